"""What a checkpoint's tokenizer is, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.tensors import read_config
from core.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_info(folder: Path) -> dict[str, Any] | None:
    """Return the tokenizer's kind, file and size (highest id + 1), or None without one.

    Raises `CheckpointError` if its file is damaged.
    """
    for file in TOKENIZER_FILES:
        path = folder / file
        if not path.is_file():
            continue
        kind, ids = _token_ids(path)
        if not ids:
            raise CheckpointError(
                f"{path} is not a valid tokenizer: it has no vocabulary.",
                "Copy it from the model it belongs to.",
            )
        extra = folder / "added_tokens.json"
        if file != "tokenizer.json" and extra.is_file():
            ids += [int(i) for i in read_config(extra).values()]
        return {"kind": kind, "file": file, "size": max(ids, default=-1) + 1}
    return None


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, without transformers and torch.

    Raises `CheckpointError` if the file is not a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(
            f"Cannot read {path} as a tokenizer: {error}.",
            "Copy tokenizer.json from the model it belongs to.",
        ) from error


def _token_ids(path: Path) -> tuple[str, list[int]]:
    if path.name == "tokenizer.model":
        return "sentencepiece", list(range(_sentencepiece_size(path.read_bytes())))
    table = read_config(path)
    if path.name == "vocab.json":
        return "BPE", [int(i) for i in table.values()]
    model = table.get("model") or {}
    vocab = model.get("vocab") or {}
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
    ids += [int(token["id"]) for token in table.get("added_tokens") or []]
    return str(model.get("type") or "BPE"), ids


def _sentencepiece_size(data: bytes) -> int:
    """Count the pieces of a sentencepiece model: the repeated field 1 of its protocol buffer."""
    pieces = position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 == 2:
            length, position = _varint(data, position)
            position += length
            pieces += tag >> 3 == 1
        elif tag & 7 == 0:
            _, position = _varint(data, position)
        else:
            position += 8 if tag & 7 == 1 else 4
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data):
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    return value, position
