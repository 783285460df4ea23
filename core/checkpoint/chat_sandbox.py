"""Jinja's sandbox for chat templates: what transformers offers them, in bounded time and size.

The environment equals that of transformers (``transformers.utils.chat_template_utils``, which
imports torch). Its own part are the bounds: every pass of a loop, call and operation looks at the
time and at the size of its result.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from core import outside
from core.errors import CheckpointError

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Starts a part of a template that the model writes."""
RENDER_S = 10.0
"""Longest time of one rendering; usually it takes less than a millisecond."""
MOST_CHARACTERS = 1 << 24
"""Longest text that a template may build."""
HIGHEST = 1 << 20
"""Largest number that a template may pass to a function, e.g. as a width."""


class _Rendering:
    """One rendering in progress."""

    def __init__(self) -> None:
        self.deadline = time.monotonic() + RENDER_S
        self.blocks: list[str] = []
        self.length = 0
        self.marked: list[tuple[int, int]] = []

    def add(self, block: str) -> None:
        self.blocks.append(block)
        self.length = _bounded(self.length + len(block))

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes longer than {RENDER_S:.0f} s")


_NOW: ContextVar[_Rendering | None] = ContextVar("rendering", default=None)


def _bounded(length: int) -> int:
    if length > MOST_CHARACTERS:
        raise SecurityError(f"it builds more than {MOST_CHARACTERS:,} characters")
    return length


def _checked(value: Any) -> Any:
    """Return ``value``, after a look at the time and at its size."""
    if rendering := _NOW.get():
        rendering.check()
    if isinstance(value, (str, list, tuple)):
        _bounded(len(value))
    return value


def _tick() -> None:
    """Be called in every pass of a loop; the environment looks at the time."""


def _join(*parts: Any) -> str:
    return "".join(map(str, parts))


class _Bounds(NodeTransformer):
    """Adds a call to every loop and macro, and makes ``~`` a call: `_Environment` checks calls."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._ticking(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._ticking(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("_join", node.nodes)

    def _ticking(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("_tick", [])))
        return node

    @staticmethod
    def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
        return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)


class _Generation(Extension):
    """Notes which part of the text stems from ``{% generation %}`` blocks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block as a call of `_note`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = str(caller())
        if rendering := _NOW.get():
            rendering.marked.append((rendering.length, rendering.length + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Bounds().visit(super()._parse(source, name, filename))
        return tree.set_environment(self).set_lineno(1)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if any(type(each) is int and each > HIGHEST for each in (*args, *kwargs.values())):
            raise SecurityError(f"it passes a number above {HIGHEST:,} to a function")
        _checked(None)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [each for each in (left, right) if type(each) is int]
        sized = [len(each) for each in (left, right) if isinstance(each, (str, list, tuple))]
        if operator == "*" and numbers and sized:
            _bounded(numbers[0] * sized[0])
        if operator == "**" and any(abs(each) > 1000 for each in numbers):
            raise SecurityError("it raises large numbers to a power")
        if operator == "%" and isinstance(left, str) and re.search(r"\d{7}|\*", left):
            raise SecurityError("it formats with a large width")
        return _checked(super().call_binop(context, operator, left, right))


class _Dict:
    """``dict`` for templates, without its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace`` for templates, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _no_underscore(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _no_underscore(name)
        super().__setitem__(name, value)


def _no_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores the name {outside.quoted(name)} on a namespace")


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> Template:
    """Return a template; raises `CheckpointError` if the source is none."""
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _now,
        "dict": _Dict(),
        "namespace": _Namespace,
        "_tick": _tick,
        "_join": _join,
    }
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise CheckpointError(
            "The tokenizer's chat template cannot be read: "
            f"{outside.brief(str(error) or type(error).__name__, 200).rstrip('.')}.",
            "Correct it, or copy the tokenizer from the model again.",
        ) from error


@contextmanager
def _rendering() -> Iterator[_Rendering]:
    rendering = _Rendering()
    token = _NOW.set(rendering)
    try:
        yield rendering
    finally:
        _NOW.reset(token)


def render(template: Template, **values: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the spans of its ``{% generation %}`` blocks, in order.

    Raises whatever the template raises, and `jinja2.exceptions.SecurityError` beyond the bounds.
    """
    with _rendering() as rendering:
        for block in template.generate(**values):
            rendering.add(block)
    return "".join(rendering.blocks), rendering.marked
