"""Time blocks in the manner of the benchmark: whole generations, with cache and sampling.

One block alone would stay in the processor's cache, which a whole model never does. So the loaded
model is timed with all its blocks as one version, the first excepted, and with that first block
alone: the difference, shared among the others, is the time of one such block, and what the first
block alone leaves is the embedding, the head, sampling and the overhead of a step. Versions take
turns, so that a change of the machine's speed hits all of them alike. If not all blocks fit in
memory, as many as do are timed together.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from core.benchmark.generate import force_length, import_and_settle, prompt_ids, stepwise
from core.budget.demand import LEAST_BLOCKS
from core.budget.versions import LOSES, neurons_left
from core.checkpoint.drop import Removal
from core.model.blocks import BlockView, PartOfLayer, narrow_layer
from core.prune.version_results import MLP_SHARES, WHOLE
from core.runs.progress import SILENT, Progress

_KEPT: dict[tuple[str, ...], str] = {("mlp",): "attention", ("attention",): "mlp"}


@dataclass(frozen=True)
class Seconds:
    """Seconds for the prompts, and for one more token of every sequence."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Timing:
    """What was timed."""

    rest: Seconds
    """Outside the blocks."""
    dense: Seconds | None
    """The whole model; None if it was not in memory."""
    of: dict[tuple[int, str], Seconds]
    """(block, version) -> the block's own time; dropped blocks take none."""
    seconds: float
    """What timing took."""
    noise: float = 0.0
    """How much steps of one kind vary: the middle half of their times, as a share of the median;
    the median over all kinds."""


@dataclass
class _Stack:
    """Layers that are timed in place of the model's own."""

    layers: list[nn.Module]
    sources: list[int]
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    """Of all generations: one that another program disturbed hardly moves their median."""

    def median(self) -> Seconds:
        return Seconds(statistics.median(self.prompts), statistics.median(self.steps))

    def spread(self) -> float:
        """Return the width of the middle half of the steps' times, as a share of their median."""
        low, middle, high = statistics.quantiles(self.steps, n=4)
        return (high - low) / middle if middle > 0 else 0.0


def version_of(layer: Any, version: str) -> nn.Module:
    """Return a decoder layer as ``version``; weights are shared, but for narrower MLPs.

    Which neurons these keep does not matter to the time: the first ones.
    """
    if version in MLP_SHARES:
        count = neurons_left(layer.mlp.down_proj.in_features, version)
        return narrow_layer(layer, range(count))
    parts = LOSES.get(version, ())
    return PartOfLayer(layer, _KEPT[parts]) if parts else layer


