"""The checks of `core.doctor.plan`: a function each, which runs commands and compares.

Commands run in this process, with the same options on the device and on the CPU. On the CPU itself
the comparison is with `core.doctor.plain`. Tolerances are on relative differences; numbers far
below the others of their kind are compared with 5% of the kind's median instead of themselves.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core import commands, demo
from core.benchmark.results import Point
from core.criteria import METRICS
from core.data.calibration import calibration_rows
from core.data.evaluation import evaluation_stream, evaluation_windows
from core.doctor import plain
from core.errors import OptionError
from core.evaluate.results import TextRow, read_samples
from core.model import loading, precision
from core.prune.results import Healing, Pruning
from core.prune.score_results import AngularRow, BlockRow, GreedyRow, Importance, SublayerRow
from core.retrain.results import Step, Summary, metric, read_measures
from core.runs import processes
from core.runs.devices import GIB, MIB
from core.runs.run import Run
from core.runs.spec import build, to_arguments
from core.width.results import WidthPruning

CPU = torch.device("cpu")
SAMPLES, LENGTH, ROUNDS, SEED, WINDOW = 6, 64, 2, 1234, 128
DROPPED = (4, 5, 6)
NEAR_FLOAT32, NEAR_BFLOAT16, NEAR_TRAINED, NEAR_TRAINED_BFLOAT16 = 2e-3, 8e-2, 2e-3, 2e-2
"""Largest relative differences. float32: sums in another order; the losses that lose most to it
are those without a block that the model cannot do without. Trained: after four steps."""
NEAR_SHARED = 1e-4
"""Between one process and two: a GPU may multiply fewer rows by another algorithm."""
FACTORS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest relative error of a matrix product; TF32 in place of float32 would have 3e-4."""
SEVEN_B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
CARD_GIB = 23.5
"""What a 24 GiB card leaves to a process."""


@dataclass(frozen=True)
class Outcome:
    """Whether a check's numbers agree, and which numbers."""

    agrees: bool
    text: str


class Bench:
    """A device, a folder to work in, and what several checks need, made once."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        """Check ``device``; runs are written into ``folder``."""
        self.device, self.folder = device, folder
        self.is_cpu = device.type == "cpu"

    def run(self, name: str, on: torch.device, key: str = "", **options: Any) -> Path:
        """Run a command on a device and return its folder; the same ``key`` is run only once."""
        folder = self.folder / f"{key or name}-{str(on).replace(':', '-')}"
        if (folder / "done").exists():
            return folder
        command = commands.get(name)
        spec = build(command.spec_class, {**options, "device": str(on), "out": str(folder)})
        run = Run(command, spec, folder)
        run.book.mkdir(parents=True, exist_ok=True)
        module = command.load()
        if hasattr(module, "check"):
            module.check(spec)
        module.run(spec, run)
        (folder / "done").touch()
        return folder

    def both(self, name: str, key: str = "", **options: Any) -> tuple[Path, Path]:
        """Return the folders of a command on the CPU and on the device."""
        return tuple(self.run(name, on, key, **options) for on in (CPU, self.device))  # type: ignore[return-value]

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The demo's tokenizer."""
        return loading.load_tokenizer(demo.CHECKPOINT)

    @functools.cached_property
    def dense(self) -> Any:
        """The demo in float32 on the CPU, by plain transformers."""
        return plain.load(demo.CHECKPOINT)

    @functools.cached_property
    def rows(self) -> list[list[int]]:
        """The calibration rows of the checks of importance."""
        return calibration_rows("demo", self.tokenizer, SAMPLES, LENGTH, SEED)

    @functools.cached_property
    def text(self) -> Path:
        """A text to evaluate on."""
        path = self.folder / "text.txt"
        path.write_text(evaluation_stream("demo")[:20000], encoding="utf-8")
        return path

    @functools.cached_property
    def stories(self) -> Path:
        """Rows to train on."""
        path = self.folder / "stories.jsonl"
        found = evaluation_stream("demo").split("\n\n")[:300]
        path.write_text("".join(json.dumps({"text": story}) + "\n" for story in found))
        return path

    @functools.cached_property
    def pruned(self) -> Path:
        """The demo without the blocks `DROPPED`."""
        folder = self.folder / "pruned"
        if not (folder / "config.json").exists():
            command = commands.get("prune")
            spec = build(
                command.spec_class, {"checkpoint": "demo", "drop": DROPPED, "out": str(folder)}
            )
            run = Run(command, spec, folder)
            run.book.mkdir(parents=True, exist_ok=True)
            command.load().run(spec, run)
        return folder

    @property
    def other(self) -> str:
        """What the device is compared with."""
        return "plain transformers" if self.is_cpu else "the CPU"


