"""The check of the extrapolation against how runs went on."""

from __future__ import annotations

import json

from bench import extrapolation as bench


def test_the_first_half_of_a_run_is_held_against_its_end(tmp_path):
    lines = [{"step": step, "loss": 1.0, "tokens": 500 * step} for step in range(1, 81)]
    shares = {step: 1 - (1 + 500 * step / 3000) ** -0.4 for step in range(0, 81, 8)}
    lines += [
        {"event": "eval", "step": step, "heldout_loss": 1.0, "recovered": share,
         "recovered_kl": 0.01}
        for step, share in shares.items()
    ]  # fmt: skip
    (tmp_path / ".run").mkdir()
    (tmp_path / ".run" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (found,) = bench.checks(tmp_path)  # next to nothing of the KL came back: not fitted
    assert (found.measure, found.fitted, found.end) == ("loss", 20_000, 40_000)
    assert found.measured == shares[80]
    assert abs(found.estimate - shares[80]) < 0.01
    assert found.is_inside
    text = "\n".join(bench.page([found], 1))
    assert "1 of 1 intervals, from 1 run," in text
    assert "| loss | 20,000 tokens | 40,000 |" in text
    assert "No run so far" in "\n".join(bench.page([], 0))
