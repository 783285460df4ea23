"""Write the checkpoint of a GGUF file: check, widen, save, look at the result, publish.

transformers reads and widens the weights (`core.importing.weights`); what it reads them into is
the config of `core.checkpoint.gguf_config`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from core.checkpoint import gguf, gguf_config, headers
from core.checkpoint.gguf import Header
from core.checkpoint.imported import Imported
from core.errors import CheckpointError
from core.importing import card, needs
from core.importing.digest import digest
from core.importing.smollm2 import Origin
from core.prune import staging
from core.runs.footprint import Footprint
from core.runs.progress import SILENT, Progress


def storage(header: Header) -> dict[str, int]:
    """Return the model's parameters by storage, the largest part first."""
    counts: Counter[str] = Counter()
    for name, tensor in header.tensors.items():
        if name != gguf_config.FREQUENCIES:  # a setting of the model, stored as a tensor
            counts[tensor.storage] += tensor.parameters
    return dict(counts.most_common())


def parameters(header: Header) -> int:
    """Return the model's parameters."""
    return sum(storage(header).values())


def needs_of(header: Header, dtype: str) -> needs.Needs:
    """Return what importing a file takes."""
    largest = max(tensor.parameters for tensor in header.tensors.values())
    return needs.of(parameters(header), largest, dtype)


def footprint_of(header: Header, dtype: str) -> Footprint:
    """Return what importing a file reads, writes and converts."""
    largest = max(tensor.parameters for tensor in header.tensors.values())
    return needs.footprint(parameters(header), largest, dtype, header.size)


def convert(
    file: Path,
    target: Path,
    *,
    dtype: str = "bfloat16",
    origin: Origin | None = None,
    progress: Progress = SILENT,
) -> Imported:
    """Write the checkpoint of a GGUF ``file`` into ``target`` and return its record.

    Raises `CheckpointError` (see `core.checkpoint.gguf.read` and ``config_of``) and `OutputError`.
    Nothing is left in ``target`` unless all of it is.
    """
    header = gguf.read(file)
    config = gguf_config.config_of(header)
    sha256 = digest(file, progress)
    from core.importing import tokenizer, weights

    with staging.partial_folder(target) as partial:
        staging.check_space(partial, needs_of(header, dtype).disk_bytes)
        notes = tokenizer.write(header, partial)
        weights.write(header, config, dtype, partial, progress)
        record = _record(header, dtype, sha256, origin or Origin(), notes)
        info = headers.inspect(partial, allow_config_only=False)
        if info.parameters != parameters(header):
            raise CheckpointError(
                f"The checkpoint of {file} has {info.parameters:,} parameters, but the file has "
                f"{parameters(header):,}.",
                "Report this file.",
            )
        headers.check_tokenizer(info)
        staging.write(partial / Imported.FILE, record.to_text())
        staging.write(partial / "README.md", card.text(record, info.parameters))
        progress.check_cancel()
        staging.publish(partial, target)
    for note in notes:
        progress.log(f"Note: {note}")
    return record


def _record(
    header: Header, dtype: str, sha256: str, origin: Origin, notes: tuple[str, ...]
) -> Imported:
    return Imported(
        file=header.path.name,
        sha256=sha256,
        bytes=header.size,
        storage=storage(header),
        quantized=header.quantized,
        architecture=header.architecture,
        title=origin.title or _text(header, "general.name"),
        license=origin.license or _text(header, "general.license"),
        origin=origin.source,
        dtype=dtype,
        notes=notes,
    )


def _text(header: Header, key: str) -> str:
    value = header.metadata.get(key)
    return " ".join(value.split())[:200] if isinstance(value, str) else ""
