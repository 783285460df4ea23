"""What is written: equal to masking, loads with transformers alone, serves every other command."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch
from run_helpers import full_disk_before_work
from safetensors.torch import load_file

from core.__main__ import main
from core.checkpoint import families, headers
from core.checkpoint.drop import Removal
from core.importance.branches import losses_without, make_batch
from core.model.blocks import BlockView
from core.model.loading import load_model, load_tokenizer
from core.prune import depth, staging
from core.runs import run
from core.width import layout
from core.width.units import Counts, units_of

ROOT = Path(__file__).parents[2]
METHODS = ("llm-pruner", "flap", "wanda-sp", "magnitude", "random")
CPU = torch.device("cpu")


def ids(rows=2, tokens=40):
    # Longer than the sliding window of 16.
    return torch.randint(3, 320, (rows, tokens), generator=torch.Generator().manual_seed(0))


def logits(model, **options):
    with torch.no_grad():
        return model(ids(), use_cache=False, **options).logits


def own(folder):
    return load_model(folder, CPU, torch.float32)


def _means(source, text, dense):
    """Inputs' means of the dense model on the rows that the ``width`` fixture calibrates on."""
    from core.data.calibration import calibration_rows

    given = calibration_rows(text, load_tokenizer(source), 6, 9, 1234)
    return {key: x.mean(0) for key, x in naive.inputs_of(dense, given).items()}


