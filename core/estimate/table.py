"""Memory, bytes read and time of every command, by roofline; no torch.

What a command takes is what its own dry run computes (`core.runs.footprint.Footprint`); here it is
only put on a machine. Time is the largest of two: operations at a share of the device's peak, and
weights and caches through its memory. If the weights fit they are read from the disk before; if
not, each pass reads them while it computes. Files are written afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from core.benchmark import command as benchmark
from core.budget import command as budget
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.errors import DepthcutError
from core.estimate.machines import (
    BANDWIDTH_SHARE,
    DEVICE,
    DISK_BYTES_PER_S,
    MACHINES,
    MATMUL_SHARE,
    Machine,
)
from core.evaluate import estimate as evaluating
from core.evaluate.spec import EvaluateSpec
from core.export import command as export
from core.export import layout
from core.generate import command as generate
from core.heal import command as prune
from core.heal import seams
from core.importance import capacity, curve_command
from core.importance import command as importance
from core.importing import needs as importing
from core.prune.plan import default_protection
from core.quantize import plan as quantizing
from core.retrain import estimate as training
from core.retrain import partial
from core.retrain.spec import RetrainSpec, settings_of
from core.runs.devices import GIB
from core.runs.dtypes import BYTES, choose, computable, native_formats
from core.runs.footprint import PROCESS_BYTES, Footprint, whole
from core.search import command as search
from core.width import command as width
from core.width import methods

CHOOSING, CUTTING, TRAINING, MEASURING, FILES = (
    "Choose blocks", "Cut and quantize", "Train", "Measure and use", "Other formats",
)  # fmt: skip
GROUPS = (CHOOSING, CUTTING, TRAINING, MEASURING, FILES)
SAMPLES, LENGTH = 10, 128
"""Rows that blocks are scored on, and their tokens: the defaults of the commands."""
STEPS, BATCH, CUTOFF = 1000, 64, 256
"""Of a training: 16 M tokens."""
PROMPT_TOKENS = 100
"""Of the prompts that training text is generated for; a typical instruction."""
RATIO = 0.2
"""Share of heads and neurons that goes."""


@dataclass(frozen=True)
class Row:
    """What one computation takes."""

    group: str
    """One of `GROUPS`."""
    command: str
    what: str
    processes: int
    """That share the work, each with a device; the bytes below are those of one of them."""
    way: str
    """As `core.runs.footprint` has it: fits, streams, cannot; whole, no memory; files."""
    memory_bytes: int
    """In the way that it runs; if it cannot, what it would need. Of the CPU's memory for files."""
    limit_bytes: int
    flops: float
    """Of all processes together."""
    read_bytes: int
    """From the disk; states that are kept there count when they are written too."""
    written_bytes: int
    passes: int
    """How often the weights pass through the device."""
    compute_s: float
    """At a share of the peak of all devices; for files, of converting weights on one core."""
    device_s: float
    """Of weights and caches through the device's memory."""
    disk_s: float
    """Of what is read and written."""
    seconds: float | None
    """None if it cannot run."""
    ways: Mapping[str, str]
    """How it runs on every machine of `MACHINES`, each with the default limit."""


@dataclass(frozen=True)
class LeftOut:
    """A computation that this model cannot have."""

    command: str
    what: str
    why: str


Make = Callable[[], tuple[str, Footprint]]


