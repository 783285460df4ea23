"""Run directories as commands leave them, made without computing anything."""

from __future__ import annotations

import json
from pathlib import Path

from core.runs import workspace

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


def checkpoint(folder: Path, blocks: int = 6, words: int = 3) -> Path:
    """Write a config and a tokenizer; shapes and sizes can be read from them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": blocks}))
    vocab = {f"word{i}": i for i in range(words)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def run(root: Path, name: str, command: str, started: float, cwd: str = "", **spec) -> Path:
    """Write the bookkeeping of a finished run."""
    book = root / name / ".run"
    book.mkdir(parents=True)
    spec = {k: v if isinstance(v, (list, int, type(None))) else str(v) for k, v in spec.items()}
    value = {"command": command, "spec": spec, "argv": [], "cwd": cwd}
    workspace.write_json(book / "spec.json", value)
    workspace.write_json(book / "status.json", {"state": "done", "created": started})
    return root / name


def pruned(root: Path, name: str, source, drop, started: float, total: int, **more) -> Path:
    """Write a run of prune on a model of six blocks that has ``total`` parameters."""
    folder = checkpoint(run(root, name, "prune", started, checkpoint=source, drop=drop), 6)
    left = total - 7744 * len(drop)
    record = {"dropped": drop, "dropped_original": drop, "parameters_after": left}
    record |= {"original_blocks": [b for b in range(6) if b not in drop], "blocks_after": 6}
    workspace.write_json(folder / "pruning.json", {**record, "ratio": 1 - left / total, **more})
    return folder


def benchmark(root: Path, name: str, started: float, entries: dict[str, str], rows, **more) -> Path:
    """Write a benchmark run; ``entries`` maps its variants' names to their paths."""
    folder = run(root, name, "benchmark", started, checkpoints=list(entries.values()))
    columns = list(rows[0])
    cells = [[str(r[c]).lower() if isinstance(r[c], bool) else r[c] for c in columns] for r in rows]
    workspace.write_csv(folder / "points.csv", columns, cells)
    common = {"parameters": 1000, "dtype": "float32"}
    listed = [{"name": n, "path": p, **common} for n, p in entries.items()]
    workspace.write_json(folder / "summary.json", {"variants": listed, "device": "cpu", **more})
    return folder