def differ(reference: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[float]]) -> Any:
    """Return the largest relative difference and the name of its list; infinite for NaN."""
    worst, where = 0.0, next(iter(reference))
    for name, wanted in reference.items():
        if len(wanted) != len(found[name]):
            return math.inf, name
        least = 0.05 * statistics.median(map(abs, wanted))
        for x, y in zip(wanted, found[name], strict=True):
            off = abs(x - y) / max(abs(x), least, 1e-12)
            if not off <= worst:
                worst, where = (off if math.isfinite(off) else math.inf), name
    return worst, where


def near(
    bench: Bench,
    reference: Mapping[str, Sequence[float]],
    found: Mapping[str, Sequence[float]],
    most: float,
) -> Outcome:
    """Compare lists of numbers by name."""
    off, where = differ(reference, found)
    count = sum(len(values) for values in reference.values())
    agrees = off <= most
    if count == 1:
        text = f"differs from {bench.other} by {off:.1e}"
    else:
        text = f"{count} numbers differ from {bench.other} by at most {off:.1e}"
    if not agrees:
        text += f" ({where.replace('_', ' ')}), more than the {most:.0e} that rounding explains"
    return Outcome(agrees, text)


def arithmetic(bench: Bench) -> Outcome:
    """Products of random matrices [512, 512] in every format, against float64."""
    draw = torch.Generator().manual_seed(SEED)
    left, right = (torch.randn(512, 512, generator=draw) for _ in range(2))
    parts, agrees = [], True
    for name, dtype in precision.DTYPES.items():
        a, b = left.to(dtype), right.to(dtype)
        exact = a.double() @ b.double()
        product = (a.to(bench.device) @ b.to(bench.device)).cpu().double()
        off = float((product - exact).norm() / exact.norm())
        good = off <= FACTORS[name]
        agrees = agrees and good
        parts.append(f"{name} {off:.0e}" + ("" if good else f" (at most {FACTORS[name]:.0e})"))
    return Outcome(agrees, f"relative errors against float64: {', '.join(parts)}")


def scores(folder: Path) -> dict[str, list[float]]:
    """Return all numbers of an importance run by metric."""
    blocks, summary = BlockRow.read(folder), Importance.read(folder)
    dense = summary.dense_ppl if summary else None
    found: dict[str, list[Any]] = {
        name: [getattr(row, name) for row in blocks]
        for name in ("ppl", "taylor", "magnitude", "block_influence", "relative_update", "kl")
    }
    found["ppl"].insert(0, dense)
    found["angular"] = [row.distance for row in AngularRow.read(folder)]
    found["sublayers"] = [row.ppl for row in SublayerRow.read(folder)]
    found["sleb"] = [row.ppl for row in GreedyRow.read(folder)]
    return {n: [math.nan if v is None else v for v in values] for n, values in found.items()}


