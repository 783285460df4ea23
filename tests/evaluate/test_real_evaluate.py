"""Real input: stories260k on WikiText-2, by both protocols, against a plain transformers loop."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main


@pytest.mark.parametrize("bos", ["once", "window"])
def test_stories260k_on_wikitext2(real_dir, tmp_path, bos):
    folder, whole = real_dir / "stories260k", real_dir / "wikitext2_test.txt"
    text = tmp_path / "wikitext2_part.txt"
    text.write_text(whole.read_text(encoding="utf-8")[:16_000], encoding="utf-8")
    out = tmp_path / "out"
    argv = ["evaluate", folder, "--perplexity", text, "--window", "128,512", "--bos", bos]
    assert main([str(a) for a in [*argv, "--out", out, "--device", "cpu"]]) == 0
    with (out / "perplexity.csv").open(newline="") as handle:
        rows = {int(row["window"]): row for row in csv.DictReader(handle)}

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    start = [tokenizer.bos_token_id]
    for window in (128, 512):
        stream, size = (start + ids, window) if bos == "once" else (ids, window - 1)
        losses = []
        for at in range(0, len(stream) - size + 1, size):
            row = torch.tensor([(start if bos == "window" else []) + stream[at : at + size]])
            with torch.no_grad():
                losses.append(model(input_ids=row, labels=row).loss.item())
        expected = math.exp(math.fsum(losses) / len(losses))
        assert int(rows[window]["tokens"]) == len(losses) * (window - 1) > 3_000
        assert float(rows[window]["ppl"]) == pytest.approx(expected, rel=1e-5)
