"""Rotary scaling in llama.cpp's terms.

``linear`` and ``yarn`` have hyperparameters of their own; ``llama3`` is stored as a tensor of
divisors, one per pair of rows; ``dynamic`` only acts beyond the trained context. The formulas
follow transformers 5.24 (``modeling_rope_utils.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.checkpoint import families
from core.errors import CheckpointError

_THETA = 10_000.0
"""transformers' default base of the four families."""


@dataclass(frozen=True)
class Rotary:
    """Rotary settings of a GGUF file."""

    context: int
    """Tokens."""
    values: dict[str, Any]
    """Hyperparameters by their keys without the architecture."""
    factors: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())


def read(config: Mapping[str, Any], architecture: str) -> Rotary:
    """Return what a GGUF file says of a config's rotary positions.

    Raises `CheckpointError` for a kind that llama.cpp's ``architecture`` does not compute.
    """
    table: Mapping[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = table.get("rope_type", table.get("type", "default"))
    theta = float(table.get("rope_theta", config.get("rope_theta", _THETA)))
    context = families.setting(config, "max_position_embeddings")
    values: dict[str, Any] = {"rope.freq_base": theta}
    if float(table.get("partial_rotary_factor", 1.0)) != 1.0:
        raise _refused(f"the rotary share of a head {table['partial_rotary_factor']}")
    if kind == "default":
        return Rotary(context, values)
    factor = float(table.get("factor") or 1.0)
    before = int(table.get("original_max_position_embeddings") or context)
    if kind == "dynamic":
        note = (
            f"Dynamic rotary scaling acts only beyond {context:,} tokens, the file's context "
            "length; llama.cpp does not apply it."
        )
        return Rotary(context, values, notes=(note,))
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
        return Rotary(context, values)
    if kind == "yarn":
        return Rotary(context, values | _yarn(table, factor, before))
    if kind == "llama3":
        if architecture not in ("llama", "deci"):
            raise _refused(f"rotary scaling '{kind}' in architecture {architecture}")
        width = families.setting(config, "head_dim")
        return Rotary(context, values, _llama3(table, theta, width, factor, before))
    raise _refused(f"rotary scaling '{kind}'")


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp does not compute {what}.", "This checkpoint cannot be exported to GGUF."
    )


def _yarn(table: Mapping[str, Any], factor: float, before: int) -> dict[str, Any]:
    if table.get("truncate", True) is False:
        raise _refused("rotary scaling 'yarn' with truncate: false")
    values = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": before,
    }
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (found := float(table.get(key) or usual)) != usual:
            values[f"rope.scaling.yarn_{key}"] = found
    own = table.get("attention_factor")
    if own is None and table.get("mscale") and table.get("mscale_all_dim"):
        own = _scale(factor, table["mscale"]) / _scale(factor, table["mscale_all_dim"])
    if own is not None:  # llama.cpp multiplies its own factor, that of an mscale of 1, with this
        values["rope.scaling.yarn_attn_factor"] = float(own) / _scale(factor, 1.0)
    return values


def _scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(
    table: Mapping[str, Any], theta: float, width: int, factor: float, before: int
) -> tuple[float, ...]:
    """Return the divisor of each frequency: 1 for short wavelengths, ``factor`` for long ones."""
    low, high = float(table["low_freq_factor"]), float(table["high_freq_factor"])
    factors = []
    for row in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (row / width)
        if wavelength < before / high:
            factors.append(1.0)
        elif wavelength > before / low:
            factors.append(factor)
        else:
            smooth = (before / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