def importance(bench: Bench, dtype: str = "float32") -> Outcome:
    """Compare all metrics of importance in one format."""
    options = {
        "checkpoint": "demo", "metrics": METRICS, "samples": SAMPLES, "length": LENGTH,
        "seed": SEED, "rounds": ROUNDS, "dtype": dtype,
    }  # fmt: skip
    key, most = f"importance-{dtype}", NEAR_FLOAT32 if dtype == "float32" else NEAR_BFLOAT16
    if not bench.is_cpu:
        reference, found = map(scores, bench.both("importance", key, **options))
        return near(bench, reference, found, most)
    model = bench.dense if dtype == "float32" else plain.load(demo.CHECKPOINT, torch.bfloat16)
    reference = plain.importance(model, bench.rows, ROUNDS)
    found = scores(bench.run("importance", CPU, key, **options))
    reference["angular"] = _by_length(reference["angular"], len(model.model.layers))
    return near(bench, reference, found, most)


def _by_length(values: list[float], blocks: int) -> list[float]:
    """Return distances of (start, end) in the order of angular.csv: by length, then by start."""
    pairs = [(s, e) for s in range(blocks + 1) for e in range(s + 1, blocks + 1)]
    known = dict(zip(pairs, values, strict=True))
    return [known[s, s + n] for n in range(1, blocks + 1) for s in range(blocks + 1 - n)]


def perplexity(bench: Bench) -> Outcome:
    """Compare the perplexity of a text."""
    options = {"checkpoint": "demo", "perplexity": (str(bench.text),), "window": (WINDOW,),
               "dtype": "float32", "fresh": True}  # fmt: skip
    if bench.is_cpu:
        reference = plain.perplexity(bench.dense, _windows(bench))
    else:
        reference = _ppl(bench.run("evaluate", CPU, "perplexity", **options))
    found = _ppl(bench.run("evaluate", bench.device, "perplexity", **options))
    outcome = near(bench, {"ppl": [reference]}, {"ppl": [found]}, 1e-4)
    return Outcome(outcome.agrees, f"perplexity {found:.4f}: {outcome.text}")


def _windows(bench: Bench) -> list[list[int]]:
    text = bench.text.read_text(encoding="utf-8")
    ids = bench.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return evaluation_windows(ids, WINDOW, "once", bench.tokenizer.bos_token_id)


def _ppl(folder: Path) -> float:
    return TextRow.read(folder)[0].ppl


def live(bench: Bench) -> Outcome:
    """Compare a what-if perplexity and the likeliest text without a block; models are freed."""
    from core.live.protocol import Perplexity
    from core.live.store import Store

    ask = Perplexity(checkpoint="demo", source="demo", skip=(3, 7), samples=8, window=LENGTH)

    def answer(device: torch.device) -> tuple[float, str, float]:
        store = Store(device, "float32", 4000.0)
        loaded = store.get("demo")
        ppl = loaded.text(ask, store.room_bytes())[0].answer(ask.removal).ppl
        text, rate = _write(loaded)
        del loaded
        store.clear()
        return ppl, text, rate

    ppl, text, rate = answer(bench.device)
    if bench.is_cpu:
        cut = plain.without(bench.dense, ask.skip)
        rows = calibration_rows("demo", bench.tokenizer, 8, LENGTH, ask.seed)
        wanted = plain.perplexity(cut, rows)
        end = [int(bench.dense.config.eos_token_id)]
        ids = plain.continuation(cut, bench.tokenizer.encode(PROMPT), NEW_TOKENS, end)
        written = bench.tokenizer.decode(ids, skip_special_tokens=True)
    else:
        wanted, written, _ = answer(CPU)
    outcome = near(bench, {"ppl": [wanted]}, {"ppl": [ppl]}, 1e-4)
    same = "the text is the same" if text == written else f"the text is '{text}', not '{written}'"
    parts = [f"perplexity {ppl:.4f}: {outcome.text}", f"{same} ({rate:.0f} tokens/s)"]
    freed = True
    if bench.device.type == "cuda":
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear:  # these are cuBLAS's own, 32 MiB or more on a Hopper GPU
            clear()
        left = torch.cuda.memory_allocated(bench.device) / MIB
        freed = left < 64
        parts.append(f"{left:.0f} MiB stay allocated after the models are freed")
    return Outcome(outcome.agrees and text == written and freed, "; ".join(parts))


