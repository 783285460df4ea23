"""A causal language model as a sequence of blocks: embed, run block i, finish, or skip blocks.

One adapter serves transformers' LLaMA, Mistral, Qwen2 and Qwen3: their models share
``model.embed_tokens``, ``model.layers``, ``model.norm``, ``model.rotary_emb`` and ``lm_head``, and
differ in biases, in query/key norms and in the blocks that attend within a sliding window.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.checkpoint import families, neurons
from core.checkpoint.drop import PARTS, Removal, check_removal
from core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODULES = (
    ("input_norm", "input_layernorm"),
    ("q", "self_attn.q_proj"),
    ("k", "self_attn.k_proj"),
    ("v", "self_attn.v_proj"),
    ("o", "self_attn.o_proj"),
    ("post_norm", "post_attention_layernorm"),
    ("gate", "mlp.gate_proj"),
    ("up", "mlp.up_proj"),
    ("down", "mlp.down_proj"),
)
"""Short name and path of a block's nine scored weight tensors, in order of computation."""

_MODULE_OF = {"attention": "self_attn", "mlp": "mlp"}
_PART_OF = {module: "attention" for module, _ in MODULES[:5]} | {
    module: "mlp" for module, _ in MODULES[5:]
}


@dataclass(frozen=True)
class BlockWeight:
    """One scored weight tensor of one block."""

    name: str
    """Full name in the checkpoint, e.g. ``model.layers.3.mlp.up_proj.weight``."""
    block: int
    module: str
    """Short name: input_norm, q, k, v, o, post_norm, gate, up or down."""
    tensor: Tensor


