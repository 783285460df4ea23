"""A causal language model as a sequence of blocks: embed, run block i, finish, or skip blocks.

One adapter serves transformers' LLaMA, Mistral, Qwen2 and Qwen3: their models share
``model.embed_tokens``, ``model.layers``, ``model.norm``, ``model.rotary_emb`` and ``lm_head``, and
differ in biases, in query/key norms and in the blocks that attend within a sliding window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.checkpoint import families
from core.checkpoint.drop import check_drop
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

    def weights(self, block: int) -> list[BlockWeight]:
        """Return the block's nine scored weights, in order of computation."""
        layer = self.blocks[block]
        return [
            BlockWeight(
                f"model.layers.{block}.{path}.weight",
                block,
                module,
                layer.get_submodule(path).weight,
            )
            for module, path in MODULES
        ]

    # computation

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings [rows, tokens, hidden] of token ids [rows, tokens]."""
        return self._body.embed_tokens(ids)

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

    def run_block(self, block: int, hidden: Tensor) -> Tensor:
        """Return the block's output for ``hidden`` [rows, tokens, hidden]; gradients flow."""
        return self.call_layer(self.blocks[block], block, hidden)

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

    def check_skip(self, blocks: Iterable[int]) -> frozenset[int]:
        """Return ``blocks`` as a set; raises `PlanError` if they cannot all be left out."""
        chosen = sorted({int(block) for block in blocks})
        return frozenset(check_drop(chosen, len(self), may_be_empty=True))

    @contextlib.contextmanager
    def skip(self, blocks: Iterable[int]) -> Iterator[PreTrainedModel]:
        """Make the model behave as if ``blocks`` were removed, until the context ends.

        Nothing is copied. ``model(...)`` and ``generate`` with a cache work inside: kept blocks
        are renumbered so that cache layers are contiguous, and the configuration's per-layer
        fields agree. Everything is restored on exit. Not thread-safe.

        Raises:
            PlanError: An index is out of range, or no block would remain.
        """
        dropped = self.check_skip(blocks)
        keep = [i for i in range(len(self)) if i not in dropped]
        layers, config = self.blocks, self.config
        numbers = [layer.self_attn.layer_idx for layer in layers]
        saved = {
            name: getattr(config, name)
            for name in ("num_hidden_layers", "layer_types", "max_window_layers")
            if getattr(config, name, None) is not None
        }
        try:
            self._body.layers = nn.ModuleList([layers[i] for i in keep])
            for number, layer in enumerate(self._body.layers):
                layer.self_attn.layer_idx = number
            for name, value in _per_layer(saved, keep).items():
                setattr(config, name, value)
            yield self.model
        finally:
            self._body.layers = layers
            for number, layer in zip(numbers, layers, strict=True):
                layer.self_attn.layer_idx = number
            for name, value in saved.items():
                setattr(config, name, value)


def _per_layer(saved: dict[str, Any], keep: list[int]) -> dict[str, Any]:
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