PROMPT, NEW_TOKENS = "One day", 16


def _write(loaded: Any) -> tuple[str, float]:
    """Return the likeliest continuation of `PROMPT` without two blocks, and tokens per second."""
    from core.live.protocol import Generate
    from core.live.replies import Reply, Token
    from core.live.writing import write

    pieces: list[str] = []

    def emit(reply: Reply) -> None:
        if isinstance(reply, Token):
            pieces.extend(reply.texts)

    ask = Generate(
        checkpoint="demo", prompt=PROMPT, max_tokens=NEW_TOKENS, skip=(3, 7), temperature=0.0
    )
    done = write(loaded, ask, emit, lambda: False)
    return "".join(pieces), done.tokens_per_s or 0.0


TRAINED: dict[str, Any] = {
    "dense": "demo", "dropout": 0.0, "steps": 4, "batch": 8, "cutoff": 64, "holdout": 20,
    "dtype": "float32",
}  # fmt: skip
"""Options of all trainings here: four steps of the pruned demo."""


def train(bench: Bench, on: torch.device, key: str, **options: Any) -> tuple[Path, Summary]:
    """Train the pruned demo for four steps; return the folder and its summary."""
    given = {"checkpoint": str(bench.pruned), "data": str(bench.stories), **TRAINED} | options
    folder = bench.run("retrain", on, key, **given)
    summary = Summary.read(folder)
    assert summary is not None, f"{folder} has no summary"
    return folder, summary


