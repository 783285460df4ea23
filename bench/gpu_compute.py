"""What computing takes on one GPU, for `bench.gpu`: scores, cutting and training of a LLaMA-7B.

Each figure is one function, the most important first. One that runs out of memory, lacks a library
or finds no time left says so in place of its numbers. The model has random weights; times do not
depend on their values.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from core.benchmark import analytic
from core.errors import DepthcutError
from core.importance.branches import Batch, losses_without, make_batch
from core.importance.passes import grouped
from core.importance.sweep import sweep
from core.importance.taylor import taylor
from core.model.blocks import BlockView
from core.model.memory import free_memory, peak_memory_mib, reset_peak_memory
from core.runs.devices import GIB, MIB
from core.runs.failures import is_out_of_memory
from core.runs.progress import SILENT

NO_TIME = "no time was left"
STATES_BYTES = 4 * GIB
"""Hidden states that all pairs may hold at once."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    rows: int = 10
    tokens: int = 128
    train_rows: int = 4
    train_tokens: int = 256
    steps: int = 5
    top_k: int = 128
    cut: int = 6
    """Blocks that are cut from the checkpoint on disk."""


TINY = Sizes(rows=3, tokens=16, train_rows=2, train_tokens=16, steps=2, top_k=8, cut=2)


class Compute:
    """Measures one figure after another until ``end`` (monotonic), and tells each."""

    def __init__(
        self,
        build: Callable[[int], Any],
        blocks: int,
        device: torch.device,
        sizes: Sizes,
        rates: analytic.Rates,
        end: float,
        tell: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Measure models that ``build`` makes, of a number of blocks."""
        self.build, self.blocks, self.device, self.sizes = build, blocks, device, sizes
        self.rates, self.end, self.tell = rates, end, tell
        self.model: Any = None
        self.one_out_s = 0.0
        self.ppl: list[float] = []

    def run(self) -> None:
        """Measure everything; what fails is told as such."""
        self.model = self.build(self.blocks)
        free_memory(self.device)
        for figure in (
            self.leave_one_out,
            self.against_loops,
            self.taylor,
            self.all_pairs,
            self.training,
            self.cutting,
        ):
            name = figure.__name__.replace("_", " ")
            if time.monotonic() >= self.end:
                self.tell(name, {"missing": NO_TIME})
                continue
            try:
                figure()
            except ImportError as error:
                self.tell(name, {"missing": f"{error.name} is not installed"})
            except (RuntimeError, MemoryError, DepthcutError) as error:
                if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                    raise
                self.tell(name, {"missing": str(error).splitlines()[0][:200]})
            free_memory(self.device)
        self.model = None
        free_memory(self.device)

    def timed(self, work: Callable[[], Any]) -> tuple[float, float, Any]:
        """Return seconds, peak MiB since the start, and what ``work`` returns."""
        free_memory(self.device)
        reset_peak_memory(self.device)
        _synchronize(self.device)
        began = time.perf_counter()
        found = work()
        _synchronize(self.device)
        return time.perf_counter() - began, peak_memory_mib(self.device), found

    def batch(self, view: BlockView, rows: int, tokens: int) -> Batch:
        """Return random rows."""
        draw = torch.Generator().manual_seed(1234)
        vocab = int(view.config.vocab_size)
        return make_batch(torch.randint(0, vocab, (rows, tokens), generator=draw).tolist(), view)

    def leave_one_out(self) -> None:
        """Perplexity without each block, in one pass."""
        view = BlockView(self.model)
        batch = self.batch(view, self.sizes.rows, self.sizes.tokens)
        sweep(view, batch)  # warm up
        seconds, peak, found = self.timed(lambda: sweep(view, batch))
        self.one_out_s, self.ppl = seconds, found.ppl
        self.tell(
            "leave-one-out of all blocks",
            {"seconds": seconds, "peak_mib": peak, "rows": f"{self.sizes.rows} x "
             f"{self.sizes.tokens} tokens"},
        )  # fmt: skip

    def against_loops(self) -> None:
        """The same in a naive loop, and with a model built for each block."""
        view = BlockView(self.model)
        ids = self.batch(view, self.sizes.rows, self.sizes.tokens).ids

        def loss(model: Any) -> float:
            with torch.inference_mode():
                logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
                return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))

        def naive() -> list[float]:
            found = []
            for block in range(len(view)):
                with view.skip([block]) as model:
                    found.append(loss(model))
            return found

        seconds, _, losses = self.timed(naive)
        pairs = zip(torch.tensor(losses).exp().tolist(), self.ppl, strict=True)
        off = max(abs(a / b - 1) for a, b in pairs)
        self.tell(
            "leave-one-out, naive loop",
            {"seconds": seconds, "times": seconds / self.one_out_s, "largest_difference": off},
        )
        tried = min(2, self.blocks)

        def rebuild() -> None:
            for _ in range(tried):
                model = self.build(self.blocks - 1)
                loss(model)
                del model
                free_memory(self.device)

        took, _, _ = self.timed(rebuild)
        whole = took / tried * self.blocks
        self.tell(
            "leave-one-out, a model built for each block",
            {"seconds": whole, "times": whole / self.one_out_s,
             "note": f"{tried} of {self.blocks} measured"},
        )  # fmt: skip

    def taylor(self) -> None:
        """Taylor scores of all weights."""
        view = BlockView(self.model)
        batch = self.batch(view, self.sizes.rows, self.sizes.tokens)
        seconds, peak, _ = self.timed(lambda: taylor(view, batch))
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters()) / MIB
        self.tell("Taylor of all blocks", {"seconds": seconds, "peak_mib": peak,
                                           "beyond_weights_mib": peak - weights})  # fmt: skip

    def all_pairs(self) -> None:
        """KL and loss without every pair of blocks."""
        view = BlockView(self.model)
        batch = self.batch(view, self.sizes.rows, self.sizes.tokens)
        state = batch.ids.numel() * view.hidden_size * view.dtype.itemsize
        every = range(self.blocks)
        pairs = [frozenset({a, b}) for a in every for b in every if a < b]
        groups = grouped(pairs, max(2, STATES_BYTES // state))

        def measure() -> int:
            reference, passes = None, 0
            for number, sets in enumerate(groups):
                first = [] if number else [frozenset[int]()]
                found = losses_without(view, batch, [*first, *sets], want_kl=True, dense=reference)
                assert found is not None
                reference, passes = found.dense, passes + found.passes
            return passes

        seconds, peak, passes = self.timed(measure)
        self.tell("all pairs of blocks", {"seconds": seconds, "peak_mib": peak,
                                          "sets": len(pairs), "block_passes": passes})  # fmt: skip

    def training(self) -> None:
        """LoRA with this project's layers and with peft's, and KL with a teacher kept on disk."""
        from core.model.precision import decide
        from core.retrain import fused, loss, teacher, weights
        from core.retrain.rows import Row
        from core.retrain.spec import Goal, RetrainSpec
        from core.retrain.trainer import Objective, with_kept

        sizes = self.sizes
        ids = self.batch(BlockView(self.model), sizes.train_rows, sizes.train_tokens).ids.tolist()
        rows = [Row(tuple(line), (-100, *line[1:])) for line in ids]
        packs = [(row,) for row in rows]
        items = {"items": sum(row.items for row in rows)}
        precision = decide("auto", self.device, "bfloat16", "adapters")
        parameters = sum(p.numel() for p in self.model.parameters())
        with tempfile.TemporaryDirectory() as place:
            how = self.device, precision.compute
            seconds, _, kept = self.timed(
                lambda: teacher.write(
                    Path(place) / "key", self.model, rows, sizes.top_k, how, SILENT
                )
            )
            self.tell("teacher's distributions, once", {"seconds": seconds,
                      "tokens_per_s": items["items"] / seconds})  # fmt: skip
            model = weights.with_adapters(self.model, RetrainSpec(checkpoint="", data="", out=""))
            model.train()
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            plain = loss.moved(with_kept(packs, None), self.device) | items
            with_teacher = loss.moved(with_kept(packs, kept), self.device) | items

            def peft() -> Any:
                with loss.autocast(self.device, precision.compute):
                    inputs, labels = plain["input_ids"], plain["labels"]
                    return model(input_ids=inputs, labels=labels, use_cache=False).loss

            ours = Objective(self.device, precision.compute)
            kl = Objective(self.device, precision.compute, None, Goal(False, 1.0, sizes.top_k))
            ways: list[tuple[str, Callable[[], Any]]] = [
                ("LoRA, plain peft", peft),
                ("LoRA, ours", lambda: ours(model, plain)[0]),
                ("LoRA by KL from a kept teacher", lambda: kl(model, with_teacher)[0]),
            ]
            for name, value in ways:
                if name == "LoRA, ours":
                    fused.install(model)
                if time.monotonic() >= self.end:
                    self.tell(name, {"missing": NO_TIME})
                    continue
                optimiser = torch.optim.AdamW(trained, 1e-4, fused=True)
                self._steps(name, value, optimiser, parameters)
                del optimiser
        self.model = None  # it has adapters now

    def _steps(self, name: str, value: Callable[[], Any], optimiser: Any, parameters: int) -> None:
        tokens = self.sizes.train_rows * self.sizes.train_tokens

        def step() -> None:
            value().backward()
            optimiser.step()
            optimiser.zero_grad()

        step()
        times, peaks = [], []
        for _ in range(self.sizes.steps):
            seconds, peak, _ = self.timed(step)
            times.append(seconds)
            peaks.append(peak)
        seconds = statistics.median(times)
        flops = 4 * parameters * tokens
        self.tell(
            name,
            {"seconds": seconds, "tokens_per_s": tokens / seconds, "peak_mib": max(peaks),
             "share_of_matmul": flops / seconds / self.rates.matmul_flops_per_s},
        )  # fmt: skip

    def cutting(self) -> None:
        """Drop blocks from a checkpoint on disk; bytes are copied, the GPU is not used."""
        from core.checkpoint.drop import Removal
        from core.prune import depth

        with tempfile.TemporaryDirectory(prefix="depthcut-gpu-") as place:
            source = Path(place) / "source"
            self.build(self.blocks).save_pretrained(source)
            size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
            drop = Removal(tuple(range(1, 1 + self.sizes.cut)))
            seconds, _, record = self.timed(lambda: depth.prune(source, drop, Path(place) / "cut"))
            left = record.parameters_after / record.parameters_before
            self.tell(
                f"cutting {self.sizes.cut} blocks from the files",
                {"seconds": seconds, "gib_per_s": size * left / GIB / seconds},
            )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the Markdown table of all figures; empty without any."""
    if not found:
        return ""
    lines = ["| what | seconds | peak MiB | |", "| --- | ---: | ---: | --- |"]
    for name, figures in found:
        if "missing" in figures:
            lines.append(f"| {name} | - | - | {figures['missing']} |")
            continue
        rest = {k: v for k, v in figures.items() if k not in ("seconds", "peak_mib")}
        words = "; ".join(f"{k.replace('_', ' ')} {_number(v)}" for k, v in rest.items())
        peak = f"{figures['peak_mib']:,.0f}" if "peak_mib" in figures else "-"
        lines.append(f"| {name} | {figures['seconds']:.3f} | {peak} | {words} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.3g}"
