"""A text token by token, with and without skipped blocks."""

from __future__ import annotations

from core.errors import DataError
from core.evaluate.token_losses import token_view
from core.live.protocol import Tokens
from core.live.replies import Scored
from core.live.store import Loaded
from core.model.precision import dtype_name

MOST = 512
"""Tokens of a text that are read; a page shows no more."""


def read(loaded: Loaded, ask: Tokens) -> Scored:
    """Return the loss of each token of a text; of a long one, of its first `MOST`.

    Raises:
        PlanError: A block does not exist, or none would be left.
        DataError: The text is too short.
    """
    if not ask.text.strip():
        raise DataError("The text is empty.", "Enter a few words.")
    view = loaded.view
    removal = view.check_skip(ask.removal)
    ids = list(loaded.tokenizer.encode(ask.text))
    some = ids[: min(MOST, loaded.info.context or MOST)]
    with view.skip(removal) as model:
        found = token_view(model, loaded.tokenizer, some)
    return Scored(
        **vars(found),
        left_out=len(ids) - len(some),
        device=str(view.device),
        dtype=dtype_name(view.dtype),
    )
