"""Every family goes through every command, from inspecting to measuring the retrained variant."""

from __future__ import annotations

import csv
import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from core.__main__ import main

ROWS, LENGTH = 3, 12
COMPUTE = ("--device", "cpu", "--dtype", "float32")


def table(path):
    with path.open() as handle:
        return list(csv.DictReader(handle))


def perplexity(folder, rows):
    """Perplexity of exact rows by one plain pass of stock transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    return math.exp(-logits.gather(2, ids[:, 1:, None]).double().mean().item())


@pytest.mark.parametrize("variant", ["llama3", *tiny.FAMILIES])
def test_a_family_through_every_command(tiny_dir, tmp_path, monkeypatch, capsys, variant):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tiny_dir(variant)
    rows = [[(7 * r + 3 * i) % 200 for i in range(LENGTH)] for r in range(ROWS)]
    calibration, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    calibration.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    text.write_text(tiny.text(60, seed=5))
    same = ("--calibration", calibration, "--samples", ROWS, "--length", LENGTH, *COMPUTE)

    def call(command, *arguments, out=None):
        where = () if out is None else ("--out", tmp_path / out)
        capsys.readouterr()
        assert main([str(a) for a in (command, *arguments, *where)]) == 0, command
        return capsys.readouterr().out

    assert json.loads(call("inspect", folder))["family"] == tiny.VARIANTS[variant][0]
    call("importance", folder, *same, out="scores")
    plan = json.loads(call("plan", tmp_path / "scores", "--criterion", "ppl", "--count", 2))
    drop = ",".join(map(str, plan["drop"]))
    asked = ("--scores", tmp_path / "scores", "--criteria", "ppl", "--counts", "1-2")
    call("curve", folder, *asked, *same, out="curve")
    call("prune", folder, "--drop", drop, out="cut")
    curve = [float(row["ppl"]) for row in table(tmp_path / "curve/curve.csv")]
    scores = {row["block"]: float(row["ppl"]) for row in table(tmp_path / "scores/blocks.csv")}
    assert curve[-2] == pytest.approx(scores[str(plan["drop"][0])], rel=1e-5)
    assert curve[-1] == pytest.approx(perplexity(tmp_path / "cut", rows), rel=1e-5)

    call("width", folder, "--method", "flap", "--ratio", 0.2, *same, out="narrow")
    narrow = json.loads(call("inspect", tmp_path / "narrow"))
    assert narrow["blocks"] == tiny.BLOCKS
    call(
        *("retrain", tmp_path / "cut", "--method", "lora", "--data", text, "--steps", 2),
        *("--batch", 2, "--cutoff", 16, "--holdout", 4, "--merge", *COMPUTE),
        out="lora",
    )
    merged = tmp_path / "lora" / "merged"
    assert perplexity(merged, rows) != perplexity(tmp_path / "cut", rows)
    call("evaluate", merged, "--perplexity", text, "--window", 16, *COMPUTE, out="judged")
    assert float(table(tmp_path / "judged/perplexity.csv")[0]["ppl"]) > 1
    # Its processes take seconds and know no family, so one family measures for all.
    dry = () if variant == "qwen3" else ("--dry-run",)
    sizes = ("--batch-sizes", 1, "--output-tokens", 4, "--runs", 2, "--warmup", 0)
    said = call("benchmark", merged, *sizes, *COMPUTE, *dry, out="speed")
    if dry:
        assert json.loads(said)["points"]
    else:
        assert float(table(tmp_path / "speed/points.csv")[0]["latency_s_mean"]) > 0
