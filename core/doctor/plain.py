"""The same numbers with stock transformers, in the plainest way: what the CPU is compared with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Rows = Sequence[Sequence[int]]


def load(folder: Path, rounded: torch.dtype | None = None) -> Any:
    """Return the model in float32 on the CPU, its weights first rounded to a format if given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if rounded is not None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.to(rounded))
    return model.eval().requires_grad_(False)


def without(model: Any, blocks: Iterable[int]) -> Any:
    """Return a copy from which the blocks are really gone."""
    smaller = copy.deepcopy(model)
    gone = set(blocks)
    smaller.model.layers = nn.ModuleList(
        layer for number, layer in enumerate(smaller.model.layers) if number not in gone
    )
    for number, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = number
    smaller.config.num_hidden_layers = len(smaller.model.layers)
    return smaller


def losses(model: Any, rows: Rows) -> Tensor:
    """Return the mean loss of every row [rows], rows of one length, in nats."""
    found = []
    for row in rows:
        ids = torch.tensor([list(row)])
        found.append(model(ids, labels=ids, use_cache=False).loss)
    return torch.stack(found)


def perplexity(model: Any, rows: Rows) -> float:
    """Return exp of the mean loss over all predictions."""
    with torch.no_grad():
        return math.exp(float(losses(model, rows).double().mean()))


def mean_loss(model: Any, rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Return the loss per predicted token of rows of ids and labels (-100: not predicted)."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in rows:
            logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
            wanted = torch.tensor(list(labels)[1:])
            total += float(functional.cross_entropy(logits.double(), wanted, reduction="sum"))
            count += int((wanted != -100).sum())
    return total / count


def divergence(dense: Any, other: Any, rows: Rows) -> float:
    """Return KL(dense || other), the mean over all positions that predict a token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            p, q = (
                model(torch.tensor([list(row)]), use_cache=False).logits[0, :-1].double()
                for model in (dense, other)
            )
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total, count = total + float((p.exp() * (p - q)).sum()), count + len(p)
    return total / count


def importance(model: Any, rows: Rows, rounds: int) -> dict[str, list[float]]:
    """Return every metric of an importance run, by the names of `core.doctor.checks.scores`."""
    blocks = len(model.model.layers)
    found = {
        "ppl": [perplexity(model, rows)]
        + [perplexity(without(model, [block]), rows) for block in range(blocks)],
        **_first_order(model, rows),
        **_similarities(model, rows),
        "kl": [divergence(model, without(model, [block]), rows) for block in range(blocks)],
        "sublayers": [],
        "sleb": [],
    }
    for block in range(blocks):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            silent = copy.deepcopy(model)
            silent.model.layers[block].get_submodule(part).weight.zero_()
            found["sublayers"].append(perplexity(silent, rows))
    gone: list[int] = []
    for _ in range(rounds):
        left = [b for b in range(1, blocks - 1) if b not in gone]
        values = {b: perplexity(without(model, [*gone, b]), rows) for b in left}
        best = min(values, key=lambda b: values[b])
        gone.append(best)
        found["sleb"].append(values[best])
    return found


def _first_order(model: Any, rows: Rows) -> dict[str, list[float]]:
    """Return Taylor (gradient times weight) and magnitude of every block."""
    whole = copy.deepcopy(model).requires_grad_(True)
    losses(whole, rows).mean().backward()
    layers = [list(layer.parameters()) for layer in whole.model.layers]
    return {
        "taylor": [
            sum(float((w * w.grad).detach().abs().sum()) for w in layer) for layer in layers
        ],
        "magnitude": [sum(float(w.detach().abs().sum()) for w in layer) for layer in layers],
    }


def _similarities(model: Any, rows: Rows) -> dict[str, list[float]]:
    """Return Block Influence, relative update and angular distances from the hidden states."""
    states: list[Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))]
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda _m, _a, out: states.append(_state(out))))
    with torch.no_grad():
        model(torch.tensor([list(row) for row in rows]), use_cache=False)
    for hook in hooks:
        hook.remove()

    def cosine(x: Tensor, y: Tensor) -> Tensor:
        return functional.cosine_similarity(x.double(), y.double(), dim=-1)

    def change(x: Tensor, y: Tensor) -> float:
        return float(((y - x).norm(dim=-1) / y.norm(dim=-1)).mean())

    pairs = list(zip(states, states[1:], strict=False))
    angles = [
        float((torch.arccos(cosine(x[:, -1], y[:, -1]).clamp(-1, 1)) / math.pi).mean())
        for start, x in enumerate(states)
        for y in states[start + 1 :]
    ]
    return {
        "block_influence": [1 - float(cosine(x, y).mean()) for x, y in pairs],
        "relative_update": [
            float(((y - x).norm(dim=-1) / y.norm(dim=-1)).mean()) for x, y in pairs
        ],
        "angular": angles,
    }


def _state(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output).clone()


def continuation(model: Any, ids: Sequence[int], tokens: int, end: Sequence[int]) -> list[int]:
    """Return the likeliest next tokens one by one, by whole passes without a cache."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(tokens):
            found.append(int(model(torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
            if found[-1] in end:
                break
    return found[len(ids) :]


def likelihood(model: Any, before: Sequence[int], after: Sequence[int]) -> float:
    """Return the log-likelihood of the tokens ``after`` behind the tokens ``before``."""
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *after]]), use_cache=False).logits[0]
    logs = logits[len(before) - 1 : -1].double().log_softmax(-1)
    return float(logs.gather(1, torch.tensor(list(after))[:, None]).sum())


def silenced(model: Any, blocks: Iterable[Any], biases: dict[str, Tensor]) -> Any:
    """Return a copy whose dropped heads and neurons contribute nothing.

    Args:
        model: The dense model.
        blocks: `core.width.results.BlockCut` of every block.
        biases: Biases of output projections, by name, that stand for what was dropped.
    """
    quiet = copy.deepcopy(model)
    size = quiet.config.head_dim
    for cut in blocks:
        layer = quiet.model.layers[cut.block]
        for head in cut.dropped_heads:
            layer.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0.0
        layer.mlp.down_proj.weight[:, list(cut.dropped_neurons)] = 0.0
    for name, bias in biases.items():
        quiet.get_submodule(name.removesuffix(".bias")).bias = nn.Parameter(bias.float(), False)
    return quiet
