"""Token ids and a model's vocabulary: checked before they reach a device.

On a GPU an id beyond the embedding is a device-side assertion, after which the process can use the
GPU no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from core.errors import DataError


def check_ids(rows: Iterable[Sequence[int]], vocabulary: int) -> None:
    """Check ``rows`` of token ids against the number of rows of a model's embedding.

    Raises:
        DataError: An id is negative, or too large; the message names it.
    """
    for row in rows:
        if not row:
            continue
        least, largest = min(row), max(row)
        if least < 0 or largest >= vocabulary:
            raise DataError(
                f"Token id {largest if largest >= vocabulary else least} is outside the model's "
                f"vocabulary of {vocabulary}.",
                "Use the tokenizer that belongs to this checkpoint.",
            )


def pad_id(tokenizer: Any, vocabulary: int) -> int:
    """Return an id to fill up rows with: the tokenizer's own if the model has it, else EOS or 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in known if i is not None and 0 <= i < vocabulary), 0)


def embedded(model: Any) -> int:
    """Return the number of token ids that ``model`` (transformers) has an embedding for."""
    return int(model.get_input_embeddings().num_embeddings)
