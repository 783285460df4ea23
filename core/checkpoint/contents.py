"""What of the stored tensors a model uses: stored and expected names compared in both directions.

transformers ignores stored tensors that the model has no place for, and reports them in a log that
is easily missed. Some of them change the result (a bias without its flag, the scales of quantized
weights), so these are refused; others (left-over adapters, a vision tower) are named and counted
apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from core import outside
from core.checkpoint import families
from core.checkpoint.tensors import TensorEntry, TensorIndex
from core.errors import CheckpointError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
Head = Literal["untied", "tied", "copy", "own", "unknown"]
"""The head: untied as declared; tied and not stored; a stored copy of the embedding; one of its
own despite ``tie_word_embeddings: true``; or stored on the Hub, where its values are not read."""
_CHUNK = 8 << 20
_SHOWN = 3
_FLAGS = ("attention_bias", "mlp_bias")
# Scales of a quantized key/value cache; the weights themselves are complete without them.
_CACHE_SCALES = re.compile(r"\.(k|v)_scale$")
_SCALES = re.compile(r"scale|zero|absmax|qweight|g_idx|quant_(state|map)|nested|SCB|packed|amax")
_BLOCK_NORM = re.compile(r"^model\.layers\.\d+\.[\w.]*norm\.weight$")
_FLOATS = ("float", "bfloat", "f8", "f6", "f4")


@dataclass(frozen=True)
class Contents:
    """Which stored tensors a model uses."""

    used: dict[str, families.Shape]
    """Parameters as loaded, name -> shape; a tied head is left out."""
    unused: tuple[str, ...]
    """Tensors that loading ignores, in the order of their names."""
    unused_parameters: int
    head: Head
    notes: tuple[str, ...]
    """What a user should know."""

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weight once loaded."""
        return self.head in ("tied", "copy")


def compare(config: Mapping[str, Any], index: TensorIndex) -> Contents:
    """Return which stored tensors the model of ``config`` uses.

    Raises `CheckpointError` if a tensor is missing or has another shape, and for stored tensors
    that would change the result but that loading ignores.
    """
    entries = index.entries
    expected = _expected(config, entries)
    head = _head(config, index)
    used = {name: entries[name].shape for name in expected}
    if head in ("own", "unknown"):
        used[HEAD] = entries[HEAD].shape
    ignored = {HEAD} if head == "copy" else set()
    unused = sorted(
        name
        for name in entries
        if name not in used and name not in ignored and families.is_parameter(name)
    )
    _refuse_whole_numbers([entries[name] for name in used])
    _refuse_norms(config, unused)
    unused_biases = _refuse_scales(used, unused)
    _refuse_biases(config, index, unused_biases)
    count = sum(entries[name].parameters for name in unused)
    notes = (*_head_notes(head), *_unused_notes(unused, count))
    return Contents(used, tuple(unused), count, head, notes)


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    shown = ", ".join(outside.quoted(name, 80) for name in names[:_SHOWN])
    return shown + (f" and {more:,} more" if more > 0 else "")


# --------------------------------------------------------------------------------------- expected


def _expected(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return the stored names that the config asks for; raises if one is missing or misshapen."""
    wanted = families.setting(config, "num_hidden_layers")
    held = {b for b in map(families.block_of, entries) if b is not None}
    if held != set(range(wanted)):
        absent, extra = sorted(set(range(wanted)) - held), sorted(held - set(range(wanted)))
        which = f"block {absent[0]} is missing" if absent else f"block {extra[0]} is unexpected"
        raise CheckpointError(
            f"config.json declares {wanted} blocks but the weights contain {len(held)} ({which}).",
            "Give a checkpoint whose config.json matches its weights.",
        )
    any_shape = families.is_custom(config) and not families.says_layer_shapes(config)
    expected = _custom_names(config) if any_shape else families.expected_shapes(config)
    missing = [name for name in expected if name not in entries]
    if missing:
        others = len(missing) - 1
        more = f" and {others} more" if others else ""
        raise CheckpointError(
            f"'{missing[0]}'{more} {'are' if others else 'is'} missing from the weights.",
            "Give a checkpoint whose config.json matches its weights.",
        )
    for name, shape in expected.items():
        if any_shape:
            _check_rank(name, entries[name].shape)
        elif entries[name].shape != shape:
            raise CheckpointError(
                f"'{name}' has shape {list(entries[name].shape)}, but config.json implies "
                f"{list(shape)}.",
                "Give a checkpoint whose config.json matches its weights.",
            )
    biases = [f"{name.removesuffix('weight')}bias" for name in expected] if any_shape else []
    return [*expected, *(name for name in biases if name in entries)]


def _check_rank(name: str, shape: families.Shape) -> None:
    """Raise `CheckpointError` unless a weight is a matrix, a norm's weight a vector."""
    wanted = 1 if "norm" in name.rsplit(".", 2)[-2] else 2
    if len(shape) != wanted or 0 in shape:
        raise CheckpointError(
            f"'{name}' has shape {list(shape)}, which is not that of such a weight.",
            "Download the checkpoint again.",
        )


def _custom_names(config: Mapping[str, Any]) -> dict[str, families.Shape]:
    """Return the tensors that a checkpoint with its own block shapes must have (any shape)."""
    modules = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
               "input_layernorm", "post_attention_layernorm"]  # fmt: skip
    if families.of(config).qk_norm:
        modules += ["self_attn.q_norm", "self_attn.k_norm"]
    names = [EMBEDDING, "model.norm.weight"]
    for block in range(families.setting(config, "num_hidden_layers")):
        names += [f"model.layers.{block}.{module}.weight" for module in modules]
    if not families.setting(config, "tie_word_embeddings"):
        names.append(HEAD)
    return dict.fromkeys(names, ())


