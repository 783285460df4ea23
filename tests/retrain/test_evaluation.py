"""Further evaluation: loss and KL on several sources, and questions, against stock libraries."""

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from retrain_helpers import execute, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.demo.evaluate import accuracy


def table(folder):
    with (folder / "evaluation.csv").open() as file:
        return {(row["source"], row["measure"]): row for row in csv.DictReader(file)}


@torch.no_grad()
def naive(model, dense, lines, tokenizer):
    """Mean loss and mean KL(dense || model) per token, one text at a time."""
    loss = kl = count = 0.0
    for line in lines:
        ids = torch.tensor([[*tokenizer(line).input_ids, tokenizer.eos_token_id]])
        mine = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        p = dense(input_ids=ids).logits[0, :-1].softmax(-1)
        kl += float((p * (p.log() - mine)).sum())
        loss -= float(mine.gather(1, ids[0, 1:, None]).sum())
        count += len(mine)
    return loss / count, kl / count, count


@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_kl_on_another_source(method, pruned, dense, texts, tmp_path):
    trained = set(Path(texts).read_text().splitlines())
    lines = [line for line in tiny.text(40, seed=99).splitlines() if line not in trained][:10]
    assert len(lines) > 3
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": line} for line in lines])
    out = tmp_path / "run"
    status = execute(
        checkpoint=str(pruned), data=texts, out=str(out), method=method, steps=3, batch=6,
        lr=5e-3, cutoff=64, holdout=10, also=(other,), merge=method == "lora",
        merge_dtype="bfloat16" if method == "lora" else "auto", seed=1,
    )  # fmt: skip
    assert status == 0
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    full = AutoModelForCausalLM.from_pretrained(dense).eval()
    cut = AutoModelForCausalLM.from_pretrained(pruned).eval()
    before = naive(cut, full, lines, tokenizer)
    if method == "lora":
        after = naive(PeftModel.from_pretrained(cut, out / "adapter"), full, lines, tokenizer)
    else:
        merged = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
        after = naive(merged, full, lines, tokenizer)
    got = table(out)
    loss, kl = got[other, "loss"], got[other, "kl"]
    assert float(loss["dense"]) == pytest.approx(naive(full, full, lines, tokenizer)[0], abs=1e-4)
    for column, expected in (("before", before), ("after", after)):
        assert float(loss[column]) == pytest.approx(expected[0], abs=1e-4)
        assert float(kl[column]) == pytest.approx(expected[1], abs=1e-4)
    assert int(loss["items"]) == before[2]
    assert float(kl["before"]) > 0.01
    assert kl["dense"] == ""
    stated = json.loads((out / "summary.json").read_text())
    assert float(got["held out", "loss"]["after"]) == stated["heldout_loss_after"]
    if method == "lora":  # rounding the merged weights to bfloat16 is measured, and is not zero
        assert 1e-5 < stated["merged"]["max_logit_difference"] < 0.5
        assert stated["merged"]["dtype"] == "bfloat16"


def test_questions_are_asked_of_all_three(tmp_path, tiny_dir, texts):
    dense, pruned = tiny_dir("gqa", seed=1, max_position_embeddings=1024), tiny_dir("gqa", seed=2,
        max_position_embeddings=1024)  # fmt: skip
    out = tmp_path / "run"
    status = execute(
        checkpoint=str(pruned), dense=str(dense), data=texts, out=str(out), method="lora",
        steps=1, batch=2, cutoff=64, holdout=2, questions=1,
    )  # fmt: skip
    assert status == 0
    got, tokenizer = table(out), AutoTokenizer.from_pretrained(pruned)
    for column, folder in (("dense", dense), ("before", pruned)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        for skill in ("opposite", "counting"):
            assert float(got[skill, "accuracy"][column]) == accuracy(model, tokenizer, skill, 1)
    assert got["opposite", "accuracy"]["items"] == "1"


def test_rows_that_were_trained_on_are_not_evaluated_on(pruned, dense, tmp_path, capsys):
    lines = list(dict.fromkeys(tiny.text(60, seed=5).splitlines()))
    data = write_jsonl(tmp_path / "d.jsonl", [{"text": line} for line in lines])
    options = {
        "checkpoint": str(pruned), "dense": str(dense), "data": data, "steps": 1, "batch": 2,
        "cutoff": 64, "holdout": 2,
    }  # fmt: skip
    evaluated = tmp_path / "j.jsonl"
    write_jsonl(evaluated, [{"text": lines[0]}, {"text": "Nobody knows."}])
    assert execute(**options, out=str(tmp_path / "one"), also=(str(evaluated),)) == 0
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    left = len(tokenizer("Nobody knows.").input_ids)  # plus the end token, minus the first
    assert int(table(tmp_path / "one")[str(evaluated), "loss"]["items"]) == left
    write_jsonl(evaluated, [{"text": lines[0]}])
    assert execute(**options, out=str(tmp_path / "two"), also=(str(evaluated),)) == 2
    assert "no usable rows to evaluate on" in capsys.readouterr().err
