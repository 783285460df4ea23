"""The same quantities computed plainly: stock transformers, whole batches, python loops."""

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

PROJECTIONS = {"q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}
"""Projection -> the axis of its weight along which units lie."""


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def projection(layer, name):
    part = layer.mlp if name in ("gate", "up", "down") else layer.self_attn
    return getattr(part, f"{name}_proj")


def losses(model, rows):
    """Mean next-token loss of every row, with gradients."""
    ids = torch.tensor(rows)
    logits = model(ids, use_cache=False).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return nll.view(len(rows), -1).mean(1)


def gradients(model, loss):
    """(block, projection) -> gradient of ``loss``."""
    keys, tensors = [], []
    for block, layer in enumerate(model.model.layers):
        for name in PROJECTIONS:
            keys.append((block, name))
            tensors.append(projection(layer, name).weight)
    return dict(zip(keys, torch.autograd.grad(loss, tensors, retain_graph=True), strict=True))


def contiguous(group, queries):
    """The query heads of a key/value head as transformers repeats them."""
    return [group * queries + q for q in range(queries)]


def folded(group, queries, groups=2):
    """The query heads that the public code adds up for a key/value head: the wrong ones."""
    return [q * groups + group for q in range(queries)]


def unit_scores(elementwise, heads, groups, width, queries_of=contiguous):
    """Sum elementwise scores {projection: tensor} by group and neuron, head by head."""
    queries = heads // groups
    by_group = []
    for group in range(groups):
        total = 0.0
        for name in ("k", "v"):
            total += float(elementwise[name][group * width : (group + 1) * width].sum())
        for head in queries_of(group, queries):
            at = slice(head * width, (head + 1) * width)
            total += float(elementwise["q"][at].sum() + elementwise["o"][:, at].sum())
        by_group.append(total)
    by_neuron = [
        float(
            elementwise["gate"][n].sum()
            + elementwise["up"][n].sum()
            + elementwise["down"][:, n].sum()
        )
        for n in range(elementwise["gate"].shape[0])
    ]
    return by_group, by_neuron


def inputs_of(model, rows):
    """(block, "o" | "down") -> what enters that projection, [tokens, channels]."""
    seen = {}
    hooks = []
    for block, layer in enumerate(model.model.layers):
        for name in ("o", "down"):

            def hook(_, given, key=(block, name)):
                seen[key] = given[0].detach().flatten(0, 1).double()

            hooks.append(projection(layer, name).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(torch.tensor(rows), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def masked(model, record, width, means=None):
    """Zero in ``model`` what pruning.json says was dropped, nothing made smaller.

    ``means``: inputs' means of the dense model; their share in the output is put back.
    """
    for entry in record["blocks"]:
        layer = model.model.layers[entry["block"]]
        channels = [h * width + c for h in entry["dropped_heads"] for c in range(width)]
        for name, gone in (("o", channels), ("down", entry["dropped_neurons"])):
            linear = projection(layer, name)
            with torch.no_grad():
                if means is not None:
                    mean = means[entry["block"], name].float()
                    extra = linear.weight[:, gone] @ mean[gone]
                    linear.register_forward_hook(lambda _, __, out, extra=extra: out + extra)
                linear.weight[:, gone] = 0.0
    return model
