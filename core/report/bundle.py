"""A study as one zip: the report, and the folders of its runs as they are on disk."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from core.report.material import Material
from core.runs import workspace

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""Suffixes of files with weights or optimiser state."""
PASSING = ("heartbeat", "lock", "cancel")
"""Bookkeeping files that are meaningless once a run has ended."""


def files(material: Material, *, weights: bool) -> Iterator[tuple[Path, str]]:
    """Yield every file of the study's runs once, with its name in the zip."""
    seen: set[str] = set()
    steps = {r.path.resolve() for r in material.runs}
    for record in material.runs:
        for folder, inner, names in os.walk(record.path):
            here = Path(folder)
            # skip the steps inside a recipe's folder: those of this study are runs of their own
            inner[:] = sorted(
                d for d in inner
                if (here / d).resolve() not in steps and not d.endswith(".tmp")
            )  # fmt: skip
            for name in sorted(names):
                path = here / name
                target = f"{record.id}/{path.relative_to(record.path).as_posix()}"
                if name in PASSING or name.endswith(".tmp") or path.is_symlink():
                    continue
                if (weights or path.suffix not in WEIGHTS) and target not in seen:
                    seen.add(target)
                    yield path, target


def write(path: Path, material: Material, report: str, *, weights: bool = False) -> int:
    """Write the zip atomically and return the number of its files.

    Raises `OutputError` if it cannot be written.
    """
    temporary = workspace.temporary_beside(path)
    count = 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("report.html", report)
            for source, target in files(material, weights=weights):
                stored = source.suffix in WEIGHTS  # weights hardly compress
                kind = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
                archive.write(source, target, compress_type=kind)
                count += 1
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise workspace.cannot_write(path, error) from error
        raise
    return count
