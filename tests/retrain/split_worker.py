"""What two processes do in test_split_files.py: load split models, compare, write, evaluate.

Each writes what it found to ``result-RANK.json`` in its folder.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from core.errors import DepthcutError, RunError
from core.model.loading import load_model
from core.model.memory import free_memory
from core.model.streaming import Weights
from core.retrain import loss, sharded, split_files, teacher
from core.retrain.rows import IGNORED, Row
from core.runs.progress import SILENT
from core.runs.ranks import ALONE, Ranks

CPU = torch.device("cpu")
SIZE = 2


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=SIZE)
    ranks = Ranks(rank, SIZE)
    asked = json.loads((folder / "asked.json").read_text())
    found = {
        "loaded": {n: loaded(n, Path(path), ranks, folder) for n, path in asked["same"].items()},
        "memory": memory(Path(asked["large"]), ranks, folder),
        "evaluated": evaluated(Path(asked["model"]), Path(asked["dense"]), ranks),
        "failed": failed(Path(asked["model"]), Path(asked["wider"]), ranks),
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def loaded(name: str, path: Path, ranks: Ranks, folder: Path) -> dict[str, object]:
    """Compare a split model, and what it is written as, with stock loads."""
    ids = torch.arange(3, 35).view(2, 16)
    found: dict[str, object] = {}
    formats = (torch.float32, torch.bfloat16) if "bfloat16" in name else (torch.float32,)
    for dtype in formats:
        split = split_files.load(path, ranks, CPU, dtype, trained=True)
        stock = load_model(path, CPU, dtype)
        assert all(weight.requires_grad for weight in split.parameters())
        whole = {name: sharded.whole(w.detach()) for name, w in split.named_parameters()}
        other = dict(stock.named_parameters())
        buffers, others = dict(split.named_buffers()), dict(stock.named_buffers())
        with torch.no_grad():
            differ = (split(input_ids=ids).logits - stock(input_ids=ids).logits).abs().max()
        sharded.release(split)
        out = folder / f"{path.name}-{dtype}"
        split_files.write(split, out, ranks)
        split_files.write(split, folder / f"{out.name}-half", ranks, torch.bfloat16)
        dist.barrier()
        again = dict(load_model(out, CPU, dtype).named_parameters())
        half = dict(load_model(folder / f"{out.name}-half", CPU, torch.bfloat16).named_parameters())
        found[str(dtype)] = {
            "names": list(whole) == list(other) == list(again),
            "weights": all(same(whole[name], other[name]) for name in other),
            "buffers": buffers.keys() == others.keys()
            and all(same(buffers[name], others[name]) for name in others),
            "tied": (split.lm_head.weight is split.model.embed_tokens.weight)
            == (stock.lm_head.weight is stock.model.embed_tokens.weight),
            "settings": split.generation_config.to_dict() == stock.generation_config.to_dict()
            and settings(split) == settings(stock),
            "written": all(same(again[name], other[name]) for name in other),
            "rounded": all(same(half[name], other[name].bfloat16()) for name in other),
            "logits": float(differ),
            "share": sharded.held_bytes(split.parameters())
            / sum(weight.nbytes for weight in stock.parameters()),
        }
    return found


def settings(model) -> dict[str, object]:
    return {**model.config.to_dict(), "_name_or_path": ""}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def memory(path: Path, ranks: Ranks, folder: Path) -> dict[str, float]:
    """Return the memory that loading and writing take, in whole models, and what is freed."""
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    found = {}
    with _peak(size) as peak:
        split = split_files.load(path, ranks, CPU, torch.float32, trained=True)
    found["load"] = peak[0]
    for weight in split.parameters():
        weight.grad = torch.zeros_like(weight)
    optimiser = torch.optim.AdamW(split.parameters(), fused=True)
    optimiser.step()
    with _peak(size) as peak:
        split_files.write(split, folder / "large", ranks)
        split_files.write_optimiser(optimiser, folder / "optimizer.pt", ranks)
        dist.barrier()
    found["write"] = peak[0]
    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    kept = optimiser.state_dict()["state"]
    equal = (
        torch.equal(state[number][name], sharded.whole(value))
        for number, values in kept.items()
        for name, value in values.items()
    )
    found["state"] = all(list(equal))  # every process gathers all of them
    held = sharded.held_bytes(split.parameters())
    free_memory(CPU)
    before = _kib("VmRSS")
    sharded.free(split)
    free_memory(CPU)
    found["freed"] = (before - _kib("VmRSS")) * 1024 / held
    return found


class _peak:
    """The growth of this process's resident memory at its highest, in multiples of ``size``."""

    def __init__(self, size: int) -> None:
        self.size, self.found = size, [math.nan]

    def __enter__(self) -> list[float]:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _kib("VmRSS")
        return self.found

    def __exit__(self, *_: object) -> None:
        self.found[0] = (_kib("VmHWM") - self.before) * 1024 / self.size


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def evaluated(path: Path, dense: Path, ranks: Ranks) -> dict[str, object]:
    """Compare evaluations that share rows with those of whole models by one process."""
    loss.TOKENS_AT_ONCE = 64
    texts = [tuple(range(5 + i, 15 + 2 * i)) for i in range(17)]
    made = [Row(ids, (IGNORED, *ids[1:])) for ids in texts]
    batches = loss.batches_of(made)
    taken = [len(chosen) for chosen, counts, _ in loss.parts(made, CPU, SILENT, ranks) if counts]
    found: dict[str, object] = {"batches": len(batches), "taken": taken, "rows": len(made)}
    how = CPU, None, SILENT
    ways = {}
    for name, whose in (("one", ALONE), ("two", ranks)):
        if whose is ALONE:
            models = [load_model(one, CPU, torch.float32) for one in (path, dense)]
        else:
            models = [
                split_files.load(one, ranks, CPU, torch.float32, trained=False)
                for one in (path, dense)
            ]
        yardstick = teacher.yardstick(models[1], made, *how, whose)
        held = yardstick.measure(models[0], *how, None, whose)
        kl = loss.mean_kl(models[0], models[1], made, *how, whose)
        assert torch.is_grad_enabled()
        ways[name] = [yardstick.loss, held.loss, held.kl, kl]
    return {**found, **ways}


def failed(path: Path, wider: Path, ranks: Ranks) -> dict[str, str]:
    """Return what each process says if one alone cannot read, and of files of another model."""
    rows = Weights.rows

    def reading(self, name, first, last):
        if ranks.rank == 1 and name == "model.norm.weight":
            raise RunError("Cannot read the file: broken disk.", "Check the disk.")
        return rows(self, name, first, last)

    found = {}
    Weights.rows = reading
    try:
        split_files.load(path, ranks, CPU, torch.float32, trained=False)
    except DepthcutError as error:
        found["one alone"] = f"{type(error).__name__}: {error}"
    Weights.rows = rows
    model = split_files.load(path, ranks, CPU, torch.float32, trained=False)
    try:
        split_files.read(model, wider)
    except DepthcutError as error:
        found["shape"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