def _heldout(bench: Bench) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Return the held-out rows as ids and labels."""
    from core.retrain import rows
    from core.retrain.encoders import ModelTokenizer, config_eos
    from core.retrain.spec import RetrainSpec

    spec = RetrainSpec(
        checkpoint="", data=str(bench.stories), out="", cutoff=64, holdout=20, steps=4
    )
    encoder = ModelTokenizer(bench.tokenizer, config_eos(demo.CHECKPOINT))
    sizes = {"vocab": bench.dense.config.vocab_size, "context": 512}
    return [(row.ids, row.labels) for row in rows.prepare(spec, encoder, **sizes).heldout]


def _loss(value: float | None) -> float:
    return math.nan if value is None else value


def trained(
    bench: Bench, key: str, most: float, compare: Mapping[str, float] | None, **options: Any
) -> Outcome:
    """Compare held-out losses before and after training, and those of the written checkpoint."""
    folder, found = train(bench, bench.device, key, **options)
    losses = {"loss_before": found.heldout_loss_before, "loss_after": found.heldout_loss_after}
    have = {name: _loss(value) for name, value in losses.items()}
    if compare is None:
        _, cpu = train(bench, CPU, key, **options)
        compare = {"loss_before": _loss(cpu.heldout_loss_before),
                   "loss_after": _loss(cpu.heldout_loss_after)}  # fmt: skip
    result = near(
        bench, {k: [v] for k, v in compare.items()}, {k: [have[k]] for k in compare}, most
    )
    parts = [f"held-out loss {have['loss_before']:.4f} to {have['loss_after']:.4f}: {result.text}"]
    agrees = result.agrees
    if (folder / "merged").is_dir():
        loss = plain.mean_loss(plain.load(folder / "merged"), _heldout(bench))
        off = abs(loss / have["loss_after"] - 1)
        agrees = agrees and off <= most
        parts.append(f"the written checkpoint has {loss:.4f} in plain transformers ({off:.0e} off)")
    parts.append(f"{found.tokens_per_s or 0:,.0f} tokens/s, {found.peak_memory_mib or 0:,.0f} MiB")
    return Outcome(agrees, "; ".join(parts))


def lora(bench: Bench) -> Outcome:
    """LoRA with the hand-written layers, merged; on the CPU against the layers of peft."""
    compare = None
    if bench.is_cpu:
        _, stock = train(bench, CPU, "lora-stock", fused="off")
        before = plain.mean_loss(plain.load(bench.pruned), _heldout(bench))
        compare = {"loss_before": before, "loss_after": _loss(stock.heldout_loss_after)}
    return trained(bench, "lora", NEAR_TRAINED, compare, merge=True)


def recompute(bench: Bench) -> Outcome:
    """LoRA with recomputed activations in the format that auto chooses."""
    compare = None
    if bench.is_cpu:
        _, stock = train(bench, CPU, "lora-stock", fused="off")
        compare = {"loss_after": _loss(stock.heldout_loss_after)}
    return trained(
        bench, "recompute", NEAR_TRAINED_BFLOAT16, compare, gradient_checkpointing="on",
        dtype="auto",
    )  # fmt: skip


def continued(bench: Bench) -> Outcome:
    """Continued pretraining, packed, with distillation; retention is measured."""
    options = {"method": "continued", "distil": True, "retention": True}
    if not bench.is_cpu:
        return trained(bench, "continued", 5e-3, None, **options)
    heldout, small = _heldout(bench), plain.load(bench.pruned)
    folder, found = train(bench, CPU, "continued", **options)
    kl = next(row for row in read_measures(folder) if row.measure == "kl")
    model = plain.load(folder / "merged")
    reference = {
        "loss_before": [plain.mean_loss(small, heldout)],
        "loss_after": [plain.mean_loss(model, heldout)],
        "kl": [_divergence(bench.dense, m, heldout) for m in (small, model)],
    }
    have = {
        "loss_before": [_loss(found.heldout_loss_before)],
        "loss_after": [_loss(found.heldout_loss_after)],
        "kl": [_loss(kl.before), _loss(kl.after)],
    }
    outcome = near(bench, reference, have, 5e-3)
    before, after = have["loss_before"][0], have["loss_after"][0]
    learned = after < before
    text = f"held-out loss {before:.4f} to {after:.4f}, and KL from the dense model: {outcome.text}"
    return Outcome(outcome.agrees and learned, text + ("" if learned else "; nothing was learned"))


def kept(bench: Bench) -> Outcome:
    """LoRA by KL from distributions read from disk; on the CPU against a teacher in memory."""
    whole = bench.dense.config.vocab_size  # with all tokens kept, both are the same
    compare = None
    if bench.is_cpu:
        _, live = train(bench, CPU, "kept-live", loss="kl", teacher_top_k=0)
        compare = {"loss_after": _loss(live.heldout_loss_after)}
    return trained(bench, "kept", NEAR_TRAINED_BFLOAT16, compare, loss="kl", teacher_top_k=whole)


def _divergence(dense: Any, model: Any, rows: Sequence[tuple[Any, Any]]) -> float:
    """Return KL(dense || model) per predicted token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, _ in rows:
            at = torch.tensor([list(ids)])
            p, q = (m(at, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                    for m in (dense, model))  # fmt: skip
            total += float((p.exp() * (p - q)).sum())
            count += len(ids) - 1
    return total / count


def width(bench: Bench, method: str) -> Outcome:
    """Compare the dropped units; on the CPU the written model with the dense one, silenced."""
    from safetensors.torch import load_file

    options: dict[str, Any] = {"checkpoint": "demo", "method": method, "ratio": 0.25,
                               "samples": 16, "dtype": "float32"}  # fmt: skip
    folder = bench.run("width", bench.device, f"width-{method}", **options)
    found = WidthPruning.read(folder)
    assert found is not None
    if not bench.is_cpu:
        wanted = WidthPruning.read(bench.run("width", CPU, f"width-{method}", **options))
        assert wanted is not None
        here, there = _units(found), _units(wanted)
        text = f"{len(here):,} heads and neurons dropped"
        if here != there:
            differ = f"{len(here ^ there):,} are dropped on only one of the two"
            return Outcome(False, f"{text}, {len(there):,} on the CPU; {differ}")
        return Outcome(True, f"{text}, the same as on the CPU")
    tensors: dict[str, Any] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    biases = {n: t for n, t in tensors.items() if n.endswith(("o_proj.bias", "down_proj.bias"))}
    quiet = plain.silenced(bench.dense, found.blocks, biases)
    cut = loading.load_model(folder, CPU, torch.float32)
    outcome = near(
        bench,
        {"loss": plain.losses(quiet, bench.rows).tolist()},
        {"loss": plain.losses(cut, bench.rows).tolist()},
        1e-4,
    )
    text = f"{len(_units(found)):,} heads and neurons dropped; losses of rows: {outcome.text}"
    return Outcome(outcome.agrees, text)


def _units(record: WidthPruning) -> set[tuple[int, str, int]]:
    return {
        (cut.block, kind, unit)
        for cut in record.blocks
        for kind, units in (("head", cut.dropped_heads), ("neuron", cut.dropped_neurons))
        for unit in units
    }


def tasks(bench: Bench) -> Outcome:
    """Compare the log-likelihood of every choice of a few questions."""
    options = {"checkpoint": "demo", "tasks": ("demo_colour", "demo_order"), "limit": 10,
               "dtype": "float32", "fresh": True}  # fmt: skip
    samples = read_samples(bench.run("evaluate", bench.device, "tasks", **options))
    if bench.is_cpu:
        reference = [_likelihood(bench, s.question, c) for s in samples for c in s.choices or ()]
    else:
        others = read_samples(bench.run("evaluate", CPU, "tasks", **options))
        reference = [value for s in others for value in s.loglikelihoods or ()]
    found = [value for s in samples for value in s.loglikelihoods or ()]
    outcome = near(bench, {"log-likelihood": reference}, {"log-likelihood": found}, NEAR_FLOAT32)
    right = sum(sample.answer == sample.target for sample in samples)
    agrees = outcome.agrees and bool(found)
    return Outcome(agrees, f"{right} of {len(samples)} questions right: {outcome.text}")


def _likelihood(bench: Bench, question: str, choice: str) -> float:
    before, whole = (bench.tokenizer.encode(text) for text in (question, question + choice))
    return plain.likelihood(bench.dense, before, whole[len(before) :])


def benchmark(bench: Bench) -> Outcome:
    """Benchmark the demo; its latency is near that of the same generation timed here."""
    from core.benchmark import generate

    tokens, batches = 16, (1, 4)
    folder = bench.run(
        "benchmark", bench.device, checkpoints=("demo",), batch_sizes=batches,
        output_tokens=(tokens,), runs=4, warmup=2, largest_batch=bench.device.type == "cuda",
        memory_limit_mib=2000 if bench.device.type == "cuda" else None, dtype="float32",
    )  # fmt: skip
    points = Point.read(folder)
    problems = [f"{len(points)} of {len(batches)} points"] if len(points) != len(batches) else []
    model = loading.load_model(demo.CHECKPOINT, bench.device, torch.float32)
    config = generate.force_length(model, tokens)
    parts = []
    for point in points:
        ids = torch.ones(point.batch_size, 12, dtype=torch.long, device=bench.device)
        generate.timed(model, ids, config)
        own = statistics.median(generate.timed(model, ids, config)[0] for _ in range(3))
        mean, first = point.latency_s_mean or math.nan, point.first_token_s or math.nan
        parts.append(f"batch {point.batch_size}: {1000 * mean:.0f} ms, {1000 * own:.0f} ms here")
        if not (0 < first < mean and own / 10 < mean < own * 10 and point.runs == 4):
            problems.append(f"batch {point.batch_size} is implausible ({point.runs} runs)")
        least = sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
        if point.peak_memory_mib is not None and point.peak_memory_mib < least:
            problems.append(f"a peak of {point.peak_memory_mib:.0f} MiB is less than the weights")
    return Outcome(not problems, f"{tokens} tokens, {'; '.join([*parts, *problems])}")


def refusal(bench: Bench) -> Outcome:
    """A device number that does not exist is refused with a sentence."""
    try:
        found = precision.resolve_device("cuda:99")
    except OptionError as error:
        return Outcome(True, f"cuda:99: {error}")
    return Outcome(False, f"cuda:99 was accepted as {found}")


def _in_own_process(bench: Bench, command: str, spec: Any) -> Outcome | None:
    """Run a command in a new process; return the outcome if it fails, else None."""
    argv = [sys.executable, "-m", "core", command, *to_arguments(spec)]
    # The doctor's own run holds the device.
    env = processes.environment(DEPTHCUT_LOCK_DIR=str(bench.folder / "locks"))
    done = subprocess.run(
        argv, env=env, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return None
    return Outcome(False, (done.stderr.strip().splitlines() or ["no message"])[-1])


def own_process(bench: Bench) -> Outcome:
    """Heal a cut in a new process, as users do: nothing has used the GPU there before."""
    options: dict[str, Any] = {"checkpoint": "demo", "dtype": "float32", "drop": DROPPED}
    options |= {"heal": "refit", "samples": 32, "length": 2 * WINDOW}
    here = bench.run("prune", CPU, "healed", **options)
    out = bench.folder / "own-process"
    device = "cpu" if bench.device.type == "cpu" else str(bench.device)
    spec = build(commands.get("prune").spec_class, {**options, "device": device, "out": str(out)})
    failed = _in_own_process(bench, "prune", spec)
    if failed:
        return failed

    def kl(folder: Path) -> list[float]:
        found = (Pruning.read(folder) or Pruning()).healing or Healing()
        return [found.kl_before or math.nan, found.kl_after or math.nan]

    return near(bench, {"kl": kl(here)}, {"kl": kl(out)}, NEAR_FLOAT32)


def several(bench: Bench) -> Outcome:
    """Compare what two processes compute, each on a device of its own, with what one computes."""
    outcomes = [_several_score(bench), _several_train(bench)]
    text = "; ".join(outcome.text for outcome in outcomes)
    return Outcome(all(outcome.agrees for outcome in outcomes), text)


def _several_score(bench: Bench) -> Outcome:
    """Compare importance."""
    options: dict[str, Any] = {
        "checkpoint": "demo", "metrics": METRICS, "samples": SAMPLES, "length": LENGTH,
        "seed": SEED, "rounds": ROUNDS, "dtype": "float32",
    }  # fmt: skip
    one, two = bench.run("importance", bench.device, "several", **options), bench.folder / "two"
    options |= {"device": bench.device.type, "processes": 2, "out": str(two)}
    spec = build(commands.get("importance").spec_class, options)
    failed = _in_own_process(bench, "importance", spec)
    if failed:
        return failed
    off, where = differ(scores(one), scores(two))
    text = f"all numbers differ from those of one process by at most {off:.1e} ({where})"
    return Outcome(off <= NEAR_SHARED, text)


def _several_train(bench: Bench) -> Outcome:
    """Compare training all weights, which two processes load, hold and write in parts (FSDP2)."""
    given: dict[str, Any] = {"method": "full"}
    one, _ = train(bench, bench.device, "several-training", **given)
    two = bench.folder / "split"
    given |= TRAINED | {"checkpoint": str(bench.pruned), "data": str(bench.stories)}
    given |= {"device": bench.device.type, "processes": 2, "sharding": "fsdp", "out": str(two)}
    failed = _in_own_process(bench, "retrain", build(commands.get("retrain").spec_class, given))
    if failed:
        return failed
    off, where = differ(_training(one), _training(two))
    text = f"training with split weights by at most {off:.1e} ({where})"
    return Outcome(off <= NEAR_TRAINED, text)


def _training(folder: Path) -> dict[str, list[float]]:
    """Return what a training measured, and the norms of the weights that it wrote."""
    from safetensors.torch import load_file

    found = Summary.read(folder)
    assert found is not None
    assert found.merged is not None
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [step for step in map(metric, lines) if isinstance(step, Step)]
    tensors = load_file(folder / "merged" / "model.safetensors")
    return {
        "loss": [_loss(step.loss) for step in steps],
        "gradient norm": [_loss(step.grad_norm) for step in steps],
        "held-out loss": [_loss(found.heldout_loss_after), found.merged.heldout_loss],
        "weights": [float(tensors[name].float().norm()) for name in sorted(tensors)],
    }


def utilisation(bench: Bench) -> Outcome:
    """The driver reports a busy GPU as busy."""
    import time

    from core.benchmark.utilisation import UtilisationSampler

    sampler = UtilisationSampler(bench.device)
    sampler.start()
    left = torch.randn(4096, 4096, device=bench.device)
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        left @ left
        torch.cuda.synchronize(bench.device)
    sampler.stop()
    if not sampler.samples:
        return Outcome(False, "the driver reports no utilisation of this GPU")
    most = max(sampler.samples)
    return Outcome(most > 50, f"{most:.0f}% while it multiplies")


def seven_billion(bench: Bench) -> Outcome:
    """Score and train a model of the size of LLaMA-7B, random, within the memory of a small card.

    Raises out of memory if a step needs more, which the check then reports.
    """
    from core.importance.branches import make_batch
    from core.importance.sweep import sweep
    from core.importance.taylor import taylor
    from core.model.blocks import BlockView
    from core.model.memory import free_memory
    from core.retrain import layers, weights
    from core.retrain.loss import collate
    from core.retrain.rows import Row
    from core.retrain.spec import RetrainSpec
    from core.retrain.trainer import Objective

    device = bench.device
    free, total = torch.cuda.mem_get_info(device)
    if free < CARD_GIB * GIB:
        return Outcome(True, f"not tried: it needs {CARD_GIB} GiB, and {free / GIB:.1f} are free")
    torch.cuda.set_per_process_memory_fraction(CARD_GIB * GIB / total, device)
    parts: list[str] = []

    def step(what: str, work: Callable[[], Any]) -> None:
        free_memory(device)
        torch.cuda.reset_peak_memory_stats(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        peak = torch.cuda.max_memory_allocated(device) / GIB
        parts.append(f"{what} {start.elapsed_time(end) / 1000:.1f} s, {peak:.1f} GiB")

    try:
        model = _random_7b(device)
        view = BlockView(model)
        draw = torch.Generator().manual_seed(SEED)

        def rows(count: int) -> Any:
            return make_batch(torch.randint(0, 32000, (count, 128), generator=draw).tolist(), view)

        step("scoring 10 x 128 tokens", lambda: sweep(view, rows(10)))
        step("64 x 128", lambda: sweep(view, rows(64)))
        step("Taylor 10 x 128", lambda: taylor(view, rows(10)))
        spec = RetrainSpec(checkpoint="", data="demo", out="")
        model = weights.with_adapters(model, spec).train()
        layers.enable_recomputation(model)
        objective = Objective(device, torch.bfloat16)
        ids = tuple(range(2, 258))
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v
                 for k, v in collate([(Row(ids, ids),)] * 4).items()}  # fmt: skip
        batch["items"] = 4 * 255
        step("LoRA 4 x 256", lambda: objective(model, batch)[0].backward())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return Outcome(True, "; ".join(parts))


def _random_7b(device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**SEVEN_B))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)
