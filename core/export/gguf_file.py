"""Write a checkpoint as one GGUF file, straight from its safetensors.

The file gets a temporary name in the folder of its target and is renamed once it is complete and
on disk, so that an export that was killed, cancelled or ran out of space never looks finished.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside, words
from core.checkpoint import locate, quantized
from core.checkpoint.locate import Checkpoint
from core.checkpoint.tensors import TensorIndex, read_config
from core.errors import CheckpointError, InputError, OutputError
from core.export import layout as layouts
from core.export import vocabulary as vocabularies
from core.export.arrays import Streamed
from core.export.layout import Layout, Type
from core.export.vocabulary import Vocabulary
from core.prune.results import Pruning
from core.runs import processes, workspace
from core.runs.progress import SILENT, Progress

_SPARE_BYTES = 16 << 20
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
"""general.file_type (gguf.LlamaFileType)."""
_HEADER_BYTES = 4096
"""For the hyperparameters; what else the header holds is added up."""


@dataclass(frozen=True)
class Content:
    """All that a GGUF file will hold."""

    checkpoint: Checkpoint
    index: TensorIndex | None
    """None if there are no weights; then the file can only be described."""
    layout: Layout
    vocabulary: Vocabulary
    name: str
    description: str

    @property
    def bytes(self) -> int:
        """Size of the file, to within a few KiB."""
        header = sum(len(t.name) + 40 for t in self.layout.tensors)
        return _HEADER_BYTES + header + self.vocabulary.bytes + self.layout.tensor_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from the checkpoint, or was decided."""
        return (*self.layout.notes, *self.vocabulary.notes)


def describe(checkpoint: Checkpoint, kind: Type, *, light: bool = False) -> Content:
    """Return what the GGUF file of a checkpoint would hold.

    ``light`` reads tokenizer.json itself, without transformers, which rebuilds parts of it for some
    classes of tokenizers; that is enough to describe the file. Raises `CheckpointError` if
    llama.cpp cannot run it, with the reason.
    """
    quantized.refuse(checkpoint.name, checkpoint.info.quantization)
    index = TensorIndex.read(checkpoint.folder) if checkpoint.info.has_weights else None
    layout = layouts.plan(checkpoint.config, index, kind)
    if light and checkpoint.info.tokenizer is None:
        vocabulary = vocabularies.MISSING
    else:
        source = vocabularies.read(checkpoint.folder, light=light)
        vocabulary = vocabularies.convert(source, layout.vocab, _eos_ids(checkpoint))
    return Content(checkpoint, index, layout, vocabulary, *_names(checkpoint))


