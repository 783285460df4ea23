"""Chat templates: conversations as the text that a checkpoint was trained on. No torch.

A template is Jinja code that comes with the tokenizer, and foreign code: it is rendered in a
sandbox, in bounded time and size (`core.checkpoint.chat_sandbox`). The text is that of
transformers' ``apply_chat_template``, which the tests compare.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from core import outside
from core.checkpoint.tensors import read_config
from core.errors import CheckpointError, DataError, OptionError

CHOICES = ("auto", "on", "off")
HELP = (
    "Write chat and instruction rows with the tokenizer's own chat template: on, off (their parts, "
    "a line each), or auto (on if the tokenizer has one). Plain text stays as it is."
)
"""Of ``--chat-template``, for text that is calibrated on."""
FILE = "chat_template.jinja"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
STAND_IN = "\ue000"
"""Takes the place of an answer to find it in the rendered text; a code point without a meaning."""
PLAIN = """\
{%- for message in messages -%}
{{ message['role'].capitalize() + ': ' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '\\n' }}
{%- endif -%}
{%- endfor -%}
{{ 'Assistant: ' if add_generation_prompt else '' }}"""
"""The layout of conversations for tokenizers without a template: a line ``User: ...`` for each
message, and the end token after each answer."""

Messages = Sequence[Mapping[str, str]]
Span = tuple[int, int]
"""The first character, and the one after the last."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where the assistant's answers are in it."""

    text: str
    answers: tuple[Span, ...]
    """What the model writes in each of the assistant's turns, with the token that ends it."""


