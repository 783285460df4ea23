"""Tokenizers for the rows: transformers' own, or read from tokenizer.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from core import outside
from core.checkpoint.headers import read_config
from core.checkpoint.tokenizer import read_tokenizer
from core.errors import CheckpointError


class Encoder(Protocol):
    """Converts text to token ids."""

    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids with the tokenizer's start token and without an end token."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""


class ModelTokenizer:
    """A transformers tokenizer as an `Encoder`."""

    def __init__(self, tokenizer: Any, eos_id: int | None = None) -> None:
        """Wrap ``tokenizer``; ``eos_id`` is used if it has no end token."""
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids with the start token."""
        ids = list(self.tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

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
                "Save the tokenizer with transformers, or start without --dry-run.",
            )
        self._tokenizer = read_tokenizer(path)
        self.eos_id = self._eos(folder)

    def _eos(self, folder: Path) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if outside.is_file(folder / name):
                token = read_config(folder / name).get("eos_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    return self._tokenizer.token_to_id(token)
        return config_eos(folder)

    def encode(self, text: str) -> list[int]:
        """Return the ids with the start token."""
        try:
            ids = list(self._tokenizer.encode(text).ids)
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(
                f"The tokenizer cannot encode '{outside.brief(text, 40)}': {error}.",
                "Copy tokenizer.json from the model it belongs to.",
            ) from error
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token."""
        return [self._tokenizer.decode([i], skip_special_tokens=False) for i in ids]


def config_eos(folder: Path) -> int | None:
    """Return the end token that config.json names."""
    eos = read_config(folder / "config.json").get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    return first if isinstance(first, int) else None
