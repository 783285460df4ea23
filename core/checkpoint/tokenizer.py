"""What a checkpoint's tokenizer is, from its files alone."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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


_ROLES = ("bos_token", "eos_token", "unk_token")
"""Special tokens that are put around text, or stand for characters that are not known."""


def tokenizer_info(folder: Path) -> dict[str, Any] | None:
    """Return what the tokenizer is, or None without one.

    ``kind``, ``file``, ``size`` (highest id + 1), ``text_size`` (the same, of the ids that text
    can produce without spelling out a special token's name), and ``special_beyond``, name -> id of
    the special tokens from ``text_size`` on.

    Raises `CheckpointError` if its file is damaged.
    """
    for file in TOKENIZER_FILES:
        path = folder / file
        if not outside.is_file(path):
            continue
        try:
            content = outside.data(path)
            settings = _settings(folder)
            key = hashlib.sha256(content).digest(), _roles(settings)
            if path.name == "tokenizer.json" and (found := _known.get(key)):
                return copy.deepcopy(found)
            tokens = _tokens(folder, path, content, settings)
        except outside.Malformed as error:
            raise _invalid(path, str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"Cannot read {path}: {error.strerror}.", "Check that the file is readable."
            ) from error
        size = _size([*tokens.ids, *tokens.special])
        if not tokens.ids:
            raise _invalid(path, "it has no vocabulary")
        text_size = _size(i for i in tokens.ids if i not in tokens.special)
        found = {
            "kind": tokens.kind,
            "file": file,
            "size": size,
            "text_size": text_size,
            "special_beyond": {
                name: i for i, name in sorted(tokens.special.items()) if i >= text_size
            },
        }
        if path.name == "tokenizer.json":
            if len(_known) >= KEPT:
                _known.clear()
            _known[key] = copy.deepcopy(found)
        return found
    return None


KEPT = 64
_known: dict[tuple[bytes, frozenset[str]], dict[str, Any]] = {}
"""What is known of each tokenizer.json, by its content and `_roles`: all variants share one."""


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


class SentencePiece:
    """The tokenizer of a tokenizer.model, with the calls of `tokenizers` that are used here."""

    def __init__(self, folder: Path) -> None:
        """Read the model; raises `CheckpointError` if it is damaged or sentencepiece is missing."""
        path = folder / "tokenizer.model"
        try:
            import sentencepiece

            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except ImportError as error:
            raise CheckpointError(
                f"{path} needs the library sentencepiece, which is not installed.",
                "Install it: python -m pip install sentencepiece",
            ) from error
        except (OSError, RuntimeError) as error:
            raise _invalid(path, " ".join(str(error).split()) or "it cannot be parsed") from error
        starts = any(each.get("add_bos_token") is True for each in _settings(folder))
        self._start = [self._model.bos_id()] if starts and self._model.bos_id() >= 0 else []

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's ids, with the start token if ``special`` and the settings ask for it."""
        return [*(self._start if special else ()), *self._model.encode(text)]

    def piece(self, number: int) -> str:
        """Return the text of one token."""
        return self._model.id_to_piece(number).replace("\u2581", " ")

    def number(self, token: str) -> int | None:
        """Return a token's id, or None if there is no such token."""
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a vocabulary."""

    kind: str
    ids: Collection[int]
    special: dict[int, str]
    """Those that no text contains, unless it spells them out, and that no rule adds to one."""


def _roles(settings: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the special tokens that the settings give one of `_ROLES`."""
    return frozenset(_content(each.get(role)) for each in settings for role in _ROLES) - {""}


def _tokens(
    folder: Path, path: Path, content: bytes, settings: Sequence[Mapping[str, Any]]
) -> _Tokens:
    """Return the tokens of a vocabulary file with this content; raises `outside.Malformed`."""
    if path.name == "tokenizer.json":
        found = _whole_tokenizer(read_config(path, content))
    else:
        ids: Sequence[int]
        if path.name == "tokenizer.model":
            kind, ids = "sentencepiece", range(_sentencepiece_size(content))
        else:
            kind, ids = "BPE", _ids(read_config(path, content).values())
        extra = folder / "added_tokens.json"
        added = read_config(extra) if ids and outside.is_file(extra) else {}
        numbers = dict(zip(added, _ids(added.values()), strict=True))
        marked = _marked_special(settings)
        special = {i: name for name, i in numbers.items() if name in marked}
        found = _Tokens(kind, [*ids, *numbers.values()], special)
    roles = _roles(settings)
    never = {i: name for i, name in found.special.items() if name not in roles}
    return replace(found, special=never)


def _whole_tokenizer(table: Mapping[str, Any]) -> _Tokens:
    model = table.get("model")
    added = table.get("added_tokens") or []
    if model is None:
        return _Tokens("BPE", (), {})
    if not isinstance(model, dict):
        raise outside.Malformed(f"its model is {outside.quoted(model)}")
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise outside.Malformed("its added_tokens are not a list of objects")
    vocab = model.get("vocab") or []
    if isinstance(vocab, dict):
        ids: Sequence[int] = _ids(vocab.values())
    elif isinstance(vocab, list):
        ids = range(len(vocab))
    else:
        raise outside.Malformed(f"its vocabulary is {outside.quoted(vocab)}")
    numbers = _ids(token.get("id") for token in added)
    inserted = _inserted(table.get("post_processor"))
    special = {
        number: name
        for number, token in zip(numbers, added, strict=True)
        if token.get("special") is True and (name := _content(token)) not in inserted
    }
    kind = model.get("type")
    kind = outside.brief(kind) if isinstance(kind, str) else "BPE"
    return _Tokens(kind, [*ids, *numbers], special)


def _ids(values: Iterable[Any]) -> list[int]:
    """Return token ids; raises `outside.Malformed` if one is not."""
    try:
        return [outside.whole(i, high=HIGHEST_ID) for i in values]
    except outside.Malformed as error:
        raise outside.Malformed(f"the token id {error}") from error


def _size(ids: Iterable[int]) -> int:
    """Return the highest id + 1, 0 without any."""
    return 1 + max(ids, default=-1)


def _inserted(processor: Any) -> set[str]:
    """Return the tokens that a tokenizer.json puts around every text."""
    if not isinstance(processor, dict):
        return set()
    found: set[str] = set()
    for part in _list(processor.get("processors")):
        found |= _inserted(part)
    for pair in (processor.get("cls"), processor.get("sep")):
        found |= {_content(pair[0])} if isinstance(pair, list) and pair else set()
    for piece in _list(processor.get("single")):
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        found |= {_content(token.get("id"))} if isinstance(token, dict) else set()
    return found


def _marked_special(settings: Iterable[Mapping[str, Any]]) -> set[str]:
    """Return the tokens that a tokenizer's settings call special."""
    found: set[str] = set()
    for each in settings:
        for key, value in each.items():
            if key == "added_tokens_decoder" and isinstance(value, dict):
                tokens = [token for token in value.values() if isinstance(token, dict)]
                found |= {_content(token) for token in tokens if token.get("special") is True}
            elif key == "additional_special_tokens":
                found |= set(map(_content, _list(value)))
            elif key.endswith("_token"):
                found.add(_content(value))
    return found - {""}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _content(token: Any) -> str:
    """Return a token's text: settings hold it as a string, or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _settings(folder: Path) -> list[dict[str, Any]]:
    """Return the tokenizer's settings; files that cannot be read are left to transformers."""
    found = []
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if outside.is_file(folder / name):
            with contextlib.suppress(CheckpointError, OSError):
                found.append(read_config(folder / name))
    return found


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