class Table:
    """The rows for one model on one machine."""

    def __init__(
        self,
        info: CheckpointInfo,
        machine: Machine,
        *,
        config: Mapping[str, Any] | None = None,
        limit: int | None = None,
        disk: float = DISK_BYTES_PER_S,
        processes: int = 1,
    ) -> None:
        """Estimate for ``info`` and the content of its config.json.

        ``limit`` is in bytes, by default nine tenths of the device. Of commands that can share
        their work, ``processes`` do, each with such a device.
        """
        self.info, self.machine, self.disk = info, machine, disk
        self.config = config or {}
        self.limit = limit or usual_limit(machine)
        self.processes = processes
        native = native_formats("cuda")
        self.blocks = choose("auto", info.dtype, "cuda", native, "blocks")
        self.whole = choose("auto", info.dtype, "cuda", native)
        self.dtype = computable(self.whole.weights)
        self.width = BYTES[computable(self.blocks.weights)]
        self.left_out: list[LeftOut] = []
        """What `rows` found that this model cannot have."""
        self._base: dict[str, Any] = {
            "checkpoint": info.path, "out": "", "device": DEVICE, "memory_limit": self.limit / GIB,
        }  # fmt: skip
        self._shared = self._base | {"processes": processes}
        self.samples = max(SAMPLES, processes)
        self.length = min(LENGTH, info.context or LENGTH)

    def rows(self) -> list[Row]:
        """Return every command, as a rule at its defaults."""
        others = {
            name: Table(self.info, machine, config=self.config, processes=self.processes)._makes()
            for name, machine in MACHINES.items()
        }
        found: list[Row] = []
        self.left_out = []
        for at, (group, command, name, make) in enumerate(self._makes()):
            try:
                what, taken = make()
                ways = {card: makes[at][3]()[1].way for card, makes in others.items()}
            except DepthcutError as error:
                self.left_out.append(LeftOut(command, name, str(error)))
                continue
            found.append(self._timed(group, command, what, taken, ways))
        return found

    def _makes(self) -> list[tuple[str, str, str, Make]]:
        """Return group, command, a short name and the way to make each row."""
        score, rows = self._importance, f"{self.samples} x {self.length} tokens"
        return [
            (CHOOSING, "importance", "perplexity and KL", lambda: score(
                ("ppl", "kl"), f"perplexity and KL without each block, {rows}")),
            (CHOOSING, "importance", "Taylor", lambda: score(("taylor",), f"Taylor, {rows}")),
            (CHOOSING, "importance", "similarity", lambda: score(
                ("block-influence", "angular"), f"Block Influence, angular distance, {rows}")),
            (CHOOSING, "importance", "parts", lambda: score(
                ("sublayers",), f"perplexity without each part of a block, {rows}")),
            (CHOOSING, "importance", "SLEB", lambda: score(
                ("sleb",), f"greedy removal (SLEB) of half of the blocks, {rows}")),
            (CHOOSING, "search", "defaults", lambda: self._search(
                "one-shot, greedy and pairs, up to a quarter of the blocks")),
            (CHOOSING, "search", "pairs", lambda: self._search(
                f"all pairs of {self.info.blocks} blocks", methods=("pairs",), protect_first=0,
                protect_last=0, counts=(min(2, max(1, self.info.blocks - 1)),))),
            (CHOOSING, "search", "healed", self._healed_search),
            (CHOOSING, "budget", "defaults", self._budget),
            (CHOOSING, "curve", "defaults", self._curve),
            (CUTTING, "prune", "cut", lambda: self._prune("none")),
            (CUTTING, "prune", "healed", lambda: self._prune("refit")),
            (CUTTING, "width", "LLM-Pruner", lambda: self._width("llm-pruner")),
            (CUTTING, "width", "FLAP", lambda: self._width("flap")),
            (CUTTING, "width", "Wanda-sp", lambda: self._width("wanda-sp")),
            (CUTTING, "width", "healed", lambda: self._width("flap", "refit")),
            (CUTTING, "quantize", "int8", lambda: self._quantize(8)),
            (CUTTING, "quantize", "int4", lambda: self._quantize(4)),
            (TRAINING, "retrain", "LoRA", lambda: self._retrain("LoRA")),
            (TRAINING, "retrain", "LoRA, NF4", lambda: self._retrain(
                "LoRA on a base in 4 bits (NF4)", quantized_base="nf4")),
            (TRAINING, "retrain", "partial", lambda: self._retrain(
                "the last 3 blocks and the output matrix", method="partial")),
            (TRAINING, "retrain", "full", lambda: self._retrain("all weights", method="full")),
            (TRAINING, "generate", "defaults", self._generate),
            (MEASURING, "evaluate", "perplexity", self._perplexity),
            (MEASURING, "evaluate", "tasks", lambda: self._tasks(each_block=False)),
            (MEASURING, "evaluate", "tasks without each block",
             lambda: self._tasks(each_block=True)),
            (MEASURING, "benchmark", "defaults", lambda: self._benchmark(
                "1, 4 and 16 prompts, 30 generations of 128 tokens each", runs=20, warmup=10)),
            (MEASURING, "live", "one model", lambda: self._benchmark(
                "one model loaded, 128 tokens for one prompt", runs=1, warmup=0, visits=1,
                batch_sizes=(1,))),
            (FILES, "export", "GGUF", lambda: self._export("auto")),
            (FILES, "export", "GGUF in 8 bits", lambda: self._export("q8_0")),
            (FILES, "import", "GGUF", self._import),
        ]  # fmt: skip

    # ----- choosing blocks

    def _importance(self, metrics: tuple[str, ...], what: str) -> tuple[str, Footprint]:
        spec = importance.ImportanceSpec(
            **self._shared, metrics=metrics, samples=self.samples, length=self.length
        )
        return what, importance.footprint(spec, self.info, self.blocks)

    def _search(self, what: str, **more: Any) -> tuple[str, Footprint]:
        spec = search.SearchSpec(**self._shared, samples=self.samples, length=self.length, **more)
        found = search.rehearsed(spec, self.info, self.blocks, self.limit)
        return f"{what}, {self.samples} x {spec.length} tokens", found.footprint

    def _healed_search(self) -> tuple[str, Footprint]:
        spec = search.SearchSpec(
            **self._base, length=self.length, methods=("greedy",), heal="refit"
        )
        found = search.rehearsed(spec, self.info, self.blocks, self.limit)
        rows = search.samples_of(spec, self.info)
        what = f"greedy, up to a quarter of the blocks, the best {spec.heal_best} of each step "
        return f"{what}healed by refit on {rows:,} x {spec.length} tokens", found.footprint

    def _budget(self) -> tuple[str, Footprint]:
        spec = budget.BudgetSpec(**self._base, length=self.length)
        what = f"KL and time of {len(spec.versions)} versions of every block, {spec.check_plans} "
        what += f"plans measured, {spec.samples} x {spec.length} tokens"
        return what, budget.footprint(spec, self.info, self.blocks, self.limit)

    def _curve(self) -> tuple[str, Footprint]:
        spec = curve_command.CurveSpec(**self._shared, scores="")
        first, last = default_protection(self.info.blocks)
        free = list(range(first, self.info.blocks - last))
        most = min(len(free), self.info.blocks - 1)
        draw, sets = random.Random(0), [frozenset[int]()]
        for _ in spec.criteria:  # orders as unlike as those of two criteria can be
            order = draw.sample(free, most)
            sets += [frozenset(order[:count]) for count in range(1, most + 1)]
        rows = self.samples, self.length
        room = curve_command.capacity(spec, self.info, self.blocks, sets, *rows)
        taken = curve_command.footprint(spec, self.info, room, sets, *rows)
        what = f"perplexity after removing 1 to {most} blocks, {len(spec.criteria)} criteria"
        return f"{what}, {self.samples} x {self.length} tokens", taken

    # ----- cutting

    def _prune(self, heal: str) -> tuple[str, Footprint]:
        removal, what = self.spaced(self.info.blocks // 4), "a quarter of the blocks"
        spec = prune.PruneSpec(**self._base, heal=heal)
        if heal == "none":
            return f"{what}, copying bytes", prune.footprint(spec, self.info, removal, self.blocks)
        rows = max(prune.SAMPLES, self._least_rows(prune.length_of(spec, self.info)))
        spec = replace(spec, samples=rows)
        prune.check_healing(spec, self.info, removal)
        what += f", healed by refit on {rows:,} x {prune.length_of(spec, self.info)} tokens"
        return what, prune.footprint(spec, self.info, removal, self.blocks)

    def _width(self, method: str, heal: str = "none") -> tuple[str, Footprint]:
        shared = self._shared if heal == "none" else self._base
        spec = width.WidthSpec(**shared, method=method, ratio=RATIO, heal=heal)
        plan, _ = width.make_plan(spec, self.info)
        rows = max(plan.method.samples, spec.processes)
        spec = replace(spec, samples=rows)
        width.planned_healing(spec, plan)
        label = methods.get(method).label
        what = f"{label}, {RATIO:.0%}, {rows:,} x {width.length_of(spec, plan)} tokens"
        if heal != "none":
            few, length = width.heal_rows(spec, self.info)
            what = f"{label}, {RATIO:.0%}, healed by refit on {few:,} x {length} tokens"
        return what, width.footprint(spec, plan, self.blocks)

    def _quantize(self, bits: int) -> tuple[str, Footprint]:
        plan = quantizing.make(self.info, bits, None)
        return f"int{bits}, on the CPU", quantizing.footprint(self.info, plan)

    def spaced(self, count: int) -> Removal:
        """Return ``count`` blocks that go, at least one, evenly spaced: each leaves a seam."""
        first, last = default_protection(self.info.blocks)
        free, count = self.info.blocks - first - last, max(1, count)
        return Removal(tuple(first + at * free // count for at in range(min(count, free))))

    def _least_rows(self, tokens: int) -> int:
        """Return the rows that healing needs at least, a multiple of four."""
        rows = -(-seams.TOKENS_PER_DIMENSION * self.info.hidden // tokens)
        return seams.HELD_OUT * -(-rows // seams.HELD_OUT)

    # ----- training

    def _retrain(self, label: str, **more: Any) -> tuple[str, Footprint]:
        shared = {key: value for key, value in self._shared.items() if key != "memory_limit"}
        spec = RetrainSpec(**shared, data="", steps=STEPS, batch=BATCH, cutoff=CUTOFF, **more)
        info, room = self.info, self.limit - PROCESS_BYTES["gpu"]
        settings = settings_of(spec, STEPS * BATCH, info.parameters)
        trained = partial.last_blocks(spec, info.blocks)
        count = training.trainable_parameters(spec, info, trained)
        tokens, first = STEPS * BATCH * CUTOFF, trained[0] if trained else 0
        case = training.Case(info, self.config, count, DEVICE, room, CUTOFF, first)
        how = training.fit(spec, settings, case)
        spec, settings, memory = training.as_decided(spec, how, case)
        needed = sum(memory.values())
        flops = training.training_flops(spec, info, tokens, first)
        taken = training.footprint(spec, settings, info, needed, flops, tokens, first)
        memory_bytes = taken.memory_bytes + PROCESS_BYTES["gpu"]
        taken = replace(taken, memory_bytes=memory_bytes, way=whole(memory_bytes, self.limit))
        split = " (FSDP)" if spec.sharding == "fsdp" else ""
        return f"{label}{split}, {STEPS:,} steps of {BATCH} x {CUTOFF} tokens", taken

    def _generate(self) -> tuple[str, Footprint]:
        base = {key: value for key, value in self._base.items() if key != "memory_limit"}
        spec = generate.GenerateSpec(**base, prompts="")
        prompts = [PROMPT_TOKENS] * spec.samples
        taken = generate.footprint(spec, self.info, prompts, self.dtype, self.limit)
        what = f"answers of up to {spec.max_tokens} tokens to {spec.samples:,} prompts of "
        return f"{what}{PROMPT_TOKENS}", taken

    # ----- measuring

    def _perplexity(self) -> tuple[str, Footprint]:
        spec, tokens = EvaluateSpec(**self._shared), evaluating.USUAL_TOKENS
        window = spec.window[0]
        taken = evaluating.text_footprint(spec, self.info, self.whole, tokens, window)
        return f"perplexity of {tokens:,} tokens in windows of {window}", taken

    def _tasks(self, *, each_block: bool) -> tuple[str, Footprint]:
        spec = EvaluateSpec(**self._shared, each_block=each_block)
        count = evaluating.USUAL_QUESTIONS
        flops = evaluating.questions_flops(self.info, count, each_block=each_block)
        taken = evaluating.tasks_footprint(spec, self.info, self.whole, flops, self.limit)
        what = f"{count:,} questions of {evaluating.QUESTION_TOKENS} tokens"
        return what + (", and without each block" if each_block else ""), taken

    def _benchmark(self, what: str, **more: Any) -> tuple[str, Footprint]:
        spec = benchmark.BenchmarkSpec(checkpoints=(self.info.path,), out="", device=DEVICE, **more)
        return what, benchmark.footprint(spec, self.info, self.dtype, self.limit)

    # ----- files

    def _export(self, kind: str) -> tuple[str, Footprint]:
        found: Any = layout.default_type(self.info.dtype) if kind == "auto" else kind
        planned = layout.plan(self.config, None, found)
        return f"GGUF in {found}", export.footprint(self.info, planned)

    def _import(self) -> tuple[str, Footprint]:
        info = self.info
        inner = max((shape["intermediate"] for shape in info.block_shapes), default=0)
        largest, dtype = info.hidden * max(info.vocab, inner), self.dtype
        stored = info.parameters * BYTES[dtype]
        return f"GGUF in {dtype}", importing.footprint(info.parameters, largest, dtype, stored)

    # ----- time

    def _timed(
        self, group: str, command: str, what: str, taken: Footprint, ways: Mapping[str, str]
    ) -> Row:
        """Return a row with its times."""
        machine, size = self.machine, taken.processes
        plain = (taken.flops - taken.float64_flops) / machine.matmul_flops_per_s
        exact = taken.float64_flops / machine.float64_flops_per_s
        compute = (plain + exact) / MATMUL_SHARE / size + taken.convert_s
        through = taken.passes * self.info.parameters * self.width + taken.cache_bytes
        device = through / (machine.bandwidth_bytes_per_s * BANDWIDTH_SHARE)
        # processes on one machine read the same files: its page cache has them after the first
        reading, writing = taken.read_bytes / self.disk, taken.written_bytes / self.disk
        busy = max(compute, device)
        total = (max(busy, reading) if taken.overlaps else busy + reading) + writing
        return Row(
            group, command, what, size, taken.way, taken.memory_bytes, self.limit, taken.flops,
            taken.read_bytes, taken.written_bytes, taken.passes, compute, device,
            reading + writing, total if taken.can_run else None, ways,
        )  # fmt: skip


def usual_limit(machine: Machine) -> int:
    """Return the bytes of a device that runs use without --memory-limit: nine tenths."""
    return int(machine.memory_bytes * (1 - capacity.MARGIN))


def as_dicts(rows: Sequence[Row] | Sequence[LeftOut]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(row) for row in rows]


def tokens_per_s(info: CheckpointInfo, machine: Machine, width: int = 2) -> float:
    """Return the most tokens per second that one sequence can be generated with.

    The embedding is looked up, not read, unless it is the output matrix too.
    """
    read = info.parameters - (0 if info.tied else info.vocab * info.hidden)
    return machine.bandwidth_bytes_per_s / (read * width)
