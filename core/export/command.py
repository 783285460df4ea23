"""``python -m core export CHECKPOINT --format gguf --out FILE``: a variant for another program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import outside
from core.checkpoint import locate
from core.checkpoint.locate import Checkpoint
from core.errors import CheckpointError, OptionError
from core.export import gguf_file, mergekit, push
from core.export.layout import TYPES, Layout, Type, default_type
from core.export.results import Export
from core.runs import pace, workspace
from core.runs.devices import MIB
from core.runs.footprint import FILES, Footprint
from core.runs.progress import Progress, StderrProgress
from core.runs.spec import option

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo
    from core.runs.run import Run

FORMATS = ("gguf", "mergekit", "hub")
SUFFIXES = {"gguf": (".gguf",), "mergekit": (".yaml", ".yml")}
"""A name that ends so in --out is the file to write; any other is a run directory."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """Write a checkpoint as GGUF or as a mergekit recipe, or push it to the Hub."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, or demo.")
    format: str = option(
        help="gguf for llama.cpp and Ollama, mergekit for the recipe of a depth-pruned variant, "
        "hub to upload to huggingface.co.",
        choices=FORMATS,
    )
    type: str = option(
        "auto",
        help="gguf: precision of the matrices. auto is bf16 for bfloat16 weights, otherwise f16.",
        choices=("auto", *TYPES),
    )
    repo: str = option("", help="hub: repository to create or update, OWNER/NAME.")
    public: bool = option(False, help="hub: create a public repository. Default: private.")
    out: str = option(
        "",
        help="File to write (.gguf, .yaml), or a run directory. Default: a run in the workspace.",
    )
    overwrite: bool = option(False, help="Replace a file that exists.")
    dry_run: bool = option(False, help="Show what would be written without writing it.")


def check(spec: ExportSpec) -> None:
    """Raise `OptionError` for options that do not belong together."""
    if spec.format == "hub" and not spec.repo:
        raise OptionError("--format hub needs --repo, which is missing.", "Add --repo OWNER/NAME.")
    for flag, given, only in (
        ("--repo", bool(spec.repo), "hub"),
        ("--public", spec.public, "hub"),
        ("--type", spec.type != "auto", "gguf"),
    ):
        if given and spec.format != only:
            raise OptionError(
                f"{flag} is for --format {only}, not {spec.format}.", f"Leave {flag} out."
            )


def run(spec: ExportSpec, run: Run) -> dict[str, Any]:
    """Export into the run directory, which the runner has already checked."""
    checkpoint = _open(spec, run.progress)
    target = run.path(_file_name(spec, checkpoint))
    if spec.format != "hub":
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
    check(spec)
    target, progress = outside.path_of(spec.out), StderrProgress()
    gguf_file.check_target(target, spec.overwrite)
    with _stoppable():
        return _export(spec, _open(spec, progress), target, progress).shown()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that temporary files are removed (main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def dry_run(spec: ExportSpec) -> dict[str, Any]:
    """Return what would be written: architecture, bytes, and what a user should know."""
    check(spec)
    name = spec.checkpoint
    if locate.is_hub_id(name) and locate.local_folder(name) is None:
        raise CheckpointError(
            f"{name} is on the Hub; a dry run of an export reads a checkpoint on this machine.",
            f"Download it (hf download {name}) and give the folder.",
        )
    need: locate.Need = "headers" if spec.format == "gguf" else "weights"
    checkpoint = locate.open(name, StderrProgress(), need=need, need_tokenizer=False)
    target = outside.path_of(spec.out)
    if not names_file(spec):
        target = target / _file_name(spec, checkpoint)
    file = str(target) if spec.out else target.name
    if spec.format == "gguf":
        content = gguf_file.describe(checkpoint, _type(spec, checkpoint), light=True)
        result = _gguf_result(content, file, content.bytes)
        taken = footprint(checkpoint.info, content.layout)
        writing, origin = pace.writing(content.bytes)
        return {
            **result.shown(),
            "dry_run": True,
            "converted": _converted(content),
            "memory_mib": round(taken.memory_bytes / MIB, 1),
            **taken.facts(),
            "seconds": taken.convert_s + writing,
            "kind": "estimated",
            "seconds_from": origin,
        }
    if spec.format == "mergekit":
        text = mergekit.recipe(checkpoint, StderrProgress())
        result = _result(spec, checkpoint, file=file, bytes=len(text.encode()))
        return {**result.shown(), "dry_run": True, "recipe": text}
    names = [path.name for path in push.files(checkpoint)]
    result = _result(spec, checkpoint, bytes=push.size(checkpoint), private=not spec.public)
    return {**result.shown(), "dry_run": True, "repo": spec.repo, "files": names}


EXPORT_BYTES = 128 * MIB
"""What writing GGUF takes, piece by piece: 113 MiB were measured for a checkpoint of 1.3 GiB."""


def footprint(info: CheckpointInfo, layout: Layout) -> Footprint:
    """Return what writing a checkpoint as GGUF takes."""
    return Footprint(
        memory_bytes=EXPORT_BYTES,
        way=FILES,
        read_bytes=info.stored_bytes,
        written_bytes=layout.tensor_bytes,
        converted=info.parameters,
    )


def _open(spec: ExportSpec, progress: Progress) -> Checkpoint:
    return locate.open(spec.checkpoint, progress, need_tokenizer=spec.format == "gguf")


def _type(spec: ExportSpec, checkpoint: Checkpoint) -> Type:
    if spec.type == "auto":
        return default_type(checkpoint.info.dtype)
    return spec.type  # type: ignore[return-value]  # checked by the spec's choices


def _file_name(spec: ExportSpec, checkpoint: Checkpoint) -> str:
    if spec.format == "gguf":
        return gguf_file.file_name(checkpoint, _type(spec, checkpoint))
    return f"{gguf_file.model_name(checkpoint)}-mergekit.yaml"


def _export(spec: ExportSpec, checkpoint: Checkpoint, target: Path, progress: Progress) -> Export:
    if spec.format == "hub":
        url = push.push(checkpoint, spec.repo, public=spec.public, progress=progress)
        size = push.size(checkpoint)
        return _result(spec, checkpoint, url=url, private=not spec.public, bytes=size)
    if spec.format == "mergekit":
        text = mergekit.recipe(checkpoint, progress)
        workspace.write_text(target, text)
        return _result(spec, checkpoint, file=str(target), bytes=len(text.encode()))
    content = gguf_file.describe(checkpoint, _type(spec, checkpoint))
    for note in content.notes:
        progress.log(note)
    size = gguf_file.write(content, target, overwrite=spec.overwrite, progress=progress)
    return _gguf_result(content, str(target), size)


def _result(spec: ExportSpec, checkpoint: Checkpoint, **more: Any) -> Export:
    return Export(checkpoint=checkpoint.name, format=spec.format, **more)


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