# ------------------------------------------------------------------------------------------- head


def _head(config: Mapping[str, Any], index: TensorIndex) -> Head:
    if not families.setting(config, "tie_word_embeddings"):
        return "untied"
    entries = index.entries
    if HEAD not in entries:
        return "tied"
    head, embedding = entries[HEAD], entries[EMBEDDING]
    if head.shape != embedding.shape:
        raise CheckpointError(
            f"'{HEAD}' has shape {list(head.shape)}, but config.json implies "
            f"{list(embedding.shape)}.",
            "Give a checkpoint whose config.json matches its weights.",
        )
    if index.folder is None:
        return "unknown"
    return "copy" if _same(index, head, embedding) else "own"


def _same(index: TensorIndex, one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same bytes; reads until the first difference."""
    assert index.folder is not None
    size = one.end - one.start
    if one.dtype != other.dtype or size != other.end - other.start:
        return False
    with (index.folder / one.file).open("rb") as a, (index.folder / other.file).open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        for at in range(0, size, _CHUNK):
            length = min(_CHUNK, size - at)
            if a.read(length) != b.read(length):
                return False
    return True


def _head_notes(head: Head) -> list[str]:
    notes: dict[Head, str] = {
        "own": "config.json says that the head is tied to the embedding, but the weights hold a "
        "different head, which is what transformers uses. It is counted and used, and variants "
        "are written with tie_word_embeddings: false.",
        "unknown": "config.json says that the head is tied to the embedding, but the weights hold "
        "a head, which transformers uses if it differs. It is counted here; once the weights are "
        "downloaded, it is compared with the embedding.",
        "copy": "The weights hold the tied head a second time, equal to the embedding; it is "
        "counted once.",
    }
    return [notes[head]] if head in notes else []


# ----------------------------------------------------------------------------------------- unused


def _unused_notes(unused: Sequence[str], count: int) -> list[str]:
    if not unused:
        return []
    one = len(unused) == 1
    return [
        f"{len(unused):,} stored {'tensor is' if one else 'tensors are'} not part of the model "
        f"({count:,} parameters, not counted): {_listed(unused)}. Loading ignores "
        f"{'it' if one else 'them'}, and pruned variants leave {'it' if one else 'them'} out."
    ]


def _refuse_whole_numbers(entries: Sequence[TensorEntry]) -> None:
    odd = [entry.name for entry in entries if not entry.dtype.startswith(_FLOATS)]
    if odd:
        dtype = next(entry.dtype for entry in entries if entry.name == odd[0])
        raise CheckpointError(
            f"The weights are quantized: {_listed(odd)} stored as {dtype}, and config.json has "
            "no rule for reading them.",
            "Give the unquantized checkpoint; quantized blocks cannot be scored.",
        )


def _refuse_norms(config: Mapping[str, Any], unused: Sequence[str]) -> None:
    norms = [name for name in unused if _BLOCK_NORM.match(name)]
    if norms:
        raise CheckpointError(
            f"The weights hold norms that {families.of(config).label} blocks do not have, so they "
            f"would be ignored: {_listed(norms)}.",
            "Set model_type in config.json to the family that the model was trained as "
            f"({', '.join(families.SUPPORTED)} are supported).",
        )


def _refuse_scales(used: Mapping[str, Any], unused: Sequence[str]) -> list[str]:
    """Raise for tensors that scale used weights; return the biases of used weights.

    A tensor beside a used weight in the same module (``q_proj.weight_scale``) takes part in what
    that module computes; one in a module of its own (``q_proj.lora_A.weight``) is left over.
    """
    biases, scales = [], []
    for name in unused:
        module, _, kind = name.rpartition(".")
        beside = f"{module}.weight" in used or f"{module}.weight" == HEAD
        if kind == "bias" and beside:
            biases.append(name)
        elif not _CACHE_SCALES.search(name) and (beside or _SCALES.search(kind)):
            scales.append(name)
    if scales:
        raise CheckpointError(
            f"The weights are quantized or scaled: {_listed(scales)} stored beside them, and "
            "config.json has no rule for applying that. Loaded without it, the model would "
            "compute something else.",
            "Give the unquantized checkpoint; quantized blocks cannot be scored.",
        )
    return biases


def _refuse_biases(config: Mapping[str, Any], index: TensorIndex, biases: Sequence[str]) -> None:
    """Raise if biases are stored that the model would leave out, unless all of them are zero."""
    if not biases:
        return
    entries = index.entries
    if index.folder is not None and not any(any(index.read_bytes(entries[n])) for n in biases):
        return
    flags = _flags_for(config, entries, biases)
    if flags:
        wanted = " and ".join(f'"{flag}": true' for flag in flags)
        hint = f"If the model was trained with them, set {wanted} in config.json."
    else:
        hint = (
            f"{families.of(config).label} has no setting for them: give the checkpoint under the "
            "family it was trained as, or remove them if they do not belong to it."
        )
    raise CheckpointError(
        f"The weights hold biases that config.json does not ask for, so they would be ignored: "
        f"{_listed(biases)}.",
        hint,
    )


def _flags_for(
    config: Mapping[str, Any], entries: Mapping[str, TensorEntry], biases: Sequence[str]
) -> tuple[str, ...]:
    """Return the settings with which exactly the stored biases are part of the model."""
    for count in (1, 2):
        for flags in combinations(_FLAGS, count):
            shapes = families.expected_shapes({**config, **dict.fromkeys(flags, True)})
            if set(biases) <= shapes.keys() and shapes.keys() <= entries.keys():
                return flags
    return ()
