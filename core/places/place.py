"""Places as ``places.yaml`` in the workspace describes them: read strictly, written in full.

Such a file ends up in command lines and job scripts, so nothing in it is guessed: an unknown key, a
value of the wrong type, or a character that a shell or a scheduler could take for something else is
refused in one sentence that names the place and the key.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import outside
from core.errors import PlaceError
from core.runs import workspace

FILE = "places.yaml"
HERE = "this machine"
KINDS = ("ssh", "slurm")
MOST_BYTES = 256 * 1024
_FIX = "See docs/remote.md for an example."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_WORD = re.compile(r"[A-Za-z0-9][\w.:,+@%/=\[\]-]{0,199}")
"""A value in a job script's options: one word, which no shell and no scheduler splits."""
_PATH = re.compile(r"(/|~/)[^\x00-\x1f\x7f]{0,1000}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_LONGEST = 2000


def _about(text: str, **more: Any) -> Any:
    return field(default=more.pop("default", ""), metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place; the name is the key in the file."""

    name: str
    kind: str = _about("ssh or slurm.")
    host: str = _about("Machine to connect to. A slurm place without one submits from here.")
    user: str = _about("User name there. Default: that of ssh.")
    port: int = _about("Port of its SSH server. Default: that of ssh.", default=0)
    identity: str = _about("File with the private key. Default: those of ssh.")
    known_hosts: str = _about("File with the known host keys. Default: that of ssh.")
    folder: str = _about("Folder for inputs, code and runs there.")
    python: str = _about("Python 3.11 or later there, with torch and transformers.")
    modules: tuple[str, ...] = _about("Environment modules to load first.", default=())
    environment: Mapping[str, str] = field(
        default_factory=dict, metadata={"help": "Environment variables to set."}
    )
    partition: str = _about("SLURM partition.")
    account: str = _about("SLURM account.")
    qos: str = _about("SLURM quality of service.")
    constraint: str = _about("SLURM features that a node must have.")
    time: str = _about("Time limit of a job, as SLURM writes it.")
    gres: str = _about("Generic resources, e.g. gpu:a100:1.")
    gpus: int = _about("GPUs of a job.", default=0)
    nodes: int = _about("Nodes of a job. Not a setting: a run asks for it.", default=0)
    cpus: int = _about("CPUs of each task.", default=0)
    memory: str = _about("Memory of each node, e.g. 64G.")
    requeue: int = _about("How often a job may continue after its time limit.", default=0)
    at_once: int = _about(
        "How many independent steps of a recipe run at once, as one job array; 1: the whole recipe "
        "is one job. Default: all of them.",
        default=0,
    )
    signal_s: int = _about("Seconds before the time limit at which a run stops.", default=180)

    @property
    def is_remote(self) -> bool:
        """Whether the place is reached over SSH; else it shares this machine's file system."""
        return bool(self.host)

    @property
    def is_slurm(self) -> bool:
        """Whether SLURM starts the run."""
        return self.kind == "slurm"

    @property
    def address(self) -> str:
        """What ssh connects to."""
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def root(self) -> str:
        """The folder for inputs, code and runs there; ``~`` is the home folder there."""
        return self.folder or "~/depthcut"

    @property
    def text(self) -> str:
        """The place in a few words."""
        if not self.is_slurm:
            return f"{self.address} over SSH"
        asked = [f"partition {self.partition}" if self.partition else "", self.gres]
        about = ", ".join(part for part in asked if part)
        where = f"SLURM at {self.address}" if self.host else "SLURM"
        return f"{where} ({about})" if about else where

    def with_ask(self, ask: Mapping[str, Any]) -> Place:
        """Return the place with what one run asks for instead: gpus, nodes, time."""
        known = {k: v for k, v in ask.items() if k in ASKED and v}
        return checked(dataclasses.replace(self, **known)) if known else self

    def for_run(self, ask: Mapping[str, Any], spec: Mapping[str, Any]) -> Place:
        """Return the place with what one run asks for, and what its processes need of SLURM.

        Several processes (``processes`` of the run's options) get a core each, and a GPU each
        unless the run computes on the CPU: where the place, the run's ``gpus`` or its device asks
        for GPUs at all. Raises `PlaceError` if the run asks for fewer.
        """
        count = spec.get("processes") or 1
        if not self.is_slurm or type(count) is not int or count < 2:
            return self.with_ask(ask)
        asked, nodes = int(ask.get("gpus") or 0), int(ask.get("nodes") or 1)
        place = self.with_ask({**ask, "nodes": 0} if not asked else ask)
        cpus = max(place.cpus, -(-count // nodes))  # of the one task on each node
        place = dataclasses.replace(place, nodes=nodes if nodes > 1 else 0, cpus=cpus)
        device = str(spec.get("device") or "auto")
        listed = any(_is_gpu(item) for item in place.gres.split(","))
        if device == "cpu" or not (place.gpus or listed or device.startswith("cuda")):
            return checked(place)
        if 0 < asked < count:
            raise PlaceError(
                f"Place {self.name}: {count} processes take a GPU each, but --gpus {asked} asks "
                "for fewer.",
                f"Use --gpus {count}, --processes {asked}, or --device cpu.",
            )
        each = -(-(asked or max(place.gpus, count)) // nodes)
        if not listed:
            return checked(dataclasses.replace(place, gpus=each * nodes))
        # both would have to agree: the list names the kind, so the number goes there
        gres = ",".join(_counted(i, each) if _is_gpu(i) else i for i in place.gres.split(","))
        return checked(dataclasses.replace(place, gres=gres, gpus=0))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, without the name."""
        values = dataclasses.asdict(self)
        return {
            f.name: list(v) if isinstance(v := values[f.name], tuple) else v
            for f in dataclasses.fields(self)
            if f.name != "name" and values[f.name] != f.default and values[f.name]
        }


def _is_gpu(item: str) -> bool:
    """Whether an item of a list of generic resources is of GPUs, e.g. gpu:a100:2."""
    return item.split(":")[0].removeprefix("gres/") == "gpu"


def _counted(item: str, count: int) -> str:
    """Return an item of a list of generic resources with ``count`` of them."""
    name, dot, last = item.rpartition(":")
    return f"{name if dot and last.isdigit() else item}:{count}"


ASKED = ("gpus", "nodes", "time")
"""What a single run may ask for in another way than its place does."""
_FIELDS = {f.name: f for f in dataclasses.fields(Place) if f.name not in ("name", "nodes")}
_WORDS = ("partition", "account", "qos", "constraint", "time", "gres", "memory")
_PATHS = ("identity", "known_hosts", "folder")
_ONLY_SLURM = (*_WORDS, "gpus", "nodes", "cpus", "requeue", "at_once")


def checked(place: Place) -> Place:
    """Return ``place``; raises `PlaceError` if it cannot be one."""
    name = place.name
    if not _NAME.fullmatch(name) or name in (HERE, "here", "none"):
        raise PlaceError(
            f"'{outside.brief(name)}' cannot be the name of a place.",
            "Use up to 40 letters, digits, dots and dashes.",
        )
    if place.kind not in KINDS:
        raise PlaceError(
            f"Place {name}: unknown kind '{outside.brief(place.kind)}'.",
            f"Choose from: {', '.join(KINDS)}.",
        )
    if place.kind == "ssh" and not place.host:
        raise PlaceError(f"Place {name}: host is missing.", "Name the machine to connect to.")
    for key in ("host", "user", *_WORDS):
        value = getattr(place, key)
        if value and not _WORD.fullmatch(value):
            raise _bad(name, key, value, "It must be one word.")
    for key in _PATHS:
        value = getattr(place, key)
        if value and not _PATH.fullmatch(value):
            raise _bad(name, key, value, "Give a path that begins with / or ~/.")
    if place.python and not (_PATH.fullmatch(place.python) or _WORD.fullmatch(place.python)):
        raise _bad(name, "python", place.python, "Give a path, or the name of a program.")
    for module in place.modules:
        if not _WORD.fullmatch(module):
            raise _bad(name, "modules", module, "Each must be one word.")
    for key, value in place.environment.items():
        if not _VARIABLE.fullmatch(key):
            raise _bad(name, "environment", key, "Use letters, digits and underscores.")
        if len(value) > _LONGEST or any(ord(c) < 32 or ord(c) == 127 for c in value):
            raise _bad(name, f"environment: {key}", value, "Give one line of text.")
    for key, high in (
        *(("port", 65535), ("gpus", 4096), ("nodes", 4096), ("cpus", 4096)),
        *(("requeue", 1000), ("at_once", 4096), ("signal_s", 65535)),
    ):
        if not 0 <= getattr(place, key) <= high:
            raise _bad(name, key, getattr(place, key), f"Give a number from 0 to {high:,}.")
    foreign = [k for k in _ONLY_SLURM if place.kind != "slurm" and getattr(place, k)]
    if foreign:
        raise PlaceError(f"Place {name}: {foreign[0]} is for SLURM.", "Remove it.")
    if place.nodes > 1 and place.gpus % place.nodes:
        raise PlaceError(
            f"Place {name}: {place.gpus} GPUs cannot be split evenly among {place.nodes} nodes.",
            "Change --gpus or --nodes.",
        )
    return place


def _bad(name: str, key: str, value: object, hint: str) -> PlaceError:
    return PlaceError(f"Place {name}: {key}: invalid value '{outside.brief(value)}'.", hint)


def from_dict(name: str, values: Any) -> Place:
    """Return a place from a mapping of its file; raises `PlaceError`."""
    if not isinstance(values, dict):
        raise PlaceError(f"Place {outside.brief(name)} is not a list of settings.", _FIX)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in _FIELDS:
            raise PlaceError(
                f"Place {outside.brief(name)}: unknown setting '{outside.brief(key)}'.",
                f"Settings: {', '.join(_FIELDS)}.",
            )
        found[key] = _typed(name, key, value)
    return checked(Place(name=name, **found))


def _typed(name: str, key: str, value: Any) -> Any:
    default = _FIELDS[key].default
    if key == "environment":
        if isinstance(value, dict) and all(isinstance(k, str) for k in value):
            plain = {k: v for k, v in value.items() if isinstance(v, str | int | float)}
            if len(plain) == len(value) and not any(isinstance(v, bool) for v in value.values()):
                return {k: str(v) for k, v in plain.items()}
        raise _bad(name, key, value, "Give variables with their values; put words in quotes.")
    if key == "modules":
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise _bad(name, key, value, "Give a list of names.")
    if isinstance(default, int):
        if type(value) is int:
            return value
        raise _bad(name, key, value, "Expected a whole number.")
    if isinstance(value, str):
        return value.strip()
    if key == "time" and type(value) is int:
        raise _bad(name, key, value, 'Put the time in quotes, e.g. "04:00:00".')
    raise _bad(name, key, value, "Expected text.")


def file_of(root: Path | None = None) -> Path:
    """Return the path of a workspace's file of places."""
    return (root or workspace.default_root()) / FILE


def read(root: Path | None = None) -> dict[str, Place]:
    """Return the places of a workspace by name; none if it has no such file.

    Raises `PlaceError` for a file that cannot be read in full.
    """
    path = file_of(root)
    if not outside.exists(path):
        return {}
    import yaml

    try:
        value = yaml.safe_load(outside.text(path, MOST_BYTES))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise PlaceError(f"{path} is not valid YAML{line}: {reason}.", _FIX) from None
    except OSError as error:
        raise PlaceError(f"Cannot read {path}: {error.strerror}.", "Check its mode.") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise PlaceError(f"{path} does not list places by name.", _FIX)
    return {name: from_dict(name, values) for name, values in value.items()}


def find(name: str, root: Path | None = None) -> Place:
    """Return a place by name; raises `PlaceError` with the known names."""
    found = read(root)
    if name not in found:
        known = f"Places: {', '.join(found)}." if found else f"Describe it in {file_of(root)}."
        raise PlaceError(f"Unknown place '{outside.brief(name)}'.", known)
    return found[name]


def save(places: Mapping[str, Place], root: Path | None = None) -> None:
    """Write a workspace's places; raises `OutputError` if that is impossible."""
    import yaml

    values = {name: checked(place).to_dict() for name, place in places.items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True) if values else ""
    workspace.write_text(file_of(root), text)