def measure(
    view: BlockView,
    groups: Sequence[Sequence[int]],
    versions: Sequence[str],
    *,
    batch: int,
    context: int,
    runs: int,
    steps: int,
    layers: int | None = None,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> Timing:
    """Time all ``versions`` and whole blocks of every group of blocks that are alike.

    Args:
        view: The model, held in what a benchmark would hold it.
        groups: Blocks that take equally long; together all blocks.
        versions: What blocks can become; ``drop`` takes no time.
        batch: Sequences at once.
        context: Tokens of every prompt.
        runs: Rounds of timings; the median counts. One more round comes first, as warm-up.
        steps: Tokens generated after the prompt in every timing.
        layers: Blocks that are timed together. Default: as many as the model has.
        tokenizer: For the benchmark's prompt; without one it is a fixed sequence of ids.
        progress: Updated after every timing.
    """
    began = time.perf_counter()
    import_and_settle(view.device)
    named = [WHOLE, *(v for v in versions if v != "drop")]
    stacks: dict[tuple[int, str], _Stack] = {}
    every = range(len(view))
    stacks[-1, WHOLE] = _Stack(list(view.blocks), list(every))
    for number, group in enumerate(groups):
        lent, sources = _alike(view, group, layers or len(view))
        stacks[number, ""] = _Stack(lent[:1], sources[:1])
        for version in named:
            if version == WHOLE and list(group) == list(every) == sources:
                stacks[number, version] = stacks[-1, WHOLE]
                continue
            others = [version_of(layer, version) for layer in lent[1:]]
            stacks[number, version] = _Stack([lent[0], *others], sources)
    different = list({id(stack): stack for stack in stacks.values()}.values())
    _time(view, different, batch, context, runs, steps, tokenizer, progress, "Timing")
    return _apart(stacks, groups, named, time.perf_counter() - began)


def whole(
    view: BlockView,
    removals: Sequence[Removal],
    *,
    batch: int,
    context: int,
    runs: int,
    steps: int,
    tokenizer: Any = None,
    progress: Progress = SILENT,
) -> tuple[Seconds, list[Seconds]]:
    """Time the dense model, and the model without each of ``removals``, in turns.

    The arguments are those of `measure`.
    """
    stacks = []
    for removal in (Removal(), *removals):
        layers, sources = view.layers_without(removal)
        stacks.append(_Stack(layers, sources))
    _time(view, stacks, batch, context, runs, steps, tokenizer, progress, "Timing plans")
    dense, *others = [stack.median() for stack in stacks]
    return dense, others


def _time(
    view: BlockView,
    stacks: Sequence[_Stack],
    batch: int,
    context: int,
    runs: int,
    steps: int,
    tokenizer: Any,
    progress: Progress,
    label: str,
) -> None:
    """Add the times of all ``stacks``, which take turns; the first round warms up."""
    vocab = int(view.config.vocab_size)
    ids = torch.tensor([prompt_ids(tokenizer, vocab, context)] * batch, device=view.device)
    before = view.model.generation_config
    try:
        config = force_length(view.model, steps + 1)
        total = (runs + 1) * len(stacks)
        for turn in range(runs + 1):
            for place, stack in enumerate(stacks):
                progress.check_cancel()
                with view.arranged(stack.layers, stack.sources) as model:
                    first, others = stepwise(model, ids, config)
                if turn:
                    stack.prompts.append(first)
                    stack.steps += others
                done = turn * len(stacks) + place + 1
                progress.step(done, total, f"{label}, round {turn + 1} of {runs + 1}")
    finally:
        view.model.generation_config = before


def some(groups: Sequence[Sequence[int]], layers: int) -> list[int]:
    """Return the blocks to load so that ``layers`` of every group can be timed, or all it has."""
    return sorted(block for group in groups for block in group[: max(layers, LEAST_BLOCKS)])


def partly(
    view: BlockView, loaded: Sequence[int], groups: Sequence[Sequence[int]], *args: Any, **more: Any
) -> Timing:
    """Return `measure` of a model of which ``view`` has the blocks ``loaded`` alone.

    The blocks of a group count as equally fast.
    """
    local = [[at for at, block in enumerate(loaded) if block in set(group)] for group in groups]
    found = measure(view, local, *args, **more)
    of = {
        (block, version): seconds
        for group, own in zip(groups, local, strict=True)
        for (at, version), seconds in found.of.items()
        if at == own[0]
        for block in group
    }
    return replace(found, dense=None, of=of)


def _alike(view: BlockView, group: Sequence[int], most: int) -> tuple[list[nn.Module], list[int]]:
    """Return ``most`` layers of the group, with copies if it has fewer."""
    wanted = max(most, LEAST_BLOCKS)
    own = list(group)[:wanted]
    layers: list[nn.Module] = [view.blocks[block] for block in own]
    sources = [*own, *(own[at % len(own)] for at in range(wanted - len(own)))]
    layers += [copy.deepcopy(view.blocks[block]) for block in sources[len(own) :]]
    return layers, sources


def _apart(
    stacks: Mapping[tuple[int, str], _Stack],
    groups: Sequence[Sequence[int]],
    named: Sequence[str],
    seconds: float,
) -> Timing:
    """Split the times of whole models into those of blocks and of the rest."""
    of: dict[tuple[int, str], Seconds] = {}
    rests: list[Seconds] = []
    weights: list[int] = []
    for number, group in enumerate(groups):
        one = stacks[number, ""].median()
        each: dict[str, Seconds] = {}
        for version in named:
            stack = stacks[number, version]
            many, others = stack.median(), len(stack.layers) - 1
            each[version] = Seconds(
                max(0.0, (many.prefill - one.prefill) / others),
                max(0.0, (many.decode - one.decode) / others),
            )
        whole = each[WHOLE]
        rests.append(
            Seconds(max(0.0, one.prefill - whole.prefill), max(0.0, one.decode - whole.decode))
        )
        weights.append(len(group))
        for block in group:
            of |= {(block, version): each[version] for version in named}
            of[block, "drop"] = Seconds(0.0, 0.0)
    rest = Seconds(
        sum(r.prefill * w for r, w in zip(rests, weights, strict=True)) / sum(weights),
        sum(r.decode * w for r, w in zip(rests, weights, strict=True)) / sum(weights),
    )
    noise = statistics.median(stack.spread() for stack in stacks.values())
    return Timing(rest, stacks[-1, WHOLE].median(), of, seconds, noise)
