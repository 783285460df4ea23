"""What a retraining needs, estimated before it starts: parameters, memory, tokens. No torch.

Tokens are counted by tokenising the rows (a sample of them in large sources). Memory is estimated
from shapes: weights, gradients, AdamW's two moments and activations. The time is the number of
floating-point operations divided by a speed, which the result states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.checkpoint import locate
from core.checkpoint.headers import CheckpointInfo
from core.data.sources import BUNDLED
from core.quantize import plan as quantize_plan
from core.retrain import batches, caches, layers, pace, partial, rows
from core.retrain.batches import sequences
from core.retrain.encoders import of_folder
from core.retrain.spec import (
    DDP,
    FSDP,
    NF4,
    WHOLE,
    RetrainSpec,
    Settings,
    Sharding,
    base_bits,
    goal_of,
    layout_of,
    settings_of,
    split,
)
from core.runs import devices, dtypes, ranks
from core.runs import pace as common
from core.runs.devices import MIB
from core.runs.footprint import Footprint, whole
from core.runs.progress import StderrProgress

SAMPLE_ROWS = 2000
"""Source rows to tokenise; the counts of a larger source are extrapolated from them."""
SPARING_SHARE = 0.1
"""Of the training time, for evaluations during it (`core.retrain.trainer.EVALUATION_SHARE`)."""
ROOM = 0.8
"""Share of the free memory that training may need without recomputation: measured peaks were up to
1.18 times their estimate."""
AT_ONCE = 16384
"""Tokens that a GPU computes at once at most. Chosen, not measured: larger products hardly
keep it busier."""
SHOWN_ROWS = 8
"""Training rows to show before a launch."""


def estimate(spec: RetrainSpec) -> dict[str, Any]:
    """Return the plan of a retraining as plain JSON values.

    Raises `InputError` for any input that the run itself would refuse.
    """
    checkpoint = locate.open(spec.checkpoint, StderrProgress(), need="config")
    info = checkpoint.info
    encoder = of_folder(checkpoint.folder)
    found = rows.prepare(spec, encoder, vocab=info.vocab, context=info.context, most=SAMPLE_ROWS)
    settings_of(spec, 1, info.parameters)  # checks the options before the work
    packs = sequences(found.train, layout_of(spec), spec.cutoff, spec.seed)
    held_out = 0 if spec.holdout_data or spec.data in BUNDLED else len(found.heldout)
    available = found.source_rows - held_out
    scale = max(1.0, available / SAMPLE_ROWS)
    count = round(len(packs) * scale)
    settings = settings_of(spec, count, info.parameters)
    lengths = [sum(len(row.ids) for row in pack) for pack in packs]
    mean = sum(lengths) / len(lengths)
    tokens = round(mean * settings.steps * settings.batch)
    device, free = devices.free_bytes(spec.device)
    blocks = partial.blocks_of(spec, info.blocks, checkpoint.folder)
    trainable = trainable_parameters(spec, info, blocks)
    case = Case(info, checkpoint.config, trainable, device, free, max(lengths), blocks[0])
    how = fit(spec, settings, case)
    decided = how.recomputation
    spec, settings, memory = as_decided(spec, how, case)
    reason = layers.why_stock(spec, info.parameters, checkpoint.config)
    needed = sum(memory.values())
    goal = goal_of(spec)
    read = {row for row in found.train} if goal.is_kept else set()
    few = batches.takes_few(settings.steps, settings.batch, count)
    share = scale * (settings.steps * settings.batch / count if few else 1.0)
    kept = caches.needed_bytes(sum(row.items for row in read), goal.top_k)
    flops = training_flops(spec, info, tokens, blocks[0])
    flops += 2.0 * info.parameters * sum(len(row.ids) for row in read) * share
    once = 2.0 * info.parameters * sum(len(row.ids) for row in found.heldout)
    flops += evaluation_flops(spec, settings, once, flops)
    speed = pace.flops_per_s(spec.method, spec.device, info.parameters)
    origin = common.MEASURED if speed else None
    if speed is None:
        speed, origin = common.expected((), spec.device, info.parameters)
    warnings = []
    if free is not None and needed > free:
        ways = ["a smaller --micro-batch"]
        ways += [] if decided.on else ["--gradient-checkpointing on"]
        if how.sharding:
            ways.append("more --processes" if how.sharding.on else "--sharding fsdp")
        warnings.append(
            f"This needs about {needed / MIB:,.0f} MiB, but {device} has {free / MIB:,.0f} MiB "
            f"free. Try {', '.join(ways)} or --method lora."
        )
    if settings.batch > count:
        warnings.append(
            f"A batch of {settings.batch} is larger than the {count} sequences of the data: every "
            "step takes some of them more than once."
        )
    if found.cut:
        warnings.append(f"{found.cut} rows are longer than {spec.cutoff} tokens and will be cut.")
    if found.dropped:
        warnings.append(
            f"{found.dropped} rows are skipped: no usable text, no response within the cutoff, or "
            "held out."
        )
    if found.refused:
        warnings.append(found.refused)
    longest = max(found.train, key=lambda row: min(len(row.ids), 120))
    seconds = flops / speed if speed else None
    return {
        "dry_run": True,
        "method": spec.method,
        "parameters": info.parameters,
        "trainable_parameters": trainable,
        "trainable_share": trainable / info.parameters,
        "data": {**found.data, "kind": found.kind, "template": found.template},
        "rows": round(len(found.train) * scale),
        "heldout_rows": len(found.heldout),
        "sequences": count,
        "counted_all_rows": scale == 1.0,
        "settings": asdict(settings),
        "fused": reason is None,
        "not_fused_because": reason,
        "recomputed": decided.on,
        "recomputed_because": decided.why,
        "micro_batch_because": how.why,
        **(
            {"sharding": how.sharding.option, "sharding_because": how.sharding.why}
            if how.sharding
            else {}
        ),
        "tokens": tokens,
        "tokens_with_loss_share": sum(r.items for r in found.train)
        / sum(len(r.ids) for r in found.train),
        "tokens_per_sequence": mean,
        "device": device,
        "memory_bytes": {**memory, "total": needed},
        **footprint(spec, settings, info, needed, flops, tokens, blocks[0]).facts(),
        "teacher_disk_bytes": round(kept * share),
        "free_bytes": free,
        "fits": None if free is None else needed <= free,
        "flops": flops,
        "seconds": ranks.shared_seconds(seconds, spec.device, spec.processes),
        **ranks.facts(spec.processes, settings.batch),
        "assumed_flops_per_s": speed,
        "seconds_from": origin if speed else None,
        "sample": rows.preview(longest, encoder),
        "samples": [rows.preview(row, encoder) for row in found.train[:SHOWN_ROWS]],
        "warnings": warnings,
    }


@dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and the device that it has to fit on."""

    info: CheckpointInfo
    """Of the pruned checkpoint."""
    config: Mapping[str, Any]
    """Content of its config.json."""
    trainable: int
    """Number of trained parameters."""
    device: str
    """Name of the device."""
    free: int | None
    """Its free memory in bytes; None if unknown."""
    longest: int
    """Tokens of the longest sequence."""
    first: int = 0
    """The first block that is trained."""


