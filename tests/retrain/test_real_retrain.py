"""A real trained model: drop a block, retrain on text of the dense model, and recover."""

import json
from pathlib import Path

import pytest
import torch
from retrain_helpers import execute, summary, write_jsonl
from transformers import AutoModelForCausalLM

from core.prune import depth


def sampled(model, count, seed):
    """Return rows of 96 token ids sampled from the dense model at temperature 1."""
    torch.manual_seed(seed)
    start = torch.full((count, 1), model.config.bos_token_id)
    ids = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, min_new_tokens=95,
        max_new_tokens=95, pad_token_id=0,
    )  # fmt: skip
    return [{"input_ids": row} for row in ids.tolist()]


def test_stories260k_recovers_on_its_own_text(real_dir, tmp_path):
    source = real_dir / "stories260k"
    pruned = tmp_path / "pruned"
    depth.prune(source, (2,), pruned)
    dense = AutoModelForCausalLM.from_pretrained(source).eval()
    train = write_jsonl(tmp_path / "train.jsonl", sampled(dense, 208, seed=1))
    heldout = write_jsonl(tmp_path / "heldout.jsonl", sampled(dense, 24, seed=2))
    out = tmp_path / "run"
    status = execute(
        checkpoint=str(pruned), dense=str(source), data=train, holdout_data=heldout, out=str(out),
        method="lora", steps=26, batch=8, micro_batch=8, lr=1e-2, cutoff=96, eval_every=26,
    )  # fmt: skip
    assert status == 0
    got = summary(out)
    rows = [json.loads(line)["input_ids"] for line in Path(heldout).read_text().splitlines()]
    ids = torch.tensor(rows)
    with torch.no_grad():
        expected = float(dense(input_ids=ids, labels=ids).loss)
    assert got["heldout_loss_dense"] == pytest.approx(expected, abs=1e-3)
    assert got["gap_nat"] > 0.1
    assert got["recovered"] > 0.3
