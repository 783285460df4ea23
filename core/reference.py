"""Print docs/command-line.md, generated from the specs: ``python -m core.reference``."""

from __future__ import annotations

import dataclasses
from typing import Any

from core import commands
from core.runs.spec import flag_of, hints_of, kind_of, show

_KINDS = {int: "whole number", float: "number", str: "text", bool: "switch"}

_HEAD = """\
# Command line

```
python -m core COMMAND [options]
```

This page is generated from the commands' own options, with
`python -m core.reference > docs/command-line.md`; a test keeps it up to date.
`python -m core COMMAND --help` shows the same options.

**Output.** Commands that work in a run directory (`--out`) write plain files there; the program's
bookkeeping is in its `.run/` folder. With `--overwrite` they replace the results of a finished run
in `--out`; without it, they refuse a folder that is not empty. A run that failed, was cancelled or
was lost can simply be started again. The other commands, and every `--dry-run`, print JSON to
standard output. Progress and messages go to standard error.

**Exit status.** 0 done, 2 bad input (one sentence states the problem and how to fix it), 1 failed,
130 cancelled.

**Values.** Lists are separated by commas (`--metrics ppl,taylor`); whole numbers can also be given
as ranges (`--drop 3,5-8`). A value that begins with a dash is joined to its flag (`--out=-x`).

**Every command.** `--workspace DIR` is the folder of the runs (default: `$DEPTHCUT_WORKSPACE`,
otherwise `workspace/`). `$DEPTHCUT_LOCK_DIR` is the folder of the device locks (default: one per
user in `/tmp`). `DEPTHCUT_DEBUG=1` shows the traceback of an unexpected error. A Hub that sends
less than 64 KiB in `DEPTHCUT_HUB_TIMEOUT` seconds (default: 60) is given up.

**Another place.** A command with a run directory takes `--on PLACE` (all but `live`): a place of
`places.yaml` in the workspace, reached over SSH or through SLURM ([remote.md](remote.md)). The
command follows the run until it ends; `--detach` returns when the run has been handed over. For a
SLURM place, `--gpus` and `--time` replace what the place says; `--nodes` is
for runs with `--processes`, which are spread over the nodes.

| command | what it does | device | output |
| --- | --- | --- | --- |
"""


def markdown() -> str:
    """Return the whole reference as Markdown."""
    rows = [
        f"| [{c.name}](#{c.name}) | {c.help} | {_device(c)} | "
        f"{'a run directory' if c.is_run else 'JSON'} |\n"
        for c in commands.COMMANDS.values()
    ]
    return _HEAD + "".join(rows) + "".join(_section(c) for c in commands.COMMANDS.values())


def _device(command: commands.Command) -> str:
    if command.computes_if:
        return f"with `{flag_of(command.computes_if)}`"
    return "holds it" if command.computes else "-"


def _section(command: commands.Command) -> str:
    spec_class = command.spec_class
    first = (spec_class.__doc__ or "").strip().splitlines()[0]
    lines = [f"\n## {command.name}\n\n{first}\n\n```\n{_usage(command)}\n```\n\n"]
    lines.append("| option | value | default | meaning |\n| --- | --- | --- | --- |\n")
    lines += [_row(field, hints_of(spec_class)[field.name]) for field in _fields(spec_class)]
    return "".join(lines)


def _fields(spec_class: type) -> list[dataclasses.Field[Any]]:
    """Return the fields in reading order: positional, required, then the rest by group."""
    fields = dataclasses.fields(spec_class)

    def place(field: dataclasses.Field[Any]) -> int:
        if field.metadata["positional"]:
            return 0
        if field.default is dataclasses.MISSING:
            return 1
        return 3 if field.metadata["group"] == "device" else 2

    return sorted(fields, key=place)


def _usage(command: commands.Command) -> str:
    words = [f"python -m core {command.name}"]
    hints = hints_of(command.spec_class)
    for field in _fields(command.spec_class):
        required = field.default is dataclasses.MISSING
        if field.metadata["positional"]:
            _, many, _ = kind_of(hints[field.name])
            word = field.name.upper() + (" ..." if many else "")
        elif required:
            word = f"{flag_of(field.name)} {field.name.upper()}"
        else:
            continue
        words.append(word if required else f"[{word}]")
    return " ".join([*words, "[options]"])


def _row(field: dataclasses.Field[Any], hint: Any) -> str:
    meta = field.metadata
    kind, many, optional = kind_of(hint)
    name = field.name.upper() if meta["positional"] else flag_of(field.name)
    if kind is bool and field.default is not False:
        name += f"` / `--no-{field.name.replace('_', '-')}"
    value = " \\| ".join(meta["choices"]) if meta["choices"] else _KINDS[kind]
    value += "s, separated by commas" if many and not (meta["repeat"] or meta["choices"]) else ""
    value += ", repeated" if meta["repeat"] else ""
    bounds = [f"from {meta['low']}"] if meta["low"] is not None else []
    bounds += [f"to {meta['high']}"] if meta["high"] is not None else []
    value = " ".join([value, *bounds]) + (f" ({meta['unit']})" if meta["unit"] else "")
    if field.default is dataclasses.MISSING:
        default = "required"
    elif kind is bool:
        default = "on" if field.default else "off"
    else:
        default = f"`{show(field.default)}`" if field.default not in (None, "", ()) else "-"
    text = meta["help"].replace("|", "\\|")
    return f"| `{name}` | {value} | {default} | {text} |\n"


if __name__ == "__main__":
    print(markdown(), end="")
