"""One frozen dataclass per command: command line, widgets and saved spec derive from it.

A field is declared once::

    @dataclass(frozen=True)
    class PruneSpec:
        checkpoint: str = option(positional=True, help="Folder, Hub id, or demo.")
        drop: tuple[int, ...] = option((), help="Blocks to remove, e.g. 3,5 or 4-8.")

and ``--drop 3,5`` on the command line, the label and help text of the widget, and the saved
``spec.json`` all derive from it. Supported types: str, int, float, bool, their ``| None`` forms,
``tuple[str, ...]``, ``tuple[int, ...]`` and ``tuple[float, ...]``; tuple items are separated by
commas, integers can also be ranges (``1-8``). ``repeat=True`` makes a tuple out of a repeated flag.
``none`` on the command line means None for a field that may be None but is not by default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import numbers
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from core import outside
from core.errors import OptionError

_MISSING = dataclasses.MISSING
_MOST_NUMBERS = 100_000
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


class Spec(Protocol):
    """The options of any command: a frozen dataclass whose fields are made by `option`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


class RunSpec(Spec, Protocol):
    """The options of a command that works in a run directory."""

    @property
    def out(self) -> str:
        """The run directory."""


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


def kind_of(kind: Any) -> tuple[type, bool, bool]:
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
                f"{flag}: '{outside.brief(part)}' is not a whole number or a range.",
                "Use 3,5 or 1-8.",
            ) from None
        if high < low:
            raise OptionError(
                f"{flag}: the range '{part}' is reversed.", f"Did you mean {high}-{low}?"
            )
        if high - low >= _MOST_NUMBERS:
            raise OptionError(
                f"{flag}: the range '{part}' is too long.",
                f"A range may have up to {_MOST_NUMBERS:,} numbers.",
            )
        numbers.extend(range(low, high + 1))
        if len(numbers) > _MOST_NUMBERS:
            raise OptionError(
                f"{flag}: there are too many numbers.", f"The maximum is {_MOST_NUMBERS:,}."
            )
    return tuple(numbers)


def _scalar(text: str, kind: type, flag: str) -> Any:
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        raise _wrong_kind(text, kind, flag) from None


def parse_value(spec_class: type, name: str, text: str) -> Any:
    """Return one value of an option from ``text``, as the option's own type.

    Raises `OptionError` if it is not of that type.
    """
    kind, _, _ = kind_of(hints_of(spec_class)[name])
    if kind is not bool:
        return _scalar(text, kind, flag_of(name))
    if text.lower() not in ("true", "false"):
        raise OptionError(f"{flag_of(name)}: invalid value '{text}'.", "Expected true or false.")
    return text.lower() == "true"


def _wrong_kind(value: Any, kind: type, flag: str) -> OptionError:
    return OptionError(
        f"{flag}: invalid value '{outside.brief(value)}'.", f"Expected {_WORDS[kind]}."
    )


def _convert(text: str, kind: type, many: bool, flag: str) -> Any:
    if not many:
        return _scalar(text, kind, flag)
    if kind is int:
        return parse_numbers(text, flag)
    return tuple(_scalar(p.strip(), kind, flag) for p in text.split(",") if p.strip())


def _typed(value: Any, kind: type, flag: str) -> Any:
    """Return a value from a widget or from JSON as ``kind``; raises `OptionError` if it is not."""
    if kind is str and isinstance(value, (str, Path)):
        return str(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, numbers.Real) and not isinstance(value, bool):
        if isinstance(value, numbers.Integral):
            return kind(int(value))
        number = float(value)
        if math.isfinite(number) and (kind is float or number.is_integer()):
            return kind(number)
    raise _wrong_kind(value, kind, flag)


def _flag(name: str, meta: Any) -> str:
    """Return a field's name in messages: ``CHECKPOINT`` or ``--drop``."""
    return name.upper() if meta["positional"] else flag_of(name)


_hints: dict[type, dict[str, Any]] = {}


def hints_of(spec_class: type) -> dict[str, Any]:
    """Return the resolved field types of a spec class, which are kept."""
    if spec_class not in _hints:
        _hints[spec_class] = typing.get_type_hints(spec_class)
    return _hints[spec_class]


def add_arguments(parser: argparse.ArgumentParser, spec_class: type) -> None:
    """Add every field of ``spec_class`` to ``parser``; values stay text until `from_namespace`."""
    hints = hints_of(spec_class)
    for field in dataclasses.fields(spec_class):
        meta = field.metadata
        kind, many, _ = kind_of(hints[field.name])
        text = meta["help"] + (f" ({meta['unit']})" if meta["unit"] else "")
        if field.default not in (_MISSING, None, "", ()) and kind is not bool:
            text += f" Default: {show(field.default)}."
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
                action="store_true" if field.default is False else argparse.BooleanOptionalAction,
                required=field.default is _MISSING,
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
        kind, many, optional = kind_of(hints[field.name])
        flag = _flag(field.name, field.metadata)
        if isinstance(raw, bool):
            values[field.name] = raw
        elif optional and field.default is not None and raw == "none":
            values[field.name] = None
        elif isinstance(raw, list):
            values[field.name] = tuple(_scalar(item, kind, flag) for item in raw if item)
        else:
            values[field.name] = _convert(raw, kind, many, flag)
    return build(spec_class, values)


