"""A trained tiny dense model, a pruned one, and data; written once for all retraining tests."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

from core.prune import depth

sys.path.append(str(Path(__file__).parent))

from retrain_helpers import instructions, write_jsonl

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _lock_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("locks"))


@pytest.fixture(autouse=True)
def _own_locks(monkeypatch, _lock_dir):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", _lock_dir)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text(tiny.text(300, seed=11), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("tasks") / "tasks.jsonl", instructions(60))


@pytest.fixture(scope="session")
def dense(tiny_gqa, tmp_path_factory):
    """The tiny model after 60 plain AdamW steps on other text and tasks of the same world."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("dense")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gqa)
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa)
    lines = tiny.text(60 * 4, seed=5).splitlines()
    for line, row in zip(list(lines), instructions(60 * 4, seed=6), strict=True):
        given = [part for part in (row["instruction"], row["input"]) if part]
        lines += [line, "\n".join([*given, row["output"]])]
    lines = lines[60 * 4 :]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        ids = [tokenizer(line).input_ids + [2] for line in lines[step * 8 : step * 8 + 8]]
        width = max(map(len, ids))
        rows = torch.tensor([row + [2] * (width - len(row)) for row in ids])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
        model(input_ids=rows, labels=labels, use_cache=False).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pruned(dense, tmp_path_factory):
    """The dense model without two of its five blocks."""
    folder = tmp_path_factory.mktemp("cut") / "pruned"
    depth.prune(dense, (1, 3), folder)
    return folder


@pytest.fixture(scope="session")
def half(dense, tmp_path_factory):
    """The dense model stored in bfloat16 (``dense``), and without two blocks (``pruned``)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("half")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder / "dense")
    depth.prune(folder / "dense", (1, 3), folder / "pruned")
    return folder
