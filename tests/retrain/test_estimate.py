"""The dry run: counts that equal what trains, memory, warnings; and no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from core.benchmark.meter import tensor_peak
from core.checkpoint import headers
from core.errors import OptionError
from core.model.loading import load_model
from core.retrain import estimate, fused, layers, weights
from core.retrain.spec import RetrainSpec, settings_of
from core.retrain.trainer import Objective
from core.runs import devices

ROOT = Path(__file__).parents[2]
PLAIN = {"template": "plain", "cutoff": 128, "device": "cpu"}


def spec(checkpoint, data, **options):
    return RetrainSpec(checkpoint=str(checkpoint), data=data, out="x", **{**PLAIN, **options})


@pytest.mark.parametrize("variant", ["gqa", "qwen3"])
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), None])
def test_trainable_parameters_are_pefts(tiny_dir, tasks, variant, targets):
    folder = tiny_dir(variant)
    chosen = {"targets": targets} if targets else {}
    got = estimate.estimate(spec(folder, tasks, rank=4, **chosen))
    names = list(targets or RetrainSpec.__dataclass_fields__["targets"].default)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=names)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert got["trainable_parameters"] == trainable
    full = estimate.estimate(spec(folder, tasks, method="full"))
    assert (
        full["trainable_parameters"]
        == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    )


def test_dry_run_prints_json_and_imports_no_torch(tiny_gqa, tasks):
    code = (
        "import sys; from core.__main__ import main; status = main(sys.argv[1:]);"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "retrain", str(tiny_gqa), "--data", tasks, "--out", "none",
         "--dry-run", "--template", "plain", "--cutoff", "128", "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert got["rows"] == 54
    assert got["heldout_rows"] == 6
    assert got["settings"]["steps"] == round(2 * 54 / 16)
    assert got["sample"][0]["masked"]
    assert not got["sample"][1]["masked"]
    assert got["memory_bytes"]["total"] > got["memory_bytes"]["weights"] > 4 * got["parameters"]


def test_tokens_and_steps_equal_the_runs(tiny_gqa, tasks, tmp_path):
    from retrain_helpers import execute, summary

    options = {**PLAIN, "batch": 18, "epochs": 1.0, "holdout": 6}
    expected = estimate.estimate(spec(tiny_gqa, tasks, batch=18, epochs=1.0, holdout=6))
    out = tmp_path / "run"
    assert execute(checkpoint=str(tiny_gqa), data=tasks, out=str(out), **options) == 0
    got = summary(out)
    assert expected["tokens"] == got["tokens"]  # 54 rows, one epoch: exactly every row once
    assert expected["settings"] == got["settings"]
    assert expected["trainable_parameters"] == got["trainable_parameters"]


def test_config_alone_is_enough_and_too_large_warns(tiny_gqa, tasks, tmp_path, monkeypatch):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_gqa / name).read_bytes())
    monkeypatch.setattr(devices, "free_bytes", lambda name: ("cpu", 1 << 16))
    got = estimate.estimate(spec(tmp_path, tasks))
    with_weights = estimate.estimate(spec(tiny_gqa, tasks))
    assert got["trainable_parameters"] == with_weights["trainable_parameters"]
    assert got["fits"] is False
    assert "has 0 MiB free" in got["warnings"][0]
    monkeypatch.setattr(devices, "free_bytes", lambda name: ("cpu", 1 << 40))
    again = estimate.estimate(spec(tiny_gqa, tasks, batch=8))
    assert again["fits"] is True
    assert not any("needs about" in warning for warning in again["warnings"])


def test_large_sources_are_sampled_and_scaled(tiny_gqa, tasks, monkeypatch):
    whole = estimate.estimate(spec(tiny_gqa, tasks, batch=6))
    monkeypatch.setattr(estimate, "SAMPLE_ROWS", 27)
    half = estimate.estimate(spec(tiny_gqa, tasks, batch=6))
    assert whole["counted_all_rows"]
    assert not half["counted_all_rows"]
    assert half["rows"] == whole["rows"] == 54
    assert half["tokens"] == pytest.approx(whole["tokens"], rel=0.25)


def test_lora_needs_less_memory_than_full(tiny_gqa, tasks):
    lora, full = (
        estimate.estimate(spec(tiny_gqa, tasks, method=m))["memory_bytes"] for m in ("lora", "full")
    )
    assert lora["optimiser"] < full["optimiser"] / 2
    small = estimate.estimate(spec(tiny_gqa, tasks, gradient_checkpointing="on"))["memory_bytes"]
    assert small["activations"] < lora["activations"] / 2


@pytest.mark.parametrize("variant", ["mha", "gqa"])
@pytest.mark.parametrize(("method", "dropout"), [("lora", 0.05), ("lora", 0.5), ("full", 0.0)])
@pytest.mark.parametrize("by_hand", [True, False], ids=["fused", "stock"])
def test_activations_are_near_the_measured_peak(tmp_path, variant, method, dropout, by_hand):
    tiny.write(tmp_path, variant, hidden_size=128, intermediate_size=384, num_hidden_layers=8)
    made = spec(tmp_path, "d", method=method, dropout=dropout, micro_batch=4, batch=4)
    info = headers.inspect(tmp_path)
    model = load_model(tmp_path, torch.device("cpu"), torch.float32).requires_grad_(True)
    if method == "lora":
        model = weights.with_adapters(model.requires_grad_(False), made)
    if by_hand:
        assert fused.install(model) == 8
    ids = torch.randint(5, 300, (4, 128), generator=torch.Generator().manual_seed(1))
    objective = Objective(torch.device("cpu"))
    batch = {"input_ids": ids, "labels": ids, "items": ids.numel()}
    peak = tensor_peak(lambda: objective(model.train(), batch)[0].backward())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings = settings_of(made, 1, info.parameters)
    parts, other = (
        estimate.memory_parts(made, settings, info, trainable, "cpu", 128, fused=f)
        for f in (by_hand, not by_hand)
    )
    expected = parts["activations"] + parts["logits"] + parts["gradients"]
    assert 0.85 < expected / peak < 1.3
    assert (parts["activations"] < other["activations"]) == by_hand


def test_the_dry_run_reports_which_layers_train(tiny_dir, tasks):
    gqa, qwen3 = tiny_dir("gqa"), tiny_dir("qwen3")
    reasons = {
        None: spec(gqa, tasks),
        "--fused off": spec(gqa, tasks, fused="off"),
        "gradient checkpointing is on": spec(gqa, tasks, gradient_checkpointing="on"),
        "Qwen3 normalises queries and keys": spec(qwen3, tasks),
    }
    for reason, made in reasons.items():
        got = estimate.estimate(made)
        assert (got["fused"], got["not_fused_because"]) == (reason is None, reason)


def test_memory_decides_on_the_micro_batch_and_recomputation(tiny_gqa, tasks, monkeypatch):
    """By the estimate against invented free memory; by the size only where none is known."""

    def decided(free, device="cpu", **options):
        monkeypatch.setattr(devices, "free_bytes", lambda name: (device, free))
        return estimate.estimate(spec(tiny_gqa, tasks, **options))

    def at_once(got):
        return got["settings"]["micro_batch"], got["settings"]["accumulation"], got["recomputed"]

    for free in (None, 2**40, 2**20):
        for device in ("cpu", "cuda:0"):
            for batch in (4, 16):
                got = decided(free, device, batch=batch, processes=2, gradient_checkpointing="off")
                assert got["settings"]["accumulation"] % 2 == 0  # each process has its part

    plenty, longest = decided(2**40), 41
    assert (*at_once(plenty), plenty["fused"]) == (8, 2, False, True)
    needed = plenty["memory_bytes"]["total"]
    assert at_once(decided(int(needed / estimate.ROOM) + 1)) == (8, 2, False)
    tight = decided(int(needed / estimate.ROOM) - 1)  # fewer at once rather than recomputing
    assert at_once(tight) == (6, 3, False)
    total = tight["memory_bytes"]["total"]
    assert (
        f"6 x {longest} tokens need an estimated {total / 2**20:,.0f} MiB"
        in (tight["micro_batch_because"])
    )
    given = decided(int(needed / estimate.ROOM) - 1, micro_batch=8)
    assert (*at_once(given), given["fused"]) == (8, 2, True, False)
    assert given["micro_batch_because"] == "--micro-batch 8"
    assert given["memory_bytes"]["activations"] < plenty["memory_bytes"]["activations"]
    assert (
        f"needs an estimated {needed / 2**20:,.0f} MiB in total, and cpu has"
        in (given["recomputed_because"])
    )
    # a GPU takes all of a batch that fits, and recomputes rather than going below the usual number
    assert at_once(decided(2**40, "cuda:0")) == (16, 1, False)
    monkeypatch.setattr(estimate, "AT_ONCE", 12 * longest)
    assert at_once(decided(2**40, "cuda:0"))[0] == 8
    usual = decided(2**40, "cuda:0", micro_batch=8)["memory_bytes"]["total"]
    below = decided(int(usual / estimate.ROOM) - 1, "cuda:0")
    assert at_once(below) == (8, 2, True)
    none = decided(2**16)  # does not fit either way
    assert at_once(none)[0] == 1
    assert "--gradient-checkpointing on" not in " ".join(none["warnings"])
    assert "--micro-batch" in " ".join(none["warnings"])
    for wanted in ("on", "off"):
        got = decided(2**16, gradient_checkpointing=wanted)
        assert got["recomputed"] is (wanted == "on")
        assert got["recomputed_because"] == f"--gradient-checkpointing {wanted}"
    unknown = decided(None)
    assert at_once(unknown) == (8, 2, False)
    assert "free memory of cpu is not known" in unknown["recomputed_because"]
    monkeypatch.setattr(layers, "LARGE", 1000)
    assert decided(None)["recomputed"]
    assert not decided(2**40)["recomputed"]


def test_a_run_decides_as_its_dry_run_and_a_resumed_one_as_it_began(
    tiny_gqa, tasks, tmp_path, monkeypatch
):
    from retrain_helpers import execute, summary

    monkeypatch.setattr(devices, "free_bytes", lambda name: ("cpu", 2**10))
    out = tmp_path / "run"
    options = {**PLAIN, "batch": 4, "steps": 2, "holdout": 6, "data": tasks, "out": str(out)}
    assert execute(checkpoint=str(tiny_gqa), **options) == 0
    got = summary(out)
    assert (got["recomputed"], got["fused"]) == (True, False)
    assert "cpu has 0 MiB free" in got["recomputed_because"]
    assert "cpu has 0 MiB free" in got["micro_batch_because"]
    assert got["settings"]["micro_batch"] == 1
    (out / "summary.json").unlink()  # killed before it was written
    monkeypatch.setattr(devices, "free_bytes", lambda name: ("cpu", 2**40))
    assert execute(checkpoint=str(tiny_gqa), resume=True, **options) == 0
    assert summary(out)["recomputed_because"] == "the run began so"
    assert summary(out)["recomputed"] is True
    assert summary(out)["micro_batch_because"] == "the run began so"
    assert summary(out)["settings"]["micro_batch"] == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 1, "epochs": 1.0}, "Both --steps and --epochs"),
        ({"targets": ("lm_head",)}, "'lm_head' is not a projection"),
        ({"micro_batch": 9, "batch": 8}, "--micro-batch 9 is larger than --batch 8"),
    ],
)
def test_contradicting_options(options, says):
    with pytest.raises(OptionError, match=says):
        settings_of(spec("c", "d", **options), 10)


def test_the_papers_defaults():
    lora = settings_of(spec("c", "d"), 49_760)
    assert (lora.steps, lora.batch, lora.warmup, lora.weight_decay) == (1555, 64, 100, 0.0)
    continued = settings_of(spec("c", "d", method="continued"), 64_000)
    assert (continued.beta2, continued.weight_decay, continued.layout) == (0.95, 0.1, "packed")
    assert (lora.lr, continued.lr) == (1e-4, 1e-4)
    assert settings_of(spec("c", "d", steps=20), 10).warmup == 2


@pytest.mark.parametrize(
    ("parameters", "lora", "full", "batch"),
    [(2_000_000, 3e-3, 1e-3, 16), (113_000_000, 3e-3, 3e-4, 16), (7_000_000_000, 1e-4, 2e-5, 64)],
)
def test_defaults_by_size(parameters, lora, full, batch):
    found = settings_of(spec("c", "d"), 100, parameters)
    assert (found.lr, found.batch) == (lora, batch)
    assert settings_of(spec("c", "d", method="full"), 100, parameters).lr == full
