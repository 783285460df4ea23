"""The config.json of a width-pruned checkpoint: stock if transformers accepts it; no torch."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from core.checkpoint import families, own_code
from core.width.units import BlockUnits, Counts


def pruned_config(
    config: Mapping[str, Any],
    units: Sequence[BlockUnits],
    counts: Mapping[int, Counts],
    *,
    biases: bool = False,
) -> dict[str, Any]:
    """Return the config of the model with ``counts`` kept; blocks not listed there are unchanged.

    ``biases`` adds one to every output projection. If all blocks have the same shape and the
    family's transformers class accepts it, this is the family's stock config with an explicit
    head_dim; otherwise it is the config of `core.model.modeling_depthcut`, with an auto_map to the
    copy beside the weights.
    """
    kept = [counts.get(unit.block, unit.all.counts) for unit in units]
    heads = [k.groups * unit.queries for k, unit in zip(kept, units, strict=True)]
    groups, neurons = [k.groups for k in kept], [k.neurons for k in kept]
    had = {field: bool(config.get(field)) for field in families.ADDED_BIAS.values()}
    added = {field: families.is_custom(config) and had[field] for field in had}
    if biases:
        added = dict.fromkeys(added, True)
    family = families.of(config)
    own = [*families.LAYER_FIELDS.values(), *families.ADDED_BIAS.values(), own_code.PER_LAYER]
    clean = own_code.without_code(config)
    result = {key: copy.deepcopy(value) for key, value in clean.items() if key not in own}
    result["head_dim"] = units[0].head_dim
    if not any(added.values()) and is_stock(family.name, units[0].hidden, heads, groups, neurons):
        return result | {
            "model_type": family.name,
            "architectures": [family.architecture],
            "num_attention_heads": heads[0],
            "num_key_value_heads": groups[0],
            "intermediate_size": neurons[0],
        }
    return own_code.with_layer_sizes(result, (heads, groups, neurons), **added)


def is_stock(
    family: str, hidden: int, heads: Sequence[int], groups: Sequence[int], neurons: Sequence[int]
) -> bool:
    """Whether the family's stock class supports these sizes.

    They must be the same in all blocks, which have both parts; `LlamaConfig` also requires the
    number of heads to divide the hidden size (transformers 5).
    """
    uniform = all(len(set(sizes)) == 1 for sizes in (heads, groups, neurons))
    whole = all(min(sizes) > 0 for sizes in (heads, neurons))
    return uniform and whole and (family != "llama" or hidden % heads[0] == 0)
