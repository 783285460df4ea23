"""``python -m core places``: list the places that runs can go to, and test one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from core.errors import OptionError
from core.places import check
from core.places import place as place_file
from core.runs.spec import option

ACTIONS = ("list", "test")


@dataclass(frozen=True, kw_only=True)
class PlacesSpec:
    """List the places that runs can go to besides this machine, and test one."""

    action: str = option("list", positional=True, help="What to do.", choices=ACTIONS)
    name: str = option("", positional=True, help="Place to test.")


def run(spec: PlacesSpec) -> dict[str, Any]:
    """Perform ``spec.action``; raises `PlaceError` or `Unreachable` with what is wrong."""
    if spec.action == "list":
        found = place_file.read()
        return {
            "file": str(place_file.file_of()),
            "places": [{"name": name, **place.to_dict()} for name, place in found.items()],
        }
    if not spec.name:
        raise OptionError("places test needs a place.", "List them with: python -m core places.")
    report = check.test(place_file.find(spec.name))
    return {**dataclasses.asdict(report), "found": report.lines}