def build(spec_class: type, values: dict[str, Any]) -> Any:
    """Build a spec from a dictionary (widgets, spec.json), checking names, choices and bounds."""
    fields = {f.name: f for f in dataclasses.fields(spec_class)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise OptionError(
            f"Unknown option: {outside.brief(', '.join(unknown), 200)}.",
            f"Options: {', '.join(sorted(fields))}.",
        )
    absent = [n for n, f in fields.items() if f.default is _MISSING and n not in values]
    if absent:
        flags = ", ".join(_flag(name, fields[name].metadata) for name in absent)
        what, them = ("option", "it") if len(absent) == 1 else ("options", "them")
        raise OptionError(f"Missing required {what}: {flags}.", f"Add {them}.")
    hints = hints_of(spec_class)
    clean: dict[str, Any] = {}
    for name, value in values.items():
        kind, many, optional = kind_of(hints[name])
        flag = _flag(name, fields[name].metadata)
        if value is None and optional:
            clean[name] = None
        elif many:
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise OptionError(
                    f"{flag}: invalid value '{outside.brief(value)}'.", "Expected a list of values."
                )
            if hasattr(value, "__len__") and len(value) > _MOST_NUMBERS:
                raise OptionError(
                    f"{flag}: there are {len(value):,} values.",
                    f"The maximum is {_MOST_NUMBERS:,}.",
                )
            clean[name] = tuple(_typed(item, kind, flag) for item in value)
        else:
            clean[name] = _typed(value, kind, flag)
    spec = spec_class(**clean)
    for name, field in fields.items():
        _check(name, getattr(spec, name), field.metadata)
    return spec


def _check(name: str, value: Any, meta: Any) -> None:
    flag = _flag(name, meta)
    one_by_one = meta["positional"] or meta["repeat"]
    for item in value if isinstance(value, tuple) else (value,):
        if item is None:
            continue
        if isinstance(value, tuple) and isinstance(item, str) and not one_by_one and "," in item:
            raise OptionError(f"{flag}: '{item}' contains a comma.", "Commas separate the values.")
        if meta["choices"] and item not in meta["choices"]:
            known = ", ".join(meta["choices"])
            raise OptionError(
                f"{flag}: unknown value '{outside.brief(item)}'.", f"Choose from: {known}."
            )
        if meta["low"] is not None and item < meta["low"]:
            raise OptionError(f"{flag}: {item} is too small.", f"The minimum is {meta['low']}.")
        if meta["high"] is not None and item > meta["high"]:
            raise OptionError(f"{flag}: {item} is too large.", f"The maximum is {meta['high']}.")


def to_dict(spec: Spec) -> dict[str, Any]:
    """Return the spec as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def show(value: Any) -> str:
    """Format a value as it is written on the command line."""
    return ",".join(str(v) for v in value) if isinstance(value, tuple) else str(value)


def to_arguments(spec: Spec) -> list[str]:
    """Return the command-line arguments that produce this spec, without defaults."""
    hints = hints_of(type(spec))
    positional: list[str] = []
    flags: list[str] = []
    fields = dataclasses.fields(spec)
    last = max(
        (
            place
            for place, field in enumerate(fields)
            if field.metadata["positional"] and getattr(spec, field.name) != field.default
        ),
        default=-1,
    )
    for place, field in enumerate(fields):
        value = getattr(spec, field.name)
        kind, _, _ = kind_of(hints[field.name])
        if field.metadata["positional"]:
            if place <= last and value is not None:
                positional += [str(v) for v in (value if isinstance(value, tuple) else (value,))]
            continue
        if value == field.default:
            continue
        if kind is bool and value is not None:
            no = "--no-" + field.name.replace("_", "-")
            flags.append(flag_of(field.name) if value else no)
        elif field.metadata["repeat"] and value:
            for item in value:
                flags += _with_value(flag_of(field.name), str(item))
        else:
            flags += _with_value(flag_of(field.name), "none" if value is None else show(value))
    if any(text.startswith("-") for text in positional):
        return [*flags, "--", *positional]
    return positional + flags


def _with_value(flag: str, text: str) -> list[str]:
    """Return a flag and its value, joined if the value would otherwise parse as a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Device and precision, inherited by the spec of every computing command."""

    device: str = option("auto", help="auto, cpu, cuda, cuda:1 or mps.", group="device")
    dtype: str = option(
        "auto",
        help="Precision of weights and activations; auto keeps the checkpoint's if possible.",
        choices=("auto", "float32", "bfloat16", "float16"),
        group="device",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryOptions(DeviceOptions):
    """Device, precision and memory, inherited by commands that can read a model block by block."""

    memory_limit: float | None = option(
        None,
        help="Memory that the run may take, in GiB: of the process on a CPU, of the device on a "
        "GPU. A model that does not fit is read block by block while it computes. Default: what "
        "is free, less a tenth.",
        low=0.01,
        high=1_000_000,
        unit="GiB",
        group="device",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions(DeviceOptions):
    """Device, precision and processes, inherited by commands whose work several can share."""

    processes: int = option(
        1,
        help="Processes that share the work, for machines with several GPUs: each takes a GPU and "
        "a part of the rows. On a CPU only for testing, since one process uses all cores.",
        low=1,
        high=64,
        group="device",
    )


Runner = Callable[..., "dict[str, Any] | None"]