def as_decided(
    spec: RetrainSpec, how: Fit, case: Case
) -> tuple[RetrainSpec, Settings, dict[str, int]]:
    """Return options, settings and bytes for each purpose as `fit` decided."""
    spec = replace(spec, gradient_checkpointing=how.recomputation.option)
    if how.sharding:
        spec = replace(spec, sharding=how.sharding.option)
    return spec, how.settings, _memory(spec, how.settings, case)


def _memory(spec: RetrainSpec, settings: Settings, case: Case) -> dict[str, int]:
    """Return the bytes for each purpose, with the layers that such a training takes."""
    fused = layers.why_stock(spec, case.info.parameters, case.config) is None
    about = case.info, case.trainable, case.device, case.longest
    return memory_parts(spec, settings, *about, fused=fused, first=case.first)


def footprint(
    spec: RetrainSpec,
    settings: Settings,
    info: CheckpointInfo,
    needed: int,
    flops: float,
    tokens: int,
    first: int = 0,
) -> Footprint:
    """Return what a training takes.

    The weights pass forward, backward and, if activations are recomputed, once more for every
    micro-batch.

    Args:
        spec: The options, as `as_decided` returns them.
        settings: The same.
        info: Of the pruned checkpoint.
        needed: Bytes of one process.
        flops: Operations without those of recomputing.
        tokens: That are trained on.
        first: The first block that is trained.
    """
    again = layers.recomputes(spec, info.parameters)
    micro = settings.steps * -(-settings.accumulation // spec.processes)
    written = 0 if spec.method == "lora" and not spec.merge else info.stored_bytes
    return Footprint(
        memory_bytes=needed,
        way=whole(needed, None),
        flops=flops + again * 2.0 * sum(info.block_parameters[first:]) * tokens,
        passes=micro * (2 + again),
        read_bytes=info.stored_bytes,
        written_bytes=written,
        processes=spec.processes,
    )


def evaluation_flops(spec: RetrainSpec, settings: Settings, once: float, training: float) -> float:
    """Return the operations of all evaluations, of which one takes ``once``.

    Of the dense model, of the pruned one, during training (as many as its share of the ``training``
    allows, but at least one), and of the merged checkpoint.
    """
    during = settings.steps // settings.eval_every + (settings.steps % settings.eval_every > 0)
    meanwhile = during * once
    if settings.sparing:
        meanwhile = min(meanwhile, once + SPARING_SHARE * training)
    return (2 + (spec.method == "lora" and spec.merge)) * once + meanwhile


def trainable_parameters(
    spec: RetrainSpec, info: CheckpointInfo, blocks: Sequence[int] = ()
) -> int:
    """Return the number of trained parameters: all, or rank x (in + out) of every adapter.

    Partial fine-tuning trains ``blocks``, and the output matrix unless it is the embedding.
    """
    if spec.method == "partial":
        head = 0 if info.tied else info.parts.get("head", 0)
        return sum(info.block_parameters[block] for block in blocks) + head
    if spec.method != "lora":
        return info.parameters
    return sum(
        spec.rank * sum(widths)
        for block in range(info.blocks)
        for name, widths in info.projections(block).items()
        if name in spec.targets and all(widths)
    )


@dataclass(frozen=True)
class Recomputation:
    """Whether activations are recomputed in the backward pass, and why."""

    on: bool
    why: str

    @property
    def option(self) -> str:
        """The value of --gradient-checkpointing that means it."""
        return "on" if self.on else "off"


@dataclass(frozen=True)
class Fit:
    """How a training runs within the memory."""

    settings: Settings
    recomputation: Recomputation
    why: str
    """Why this number of sequences is computed at once."""
    needed: int | None = None
    """Estimated bytes of one process; None if free memory is not known."""
    sharding: Sharding | None = None
    """None in a single process, and if not all weights are trained."""


def fit(spec: RetrainSpec, settings: Settings, case: Case) -> Fit:
    """Return how a training runs within the memory; ``settings`` have every default filled in.

    Weights are split among processes if that is asked for, or if each GPU cannot hold them whole.
    """
    if spec.processes == 1 or spec.method not in WHOLE:
        return _fit(spec, settings, case)
    if spec.sharding != "auto":
        decided = Sharding(spec.sharding == FSDP, f"--sharding {spec.sharding}")
        return replace(_fit(spec, settings, case), sharding=decided)
    found, device = _fit(replace(spec, sharding=DDP), settings, case), case.device
    if device == "cpu":
        return replace(found, sharding=Sharding(False, "on a CPU they share one memory"))
    if spec.dtype == "float16":
        return replace(found, sharding=Sharding(False, "float16 is not trained otherwise"))
    if found.needed is None or case.free is None:
        unknown = f"the free memory of {device} is not known"
        return replace(found, sharding=Sharding(False, unknown))
    why = (
        f"replicas need an estimated {found.needed / MIB:,.0f} MiB on each GPU, and {device} has "
        f"{case.free / MIB:,.0f} MiB free"
    )
    if found.needed <= ROOM * case.free:
        return replace(found, sharding=Sharding(False, why))
    parted = _fit(replace(spec, sharding=FSDP), settings, case)
    assert parted.needed is not None
    why += f"; split, each needs an estimated {parted.needed / MIB:,.0f} MiB"
    return replace(parted, sharding=Sharding(True, why))


def _fit(spec: RetrainSpec, settings: Settings, case: Case) -> Fit:
    """Return how many sequences to compute at once, and whether to recompute activations.

    What is asked for is kept. Otherwise a GPU takes as many sequences as fit, up to `AT_ONCE`
    tokens, and recomputes activations rather than going below the usual number; a CPU takes the
    usual number, and fewer rather than recomputing. If the free memory is not known, recomputation
    goes by the model's size, and the usual number of sequences is taken.
    """
    device, free, longest = case.device, case.free, case.longest
    asked, usual = spec.gradient_checkpointing, settings.micro_batch
    if free is None:
        large = case.info.parameters > layers.LARGE
        size = "more" if large else "no more"
        unknown = f"the free memory of {device} is not known"
        why = (
            f"{unknown}, and the model has {size} than {layers.LARGE / 1e9:.0f} billion parameters"
        )
        if asked != "auto":
            large, why = asked == "on", f"--gradient-checkpointing {asked}"
        given = f"--micro-batch {usual}" if spec.micro_batch else unknown
        return Fit(settings, Recomputation(large, why), given)

    def needed(micro: int, option: str) -> int:
        kept = replace(spec, gradient_checkpointing=option)
        tried = with_micro_batch(settings, micro, spec.processes)
        return sum(_memory(kept, tried, case).values())

    def largest(sizes: Sequence[int], option: str) -> int | None:
        return next((size for size in sizes if needed(size, option) <= ROOM * free), None)

    has = f"{device} has {free / MIB:,.0f} MiB free"
    sizes = (
        [usual] if spec.micro_batch else _micro_batches(settings, device, longest, spec.processes)
    )
    if asked != "auto":
        micro = largest(sizes, asked) or sizes[-1]
        decided = Recomputation(asked == "on", f"--gradient-checkpointing {asked}")
    else:
        # of several processes, each may have fewer in a batch than the usual number
        least_of_gpu = min(usual, sizes[0])
        tried = [size for size in sizes if device == "cpu" or size >= least_of_gpu]
        kept = largest(tried, "off")
        micro = kept or largest(sizes, "on") or sizes[-1]
        least = needed(kept or tried[-1], "off")
        told = f"keeping activations needs an estimated {least / MIB:,.0f} MiB in total, and {has}"
        decided = Recomputation(kept is None, told)
    why = f"--micro-batch {usual}"
    total = needed(micro, decided.option)
    if not spec.micro_batch:
        estimated = f"{total / MIB:,.0f} MiB in total"
        why = f"{micro} x {longest} tokens need an estimated {estimated}, and {has}"
    return Fit(with_micro_batch(settings, micro, spec.processes), decided, why, total)


def with_micro_batch(settings: Settings, micro: int, processes: int) -> Settings:
    """Return the settings with another number of sequences at once; a step has as many."""
    micro, accumulation = split(settings.batch, micro, processes)
    return replace(settings, micro_batch=micro, accumulation=accumulation)


def _micro_batches(settings: Settings, device: str, longest: int, processes: int) -> list[int]:
    """Return the numbers of sequences that may be computed at once, the most first.

    Each splits a process's part of a batch into equal parts, as far as it goes.
    """
    batch, most = -(-settings.batch // processes), settings.micro_batch
    if device != "cpu":
        most = min(batch, max(most, AT_ONCE // longest))
    sizes = {-(-batch // parts) for parts in range(1, batch + 1)}
    return sorted((size for size in sizes | {settings.micro_batch} if size <= most), reverse=True)


def memory_parts(
    spec: RetrainSpec,
    settings: Settings,
    info: CheckpointInfo,
    trainable: int,
    device: str,
    longest: int,
    *,
    fused: bool,
    first: int = 0,
) -> dict[str, int]:
    """Return the bytes of a process for each purpose with the longest micro-batch.

    ``first`` is the first block that is trained: those below it keep nothing.
    """
    held, computed = _widths(spec, info, device)
    lora = spec.method == "lora"
    tokens = settings.micro_batch * longest
    if fused:
        block = fused_block(spec, info, device, held, computed)
    else:
        block = stock_block(spec, info, computed)
    kept = block * (info.blocks - first)
    if layers.recomputes(spec, info.parameters):
        kept = info.hidden * computed * info.blocks + block
    # A copy of all blocks' weights in the precision they compute in; of one block's at a time if
    # the weights are split, unless autograd keeps the copies for the layers of transformers.
    split_ = spec.sharding == FSDP
    largest = max(info.block_parameters, default=0)
    brief = split_ and (fused or layers.recomputes(spec, info.parameters))
    copied = largest if brief else info.parts["blocks"]
    copies = copied * computed if (fused or split_) and held != computed else 0
    teacher = info.parameters * computed if goal_of(spec).is_live else 0
    whole = spec.dtype == "float16"
    frozen = info.parameters * held
    if bits := base_bits(spec):
        plan = quantize_plan.make(info, bits, None)
        small = plan.nf4_bytes if spec.quantized_base == NF4 else plan.quantized_bytes
        frozen += small - plan.parameters * held
    parts = {
        "weights": frozen + (4 * trainable if lora else 0),
        "gradients": trainable * (4 if lora else held),
        "optimiser": 2 * trainable * (4 if lora else held),
        "activations": round(tokens * kept) + copies,
        # Logits, their float32 copy, its log-softmax and two gradients; at once only in float16.
        "logits": round(
            min(4 * tokens * info.vocab, math.inf if whole else layers.PIECE_BYTES)
            * (4 + computed / 4)
        ),
        "teacher": teacher,
    }
    if split_:
        for name in ("weights", "gradients", "optimiser", "teacher"):
            parts[name] = ranks.most(parts[name], spec.processes)
        # Weights and gradients of what is gathered at once: two blocks, and what is outside blocks;
        # of a live teacher, weights. Loading and writing gather less: one tensor.
        at_once = 2 * largest + info.parameters - info.parts["blocks"]
        parts["gathered"] = at_once * (2 * held + (computed if teacher else 0))
    return parts


def stock_block(spec: RetrainSpec, info: CheckpointInfo, computed: int) -> float:
    """Return the bytes per token that the backward pass of one stock block keeps.

    These are its input and two normed inputs, attention's four projections, two residuals, and
    gate, up and their product. Adapters keep their own inputs, in float32.
    """
    query = info.heads * info.head_dim
    attention = query * 2 + info.kv_heads * info.head_dim * 2
    block = (5 * info.hidden + 2 * attention + 4 * info.intermediate) * computed
    return block + (4 * sum(_inputs(spec, info)) if spec.method == "lora" else 0)


def fused_block(
    spec: RetrainSpec, info: CheckpointInfo, device: str, held: int, computed: int
) -> float:
    """Return the bytes per token that `core.retrain.fused` keeps of one block.

    These are two residuals and their normed copies, queries, keys, values (keys and values are
    repeated to the number of query heads if they have fewer), attention's output, and gate, up and
    their product. An adapter keeps ``rank`` numbers and what dropout drew: an 8-byte position for
    each dropped element on the CPU, a byte for each element on a GPU.
    """
    query, key = info.heads * info.head_dim, info.kv_heads * info.head_dim
    attention = 2 * query + 2 * key + (2 * query if key < query else 0)
    block = 2 * info.hidden * held
    block += (2 * info.hidden + attention + 3 * info.intermediate) * computed
    if spec.method != "lora":
        return block
    mask = 0.0 if not spec.dropout else 8 * spec.dropout if device == "cpu" else 1
    return block + len(spec.targets) * spec.rank * computed + mask * sum(_inputs(spec, info))


def _inputs(spec: RetrainSpec, info: CheckpointInfo) -> list[int]:
    """Return the input size of every projection that has an adapter."""
    sizes = {"down_proj": info.intermediate, "o_proj": info.heads * info.head_dim}
    return [sizes.get(name, info.hidden) for name in spec.targets]


def _widths(spec: RetrainSpec, info: CheckpointInfo, device: str) -> tuple[int, int]:
    """Return bytes per element of held weights and of computed activations."""
    purpose: dtypes.Purpose = "adapters" if spec.method == "lora" else "training"
    found = dtypes.expected(spec.dtype, info.dtype, device, purpose)
    return dtypes.BYTES[found.weights], dtypes.BYTES[found.arithmetic]


def training_flops(spec: RetrainSpec, info: CheckpointInfo, tokens: int, first: int = 0) -> float:
    """Return floating-point operations: per parameter and token 2 forward and 2 to 4 backward.

    LoRA needs no gradients of frozen weights, so its backward pass costs as much as the forward.
    Below block ``first``, the first that is trained, there is none.
    """
    table = 0 if info.tied else info.parts.get("embedding", 0)
    weights = info.parameters - table
    forward = 2.0 * weights * tokens
    frozen = sum(info.block_parameters[:first])
    backward = 2.0 * (weights - frozen) * tokens * (1 if spec.method == "lora" else 2)
    return forward + backward + (forward if goal_of(spec).is_live else 0)
