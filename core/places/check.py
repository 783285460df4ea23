"""Test a place: is it reached, is Python there, do the libraries compute, would SLURM run it?"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from core import words
from core.places.agent import CHECK_S
from core.places.follow import Site
from core.places.place import Place
from core.runs import workspace


@dataclasses.dataclass(frozen=True)
class Report:
    """What a test found."""

    place: str
    host: str
    python: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    cpus: int
    free_bytes: int
    seconds: float
    slurm: str = ""
    sbatch: str = ""
    """What sbatch says of a job with the place's settings, which it was not given."""

    @property
    def lines(self) -> list[str]:
        """What was found, in sentences."""
        named = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        devices = ", ".join(self.devices) or "no GPU"
        found = [
            f"{self.host} answers: Python {self.python}, {named}.",
            f"It has {devices}, {self.cpus} CPU cores and {words.size(self.free_bytes)} of free "
            "disk space in the folder.",
        ]
        if self.slurm:
            found.append(f"{self.slurm} accepts a job like this ({self.sbatch.rstrip('.')}).")
        return found


def test(place: Place) -> Report:
    """Test a place and return what was found; nothing is started there but the test.

    Our code is copied there if it is not there yet. Raises `PlaceError` or `Unreachable` with what
    is wrong.
    """
    began = time.monotonic()
    site = Site(place)
    root = site.root or str(workspace.default_root().absolute())
    env = site.surroundings(root, root)
    found: dict[str, Any] = site.ask(
        "check", CHECK_S + 30, root=root, python=site.python, env=env,
        modules=list(place.modules), slurm=place.to_dict() if place.is_slurm else None,
    )  # fmt: skip
    return Report(
        place=place.name,
        host=str(found["host"]),
        python=str(found["python"]),
        versions={str(k): str(v) for k, v in found["versions"].items()},
        devices=tuple(map(str, found["devices"])),
        cpus=int(found["cpus"]),
        free_bytes=int(found["free_bytes"]),
        seconds=time.monotonic() - began,
        slurm=str(found.get("slurm", "")),
        sbatch=str(found.get("sbatch", "")),
    )