def write(
    content: Content, target: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> int:
    """Write the file ``target`` and return its size in bytes.

    Raises `OutputError` if it exists (without ``overwrite``), cannot be written or has no room;
    `NotFiniteError` for weights that are not numbers. On any error, and if ``progress`` cancels,
    nothing is left behind.
    """
    check_target(target, overwrite)
    with _temporary(target) as temporary:
        check_space(target, content.bytes)
        _write(content, temporary, progress)
        progress.check_cancel()
        size = temporary.stat().st_size
        check_target(target, overwrite)
        temporary.replace(target)
    return size


def check_target(target: Path, overwrite: bool) -> None:
    """Raise `OutputError` if ``target`` is a folder, or exists and must be kept."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder.", "Give a file to write.")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} already exists.", "Give another file, or add --overwrite.")


def check_space(target: Path, size: int) -> None:
    """Raise `OutputError` if the disk of ``target`` has no room for ``size`` bytes."""
    needed, free = size + _SPARE_BYTES, shutil.disk_usage(target.parent).free
    if needed > free:
        raise OutputError(
            f"The file needs {words.size(needed)} ({needed:,} bytes), but {target.parent} has only "
            f"{words.size(free)} free.",
            "Free up disk space, give an --out on another disk, or a smaller --type.",
        )


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``target``; the file is deleted unless it was renamed.

    Files that an earlier export of this target left when it was killed are removed.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            writer = left.name.split(".")[-3]
            if writer.isdigit() and not processes.is_alive(int(writer), None):
                left.unlink()
        temporary = workspace.temporary_beside(target)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise workspace.cannot_write(target, error) from error


def _write(content: Content, path: Path, progress: Progress) -> None:
    writer = _writer(content, path)
    total, mib, done = max(content.layout.tensor_bytes >> 20, 1), 1 << 20, 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        progress.step(min(done // mib, total), total, "MiB written")

    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert content.index is not None, "checked when the checkpoint was opened"
        entries = content.index.entries
        for tensor in content.layout.tensors:
            if tensor.source:
                entry = entries[tensor.source]
                data = Streamed(tensor, content.checkpoint.folder, entry, written)
            elif tensor.zeros:
                data = _zeros(tensor.bytes)
            else:
                data = _array(content.layout.rope_factors)
            writer.write_tensor_data(data)
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


def _zeros(count: int) -> Any:
    """Return ``count`` bytes of 0, which are weights of 0 in every type."""
    import numpy as np

    return np.zeros(count, dtype=np.uint8)


def _array(values: tuple[float, ...]) -> Any:
    import numpy as np

    return np.array(values, dtype=np.float32)


def _writer(content: Content, path: Path) -> Any:
    """Return a GGUFWriter with all keys and the description of every tensor; nothing is written."""
    import numpy as np

    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise InputError(
            f"Writing GGUF needs the library gguf: {error}.", "Install it with: pip install gguf."
        ) from error
    layout = content.layout
    writer = GGUFWriter(path, layout.architecture)
    writer.add_type("model")
    writer.add_name(content.name)
    writer.add_description(content.description)
    writer.add_file_type(_FILE_TYPES[layout.type])
    writer.add_quantization_version(2)
    for key, value in layout.values.items():
        _add(writer, f"{layout.architecture}.{key}", value)
    _add_vocabulary(writer, content.vocabulary)
    for tensor in layout.tensors:
        kind = GGMLQuantizationType[tensor.type.upper()]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind
        )
    return writer


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    prefix = "tokenizer.ggml."
    _add(writer, prefix + "model", vocabulary.model)
    _add(writer, prefix + "pre", vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.ids.items():
        _add(writer, f"{prefix}{name}_token_id", number)
    for name, value in vocabulary.flags.items():
        _add(writer, prefix + name, value)
    for name, text in vocabulary.templates.items():
        _add(writer, "tokenizer.chat_template" + (f".{name}" if name else ""), text)
    if len(vocabulary.templates) > ("" in vocabulary.templates):
        writer.add_array("tokenizer.chat_templates", [n for n in vocabulary.templates if n])


# ------------------------------------------------------------------------------------ descriptions


def file_name(checkpoint: Checkpoint, kind: Type) -> str:
    """Return the usual name of a checkpoint's GGUF file: ``SmolLM2-135M-q8_0.gguf``."""
    return f"{model_name(checkpoint)}-{kind}.gguf"


def model_name(checkpoint: Checkpoint) -> str:
    """Return a checkpoint's name without folders: that of its own one, or of the repository."""
    return "depthcut-demo" if checkpoint.name == "demo" else locate.last_part(checkpoint.name)


def _names(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the model's name and one sentence on what it is; neither has a machine's paths."""
    record = Pruning.read(checkpoint.folder)
    name = model_name(checkpoint)
    if record is None or not record.base_model:
        return name, ""
    base = locate.last_part(record.base_model)
    if record.method == "depth":
        cut = f"{len(record.original_blocks)} blocks left"
    else:
        cut = f"narrower by {record.method}"
    left = f"{record.parameters_after:,} parameters" if record.parameters_after else ""
    return name, f"{base}, pruned by Depthcut: {cut}{f', {left}' if left else ''}"


def _eos_ids(checkpoint: Checkpoint) -> list[int]:
    """Return the ids that end a text: the generation config's, otherwise the config's."""
    found: Any = None
    if outside.is_file(checkpoint.folder / "generation_config.json"):
        with contextlib.suppress(CheckpointError):
            found = read_config(checkpoint.folder / "generation_config.json").get("eos_token_id")
    if found is None:
        found = checkpoint.config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return [i for i in ids if isinstance(i, int) and not isinstance(i, bool)]
