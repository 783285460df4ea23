"""Time per what-if perplexity: each single block skipped, as the Prune page requests it.

    python -m bench.live [CHECKPOINT] [--device cpu] [--threads 2] [--save FILE.md]

The requests follow the page's order: ten calibration rows, the beginning of the held-out text, then
all of it, which continues from the beginning. ``plain`` is the same beginning without cached
states. With ``--threads 1``, processor seconds are what an idle core would take.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import report
from core.live.protocol import Perplexity
from core.live.store import Loaded, Store
from core.model.precision import resolve_device

TEXTS: dict[str, dict[str, Any]] = {
    "10 calibration rows": {"samples": 10},
    "beginning": {"quick": True},
    "all, after its beginning": {},
}
ROOM = 2**32


def timed(model: Loaded, skip: tuple[int, ...], room: float = ROOM, **text: Any) -> dict[str, Any]:
    """Answer one question; return wall and processor seconds and the windows evaluated."""
    ask = Perplexity(checkpoint=model.name, skip=skip, **text)
    held, windows, total = model.text(ask, room)
    cuda = model.view.device.type == "cuda"
    began, spent = time.perf_counter(), time.process_time()
    answer = held.answer(skip, windows=windows)
    if cuda:
        torch.cuda.synchronize()
    return {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - spent,
        "windows": f"{answer.windows} of {total}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    store = Store(resolve_device(asked.device), "auto", ROOM / 2**20)
    model = store.get(asked.checkpoint)
    dense = {name: timed(model, (), **text) for name, text in TEXTS.items()}
    found = {
        block: {name: timed(model, (block,), **text) for name, text in TEXTS.items()}
        for block in range(len(model.view))
    }
    model.texts.clear()
    timed(model, (), room=0, quick=True)
    plain = [timed(model, (block,), room=0, quick=True) for block in found]
    lines = [
        f"`python -m bench.live {asked.checkpoint} --threads {asked.threads}`, {store.device}, "
        f"{model.view.dtype}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the end; "
        "windows of 128 tokens.",
        "",
        "| text | windows | without block | wall s | processor s |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for name in TEXTS:
        rows = {"none": dense[name]} | {str(block): texts[name] for block, texts in found.items()}
        for block, row in rows.items():
            seconds = f"{row['wall_s']:.3f} | {row['cpu_s']:.3f}"
            lines.append(f"| {name} | {row['windows']} | {block} | {seconds} |")
    kept = [texts["beginning"] for texts in found.values()]
    for unit in ("wall_s", "cpu_s"):
        ours, naive = ([row[unit] for row in rows] for rows in (kept, plain))
        lines += [
            "",
            f"Beginning, {unit}: median {statistics.median(ours):.3f}, worst {max(ours):.3f}; "
            f"without cached states {statistics.median(naive):.3f} and {max(naive):.3f}.",
        ]
    report("\n".join(lines) + "\n", asked.save)


if __name__ == "__main__":
    main()
