"""``python -m core export CHECKPOINT --format gguf --out FILE``: a variant for another program."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import outside
from core.checkpoint import locate
from core.checkpoint.locate import Checkpoint
from core.export import gguf_file
from core.export.layout import TYPES, Type, default_type
from core.export.results import Export
from core.runs.progress import Progress, StderrProgress
from core.runs.spec import option

if TYPE_CHECKING:
    from core.runs.run import Run

FORMATS = ("gguf",)
SUFFIXES = {"gguf": (".gguf",)}
"""A name that ends so in --out is the file to write; any other is a run directory."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """Write a checkpoint as GGUF, for llama.cpp and Ollama."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, or demo.")
    format: str = option(
        help="gguf for llama.cpp and Ollama.",
        choices=FORMATS,
    )
    type: str = option(
        "auto",
        help="gguf: precision of the matrices. auto is bf16 for bfloat16 weights, otherwise f16.",
        choices=("auto", *TYPES),
    )
    out: str = option(
        "",
        help="File to write (.gguf), or a run directory. Default: a run in the workspace.",
    )
    overwrite: bool = option(False, help="Replace a file that exists.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def run(spec: ExportSpec, run: Run) -> dict[str, Any]:
    """Export into the run directory, which the runner has already checked."""
    checkpoint = _open(spec, run.progress)
    target = run.path(_file_name(spec, checkpoint))
    run.note(target.name)
    result = _export(replace(spec, overwrite=True), checkpoint, target, run.progress)
    result = replace(result, file=target.name if result.file else None)
    result.write(run)
    return result.shown()


def names_file(spec: ExportSpec) -> bool:
    """Whether --out names the file to write itself, so that no run directory is kept."""
    path = outside.path_of(spec.out)
    return path.suffix.lower() in SUFFIXES.get(spec.format, ()) and not path.is_dir()


def write_file(spec: ExportSpec) -> dict[str, Any]:
    """Export to the file that --out names, in the foreground, without a run directory."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the rest is cleaned up
    try:
        target, progress = outside.path_of(spec.out), StderrProgress()
        gguf_file.check_target(target, spec.overwrite)
        return _export(spec, _open(spec, progress), target, progress).shown()
    finally:
        signal.signal(signal.SIGTERM, before)


def dry_run(spec: ExportSpec) -> dict[str, Any]:
    """Return what would be written: architecture, bytes, and what a user should know."""
    checkpoint = _open(spec, StderrProgress())
    content = gguf_file.describe(checkpoint, _type(spec, checkpoint), light=True)
    target = outside.path_of(spec.out)
    if not names_file(spec):
        target = target / _file_name(spec, checkpoint)
    result = _gguf_result(content, str(target) if spec.out else target.name, content.bytes)
    return {**result.shown(), "dry_run": True, "converted": _converted(content)}


def _open(spec: ExportSpec, progress: Progress) -> Checkpoint:
    return locate.open(spec.checkpoint, progress)


def _type(spec: ExportSpec, checkpoint: Checkpoint) -> Type:
    if spec.type == "auto":
        return default_type(checkpoint.info.dtype)
    return spec.type  # type: ignore[return-value]  # checked by the spec's choices


def _file_name(spec: ExportSpec, checkpoint: Checkpoint) -> str:
    return gguf_file.file_name(checkpoint, _type(spec, checkpoint))


def _export(spec: ExportSpec, checkpoint: Checkpoint, target: Path, progress: Progress) -> Export:
    content = gguf_file.describe(checkpoint, _type(spec, checkpoint))
    for note in content.notes:
        progress.log(note)
    size = gguf_file.write(content, target, overwrite=spec.overwrite, progress=progress)
    return _gguf_result(content, str(target), size)


def _gguf_result(content: gguf_file.Content, file: str, size: int) -> Export:
    return Export(
        checkpoint=content.checkpoint.name,
        format="gguf",
        type=content.layout.type,
        architecture=content.layout.architecture,
        why_deci=content.layout.why_deci,
        file=file,
        bytes=size,
        notes=content.notes,
    )


def _converted(content: gguf_file.Content) -> dict[str, Any]:
    """Return how many tensors get which type, and how the tokenizer is stored."""
    kinds: dict[str, int] = {}
    for tensor in content.layout.tensors:
        kinds[tensor.type] = kinds.get(tensor.type, 0) + 1
    vocabulary = content.vocabulary
    return {
        "from": content.checkpoint.info.dtype,
        "tensors": kinds,
        "reordered": sum(t.heads > 0 for t in content.layout.tensors),
        "tokens": len(vocabulary.tokens),
        "tokenizer": vocabulary.model,
        "pre_tokenizer": vocabulary.pre,
        **vocabulary.flags,
        "chat_template": bool(vocabulary.templates),
    }