@pytest.mark.parametrize("variant", ["mha", "gqa", "qwen2", "qwen3", "mistral", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_cutting_equals_masking(tiny_dir, width, record_of, text, variant, method):
    source = tiny_dir(variant)
    out = width(source, method, ratio=0.5)
    record = record_of(out)
    dense = naive.load(source)
    head_dim = headers.inspect(source).head_dim
    means = _means(source, text, dense) if method == "flap" else None
    before = logits(dense)
    expected = logits(naive.masked(dense, record, head_dim, means))
    got = own(out)
    torch.testing.assert_close(logits(got), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.05
    assert sum(p.numel() for p in got.parameters()) == record["parameters_after"]
    assert record["parameters_after"] < record["parameters_before"]


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("llm-pruner", {"order": "vector"}, "vector"),
        ("llm-pruner", {"ranking": "global", "parts": "mlp"}, "global, MLP only"),
        ("wanda-sp", {"parts": "attention"}, "attention only"),
        ("magnitude", {"attention_layers": "1", "mlp_layers": "2,4"}, "attention of 1 and MLP of"),
        ("flap", {"metric": "wifn", "structure": "ul-um"}, "WIFN, UL-UM"),
        ("flap", {"metric": "ifv", "round_to": 16}, "IFV, multiples of 16"),
        ("flap", {"structure": "al-mm", "remove_heads": 3, "params": 40_000}, "AL-MM"),
    ],
)
def test_cutting_a_variant_equals_masking(tiny_gqa, width, record_of, text, method, options, named):
    out = width(tiny_gqa, method, **({"ratio": 0.5} if "params" not in options else {}), **options)
    record = record_of(out)
    assert record["variant"].startswith(named)
    for name, value in options.items():
        if name in ("order", "ranking", "metric", "structure", "remove_heads", "round_to"):
            assert record[name] == value
    dense = naive.load(tiny_gqa)
    means = _means(tiny_gqa, text, dense) if method == "flap" else None
    before, got = logits(dense), own(out)
    expected = logits(naive.masked(dense, record, 8, means))
    torch.testing.assert_close(logits(got), expected, rtol=1e-5, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    assert sum(p.numel() for p in got.parameters()) == record["parameters_after"]
    for entry in record["blocks"]:
        assert not entry["dropped_heads"] or entry["block"] in record["attention_layers"]
        assert not entry["dropped_neurons"] or entry["block"] in record["mlp_layers"]
        assert entry["neurons"] % (record["round_to"] or 1) == 0
    card = (out / "README.md").read_text()
    assert f"| criterion | {record['criterion']} |" in card
    assert "could be cut" in card
    assert ("widths rounded to multiples of | 16" in card) == (record["round_to"] == 16)


@pytest.mark.parametrize("method", METHODS)
def test_ratio_0_changes_nothing(tiny_gqa, width, record_of, method):
    out = width(tiny_gqa, method, ratio=0.0)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_gqa, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(naive.load(out)), logits(naive.load(tiny_gqa)))
    assert record_of(out)["parameters_after"] == record_of(out)["parameters_before"]
    assert not list(out.glob("*.py"))


def test_the_result_tells_what_was_done(tiny_gqa, width, record_of, text):
    out = width(tiny_gqa, "flap", ratio=0.5)
    record = record_of(out)
    info = headers.inspect(out, allow_config_only=False)
    assert record["method"] == "flap"
    assert record["source"] == str(tiny_gqa)
    assert record["source_key"] == headers.inspect(tiny_gqa).key
    assert record["calibration"]["samples"] == 6
    assert (record["device"], record["dtype"]) == ("cpu", "float32")
    assert info.parameters == record["parameters_after"]
    assert info.family == "llama"
    assert info.model_type == "depthcut_llama"
    for entry, shape in zip(record["blocks"], info.block_shapes, strict=True):
        assert entry["heads"] == shape["heads"] == 4 - len(entry["dropped_heads"])
        assert entry["neurons"] == shape["intermediate"] == 48 - len(entry["dropped_neurons"])
        assert entry["dropped_heads"] == [
            2 * g + q for g in entry["dropped_kv_heads"] for q in (0, 1)
        ]
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert f"{record['parameters_after']:,}" in card
    assert str(tiny_gqa) not in card
    # The config alone says the same shapes.
    alone = headers.describe("x", headers.read_config(out / "config.json"), None, None)
    assert alone.block_shapes == info.block_shapes
    assert alone.parameters == info.parameters
    assert not list(out.glob("*.partial"))


def test_flap_meets_a_target_as_nearly_as_its_units_allow(tiny_gqa, width, record_of):
    wanted = 40_000
    record = record_of(width(tiny_gqa, "flap", params=wanted))
    unit = units_of(headers.inspect(tiny_gqa))[0]
    assert record["target"]["difference"] == record["parameters_after"] - wanted
    assert abs(record["target"]["difference"]) <= unit.group_parameters
    assert (
        record["parameters_after"]
        == headers.inspect(width(tiny_gqa, "flap", ratio=record["method_ratio"])).parameters
    )


def test_precision_and_shards_stay(tiny_dir, width, record_of):
    source = tiny_dir("gqa", shard_bytes=40_000, dtype="bfloat16")
    out = width(source, "flap", ratio=0.4)
    info = headers.inspect(out, allow_config_only=False)
    assert info.dtype == "bfloat16"
    assert len(info.shards) == len(headers.inspect(source).shards) > 1
    index = headers.TensorIndex.read(out)
    assert {e.dtype for e in index.entries.values()} == {"bfloat16"}
    assert sum(p.numel() for p in own(out).parameters()) == record_of(out)["parameters_after"]


# --------------------------------------------------------------------- loading without the project

SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
result = []
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
        cached = model.generate(ids[:, :6], **options)
        plain = model.generate(ids[:, :6], use_cache=False, **options)
    assert torch.equal(cached, plain)
    result.append([type(model).__name__, logits[0, -1].tolist()])
assert not [name for name in sys.modules if name == "core" or name.startswith("core.")]
print(json.dumps(result))
"""


def test_transformers_alone_loads_every_family(tiny_dir, width, tmp_path):
    """In an interpreter that does not have the project on its path, with a cache of its own."""
    folders = [width(tiny_dir(v), "flap", ratio=0.5) for v in ("gqa", "qwen2", "qwen3", "mistral")]
    moved = []
    for number, folder in enumerate(folders):  # nor may anything beside the folder be needed
        moved.append(tmp_path / f"model-{number}")
        shutil.copytree(folder, moved[-1], ignore=shutil.ignore_patterns(".run"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = [json.dumps(ids().tolist()), *map(str, moved)]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, *arguments],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (name, last) in zip(folders, json.loads(done.stdout), strict=True):
        assert name.startswith("Depthcut")
        expected = logits(own(folder))[0, -1]
        torch.testing.assert_close(torch.tensor(last), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "heads", "stock"),
    [("mha", 2, True), ("mha", 3, False), ("mistral", 3, True), ("qwen2", 3, True),
     ("qwen3", 3, True)],
)  # fmt: skip
def test_one_shape_for_all_blocks_is_stock_where_transformers_takes_it(
    tiny_dir, variant, heads, stock
):
    """``is_stock`` says what transformers itself accepts, with heads that do not divide 32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = tiny_dir(variant, num_key_value_heads=4)
    config = headers.read_config(source / "config.json")
    units = units_of(headers.inspect(source))
    counts = {unit.block: Counts(heads, 40) for unit in units}
    made = layout.pruned_config(config, units, counts)
    assert families.is_custom(made) is not stock
    plain = dict(config, num_attention_heads=heads, num_key_value_heads=heads)
    plain |= {"intermediate_size": 40, "head_dim": units[0].head_dim}
    kind = plain.pop("model_type")
    if stock:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **plain))
        assert model.model.layers[0].self_attn.q_proj.out_features == heads * units[0].head_dim
    else:
        with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
            AutoConfig.for_model(kind, **plain)