class ChatTemplate:
    """A chat template with the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Take Jinja code, and special tokens by their role (``bos_token``, ``eos_token``, ...).

        Raises `CheckpointError` if the code is not a template.
        """
        from core.checkpoint import chat_sandbox

        self.source, self.tokens = source, dict(tokens)
        self._template = chat_sandbox.compiled(source)

    @property
    def marked(self) -> bool:
        """Whether the template marks the answers: ``{% generation %}`` ... ``{% endgeneration %}``.

        Without marks they are located by difference (`answers_by_difference`).
        """
        from core.checkpoint import chat_sandbox

        return chat_sandbox.MARK.search(self.source) is not None

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """Return a conversation as text; with ``prompt``, the start of the next answer follows.

        Raises `DataError` with the template's reason if it does not accept the conversation.
        """
        return self._render(messages, prompt)[0]

    def _render(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        from core.checkpoint import chat_sandbox

        try:
            return chat_sandbox.render(
                self._template,
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
                **self.tokens,
            )
        except Exception as error:  # whatever foreign code does wrong
            reason = outside.brief(str(error) or type(error).__name__, 200).rstrip(".")
            raise DataError(
                f"The chat template does not accept this conversation: {reason}.",
                "Give conversations as the template expects them, or train without it.",
            ) from error

    def answers(self, messages: Messages) -> Rendered:
        """Return a conversation as text with the answers in it.

        Raises `DataError` with the template's reason if it does not accept the conversation.
        """
        if not self.marked:
            return self.answers_by_difference(messages)
        text, spans = self._render(messages)
        return Rendered(text, tuple(span for span in spans if span[0] < span[1]))

    def answers_by_difference(self, messages: Messages) -> Rendered:
        """Return what `answers` does, from differences between renderings.

        An answer is the part of the text that changes with the message's content. What the template
        puts before it, e.g. an empty thinking block, does not belong to it, unless that is part of
        the content; spaces that follow the prompt do, and so does what ends the turn, up to the
        last character that is not a space.
        """
        whole = self.render(messages)
        found = []
        for at, message in enumerate(messages):
            if message["role"] == "assistant" and message["content"].strip():
                span = self._answer(messages, at, whole)
                found += [span] if span[0] < span[1] else []
        return Rendered(whole, tuple(found))

    def _answer(self, messages: Messages, at: int, whole: str) -> Span:
        start, end = self._content(messages, at, whole)
        content = messages[at]["content"]
        with suppress(DataError):  # of a part of the conversation, which need not be acceptable
            before = self.render(messages[:at], prompt=True)
            between = whole[len(before) : start]
            if whole.startswith(before) and len(before) <= start and between.strip() in content:
                start = len(before)
        if at == len(messages) - 1:
            return start, len(whole.rstrip()) if whole[end:].strip() else end
        with suppress(DataError):
            part = self.render(messages[: at + 1])
            tail = part[self._content(messages[: at + 1], at, part)[1] :].rstrip()
            end += len(os.path.commonprefix([tail, whole[end:]]))
        return start, end

    def _content(self, messages: Messages, at: int, whole: str) -> Span:
        """Return the part of ``whole`` that changes with the content of message ``at``."""
        other = [*messages[:at], {**messages[at], "content": STAND_IN}, *messages[at + 1 :]]
        changed = self.render(other)
        start = len(os.path.commonprefix([whole, changed]))
        rest = min(len(whole), len(changed)) - start
        after = os.path.commonprefix([whole[::-1][:rest], changed[::-1][:rest]])
        return start, len(whole) - len(after)


def plain(tokens: Mapping[str, str]) -> ChatTemplate:
    """Return the documented layout for a tokenizer without a template."""
    return ChatTemplate(PLAIN, {"eos_token": "", **tokens})


def read(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a folder's tokenizer, None if it has none.

    Raises `CheckpointError` if its files cannot be read.
    """
    source = source_of(folder)
    return ChatTemplate(source, special_tokens(folder)) if source else None


def source_of(folder: Path) -> str:
    """Return the Jinja code of a folder's chat template, empty without one.

    As transformers does, a file of its own comes before the tokenizer's settings, and of several
    templates the one named ``default`` counts.
    """
    if outside.is_file(folder / FILE):
        try:
            return outside.text(folder / FILE)
        except (outside.Malformed, OSError) as error:
            raise CheckpointError(
                f"Cannot read {folder / FILE}: {error}.", "Copy it from the model it belongs to."
            ) from error
    settings = folder / "tokenizer_config.json"
    found = read_config(settings).get("chat_template") if outside.is_file(settings) else None
    if isinstance(found, list):
        named = (each for each in found if isinstance(each, dict))
        found = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return found if isinstance(found, str) else ""


def has_template(folder: Path | None) -> bool:
    """Whether the tokenizer in ``folder`` has a chat template; False if that cannot be read.

    Files are read once for each state of them: pages ask whenever they are drawn.
    """
    if folder is None:
        return False
    states = tuple(_state(folder / name) for name in (FILE, "tokenizer_config.json"))
    return any(states) and _has_template(folder, states)


@lru_cache(maxsize=256)
def _has_template(folder: Path, _: tuple[tuple[int, int] | None, ...]) -> bool:
    with suppress(CheckpointError, OSError):
        return bool(source_of(folder))
    return False


def _state(path: Path) -> tuple[int, int] | None:
    """Return a file's modification time and size, None if there is none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the tokenizer's special tokens by their role, e.g. ``eos_token``."""
    found: dict[str, str] = {}
    for name in SETTINGS:
        if outside.is_file(folder / name):
            for role, token in read_config(folder / name).items():
                token = token.get("content") if isinstance(token, dict) else token
                if role.endswith("_token") and isinstance(token, str):
                    found[role] = token
    return found


def for_text(choice: str, tokenizer: Any) -> ChatTemplate | None:
    """Return what writes chat rows to calibrate on: the tokenizer's template, None without.

    ``choice`` is one of `CHOICES`; raises `OptionError` for ``on`` if there is no template.
    """
    found = None if choice == "off" else of_tokenizer(tokenizer)
    if choice == "on" and found is None:
        raise OptionError(
            "--chat-template on: the tokenizer has no chat template.", "Use --chat-template auto."
        )
    return found


def of_tokenizer(tokenizer: Any) -> ChatTemplate | None:
    """Return the chat template of a tokenizer of transformers, None if it has none."""
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        return None
    return ChatTemplate(source, tokenizer.special_tokens_map)
