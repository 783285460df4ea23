"""Which formats a checkpoint can be exported to, how large, and why not; for pages, no torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.checkpoint import headers, locate
from core.checkpoint.locate import Checkpoint
from core.errors import CheckpointError
from core.export import gguf_file, layout, mergekit, push
from core.export.layout import TYPES

KEPT = 512
"""Checkpoints in the cache."""
LABELS = {
    "gguf": "GGUF (llama.cpp, Ollama)",
    "mergekit": "mergekit recipe",
    "hub": "Hugging Face Hub",
}


@dataclass(frozen=True)
class Format:
    """One format, as far as headers and config tell."""

    name: str
    """gguf, mergekit or hub: the value of ``--format``."""
    label: str
    why_not: str = ""
    """Why this checkpoint cannot be exported so, and what to do; empty if it can."""
    bytes: dict[str, int] = field(default_factory=dict)
    """Size of the file by its type (gguf: f32, f16, bf16, q8_0); of the upload as ``all``."""
    architecture: str = ""
    """llama.cpp's architecture."""
    why_deci: str = ""
    """Why the blocks need the architecture deci; empty without."""
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What a user should know, by type; as ``all`` for other formats."""

    @property
    def possible(self) -> bool:
        """Whether the checkpoint can be exported to this format."""
        return not self.why_not


def formats(checkpoint: Checkpoint) -> tuple[Format, ...]:
    """Return every format for a checkpoint in a folder, possible or not.

    Reads config, headers and tokenizer.json only; kept until one of its files changes. A variant's
    weights are not compared with the dense checkpoint's here, so that a mergekit recipe for a
    retrained variant is refused only when it is written.
    """
    return _formats(checkpoint.folder, headers.file_state(checkpoint.folder))


@functools.lru_cache(maxsize=KEPT)
def _formats(folder: Path, state: headers.FileState) -> tuple[Format, ...]:
    try:
        checkpoint = locate.at(folder, need_weights=True)
    except CheckpointError as error:
        return tuple(Format(name, label, str(error)) for name, label in LABELS.items())
    return (_gguf(checkpoint), _mergekit(checkpoint), _hub(checkpoint))


def _gguf(checkpoint: Checkpoint) -> Format:
    try:
        one = gguf_file.describe(checkpoint, TYPES[0], light=True)
        # reading the tokenizer takes longest, and all types have the same
        layouts = {kind: layout.plan(checkpoint.config, one.index, kind) for kind in TYPES}
    except CheckpointError as error:
        return Format("gguf", LABELS["gguf"], str(error))
    found = {kind: replace(one, layout=layouts[kind]) for kind in TYPES}
    return Format(
        "gguf",
        LABELS["gguf"],
        bytes={kind: content.bytes for kind, content in found.items()},
        architecture=one.layout.architecture,
        why_deci=one.layout.why_deci,
        notes={kind: content.notes for kind, content in found.items()},
    )


def _mergekit(checkpoint: Checkpoint) -> Format:
    try:
        mergekit.recorded(checkpoint)
    except CheckpointError as error:
        return Format("mergekit", LABELS["mergekit"], str(error))
    return Format("mergekit", LABELS["mergekit"])


def _hub(checkpoint: Checkpoint) -> Format:
    return Format("hub", LABELS["hub"], bytes={"all": push.size(checkpoint)})
