"""width --heal refit: what is written against stock transformers, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from core.__main__ import main
from core.checkpoint import headers
from core.data.calibration import calibration_rows
from core.errors import RunError
from core.model import loading
from core.runs.workspace import read_run
from core.study import variants
from core.study.kinds import Variant
from core.width.healing import Shelf
from core.width.results import WidthPruning

torch.set_num_threads(1)


def log_p(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.log_softmax(-1).double()


@pytest.mark.parametrize("method", ["flap", "magnitude"])
def test_the_record_is_what_stock_transformers_measures(
    tiny_gqa, tmp_path, monkeypatch, capsys, method
):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    text, plain, out = tmp_path / "text.txt", tmp_path / "plain", tmp_path / "healed"
    text.write_text(tiny.text(), encoding="utf-8")
    argv = ["width", str(tiny_gqa), "--method", method, "--ratio", "0.5", "--device", "cpu"]
    argv += ["--calibration", str(text), "--dtype", "float32"]
    heal = ["--heal", "refit", "--heal-samples", "40", "--heal-length", "24"]
    capsys.readouterr()
    assert main([*argv, *heal, "--dry-run", "--out", str(out)]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (planned["heal"], planned["heal_samples"], planned["heal_length"]) == ("refit", 40, 24)
    assert planned["heal_flops"] > 0
    assert main([*argv, "--out", str(plain)]) == 0
    assert main([*argv, *heal, "--out", str(out)]) == 0
    record, without = WidthPruning.read(out), WidthPruning.read(plain)
    assert without.healing is None
    assert record.blocks == without.blocks
    assert record.healed == headers.inspect(out).healed == "refit"
    assert (record.healing.tokens, record.healing.heldout_tokens) == (720, 240)
    assert record.healing.calibration.samples == 40
    dense = Variant("dense", "dense", "dense")
    assert variants.made(read_run(out), dense, dense).label.endswith(", healed")
    assert "| healing | refit: refit |" in (out / "README.md").read_text()

    rows = calibration_rows(str(text), loading.load_tokenizer(tiny_gqa), 40, 24, 1234)
    ids = torch.tensor(rows)[torch.arange(40) % 4 == 3]
    dense = log_p(tiny_gqa, ids)
    for folder, told in ((plain, record.healing.kl_before), (out, record.healing.kl_after)):
        kl = float((dense.exp() * (dense - log_p(folder, ids))).sum(-1).mean())
        assert kl == pytest.approx(told, rel=2e-3)
    assert record.healing.kl_after < record.healing.kl_before


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--heal-samples", "4", "--heal-length", "8"), "Use more --heal-samples"),
        (("--heal-length", "100000"), "exceed the model's context"),
    ],
)
def test_bad_input_is_one_sentence(tiny_gqa, tmp_path, capsys, more, sentence):
    argv = ["width", str(tiny_gqa), "--method", "magnitude", "--ratio", "0.5", "--heal", "refit"]
    assert main([*argv, *more, "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def test_refitted_weights_wait_in_a_file_without_a_name(tmp_path):
    shelf, given = Shelf(tmp_path), [torch.randn(3, 5).bfloat16(), torch.randn(2, 2)]
    made = [shelf.put(tensor) for tensor in given]
    assert not list(tmp_path.iterdir())
    for read, tensor in reversed(list(zip(made, given, strict=True))):
        found = read(torch.empty(0))
        assert found.dtype == tensor.dtype
        assert found.equal(tensor)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf.close()
    shelf._file._file = SimpleNamespace(seek=lambda *_: 0, write=full)
    with pytest.raises(RunError, match="Cannot keep refitted weights in .*: No space left"):
        shelf.put(given[0])
