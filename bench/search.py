"""Methods of search against the plain loop, in block passes and in time.

    python -m bench.search demo --save
    python -m bench.search smollm2 --counts 1-4 --samples 2 --length 32 --loop 24 --save

The plain loop rebuilds nothing and runs everything: each set that the method measured goes through
the stock model with its blocks left out, from the first block to the logits, and its KL is taken
from whole logits. Each method starts from nothing. ``--loop N`` runs the loop on N of the sets, at
even distances, and scales its time by block passes. FLOPs count blocks, attention and head, so
their ratio is what can be reached; the ratio of passes leaves out the head, which every set needs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from core.checkpoint import locate
from core.checkpoint.vocabulary import text_of
from core.data.calibration import sample
from core.importance.branches import Batch, make_batch
from core.importance.estimate import block_flops, head_flops
from core.model import loading, precision
from core.model.blocks import BlockView
from core.prune.plan import default_protection
from core.runs.progress import SILENT
from core.runs.spec import parse_numbers
from core.search.ledger import NONE, Drop, Ledger
from core.search.measure import Meter
from core.search.methods import METHODS, Task

RESULT = Path(__file__).resolve().parents[1] / "docs" / "results" / "search_bench.md"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEAD = [
    "| method | sets | block passes | of the loop | ratio of passes | ratio of FLOPs "
    "| seconds | of the loop | ratio of time | of the FLOP ratio | largest difference in KL |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
]


def logits_without(view: BlockView, batch: Batch, drop: Drop) -> torch.Tensor:
    """Return the stock model's logits [rows, tokens - 1, vocabulary] without ``drop``."""
    with view.skip(tuple(drop)) as model:
        return model(batch.ids, use_cache=False).logits[:, :-1].float()


def loop(view: BlockView, batch: Batch, sets: Sequence[Drop]) -> list[float]:
    """Return the KL of every set, one after another; the dense logits are computed once."""
    with torch.inference_mode():
        dense = F.log_softmax(logits_without(view, batch, NONE), -1)
        found = []
        for drop in sets:
            other = F.log_softmax(logits_without(view, batch, drop), -1)
            found.append(float((dense.exp() * (dense - other)).sum(-1).double().mean()))
    return found


def timed(clock: Callable[[], float], function: Callable[[], Any]) -> tuple[float, Any]:
    began = clock()
    value = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began, value


def measure(arguments: argparse.Namespace) -> tuple[list[str], str]:
    checkpoint = locate.open(arguments.checkpoint)
    folder, info = checkpoint.folder, checkpoint.info
    device = precision.resolve_device(arguments.device)
    model = loading.load_model(folder, device, precision.DTYPES[arguments.dtype])
    view, source = BlockView(model), text_of(arguments.calibration, folder)
    tokenizer = loading.load_tokenizer(folder)
    drawn = sample(source, tokenizer, arguments.samples, arguments.length, 1234)
    batch = make_batch(drawn.rows, view)
    first, last = default_protection(info.blocks)
    counts = parse_numbers(arguments.counts, "--counts") if arguments.counts else ()
    counts = tuple(sorted(counts)) or tuple(range(1, info.blocks // 4 + 1))
    task = Task(tuple(range(first, info.blocks - last)), counts)
    block = sum(block_flops(info, b, len(drawn.rows), arguments.length) for b in range(info.blocks))
    block, head = block / info.blocks, head_flops(info, len(drawn.rows), arguments.length)
    clock = CLOCKS[arguments.clock]
    loop(view, batch, [NONE])  # the first run of anything is slower
    rows = []
    for name in arguments.methods:
        ledger = Ledger(Meter(view, batch, SILENT), "kl", info.blocks, arguments.most)
        spent, _ = timed(clock, lambda name=name, ledger=ledger: METHODS[name](
            task, ledger, lambda drop: None
        ))  # fmt: skip
        sets = sorted((s for s in ledger.costs if s), key=lambda s: (len(s), sorted(s)))
        picked = sets[:: max(1, len(sets) // (arguments.loop or len(sets)))]
        plain, values = timed(clock, lambda picked=picked: loop(view, batch, picked))
        ran = sum(info.blocks - len(s) for s in [NONE, *picked])
        plain *= ledger.plain_passes / ran
        apart = max(
            abs(value - ledger.costs[drop].kl) / max(ledger.costs[drop].kl, 1e-6)
            for drop, value in zip(picked, values, strict=True)
        )
        states = len(ledger.costs)
        flops = (ledger.plain_passes * block + states * head) / (
            ledger.passes * block + states * head
        )
        rows.append(
            f"| {name} | {len(sets):,} | {ledger.passes:,} | {ledger.plain_passes:,} "
            f"| {ledger.plain_passes / ledger.passes:.2f} | {flops:.2f} | {spent:.1f} "
            f"| {plain:.1f}{'' if len(picked) == len(sets) else f' (from {len(picked)} sets)'} "
            f"| {plain / spent:.2f} | {100 * plain / spent / flops:.0f} % | {apart:.1e} |"
        )
        print(rows[-1], flush=True)
    about = (
        f"{checkpoint.name}, {info.blocks} blocks, {info.parameters:,} parameters, removing "
        f"{counts[0]} to {counts[-1]} of blocks {first} to {info.blocks - last - 1}. "
        f"{device}, {arguments.dtype}, threads: {torch.get_num_threads()}, torch "
        f"{torch.__version__}; {Path(source).name}, {len(drawn.rows)} x {arguments.length} tokens, "
        f"seed 1234; {arguments.clock} seconds."
    )
    return rows, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--methods", nargs="+", default=["pairs", "greedy", "beam", "evolve"])
    parser.add_argument("--counts", default="", help="default: up to a quarter of the blocks")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calibration", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=tuple(precision.DTYPES), default="float32")
    parser.add_argument("--most", type=int, default=1000, help="hidden states held at once")
    parser.add_argument("--loop", type=int, default=0, help="sets of the loop; 0: all")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: this process's own CPU seconds, for one thread on a busy machine",
    )
    parser.add_argument("--save", action="store_true", help=f"append to {RESULT.name}")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print("\n".join(HEAD), flush=True)
    rows, about = measure(arguments)
    print("\n" + about)
    if arguments.save:
        command = f"python -m bench.search {Path(arguments.checkpoint).name}"
        for name in ("counts", "samples", "length", "loop", "threads", "clock", "dtype"):
            value = getattr(arguments, name)
            if value and value != parser.get_default(name):
                command += f" --{name} {value}"
        if arguments.calibration != "auto":
            command += f" --calibration {Path(arguments.calibration).name}"
        old = RESULT.read_text() if RESULT.exists() else "# Search: measured\n"
        RESULT.write_text("\n".join([old, f"`{command}`", "", about, "", *HEAD, *rows, ""]))


if __name__ == "__main__":
    main()
