"""How a model of transformers names its key/value cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_name(model: Any) -> str:
    """Return how ``model`` names its key/value cache, as an argument and in its output.

    transformers renamed ``past_key_values`` to ``cache``; the model itself says which it takes.
    """
    takes = inspect.signature(model.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"