class BlockView:
    """Views a loaded model as blocks. Rows start at position 0; only right padding is allowed.

    Under causal attention, right padding changes nothing before it, so no padding mask is needed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """View ``model``; raises `CheckpointError` for a family that is not supported."""
        kind = str(getattr(model.config, "model_type", "unknown"))
        self.family = kind.removeprefix(families.CUSTOM_PREFIX)
        if self.family not in families.FAMILIES:
            raise CheckpointError(
                f"Models of type '{kind}' are not supported.",
                f"Supported: {', '.join(families.SUPPORTED)}.",
            )
        self.model = model
        self.config: Any = model.config
        self._body: Any = model.model
        self._rotary: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._masks: dict[tuple[Any, ...], Tensor | None] = {}

    # properties

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self._body.layers

    def layer(self, block: int) -> nn.Module:
        """Return a decoder layer with its weights in memory, until another one is asked for.

        ``blocks`` may hold shapes alone (`core.model.streaming`).
        """
        return self.blocks[block]

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its name in the checkpoint, in the format that weights are held in."""
        return self.model.get_parameter(name).detach()

    @contextlib.contextmanager
    def replacing(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Compute with weights of these names changed, until the context ends."""
        saved = {name: self.tensor(name).clone() for name in changes}
        with torch.no_grad():
            try:
                for name, change in changes.items():
                    self.tensor(name).copy_(change(saved[name]))
                yield
            finally:
                for name, before in saved.items():
                    self.tensor(name).copy_(before)

    def rest(self) -> None:
        """Give back what was read for this view; what computes next reads it again."""

    def close(self) -> None:
        """Give back what was read for this view; it cannot compute any more."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """The embedding's device."""
        return self._body.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._body.embed_tokens.weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden state."""
        return int(self.config.hidden_size)

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the head."""
        return self._body.norm

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, [vocabulary, hidden]."""
        return self.model.lm_head.weight

    @property
    def head_size(self) -> int:
        """Number of elements of the output matrix."""
        head: Any = self.model.lm_head
        return int(head.out_features) * int(head.in_features)

    def has(self, block: int, part: str) -> bool:
        """Whether the block has its ``attention``, or its ``mlp``."""
        return getattr(self.blocks[block], _MODULE_OF[part]) is not None

    def sizes(self) -> list[dict[str, int]]:
        """Return 1 or 0 heads, and the MLP neurons of every block, for `check_removal`."""
        return [
            {
                "heads": int(self.has(b, "attention")),
                "intermediate": int(self.blocks[b].mlp.down_proj.in_features)
                if self.has(b, "mlp")
                else 0,
            }
            for b in range(len(self))
        ]

    def weights(self, block: int) -> list[BlockWeight]:
        """Return the block's scored weights, in order of computation: nine if it is whole."""
        layer = self.layer(block)
        return [
            BlockWeight(
                f"model.layers.{block}.{path}.weight",
                block,
                module,
                layer.get_submodule(path).weight,
            )
            for module, path in self.modules(block)
        ]

    def modules(self, block: int) -> list[tuple[str, str]]:
        """Return the entries of `MODULES` that the block has; a norm belongs to its part."""
        lost = {part for part in PARTS if not self.has(block, part)}
        return [(m, path) for m, path in MODULES if _PART_OF[m] not in lost]

    # computation

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings [rows, tokens, hidden] of token ids [rows, tokens]."""
        return self._body.embed_tokens(ids)

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what embeds parts of ``ids``, one after another, as `embed` does.

        The table is read once for all of them.
        """
        return self.embed

    def rotary(
        self, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), each [1, tokens, head width], computed once per length."""
        key = (tokens, dtype, device)
        if key not in self._rotary:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(tokens, device=device)[None]
                like = torch.empty(0, dtype=dtype, device=device)
                cos, sin = self._body.rotary_emb(like, positions)
                self._rotary[key] = (cos.clone(), sin.clone())
        return self._rotary[key]

    def window(self, block: int) -> int | None:
        """Return the block's sliding attention window in tokens, or None for full attention."""
        size = getattr(self.config, "sliding_window", None)
        if size is None:
            return None
        if self.family == "mistral":
            return int(size)
        kinds = getattr(self.config, "layer_types", None)
        return int(size) if kinds and kinds[block] == "sliding_attention" else None

    def mask(self, block: int, tokens: int, device: torch.device) -> Tensor | None:
        """Return the keys that a query may attend to, [1, 1, tokens, tokens] bool, or None.

        None means all keys before it, and lets sdpa take its causal path without reading a mask.
        """
        window = self.window(block)
        if window is None or window >= tokens:
            return None
        key = (tokens, window, device)
        if key not in self._masks:
            with torch.inference_mode(False):
                at = torch.arange(tokens, device=device)
                back = at[:, None] - at[None, :]
                self._masks[key] = ((back >= 0) & (back < window))[None, None]
        return self._masks[key]

    def run_block(self, block: int, hidden: Tensor, part: str = "") -> Tensor:
        """Return the block's output for ``hidden`` [rows, tokens, hidden]; gradients flow.

        ``part`` (attention or mlp) runs only that part of the block.
        """
        layer = self.layer(block)
        if part:
            layer = PartOfLayer(layer, part)
        return self.call_layer(layer, block, hidden)

    def call_layer(self, layer: Any, block: int, hidden: Tensor) -> Tensor:
        """Run ``layer``, any callable with a decoder layer's signature, as block ``block``."""
        tokens, device = hidden.shape[1], hidden.device
        mask = self.mask(block, tokens, device)
        if getattr(self.config, "_attn_implementation", "sdpa") != "sdpa":
            if mask is None:
                mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
            mask = additive_mask(mask.view(1, 1, tokens, tokens), hidden.dtype)
        return layer(
            hidden,
            attention_mask=mask,
            position_ids=torch.arange(tokens, device=device)[None],
            position_embeddings=self.rotary(tokens, hidden.dtype, device),
            use_cache=False,
        )

    def finish(self, hidden: Tensor) -> Tensor:
        """Return logits [rows, tokens, vocabulary] of the last block's output."""
        return self.model.lm_head(self.final_norm(hidden))

    # skipping blocks

    def check_skip(self, skip: Removal | Iterable[int]) -> Removal:
        """Return ``skip``, blocks or parts of them too, in ascending order.

        Raises `PlanError` if it cannot all be left out.
        """
        whole = skip if isinstance(skip, Removal) else Removal(tuple(int(b) for b in skip))
        lists = (whole.drop, whole.attention, whole.mlp)
        drop, attention, mlp = (tuple(sorted({*one})) for one in lists)
        ordered = Removal(drop, attention, mlp, tuple(sorted(whole.width)), whole.order)
        return check_removal(ordered, self.sizes(), may_be_empty=True)

    @contextlib.contextmanager
    def skip(self, skip: Removal | Iterable[int]) -> Iterator[PreTrainedModel]:
        """Make the model behave as if ``skip`` were removed, until the context ends.

        Nothing is copied. ``model(...)`` and ``generate`` with a cache work inside: blocks that
        attend are renumbered so that cache layers are contiguous, and the configuration's per-layer
        fields agree. Everything is restored on exit. Not thread-safe.

        Raises:
            PlanError: An index is out of range, a block lacks the part, or nothing would remain.
        """
        with self.arranged(*self.layers_without(skip)) as model:
            yield model

    def layers_without(self, skip: Removal | Iterable[int]) -> tuple[list[nn.Module], list[int]]:
        """Return the layers that are left without ``skip``, and the block that each is of.

        Weights are shared. Raises `PlanError` if it cannot all be left out.
        """
        removal = self.check_skip(skip)
        keep = [i for i in range(len(self)) if i not in removal.drop]
        left = {b: "mlp" for b in removal.attention} | {b: "attention" for b in removal.mlp}
        layers: list[nn.Module] = []
        narrow = self.narrowed(removal)
        for i in keep:
            layer = self.blocks[i]
            layers.append(PartOfLayer(layer, left[i]) if i in left else narrow.get(i, layer))
        return layers, keep

    def narrowed(self, removal: Removal) -> dict[int, nn.Module]:
        """Return the blocks of ``removal.width`` as they are with the neurons that they keep.

        Raises `PlanError` if the order of the neurons is missing.
        """
        width = [size["intermediate"] for size in self.sizes()]
        found = neurons.kept(removal, width)
        return {block: narrow_layer(self.blocks[block], kept) for block, kept in found.items()}

    @contextlib.contextmanager
    def arranged(self, layers: Sequence[nn.Module], of: Sequence[int]) -> Iterator[PreTrainedModel]:
        """Make the model run ``layers`` instead of its blocks, until the context ends.

        ``of`` names, for each of them, the block whose entries in the configuration's per-layer
        fields count. The attention modules of ``layers`` must be different ones: each is numbered
        for the cache. Everything is restored on exit. Not thread-safe.
        """
        numbers = [(x.self_attn, x.self_attn.layer_idx) for x in layers if x.self_attn is not None]
        before, saved = self.blocks, self._per_layer_fields()
        try:
            self._arrange(layers, of, saved)
            yield self.model
        finally:
            vars(self.config).pop("get_text_config", None)
            self._body.layers = before
            for module, at in numbers:
                module.layer_idx = at
            for name, value in saved.items():
                setattr(self.config, name, value)

    def shorten(self, keep: Sequence[int]) -> None:
        """Give up all blocks but ``keep``, in this order, for good."""
        self._arrange([self.blocks[block] for block in keep], keep, self._per_layer_fields())

    def _per_layer_fields(self) -> dict[str, Any]:
        names = ("num_hidden_layers", "layer_types", "max_window_layers")
        found = {name: getattr(self.config, name, None) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def _arrange(self, layers: Sequence[Any], of: Sequence[int], fields: dict[str, Any]) -> None:
        """Make the model run ``layers``, with the entries of the blocks ``of`` in ``fields``."""
        self._body.layers = nn.ModuleList(layers)
        attending = [layer.self_attn for layer in layers if layer.self_attn is not None]
        for number, module in enumerate(attending):
            module.layer_idx = number
        for name, value in _per_layer(fields, of).items():
            setattr(self.config, name, value)
        attends = [layer.self_attn is not None for layer in layers]
        if not all(attends):
            _cache_for(self.config, attends)


class PartOfLayer(nn.Module):
    """The attention or the MLP of a decoder layer, with the layer's norm before it."""

    def __init__(self, layer: Any, part: str) -> None:
        """Run ``part``, attention or mlp, of ``layer``, whose weights are shared."""
        super().__init__()
        attends = part == "attention"
        self.self_attn = layer.self_attn if attends else None
        self.mlp = None if attends else layer.mlp
        norm = "input_layernorm" if attends else "post_attention_layernorm"
        setattr(self, norm, getattr(layer, norm))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what a layer without the other part would, with a layer's arguments."""
        from core.model.modeling_depthcut import run_part  # it imports four families' code

        return run_part(self, hidden_states, *args, **kwargs)


def narrow_layer(layer: nn.Module, kept: Sequence[int]) -> nn.Module:
    """Return a decoder layer whose MLP has only the neurons ``kept``; other weights are shared."""
    narrow, mlp = copy.copy(layer), copy.copy(layer.mlp)
    narrow._modules, mlp._modules = dict(layer._modules), dict(layer.mlp._modules)
    first = isinstance(kept, range) and kept == range(len(kept))  # rows that need no copy
    at = torch.tensor(list(kept), device=mlp.down_proj.weight.device)
    for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        whole = getattr(mlp, name)
        linear = copy.copy(whole)
        linear._parameters = dict(whole._parameters)
        weight = whole.weight.detach()
        rows = first and axis == 0
        weight = weight[: len(kept)] if rows else weight.index_select(axis, at)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if axis == 0 and whole.bias is not None:
            bias = whole.bias.detach().index_select(0, at)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.out_features, linear.in_features = weight.shape
        mlp._modules[name] = linear
    narrow._modules["mlp"] = mlp
    return narrow


def _cache_for(config: Any, attends: Sequence[bool]) -> None:
    """Make transformers build caches with a layer for each block that attends, and no other.

    A cache asks ``get_text_config``; the entry in ``config`` hides the method until it is removed.
    """
    from core.model.modeling_depthcut import cached_layers

    def text_config(decoder: Any = None, encoder: Any = None) -> Any:
        return cached_layers(config, attends) if decoder and not encoder else config

    vars(config)["get_text_config"] = text_config


def _per_layer(saved: dict[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """Return the configuration's per-layer fields with only the blocks of ``keep``."""
    fields: dict[str, Any] = {"num_hidden_layers": len(keep)}
    if "layer_types" in saved:
        fields["layer_types"] = [saved["layer_types"][i] for i in keep]
    if "max_window_layers" in saved:
        fields["max_window_layers"] = sum(i < saved["max_window_layers"] for i in keep)
    return fields


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool ``mask`` in the additive form of eager attention."""
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
