"""One frozen dataclass per command: command line, widgets and saved spec derive from it.

A field is declared once::

    @dataclass(frozen=True)
    class PruneSpec:
        checkpoint: str = option(positional=True, help="Folder, Hub id, or demo.")
        drop: tuple[int, ...] = option((), help="Blocks to remove, as 3,5 or 4-8.")

and from that come ``--drop 3,5`` on the command line, the label and help text of the widget, and
the saved ``spec.json``. Supported types: str, int, float, bool, their ``| None`` forms,
``tuple[str, ...]``, ``tuple[int, ...]`` and ``tuple[float, ...]``; a tuple is written with commas,
integers also as ranges (``1-8``). ``repeat=True`` makes a tuple out of a repeated flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
import typing
from collections.abc import Callable
from typing import Any

from core.errors import OptionError

_MISSING = dataclasses.MISSING


def option(
    default: Any = _MISSING,
    *,
    help: str,
    positional: bool = False,
    repeat: bool = False,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    group: str = "",
) -> Any:
    """Declare one option: default, help text, bounds (inclusive), unit and widget group."""
    metadata = {
        "help": help,
        "positional": positional,
        "repeat": repeat,
        "choices": choices,
        "low": low,
        "high": high,
        "unit": unit,
        "group": group,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """Return the command-line flag of a field: ``batch_sizes`` -> ``--batch-sizes``."""
    return "--" + name.replace("_", "-")


def _base(kind: Any) -> tuple[type, bool, bool]:
    """Split a field's type into (scalar type, is a tuple, may be None)."""
    optional = False
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        members = [m for m in typing.get_args(kind) if m is not type(None)]
        optional, kind = True, members[0]
    if typing.get_origin(kind) is tuple:
        return typing.get_args(kind)[0], True, optional
    return kind, False, optional


def parse_numbers(text: str, flag: str = "value") -> tuple[int, ...]:
    """Read ``3,5``, ``1-8`` or a mixture into integers, in the order written."""
    numbers: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise OptionError(
                f"{flag}: '{part}' is not a whole number or a range.", "Write 3,5 or 1-8."
            ) from None
        if high < low:
            raise OptionError(f"{flag}: the range '{part}' runs backwards.", "Write 1-8.")
        numbers.extend(range(low, high + 1))
    return tuple(numbers)


def _scalar(text: str, kind: type, flag: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        word = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise OptionError(f"{flag}: '{text}' is not {word}.", f"Give {flag} {word}.") from None


def _convert(text: str, kind: type, many: bool, flag: str) -> Any:
    if not many:
        return _scalar(text, kind, flag)
    if kind is int:
        return parse_numbers(text, flag)
    return tuple(_scalar(p.strip(), kind, flag) for p in text.split(",") if p.strip())


def hints_of(spec_class: type) -> dict[str, Any]:
    """Return the resolved field types of a spec class."""
    return typing.get_type_hints(spec_class)


def add_arguments(parser: argparse.ArgumentParser, spec_class: type) -> None:
    """Add every field of ``spec_class`` to ``parser``; values stay text until `from_namespace`."""
    hints = hints_of(spec_class)
    for field in dataclasses.fields(spec_class):
        meta = field.metadata
        kind, many, _ = _base(hints[field.name])
        text = meta["help"] + (f" ({meta['unit']})" if meta["unit"] else "")
        if field.default not in (_MISSING, None, "", ()) and kind is not bool:
            text += f" Default: {_show(field.default)}."
        text = text.replace("%", "%%")
        if meta["positional"]:
            required = field.default is _MISSING
            nargs: str | None = ("+" if required else "*") if many else None if required else "?"
            parser.add_argument(
                field.name, nargs=nargs, default=None, help=text, metavar=field.name.upper()
            )
        elif kind is bool:
            parser.add_argument(
                flag_of(field.name),
                dest=field.name,
                action=argparse.BooleanOptionalAction if field.default else "store_true",
                default=None,
                help=text,
            )
        else:
            parser.add_argument(
                flag_of(field.name),
                dest=field.name,
                action="append" if meta["repeat"] else "store",
                required=field.default is _MISSING,
                default=None,
                help=text,
                metavar="|".join(meta["choices"]) if meta["choices"] else field.name.upper(),
            )


def from_namespace(spec_class: type, namespace: argparse.Namespace) -> Any:
    """Build a checked spec from parsed arguments; raises `OptionError` naming flag and value."""
    hints = hints_of(spec_class)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(spec_class):
        raw = getattr(namespace, field.name, None)
        if raw is None or (raw == [] and field.metadata["positional"]):
            continue
        kind, many, _ = _base(hints[field.name])
        flag = field.name.upper() if field.metadata["positional"] else flag_of(field.name)
        if isinstance(raw, bool):
            values[field.name] = raw
        elif isinstance(raw, list):
            values[field.name] = tuple(_scalar(item, kind, flag) for item in raw)
        else:
            values[field.name] = _convert(raw, kind, many, flag)
    return build(spec_class, values)


def build(spec_class: type, values: dict[str, Any]) -> Any:
    """Build a spec from a dictionary (widgets, spec.json), checking names, choices and bounds."""
    fields = {f.name: f for f in dataclasses.fields(spec_class)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise OptionError(
            f"Unknown option {', '.join(unknown)}.", f"Known: {', '.join(sorted(fields))}."
        )
    hints = hints_of(spec_class)
    clean: dict[str, Any] = {}
    for name, value in values.items():
        _, many, _ = _base(hints[name])
        clean[name] = tuple(value) if many and value is not None else value
    spec = spec_class(**clean)
    for name, field in fields.items():
        _check(name, getattr(spec, name), field.metadata)
    return spec


def _check(name: str, value: Any, meta: Any) -> None:
    flag = name.upper() if meta["positional"] else flag_of(name)
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if meta["choices"] and item not in meta["choices"]:
            known = ", ".join(meta["choices"])
            raise OptionError(f"{flag}: '{item}' is not known.", f"Choose from: {known}.")
        if meta["low"] is not None and item < meta["low"]:
            raise OptionError(f"{flag}: {item} is too small.", f"The least is {meta['low']}.")
        if meta["high"] is not None and item > meta["high"]:
            raise OptionError(f"{flag}: {item} is too large.", f"The most is {meta['high']}.")


def to_dict(spec: Any) -> dict[str, Any]:
    """Return the spec as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def _show(value: Any) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def to_arguments(spec: Any) -> list[str]:
    """Return the command-line arguments that give this spec, defaults left out."""
    hints = hints_of(type(spec))
    positional: list[str] = []
    flags: list[str] = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        kind, many, _ = _base(hints[field.name])
        if field.metadata["positional"]:
            if value is not None:
                positional.extend(str(v) for v in value) if many else positional.append(str(value))
            continue
        if value == field.default or value is None:
            continue
        if kind is bool:
            no = "--no-" + field.name.replace("_", "-")
            flags.append(flag_of(field.name) if value else no)
        elif field.metadata["repeat"]:
            for item in value:
                flags += [flag_of(field.name), str(item)]
        else:
            flags += [flag_of(field.name), _show(value)]
    return positional + flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a computing command runs; mixed into the specs of all of them."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1 or mps.", group="device")
    dtype: str = option(
        "auto",
        help="Precision of weights and activations; auto keeps the checkpoint's where it can.",
        choices=("auto", "float32", "bfloat16", "float16"),
        group="device",
    )


Runner = Callable[..., "dict[str, Any] | None"]
