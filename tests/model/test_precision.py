"""One rule for precision: torch's side of it, and commands that must give the same number."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from core.__main__ import main
from core.benchmark.worker import Request, dtype_of
from core.data.evaluation import evaluation_stream, evaluation_windows
from core.errors import OptionError
from core.live.store import Store
from core.live.whatif import WhatIf
from core.model import precision
from core.runs import devices

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("capability", "scored", "gradients", "trained"),
    [
        ((6, 1), torch.float32, torch.float32, None),
        ((7, 5), torch.float16, torch.float32, None),
        ((8, 0), torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ((9, 0), torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_gpus(monkeypatch, capability, scored, gradients, trained):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for purpose in ("whole", "blocks"):
        found = precision.decide("auto", CUDA, "bfloat16", purpose)
        assert found == precision.Precision(scored, scored)
    assert precision.arithmetic_of(scored, CUDA) == scored
    assert precision.gradients_of(scored, CUDA) == gradients
    assert precision.decide("auto", CUDA, "bfloat16", "training").compute == trained


def test_estimates_see_the_same_cpu_as_torch():
    assert devices.cpu_has_bfloat16() == precision.cpu_has_bfloat16()


def test_an_unknown_precision():
    with pytest.raises(OptionError, match="int4"):
        precision.decide("int4", CPU, "float32")


@pytest.mark.parametrize("native", [True, False])
def test_every_command_computes_in_the_same_precision(tmp_path, monkeypatch, native):
    """evaluate, curve, importance and the live model, on the same windows of the same text."""
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: native)
    folder = tiny.write(tmp_path / "model", dtype="bfloat16")
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(60, seed=3))

    def summary(command, *options):
        out = tmp_path / command
        given = ["--out", str(out), "--device", "cpu", *options]
        assert main([command, str(folder), *given]) == 0
        return json.loads((out / "summary.json").read_text())

    evaluated = summary("evaluate", "--perplexity", str(text), "--window", "32")
    loaded = Store(CPU, "auto", 1000.0).get(str(folder))
    ids = loaded.tokenizer.encode(evaluation_stream(str(text)), add_special_tokens=False)
    bos = loaded.tokenizer.bos_token_id
    windows = evaluation_windows(ids, 32, "once", bos)
    live = WhatIf(loaded.view, windows, 2**30).answer(())

    wanted = "bfloat16" if native else "float32"
    request = Request(str(folder), "cpu", "auto", False, 4, 0, 2, 2, 0)
    assert precision.dtype_name(dtype_of(request, CPU)) == wanted
    assert evaluated["dtype"] == precision.dtype_name(loaded.view.dtype) == wanted
    assert live.windows == evaluated["perplexity"][0]["windows"]
    assert live.ppl == pytest.approx(evaluated["perplexity"][0]["ppl"], rel=1e-6)

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in windows))
    calibration = ["--calibration", str(rows), "--samples", str(len(windows)), "--length", "32"]
    scored = summary("importance", *calibration, "--metrics", "ppl,taylor")
    assert scored["compute_dtype"] == wanted
    curve = summary("curve", "--scores", str(tmp_path / "importance"), "--counts", "1")
    # The scored pass rounds in other places than the stock layers.
    near = 5e-3 if native else 1e-5
    for found in (scored, curve):
        assert found["dense_ppl"] == pytest.approx(live.ppl, rel=near)


@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_only_float16_is_blamed_on_float16(computed):
    """float16 weights are computed in float32 on a CPU: an overflow there is not float16's."""
    assert "float16 overflows" in precision.not_finite_hint(torch.float16)
    hint = precision.not_finite_hint(computed)
    assert "overflow" not in hint
    assert f"computed in {precision.dtype_name(computed)}" in hint