def test_a_uniform_cut_needs_no_code(tiny_gqa, width):
    out = width(tiny_gqa, "wanda-sp", ratio=0.5)
    model = naive.load(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(model), logits(own(out)))
    assert not list(out.glob("*.py"))
    assert "stock transformers loads it" in (out / "README.md").read_text()


def test_our_loader_runs_no_code_from_the_folder(tiny_gqa, width, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(width(tiny_gqa, "flap", ratio=0.5), folder)
    (folder / "modeling_depthcut.py").write_text("raise SystemExit('run from the folder')\n")
    assert own(folder).num_parameters() > 0


# ------------------------------------------------------------------------------- other commands


@pytest.mark.parametrize("variant", ["gqa", "mistral", "qwen3"])
def test_importance_sees_a_width_variant(tiny_dir, width, variant):
    out = width(tiny_dir(variant), "flap", ratio=0.5)
    view = BlockView(own(out))
    given = ids(3, 40).tolist()
    found = losses_without(view, make_batch(given, view), [frozenset()])
    expected = naive.losses(own(out), given)
    got = torch.tensor(found.sample_nll[0], dtype=torch.float32)
    torch.testing.assert_close(got, expected.detach(), rtol=1e-4, atol=1e-5)


def test_blocks_of_a_width_variant_can_be_dropped(tiny_gqa, width, tmp_path, record_of):
    out = width(tiny_gqa, "flap", ratio=0.5)
    record = depth.prune(out, (1, 3), tmp_path / "both")
    info = headers.inspect(tmp_path / "both", allow_config_only=False)
    shapes = headers.inspect(out).block_shapes
    assert info.block_shapes == (shapes[0], shapes[2], shapes[4])
    assert record.lineage[0].method == "flap"
    model = own(tmp_path / "both")
    dense = own(out)
    for block in (1, 3):
        dense.model.layers[block].forward = lambda hidden_states, *_, **__: hidden_states
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", ["wanda-sp", "flap"])
def test_a_width_variant_can_be_cut_again(tiny_gqa, width, record_of, second):
    first = width(tiny_gqa, "flap", ratio=0.3)
    out = width(first, second, ratio=0.4)
    record = record_of(out)
    assert record["base_model"] == str(tiny_gqa)
    assert [step["method"] for step in record["lineage"]] == ["flap"]
    model = own(out)
    assert sum(p.numel() for p in model.parameters()) == record["parameters_after"]
    if second == "wanda-sp":
        expected = logits(naive.masked(own(first), record, 8))
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def lacking(tiny_gqa, tmp_path_factory):
    """A variant without some parts, and a stock checkpoint in which they add nothing."""
    cut, twin = (tmp_path_factory.mktemp("parts") / name for name in ("cut", "twin"))
    gone = Removal(attention=(0, 3), mlp=(2,))
    depth.prune(tiny_gqa, gone, cut)
    model = naive.load(tiny_gqa)
    with torch.no_grad():
        for block, part in gone.parts:
            naive.projection(
                model.model.layers[block], "down" if part == "mlp" else "o"
            ).weight.zero_()
    model.save_pretrained(twin)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_gqa / name, twin)
    return cut, twin


