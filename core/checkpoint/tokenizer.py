"""What a checkpoint's tokenizer is, from its files alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core import outside
from core.checkpoint.tensors import read_config
from core.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HIGHEST_ID = (1 << 31) - 1
"""Of a token; the tokenizers library counts in 32 bits."""


def tokenizer_info(folder: Path) -> dict[str, Any] | None:
    """Return the tokenizer's kind, file and size (highest id + 1), or None without one.

    Raises `CheckpointError` if its file is damaged.
    """
    for file in TOKENIZER_FILES:
        path = folder / file
        if not outside.is_file(path):
            continue
        try:
            kind, size = _kind_and_size(path)
            extra = folder / "added_tokens.json"
            if file != "tokenizer.json" and size and outside.is_file(extra):
                size = max(size, _size(read_config(extra).values()))
        except outside.Malformed as error:
            raise _invalid(path, str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {path}: {error.strerror}.", "Check that the file is readable."
            ) from error
        if not size:
            raise _invalid(path, "it has no vocabulary")
        return {"kind": kind, "file": file, "size": size}
    return None


def _invalid(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a valid tokenizer: {reason}.", "Copy it from the model it belongs to."
    )


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


def _kind_and_size(path: Path) -> tuple[str, int]:
    """Return a vocabulary's kind and its highest id + 1; raises `outside.Malformed`."""
    if path.name == "tokenizer.model":
        return "sentencepiece", _sentencepiece_size(outside.data(path))
    table = read_config(path)
    if path.name == "vocab.json":
        return "BPE", _size(table.values())
    model = table.get("model")
    added = table.get("added_tokens") or []
    if model is None:
        return "BPE", 0
    if not isinstance(model, dict):
        raise outside.Malformed(f"its model is {outside.quoted(model)}")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise outside.Malformed("its added_tokens are not a list of objects")
    vocab = model.get("vocab") or []
    if isinstance(vocab, dict):
        size = _size(vocab.values())
    elif isinstance(vocab, list):
        size = len(vocab)
    else:
        raise outside.Malformed(f"its vocabulary is {outside.quoted(vocab)}")
    kind = model.get("type")
    return (
        outside.brief(kind) if isinstance(kind, str) else "BPE",
        max(size, _size(token.get("id") for token in added)),
    )


def _size(ids: Iterable[Any]) -> int:
    """Return the highest id + 1, 0 without any; raises `outside.Malformed` if one is not an id."""
    try:
        return 1 + max((outside.whole(i, high=HIGHEST_ID) for i in ids), default=-1)
    except outside.Malformed as error:
        raise outside.Malformed(f"the token id {error}") from error


def _sentencepiece_size(data: bytes) -> int:
    """Count the pieces of a sentencepiece model: the repeated field 1 of its protocol buffer.

    Raises `outside.Malformed` if a field reaches beyond the end.
    """
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
    if position > len(data):
        raise outside.Malformed("it is cut off")
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # a protocol buffer's numbers have at most 64 bits
        if position >= len(data):
            raise outside.Malformed("it is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise outside.Malformed("it is not a sentencepiece model")
