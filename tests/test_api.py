"""The Python API gives the commands' numbers, and the examples of docs/python.md run."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from core import api
from core.__main__ import main
from core.checkpoint import own_code
from core.checkpoint.drop import Removal
from core.errors import CheckpointError, DataError, OptionError, PlanError
from core.importance.command import ImportanceSpec
from core.prune import depth
from core.prune import plan as planning
from core.prune import scores as block_scores
from core.prune.score_results import BlockRow

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S)
IDS = torch.tensor([[1, 5, 9, 30, 7, 7, 100]])
METRICS = (
    *("ppl", "taylor", "magnitude", "block-influence", "angular", "relative-update", "sleb"),
    "kl",
)


@pytest.fixture
def load():
    from transformers import AutoModelForCausalLM

    return lambda folder: AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokenizer(tiny_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_dir("qwen3"))


def test_scores_and_plans_are_those_of_the_commands(
    tmp_path, tiny_dir, load, tokenizer, monkeypatch
):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("qwen3"), tmp_path / "text.txt", tmp_path / "scores"
    text.write_text(tiny.text(60, seed=3), encoding="utf-8")
    argv = ["importance", str(source), "--calibration", str(text), "--metrics", ",".join(METRICS)]
    options = ["--samples", "4", "--length", "9", "--seed", "5", "--device", "cpu"]
    assert main([*argv, *options, "--out", str(out)]) == 0
    lines = [line for line in text.read_text().splitlines() if line.strip()]
    model = load(source)
    model.train()
    found = api.score(model, tokenizer, lines, metrics=METRICS, samples=4, length=9, seed=5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for ours, theirs in zip(found.rows, BlockRow.read(out), strict=True):
        assert vars(ours) == pytest.approx(vars(theirs), rel=1e-12)
    written = block_scores.load(out)
    assert found.angular == pytest.approx(dict(written.angular))
    assert found.greedy == written.greedy
    from core.checkpoint import headers

    info = headers.inspect(source)
    for criterion in ("taylor", "angular", "sleb"):
        theirs = planning.choose(written, criterion, ratio=0.3, info=info)
        ours = api.choose(found, criterion, ratio=0.3)
        assert (ours.drop, ours.params, ours.ratio) == (theirs.drop, theirs.params, theirs.ratio)
    assert found.to_pandas().columns.tolist() == list(found.to_dict()) == list(BlockRow.columns())
    by_rows = api.score(model, rows=[[1, 5, 9, 30], [2, 4]], metrics=("ppl",))
    assert by_rows.tokens == 4
    assert [row.taylor for row in by_rows.rows] == [None] * tiny.BLOCKS


@pytest.mark.parametrize("variant", ["gqa", "qwen2", "qwen3"])
def test_a_pruned_model_is_the_pruned_checkpoint(tmp_path, tiny_dir, load, variant):
    source = tiny_dir(variant)
    depth.prune(source, [1, 3], tmp_path / "cut")
    theirs = load(tmp_path / "cut")
    whole = load(source)
    ours = api.prune(copy.deepcopy(whole), drop=[3, 1])
    assert len(whole.model.layers) == tiny.BLOCKS
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    fields = ("num_hidden_layers", "layer_types", "max_window_layers")
    for name in fields:
        assert getattr(ours.config, name, None) == getattr(theirs.config, name, None)
    assert [layer.self_attn.layer_idx for layer in ours.model.layers] == [0, 1, 2]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, plain = (ours.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    ours.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours(IDS).logits)
    tied = ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tied == (variant == "qwen3")
    assert tied == (again.lm_head.weight is again.model.embed_tokens.weight)


@pytest.mark.parametrize("variant", ["gqa", "qwen2", "qwen3", "mistral"])
def test_a_model_without_parts_is_the_pruned_checkpoint(tmp_path, tiny_dir, load, variant):
    source = tiny_dir(variant)
    depth.prune(source, Removal((1,), (0, 3), (2,)), tmp_path / "cut")
    theirs = _load_own(tmp_path / "cut")
    ours = api.prune(copy.deepcopy(load(source)), [1], attention=[0, 3], mlp=[2])
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    names = ("num_hidden_layers", "layer_types", "max_window_layers", "model_type", "auto_map")
    for name in (*names, "layer_num_attention_heads", "layer_intermediate_size"):
        assert getattr(ours.config, name, None) == getattr(theirs.config, name, None), name
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, plain = (ours.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)
    ours.save_pretrained(tmp_path / "saved")
    assert own_code.is_trusted(tmp_path / "saved")
    again = _load_own(tmp_path / "saved")
    twice = api.prune(again, attention=[1])  # which has no MLP: all of it goes
    with torch.no_grad():
        assert torch.equal(twice(IDS).logits, api.prune(ours, drop=[1])(IDS).logits)
    with pytest.raises(PlanError, match="Block 0 has no attention"):
        api.prune(ours, attention=[0])


def _load_own(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def test_perplexity_is_that_of_the_evaluate_command(
    tmp_path, tiny_dir, load, tokenizer, monkeypatch
):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    from core.evaluate.results import TextRow

    text = tmp_path / "text.txt"
    text.write_text(tiny.text(20, seed=3), encoding="utf-8")
    argv = ["evaluate", str(tiny_dir("qwen3")), "--perplexity", str(text), "--window", "16"]
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    (row,) = TextRow.read(tmp_path / "out")
    ours = api.perplexity(load(tiny_dir("qwen3")), tokenizer, text.read_text(), window=16)
    assert ours == pytest.approx(row.ppl, rel=1e-12)


def test_what_cannot_be_done_is_one_sentence(tiny_dir, load, tokenizer):
    model = load(tiny_dir("qwen3"))
    with pytest.raises(PlanError, match="Block 9 does not exist"):
        api.prune(model, drop=[9])
    with pytest.raises(OptionError, match="no metric 'bleu'"):
        api.score(model, tokenizer, ["a"], metrics=("bleu",))
    with pytest.raises(OptionError, match="Neither texts nor rows"):
        api.score(model, tokenizer)
    with pytest.raises(DataError, match="texts: only 0 rows have at least 128 tokens"):
        api.score(model, tokenizer, ["a b c"], metrics=("ppl",))
    with pytest.raises(DataError, match="fewer than two tokens"):
        api.score(model, rows=[[1]])
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match="Prune first, then quantize"):
        api.prune(model, drop=[1])


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_documentation_run(number):
    exec(compile(EXAMPLES[number], f"docs/python.md, example {number + 1}", "exec"), {})


def test_importing_it_does_not_import_torch():
    code = "import sys; from core import api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_defaults_are_those_of_the_command():
    import inspect

    options = inspect.signature(api.score).parameters
    spec = ImportanceSpec(checkpoint="demo", out="out")
    for name in ("metrics", "samples", "length", "seed", "rounds"):
        assert options[name].default == getattr(spec, name)
