"""The whole command on tiny models: its files, recovery, cancel, resume and early stops."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import PeftModel
from retrain_helpers import execute, summary
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.integrations import integration_utils

from core.checkpoint import locate
from core.retrain import estimate, fused, history, rows, session, tracking, trainer, weights
from core.retrain.encoders import FileTokenizer
from core.retrain.results import Summary
from core.retrain.spec import RetrainSpec
from core.runs.workspace import read_run
from core.ui import runs

ROOT = Path(__file__).parents[2]
LORA = {
    "method": "lora", "template": "plain", "cutoff": 128, "steps": 6, "batch": 6, "micro_batch": 3,
    "lr": 5e-3, "holdout": 6, "eval_every": 2, "dropout": 0.1, "warmup": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(pruned, dense, tasks, tmp_path_factory):
    """A finished LoRA run with a merged checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    status = execute(
        checkpoint=str(pruned), dense=str(dense), data=tasks, out=str(out), merge=True, **LORA
    )
    assert status == 0
    return out


def test_headers_of_both_checkpoints_are_read_once(pruned, dense, tasks, tmp_path, header_reads):
    options = {"checkpoint": str(pruned), "dense": str(dense), "data": tasks, **LORA}
    options |= {"out": str(tmp_path / "run"), "steps": 2, "device": "cpu"}
    estimate.estimate(RetrainSpec(**options))
    assert header_reads == {str(pruned): 1}
    header_reads.clear()
    locate._read.cache_clear()
    assert execute(**options) == 0
    assert header_reads == {str(pruned): 1, str(dense): 1}


def mean_loss(model, held, tokenizer):
    """Held-out loss by stock transformers: full text, labels on the response only."""
    total = count = 0.0
    for row in held:
        prompt = "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n"
        ids = tokenizer(prompt + row["output"]).input_ids + [tokenizer.eos_token_id]
        masked = len(tokenizer(prompt).input_ids)
        labels = torch.tensor([[-100] * masked + ids[masked:]])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), labels=labels)
        total += float(out.loss) * (len(ids) - masked)
        count += len(ids) - masked
    return total / count


def test_recovered_is_right(lora, pruned, dense, tasks):
    import random

    from core.retrain.rows import HOLDOUT_SEED

    raw = [json.loads(line) for line in Path(tasks).read_text().splitlines()]
    raw = [{"input": "", **row} for row in raw]
    order = list(range(len(raw)))
    random.Random(HOLDOUT_SEED).shuffle(order)
    held = [raw[i] for i in order[:6]]
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    base = AutoModelForCausalLM.from_pretrained(pruned)
    before = mean_loss(base, held, tokenizer)
    full = mean_loss(AutoModelForCausalLM.from_pretrained(dense), held, tokenizer)
    after = mean_loss(PeftModel.from_pretrained(base, lora / "adapter").eval(), held, tokenizer)
    got = summary(lora)
    assert got["heldout_loss_before"] == pytest.approx(before, abs=1e-4)
    assert got["heldout_loss_dense"] == pytest.approx(full, abs=1e-4)
    assert got["heldout_loss_after"] == pytest.approx(after, abs=1e-4)
    assert before - full > 0.05
    assert got["recovered"] == pytest.approx((before - after) / (before - full), abs=1e-3)
    assert after < before - 0.05


