"""Tokenizers for the rows: transformers' own, or read from tokenizer.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from core import outside
from core.checkpoint import chat
from core.checkpoint.chat import ChatTemplate
from core.checkpoint.headers import read_config
from core.checkpoint.tokenizer import SentencePiece, read_tokenizer
from core.errors import CheckpointError


class Encoder(Protocol):
    """Converts text to token ids."""

    eos_id: int | None
    chat: ChatTemplate | None
    """The tokenizer's chat template, if it has one."""
    plain_chat: ChatTemplate
    """The layout of conversations without a template."""

    def encode(self, text: str) -> list[int]:
        """Return the ids with the tokenizer's start token and without an end token."""

    def encode_spans(self, text: str, *, start: bool) -> list[tuple[int, int, int]]:
        """Return every token's id, first character and the one after its last.

        With ``start`` the tokenizer's start token is added, as a token without characters.
        """

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""


class ModelTokenizer:
    """A transformers tokenizer as an `Encoder`."""

    def __init__(self, tokenizer: Any, eos_id: int | None = None) -> None:
        """Wrap ``tokenizer``; ``eos_id`` is used if it has no end token."""
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_id
        self.chat = chat.of_tokenizer(tokenizer)
        self.plain_chat = chat.plain(tokenizer.special_tokens_map)

    def encode(self, text: str) -> list[int]:
        """Return the ids with the start token."""
        ids = list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def encode_spans(self, text: str, *, start: bool) -> list[tuple[int, int, int]]:
        """Return every token with its place in the text."""
        if not self.tokenizer.is_fast:
            raise CheckpointError(
                "The tokenizer does not tell where in a text its tokens are, so the answers of a "
                "conversation cannot be found.",
                "Convert it to a tokenizer.json with transformers.",
            )
        found = self.tokenizer(
            text, add_special_tokens=start, return_offsets_mapping=True, verbose=False
        )
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return _without_end([(i, a, b) for i, (a, b) in pairs], self.eos_id)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self.tokenizer.decode([i]) for i in ids]


class FileTokenizer:
    """A folder's tokenizer.json as an `Encoder`, without transformers and torch."""

    def __init__(self, folder: Path) -> None:
        """Read the folder; raises `CheckpointError` if it has no tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} has no tokenizer.json, so tokens cannot be counted in advance.",
                "Save the tokenizer with transformers. Only estimates need that file.",
            )
        self._tokenizer = read_tokenizer(path)
        tokens = chat.special_tokens(folder)
        eos = tokens.get("eos_token")
        self.eos_id = config_eos(folder) if eos is None else self._tokenizer.token_to_id(eos)
        self.chat = chat.read(folder)
        self.plain_chat = chat.plain(tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids with the start token."""
        ids = list(self._encoded(text).ids)
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def encode_spans(self, text: str, *, start: bool) -> list[tuple[int, int, int]]:
        """Return every token with its place in the text."""
        found = self._encoded(text, start)
        pairs = zip(found.ids, found.offsets, strict=True)
        return _without_end([(i, a, b) for i, (a, b) in pairs], self.eos_id)

    def _encoded(self, text: str, start: bool = True) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=start)
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(
                f"The tokenizer cannot encode '{outside.brief(text, 40)}': {error}.",
                "Copy tokenizer.json from the model it belongs to.",
            ) from error

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def _without_end(
    tokens: list[tuple[int, int, int]], eos_id: int | None
) -> list[tuple[int, int, int]]:
    """Return the tokens without an end token that the tokenizer itself added to the text."""
    added = tokens and tokens[-1][0] == eos_id and tokens[-1][1] == tokens[-1][2]
    return tokens[:-1] if added else tokens


class PieceTokenizer:
    """A folder's tokenizer.model as an `Encoder`, through sentencepiece alone."""

    def __init__(self, folder: Path) -> None:
        """Read the folder; raises `CheckpointError` if the file is damaged."""
        self._model = SentencePiece(folder)
        tokens = chat.special_tokens(folder)
        eos = tokens.get("eos_token")
        self.eos_id = config_eos(folder) if eos is None else self._model.number(eos)
        self.chat = chat.read(folder)
        self.plain_chat = chat.plain(tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids with the start token, if the tokenizer's settings ask for one."""
        return self._model.ids(text)

    def encode_spans(self, text: str, *, start: bool) -> list[tuple[int, int, int]]:
        """Raise `CheckpointError`: sentencepiece alone does not read a template's tokens whole."""
        raise CheckpointError(
            "Conversations cannot be previewed with a tokenizer.model alone.",
            "Save the tokenizer with transformers, which adds tokenizer.json. Only a preview needs "
            "that file.",
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._model.piece(i) for i in ids]


def of_folder(folder: Path) -> Encoder:
    """Return a folder's tokenizer without transformers and torch; raises `CheckpointError`."""
    whole = (folder / "tokenizer.json").is_file()
    only_pieces = not whole and (folder / "tokenizer.model").is_file()
    return PieceTokenizer(folder) if only_pieces else FileTokenizer(folder)


def config_eos(folder: Path) -> int | None:
    """Return the end token that config.json names."""
    eos = read_config(folder / "config.json").get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    return first if isinstance(first, int) else None
