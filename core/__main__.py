"""The command line: ``python -m core COMMAND ...``. Each button on a page runs one of these.

Results that are not files are printed to standard output as JSON; progress goes to standard
error. Exit status: 0 done, 2 bad input, 1 failed, 130 cancelled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any, NoReturn

from core import __version__, commands, noise
from core.errors import DepthcutError, OptionError
from core.runs import processes
from core.runs.spec import add_arguments, from_namespace


class _Parser(argparse.ArgumentParser):
    """A parser that raises `OptionError`: one sentence, exit status 2."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message[0].upper()}{message[1:]}.", f"See: {self.prog} --help.")


def _overview() -> str:
    width = max(map(len, commands.COMMANDS))
    lines = [f"  {c.name:<{width}}  {c.help}" for c in commands.COMMANDS.values()]
    return (
        f"depthcut {__version__}: depth pruning of language models\n\n"
        "usage: python -m core COMMAND [options]\n\n" + "\n".join(lines) + "\n\n"
        "python -m core COMMAND --help shows a command's options."
    )


def _parser(command: commands.Command) -> argparse.ArgumentParser:
    spec_class = command.spec_class
    usage_name = f"python -m core {command.name}"
    parser = _Parser(prog=usage_name, description=command.help, allow_abbrev=False)
    add_arguments(parser, spec_class)
    names = {f.name for f in dataclasses.fields(spec_class)}
    if "out" in names and "overwrite" not in names:
        parser.add_argument(
            "--overwrite",
            action="store_true",
            help="Replace a finished run's results in --out.",
        )
    if command.goes_elsewhere:
        parser.add_argument("--on", metavar="PLACE", help="Where to run: a place of places.yaml.")
        parser.add_argument("--gpus", type=int, help="GPUs of the job, with --on.")
        parser.add_argument(
            "--nodes", type=int, help="Nodes of the job, which share --processes, with --on."
        )
        parser.add_argument("--time", help="Time limit of the job, with --on.")
        parser.add_argument(
            "--detach", action="store_true", help="Return when the run has been handed over."
        )
    parser.add_argument("--workspace", help="Folder of the runs. Default: workspace.")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse flags and positional arguments in any order."""
    if "--" in argv:
        return parser.parse_args(argv)
    try:
        return parser.parse_intermixed_args(argv)
    except OptionError as error:
        if "are required" in error.message:  # lists missing flags only; parse_args lists all
            parser.parse_args(argv)
        raise


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    command = commands.get(argv[0])
    namespace = _parse(_parser(command), argv[1:])
    if namespace.workspace:
        os.environ["DEPTHCUT_WORKSPACE"] = namespace.workspace
    spec = from_namespace(command.spec_class, namespace)
    if getattr(spec, "dry_run", False):
        _print_json(_with_device(command, spec, command.load().dry_run(spec)))
        return 0
    if not command.is_run:
        _print_json(command.load().run(spec))
        return 0
    module = command.load()
    on = _asked_place(command, namespace)
    if hasattr(module, "names_file") and module.names_file(spec):
        if on:
            raise OptionError("--on needs a folder as --out, not a file.", "Give a folder.")
        _print_json(module.write_file(spec))
        return 0
    if getattr(spec, "out", None) == "":  # only for commands whose --out has a default
        from core.runs.workspace import Workspace

        spec = dataclasses.replace(spec, out=str(Workspace().new_dir(command.name)))
    if on:
        from core.places import foreground

        replace = bool(getattr(namespace, "overwrite", False))
        return foreground.execute(command, spec, on, overwrite=replace, detach=namespace.detach)
    from core.runs import ranks
    from core.runs.run import execute

    if getattr(spec, "processes", 1) > 1:  # too few GPUs: before anything is written
        ranks.places(spec.device, spec.processes)
    return execute(command, spec, overwrite=bool(getattr(namespace, "overwrite", False)))


def _asked_place(command: commands.Command, namespace: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line asks of another place; nothing if the run stays here."""
    if not command.goes_elsewhere:
        return {}
    asked = {key: getattr(namespace, key) for key in ("gpus", "nodes", "time")}
    more = [f"--{key}" for key, value in asked.items() if value is not None]
    more += ["--detach"] if namespace.detach else []
    if more and not namespace.on:
        raise OptionError(f"{more[0]} is for runs at another place.", "Add --on PLACE.")
    asked = {key: value for key, value in asked.items() if value}
    return {"place": namespace.on, **asked} if namespace.on else {}


def _with_device(command: commands.Command, spec: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Add the device that a dry run's command would compute on, and any GPU that it cannot use."""
    if not hasattr(spec, "device"):
        return found
    if command.is_light(dataclasses.asdict(spec)):
        return found
    from core.runs import devices, ranks

    size = getattr(spec, "processes", 1)
    device, *others = ranks.places(spec.device, size)
    found = {**found, "device": found.get("device") or device}
    if others:
        found["devices"] = [device, *others]
    unusable = [str(gpu) for gpu in devices.unusable()]
    if unusable and (spec.device == "auto" or device.startswith("cuda")):
        found["unusable_gpus"] = unusable
        for line in unusable:
            print(line, file=sys.stderr)
    return found


def _print_json(value: dict[str, Any] | None) -> None:
    print(json.dumps(value or {}, indent=2, default=str))


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    noise.silence()
    processes.share_cores()
    try:
        return _dispatch(sys.argv[1:] if argv is None else argv)
    except DepthcutError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from core.runs.failures import as_known

        if os.environ.get("DEPTHCUT_DEBUG"):
            raise
        known = as_known(error, "DEPTHCUT_DEBUG=1 shows the traceback.")
        print(f"Error: {known}", file=sys.stderr)
        return known.exit_status


if __name__ == "__main__":
    sys.exit(main())