@pytest.mark.parametrize(
    ("method", "more"),
    [
        *((method, {}) for method in METHODS if method != "random"),
        ("llm-pruner", {"ranking": "global", "order": "mixed"}),
        ("flap", {"structure": "al-mm", "remove_heads": 2}),
        ("flap", {"metric": "wifn", "structure": "ul-um", "parts": "mlp"}),
    ],
)
def test_blocks_that_lack_parts_become_narrower(lacking, width, record_of, method, more):
    """As if the missing parts were there, added nothing and had to stay."""
    cut, twin = lacking
    options = {"ratio": 0.4, **more}
    blocks = {"attention_layers": "1,2,4", "mlp_layers": "0,1,3,4"}
    if more.get("parts") == "mlp":
        del blocks["attention_layers"]
    one = width(cut, method, layers="0:5", **options)
    other = width(twin, method, **blocks, **options)
    found, expected = record_of(one), record_of(other)
    for ours, theirs in zip(found["blocks"], expected["blocks"], strict=True):
        for dropped in ("dropped_heads", "dropped_neurons"):
            assert ours[dropped] == theirs[dropped]
    assert found["attention_layers"] == ([] if "parts" in more else [1, 2, 4])
    assert found["mlp_layers"] == [0, 1, 3, 4]
    torch.testing.assert_close(logits(own(one)), logits(own(other)), rtol=1e-5, atol=1e-5)
    assert found["parameters_after"] == sum(p.numel() for p in own(one).parameters())
    assert found["parameters_after"] < found["parameters_before"]
    assert headers.inspect(one).block_shapes[2]["intermediate"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--attention-layers", "1,3"], "--attention-layers 1,3: block 3 has no attention."),
        (["--layers", "2", "--parts", "mlp"], "None of the blocks to prune has an MLP."),
        (
            ["--method", "flap", "--structure", "ul-mm", "--remove-heads", "3"],
            "treats all blocks alike, but only the MLP of block 0 can be cut",
        ),
    ],
)
def test_parts_that_blocks_lack_cannot_be_cut(lacking, tmp_path, capsys, options, says):
    argv = ["width", str(lacking[0]), "--method", "magnitude", "--ratio", "0.4", *options]
    assert main([*argv, "--dry-run", "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_retraining_takes_it_and_merges(tiny_gqa, width, text, tmp_path, monkeypatch):
    from core import commands
    from core.runs.spec import build

    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    out = tmp_path / "run"
    command = commands.get("retrain")
    values = {
        "checkpoint": str(width(tiny_gqa, "flap", ratio=0.5)), "method": "lora", "data": text,
        "steps": 2, "batch": 2, "micro_batch": 2, "holdout": 4, "cutoff": 32, "lr": 1e-2,
        "device": "cpu", "merge": True, "out": str(out),
    }  # fmt: skip
    assert run.execute(command, build(command.spec_class, values)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["dense"] is not None
    merged = out / "merged"
    assert headers.inspect(merged).model_type == "depthcut_llama"
    first = logits(own(merged))
    again = naive.load(merged, trust_remote_code=True)
    torch.testing.assert_close(logits(again), first, rtol=1e-5, atol=1e-5)
    assert (first - logits(own(Path(values["checkpoint"])))).abs().max() > 1e-4


def test_its_blocks_train_as_one_operation_each(tiny_gqa, width):
    """Each block has its own shape, and those of FLAP a bias that the family has not."""
    from core.retrain import fused

    model = own(width(tiny_gqa, "flap", ratio=0.5)).train().requires_grad_(True)

    def gradients():
        model.zero_grad()
        out = model(input_ids=ids(), labels=ids(), use_cache=False)
        out.loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    stock = gradients()
    assert any(name.endswith("o_proj.bias") for name in stock)
    assert fused.install(model) == len(model.model.layers)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, stock[name], rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_judges_it_as_transformers_alone_would(tiny_gqa, width, text, tmp_path):
    from transformers import AutoTokenizer

    from core import commands
    from core.runs.spec import build

    folder, out = width(tiny_gqa, "flap", ratio=0.5), tmp_path / "out"
    command = commands.get("evaluate")
    values = {"checkpoint": str(folder), "perplexity": (text,), "window": (16,), "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
        assert run.execute(command, build(command.spec_class, values | {"out": str(out)})) == 0
    with (out / "perplexity.csv").open() as handle:
        (row,) = csv.DictReader(handle)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gqa)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(Path(text).read_text(),
                                                     add_special_tokens=False)]  # fmt: skip
    model = naive.load(folder, trust_remote_code=True)
    windows = torch.tensor(ids[: len(ids) // 16 * 16]).view(-1, 1, 16)
    with torch.no_grad():
        means = [model(w, labels=w).loss for w in windows]
    assert float(row["ppl"]) == pytest.approx(float(torch.stack(means).mean().exp()), rel=1e-4)


def test_random_weights_need_only_its_config(tiny_gqa, width, tmp_path):
    from core.benchmark import worker

    source = width(tiny_gqa, "flap", ratio=0.5)
    shutil.copyfile(source / "config.json", tmp_path / "config.json")
    request = worker.Request(
        folder=str(tmp_path), device="cpu", dtype="float32", random_weights=True, input_tokens=4,
        warmup=0, runs=1, min_runs=1, seed=1,
    )  # fmt: skip
    model = worker.load(request, CPU)
    info = headers.inspect(source)
    assert sum(p.numel() for p in model.parameters()) == info.parameters
    shapes = [layer.mlp.gate_proj.out_features for layer in model.model.layers]
    assert shapes == [shape["intermediate"] for shape in info.block_shapes]
    assert torch.isfinite(logits(model)).all()


# ----------------------------------------------------------------------------------- when it fails


def test_nothing_half_written(tiny_gqa, tmp_path, text, monkeypatch, capsys):

    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write", full)
    out = tmp_path / "out"
    arguments = ["--method", "random", "--ratio", "0.5", "--device", "cpu", "--out", str(out)]
    assert main(["width", str(tiny_gqa), *arguments]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [".run"]


def test_a_full_disk_is_said_before_scoring(tiny_gqa, tmp_path, monkeypatch, capsys):
    argv = ["width", str(tiny_gqa), "--method", "magnitude", "--ratio", "0.2"]
    full_disk_before_work(argv, tmp_path / "out", capsys, monkeypatch)


def test_too_little_text_is_one_sentence(tiny_gqa, tmp_path, text, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    options = ["--method", "flap", "--ratio", "0.5", "--device", "cpu"]
    options += ["--calibration", text, "--length", "200", "--join", "off"]
    status = main(["width", str(tiny_gqa), *options, "--out", str(tmp_path / "out")])
    assert status == 2
    assert "rows have at least 200 tokens" in capsys.readouterr().err


def test_without_samples_all_rows_of_a_small_source_are_taken(tiny_gqa, width, record_of):
    record = record_of(width(tiny_gqa, "wanda-sp", ratio=0.5, samples=None))
    assert 0 < record["calibration"]["samples"] <= 60
    assert record["calibration"]["length"] == 9