def test_adapter_and_merged_checkpoint_load_in_plain_libraries(lora, pruned):
    base = AutoModelForCausalLM.from_pretrained(pruned)
    adapted = PeftModel.from_pretrained(base, lora / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(lora / "merged").eval()
    ids = torch.randint(5, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = merged(ids).logits, adapted(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(pruned).eval()(ids).logits
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - plain).abs().max()) > 0.01
    config = json.loads((lora / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16.0, 0.1)
    assert len(config["target_modules"]) == 7
    stated = summary(lora)["merged"]
    assert stated["dtype"] == "float32"
    assert stated["max_logit_difference"] < 1e-4
    assert AutoTokenizer.from_pretrained(lora / "merged")("Ann").input_ids
    assert (lora / "merged" / "pruning.json").is_file()
    special = [
        AutoTokenizer.from_pretrained(f).special_tokens_map for f in (pruned, lora / "merged")
    ]
    assert special[0] == special[1] != {}


def test_an_adapter_that_cannot_be_merged_is_kept_and_the_run_is_done(
    pruned, dense, tasks, tmp_path, monkeypatch
):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "merge_and_save", full)
    out = tmp_path / "run"
    options = {"checkpoint": str(pruned), "dense": str(dense), "data": tasks, "out": str(out)}
    assert execute(**options, **{**LORA, "steps": 2}, merge=True) == 0
    found = Summary.read(out)
    assert found.merged is None
    assert found.heldout_loss_after is not None
    (finding,) = [f for f in found.findings if f.kind == "not-merged"]
    assert "The adapter was trained and saved, but not merged" in finding.message
    assert "No space left on device" in finding.message
    assert history.is_unmerged(read_run(out))  # the Retrain page offers Merge
    assert not (out / "merged").exists()
    monkeypatch.undo()
    assert execute(**options, **{**LORA, "steps": 2}, merge=True, resume=True) == 0
    assert (out / "merged" / "config.json").is_file()


def test_a_finished_run_is_merged_later_and_its_training_stays(
    lora, pruned, dense, tasks, tmp_path, monkeypatch
):
    late = tmp_path / "late"
    shutil.copytree(lora, late)
    shutil.rmtree(late / "merged")
    again = {"checkpoint": str(pruned), "dense": str(dense), "data": tasks, "out": str(late)}
    marker = late / ".run" / "training.json"
    begun = json.loads(marker.read_text())
    del begun["clip"]  # a run of an earlier version, before there was this option
    marker.write_text(json.dumps(begun))
    assert execute(**again, **LORA, resume=True) == 0
    assert not (late / "merged").exists()
    assert execute(**again, **{**LORA, "rank": 4}, resume=True, merge=True) == 2
    assert execute(**again, **LORA, resume=True, merge=True) == 0
    ours, usual = (load_file(f / "merged" / "model.safetensors") for f in (late, lora))
    assert all(torch.equal(ours[name], usual[name]) for name in usual)
    now, then = summary(late), summary(lora)
    assert now.pop("merged")["heldout_loss"] == then.pop("merged")["heldout_loss"]
    assert now == then
    assert execute(**again, **LORA, resume=True, merge=True, merge_dtype="bfloat16") == 0
    rounded = Summary.read(late)
    model = AutoModelForCausalLM.from_pretrained(late / "merged", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    before = summary(late)["heldout_loss_before"]
    for lost, told in ((0.1, "0.1000 nats"), (0.0, "")):
        trained = rounded.merged.heldout_loss - lost
        merged = dataclasses.replace(rounded.merged, heldout_loss_trained=trained)
        found = history.lost_in_merging(dataclasses.replace(rounded, merged=merged))
        assert told in found
        assert bool(found) == bool(lost)
        assert not lost or f"{lost / (before - trained):.0%} of what" in found


def test_the_code_on_the_page_loads_the_result_from_any_folder(lora, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(lora.parent)
    codes = [
        runs.loading_code(Path("lora") / "merged"),
        runs.loading_code(pruned, Path("lora") / "adapter"),
    ]
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(5, 25)[None]
    logits = []
    for code in codes:
        names = {}
        exec(code, names)
        with torch.no_grad():
            logits.append(names["model"].eval()(ids).logits)
        assert names["tokenizer"]("Ann").input_ids
    assert float((logits[0] - logits[1]).abs().max()) < 1e-4


def test_metrics_hold_every_step_and_evaluation(lora):
    lines = [json.loads(line) for line in (lora / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "event" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in steps)
    assert steps[0]["lr"] == 0.0  # warm-up
    evaluations = [line for line in lines if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 6]
    got = summary(lora)
    assert evaluations[0]["heldout_loss"] == pytest.approx(got["heldout_loss_before"], abs=1e-6)
    assert evaluations[-1]["recovered"] == got["recovered"]
    assert got["tokens"] == steps[-1]["tokens"] > 0
    assert not (lora / ".run" / "checkpoints").exists()


def weights_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_equal_adapters(one, other):
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def options(pruned, dense, tasks, tmp_path):
    return {
        "checkpoint": str(pruned), "dense": str(dense), "data": tasks,
        "out": str(tmp_path / "run"), **LORA,
    }  # fmt: skip


def test_killed_run_resumes_to_the_same_end(lora, options, tmp_path, monkeypatch):
    """Killed at step 5, while writing a checkpoint; the last complete one is that of step 4."""
    out = tmp_path / "run"
    usual = trainer.StepWatcher.on_step_end

    def dying(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == 5:
            half = out / ".run" / "checkpoints" / "checkpoint-5"
            shutil.copytree(out / ".run" / "checkpoints" / "checkpoint-4", half)
            (half / trainer.COMPLETE).unlink()
            raise SystemExit(9)

    monkeypatch.setattr(trainer.StepWatcher, "on_step_end", dying)
    assert execute(**options) == 1
    monkeypatch.setattr(trainer.StepWatcher, "on_step_end", usual)
    assert execute(**options, resume=True) == 0
    assert_equal_adapters(out, lora)
    one, other = summary(out), summary(lora)
    for name in ("heldout_loss_before", "heldout_loss_after", "recovered", "steps", "tokens"):
        assert one[name] == other[name]
    steps = [
        (line["step"], line["loss"])
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "event" not in line
    ]
    expected = [
        (line["step"], line["loss"])
        for line in map(json.loads, (lora / "metrics.jsonl").read_text().splitlines())
        if "event" not in line
    ]
    assert steps == expected


def test_cancel_finishes_the_step_keeps_the_adapter_and_resumes(
    lora, options, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    usual = trainer.StepWatcher.on_pre_optimizer_step

    def cancelling(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == 2:  # in the middle of step 3
            (out / ".run" / "cancel").touch()

    monkeypatch.setattr(trainer.StepWatcher, "on_pre_optimizer_step", cancelling)
    assert execute(**options) == 130
    got = summary(out)
    assert (got["state"], got["steps"]) == ("cancelled", 3)
    moved = [w for name, w in weights_of(out).items() if "lora_B" in name]
    assert all(float(w.abs().max()) > 0 for w in moved)
    monkeypatch.setattr(trainer.StepWatcher, "on_pre_optimizer_step", usual)
    assert execute(**options, resume=True) == 0
    assert_equal_adapters(out, lora)


def test_a_crash_while_writing_results_loses_nothing(lora, options, tmp_path, monkeypatch):
    def dying(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_adapter", dying)
        assert execute(**options) == 1
    with monkeypatch.context() as patch:
        patch.setattr(trainer.RetrainTrainer, "training_step", pytest.fail)
        assert execute(**options, resume=True) == 0
    out = tmp_path / "run"
    assert_equal_adapters(out, lora)
    assert summary(out)["recovered"] == summary(lora)["recovered"]
    # Resuming a finished run leaves it unchanged.
    before = (out / "summary.json").read_bytes()
    assert execute(**options, resume=True) == 0
    assert (out / "summary.json").read_bytes() == before


def test_resume_with_other_options_is_refused(options, tmp_path, capsys):
    book = tmp_path / "run" / ".run"
    book.mkdir(parents=True)
    (book / "training.json").write_text(json.dumps({"lr": 1.0}))
    assert execute(**options, resume=True) == 2
    assert "--resume:" in capsys.readouterr().err


def test_nan_stops_and_keeps_the_last_good_state(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    usual = trainer.RetrainTrainer.training_step

    def poisoned(self, model, inputs, *rest, **named):
        loss = usual(self, model, inputs, *rest, **named)
        if self.state.global_step == 4:
            self.step_loss += float("nan")
        return loss

    monkeypatch.setattr(trainer.RetrainTrainer, "training_step", poisoned)
    assert execute(**options) == 1
    assert "The loss became nan at step 5; that step was not taken." in capsys.readouterr().err
    got = summary(out)
    assert (got["state"], got["kept_step"]) == ("stopped", 4)
    assert [f["kind"] for f in got["findings"]] == ["nan"]
    kept = load_file(out / ".run" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(torch.equal(w, kept[name]) for name, w in weights_of(out).items())


def test_divergence_falls_back_to_the_start_if_nothing_was_better(options, tmp_path):
    wild = {**options, "lr": 50.0, "steps": 60, "eval_every": 20, "clip": 0.0, "warmup": 0}
    assert execute(**wild) == 1
    got = summary(tmp_path / "run")
    assert got["findings"][-1]["stop"]
    assert got["heldout_loss_after"] == got["heldout_loss_before"]
    assert got["kept_step"] == 0
    assert not any(w.any() for n, w in weights_of(tmp_path / "run").items() if "lora_B" in n)


def test_fused_layers_train_unless_switched_off(options, tmp_path, monkeypatch):
    """Both ways end at the same weights; with off, no hand-written layer computes anything."""
    calls = []
    usual = fused._forward

    def counted(ctx, x, positions, mask, config, *rest):
        calls.append(config.needs_grad)
        return usual(ctx, x, positions, mask, config, *rest)

    monkeypatch.setattr(fused, "_forward", counted)
    options = {**options, "dropout": 0.0}
    assert execute(**{**options, "out": str(tmp_path / "auto")}) == 0
    assert sum(calls) == 6 * 2 * 3  # steps, micro-batches and layers; evaluations learn nothing
    calls.clear()
    assert execute(**{**options, "out": str(tmp_path / "off"), "fused": "off"}) == 0
    assert calls == []
    auto, off = summary(tmp_path / "auto"), summary(tmp_path / "off")
    assert (auto["fused"], auto["not_fused_because"]) == (True, None)
    assert (off["fused"], off["not_fused_because"]) == (False, "--fused off")
    assert auto["heldout_loss_after"] == pytest.approx(off["heldout_loss_after"], abs=1e-4)
    assert auto["heldout_loss_after"] < auto["heldout_loss_before"] - 0.05
    other = weights_of(tmp_path / "off")
    for name, weight in weights_of(tmp_path / "auto").items():
        torch.testing.assert_close(weight, other[name], rtol=0, atol=2e-4, msg=name)


def test_a_model_that_is_not_supported_trains_with_stock_layers(tiny_dir, tasks, tmp_path):
    out = tmp_path / "run"
    options = {**LORA, "steps": 1, "checkpoint": str(tiny_dir("qwen3")), "data": tasks}
    assert execute(**options, out=str(out)) == 0
    got = summary(out)
    assert got["fused"] is False
    assert got["not_fused_because"] == "Qwen3 normalises queries and keys"


def limit_memory(monkeypatch, options, most):
    """Let training on more padded tokens than ``most`` of the longest rows run out of memory."""
    usual = trainer.predicted_states
    spec = RetrainSpec(**options)
    found = rows.prepare(spec, FileTokenizer(Path(spec.checkpoint)), vocab=320, context=256)
    longest = max(len(row.ids) for row in found.train)

    def limited(model, batch):
        if model.training and batch["input_ids"].numel() > most * longest:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return usual(model, batch)

    monkeypatch.setattr(trainer, "predicted_states", limited)


def test_out_of_memory_names_the_largest_micro_batch(options, monkeypatch, capsys):
    limit_memory(monkeypatch, options, 2)
    assert execute(**{**options, "micro_batch": 6}) == 1
    message = capsys.readouterr().err
    assert "Out of memory with a micro-batch of 6 rows of up to 128 tokens." in message
    assert "--micro-batch 2" in message


def test_out_of_memory_retries_with_what_fits(lora, options, tmp_path, monkeypatch):
    limit_memory(monkeypatch, options, 3)
    assert execute(**{**options, "micro_batch": 6, "retry": True}) == 0
    got = summary(tmp_path / "run")
    assert got["settings"]["micro_batch"] == 3
    assert [f["kind"] for f in got["findings"]] == ["out-of-memory"]
    # The same steps as the run with 3 from the start.
    assert got["heldout_loss_after"] == pytest.approx(summary(lora)["heldout_loss_after"], abs=1e-3)


@pytest.mark.parametrize("method", ["continued", "full"])
def test_all_weights_train_and_the_checkpoint_loads(method, pruned, dense, texts, tmp_path):
    out = tmp_path / "run"
    status = execute(
        checkpoint=str(pruned), data=texts, out=str(out), method=method, steps=4, batch=4,
        cutoff=64, lr=3e-3, holdout=10, distil=method == "full", merge_dtype="bfloat16",
        gradient_checkpointing="on", seed=1,
    )  # fmt: skip
    assert status == 0
    got = summary(out)
    # The dense model comes from pruning.json.
    assert got["dense"] == str(dense)
    assert got["heldout_loss_after"] < got["heldout_loss_before"]
    assert got["trainable_parameters"] == got["parameters"]
    assert got["settings"]["layout"] == ("packed" if method == "continued" else "grouped")
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert model.dtype == torch.bfloat16
    assert not (out / "adapter").exists()
    old = AutoModelForCausalLM.from_pretrained(pruned).state_dict()
    changed = [n for n, w in model.state_dict().items() if not torch.equal(w.float(), old[n])]
    assert len(changed) == len(old)
    # Rounding to bfloat16 is measured, and is not zero.
    assert 1e-5 < got["merged"]["max_logit_difference"] < 1.0
    assert (got["merged"]["dtype"], got["merged"]["trained_in"]) == ("bfloat16", "float32")


def test_bad_data_ends_before_anything_is_loaded(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(session, "load_model", pytest.fail)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": ""}\n')
    out = str(tmp_path / "run")
    assert execute(checkpoint=str(pruned), data=str(bad), out=out) == 2
    assert "row 1 has an empty response" in capsys.readouterr().err


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(lora, options, tmp_path):
    """A separate process, killed after step 5; the checkpoint of step 4 is on the disk."""
    out = tmp_path / "run"
    code = (
        "import os, signal, sys\n"
        "from core.retrain import trainer\n"
        "usual = trainer.RetrainTrainer.training_step\n"
        "def dying(self, *given, **named):\n"
        "    if self.state.global_step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return usual(self, *given, **named)\n"
        "trainer.RetrainTrainer.training_step = dying\n"
        "from core import commands\nfrom core.runs import run\n"
        "from core.retrain.spec import RetrainSpec\n"
        "import json; torch = __import__('torch'); torch.set_num_threads(1)\n"
        "run.execute(commands.get('retrain'), RetrainSpec(**json.loads(sys.argv[1])))\n"
    )
    given = json.dumps({"device": "cpu", **options})
    done = subprocess.run([sys.executable, "-c", code, given], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [step for step, _ in trainer.complete_checkpoints(out / ".run" / "checkpoints")][-1] == 4
    assert read_run(out).state == "lost"
    assert execute(**options, resume=True) == 0
    assert_equal_adapters(out, lora)
    assert summary(out)["recovered"] == summary(lora)["recovered"]


class Tracker(TrainerCallback):
    """Stands for the callback of a tracker: keeps what it is told."""

    told: ClassVar[list] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.told.append((args.run_name, os.environ["WANDB_PROJECT"]))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, logs))


def test_a_tracker_is_told_what_the_metrics_say(options, tmp_path, monkeypatch):
    out, told = Path(options["out"]), []
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setattr(Tracker, "told", told)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    assert execute(**{**options, "steps": 2, "eval_every": 1, "report_to": ("wandb",)}) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert told[0] == (out.name, "depthcut")
    steps = {step: logs for step, logs in told[1:] if "loss" in logs}
    evaluated = {step: logs for step, logs in told[1:] if "eval_loss" in logs}
    assert set(steps) == set(evaluated) == {1, 2}
    for line in lines:
        if "loss" in line:
            said = steps[line["step"]]
            assert (said["loss"], said["learning_rate"]) == (line["loss"], line["lr"])
            assert (said["grad_norm"], said["tokens"]) == (line["grad_norm"], line["tokens"])
        elif line.get("event") == "eval" and line["step"]:
            assert evaluated[line["step"]]["eval_loss"] == line["heldout_loss"]


def test_a_tracker_that_cannot_be_used_is_one_sentence(options, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "is_installed", lambda name: False)
    assert execute(**options, report_to=("trackio",)) == 2
    expected = "--report-to: the package trackio is not installed. Install it with: pip install"
    assert expected in capsys.readouterr().err

    class UsageError(Exception):
        __module__ = "wandb.errors"

    def refuse(self, *arguments, **more):
        raise UsageError("api_key not configured (no-tty).\nCall wandb login")

    monkeypatch.setattr(tracking, "is_installed", lambda name: True)
    monkeypatch.setattr(Tracker, "on_train_begin", refuse)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    assert execute(**{**options, "steps": 1, "report_to": ("wandb",)}) == 2
    said = capsys.readouterr().err
    assert "wandb could not be used: api_key not configured (no-tty). Call wandb login." in said
