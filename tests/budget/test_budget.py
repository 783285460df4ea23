"""Budget runs: KL against models really cut, times taken apart, and plans made into variants."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from core.__main__ import main
from core.budget import known, measure, timing, versions
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.checkpoint.neurons import NeuronOrder
from core.data.calibration import sample
from core.doctor import plain
from core.importance.branches import make_batch
from core.model import loading
from core.model.blocks import BlockView, PartOfLayer
from core.prune import budgets, depth
from core.prune.results import Pruning
from core.prune.version_results import (
    VERSIONS,
    WHOLE,
    Budget,
    PlanCheck,
    VersionRow,
    latency_errors,
)
from core.runs import jobs, workspace
from core.runs.run import DETACHED
from core.runs.workspace import read_run
from core.width.units import units_of

CPU = torch.device("cpu")


def rows_for(model, lengths=(24, 24, 9)):
    draw = torch.Generator().manual_seed(7)
    size = model.config.vocab_size
    return [torch.randint(0, size, (n,), generator=draw).tolist() for n in lengths]


def write_order(folder, key, order):
    folder.mkdir()
    found = NeuronOrder(checkpoint_key=key, order={str(b): tuple(n) for b, n in order.items()})
    workspace.write_json(folder / NeuronOrder.FILE, found.to_dict())


@pytest.mark.parametrize("variant", ["gqa", "qwen3"])
def test_kl_equals_stock_transformers_on_the_written_variant(tiny_dir, tmp_path, variant):
    folder = tiny_dir(variant)
    model = loading.load_model(folder, CPU, torch.float32)
    view, rows = BlockView(model), rows_for(model)
    batch = make_batch(rows, view)
    info = headers.inspect(folder)
    order = measure.rank_neurons(view, batch, dict(enumerate(units_of(info))))
    found = measure.measure(view, batch, tuple(VERSIONS), 4, order=order)  # in many groups
    whole = measure.measure(view, batch, tuple(VERSIONS), 100, order=order)
    assert found.of.keys() == {(b, v) for b in range(tiny.BLOCKS) for v in VERSIONS}
    assert all(
        found.of[one] == pytest.approx(whole.of[one], rel=1e-5, abs=1e-7) for one in found.of
    )
    dropped = measure.measure(view, batch, ("drop",), most=4)
    assert dropped.of[2, "drop"] == pytest.approx(found.of[2, "drop"], rel=1e-5)
    # no other version beside them: a narrower MLP must not count as a whole block
    narrow = measure.measure(view, batch, ("drop", "mlp75"), most=4, order=order)
    for one in ((2, "drop"), (2, "mlp75")):
        assert narrow.of[one] == pytest.approx(found.of[one], rel=1e-5)
    assert found.dense_nll == pytest.approx(
        plain.mean_loss(model, [(r, r) for r in rows]), rel=1e-5
    )
    ranked = tmp_path / "ranked"
    write_order(ranked, info.key, order)
    for block, version in [
        (0, "no-attention"), (3, "no-mlp"), (1, "drop"), (2, "mlp75"), (4, "mlp25"),
    ]:  # fmt: skip
        out = tmp_path / version
        removal = versions.removal(info, block, version)
        depth.prune(folder, dataclasses.replace(removal, order=str(ranked)), out)
        cut = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        kl, nll = found.of[block, version]
        assert kl == pytest.approx(plain.divergence(model, cut, rows), rel=1e-5, abs=1e-7)
        assert nll == pytest.approx(plain.mean_loss(cut, [(r, r) for r in rows]), rel=1e-5)
        gone = info.parameters - headers.inspect(out).parameters
        left = 0 if version == "drop" else versions.parameters(info, block, version)
        assert info.block_parameters[block] - left == gone
        lost = info.kv_bytes(3, 50, "float16") - headers.inspect(out).kv_bytes(3, 50, "float16")
        own = versions.cache_bytes(info, block, WHOLE, 3, 50, "float16")
        stays = (
            0 if version == "drop" else versions.cache_bytes(info, block, version, 3, 50, "float16")
        )
        assert own - stays == lost


def test_times_are_taken_apart(monkeypatch, tiny_dir):
    """With a clock that adds up known times, every block gets its own, also of unlike shapes."""
    view = BlockView(loading.load_model(tiny_dir("gqa"), CPU, torch.float32))
    slow = {id(view.blocks[block].mlp) for block in (1, 3)}
    shapes = []

    def clock(model, ids, config):
        first = 0.5
        for layer in model.model.layers:
            first += 0.6 if layer.self_attn is not None else 0.0
            twice = id(layer.mlp) in slow or getattr(layer.mlp, "slow", False)
            if layer.mlp is not None:
                first += (0.6 if twice else 0.3) * layer.mlp.down_proj.in_features / 48
        shapes.append((ids.shape, len(model.model.layers)))
        return first, [first / 10] * (config.max_new_tokens - 1)

    for block in (1, 3):
        view.blocks[block].mlp.slow = True  # copies keep it
    monkeypatch.setattr(timing, "stepwise", clock)
    monkeypatch.setattr(timing, "import_and_settle", lambda device: None)
    options = {"batch": 2, "context": 7, "runs": 3, "steps": 4}
    found = timing.measure(view, [[0, 2, 4], [1, 3]], tuple(VERSIONS), **options)
    dense, (cut,) = timing.whole(view, [Removal((0,), (1,), (2,))], **options)
    assert dense == found.dense
    mine = [found.of[1, "no-attention"], found.of[2, "no-mlp"], found.of[3, WHOLE]]
    parts = [found.rest, *mine, found.of[4, WHOLE]]
    assert cut.prefill == pytest.approx(sum(part.prefill for part in parts))
    assert cut.decode == pytest.approx(sum(part.decode for part in parts))
    assert found.dense.prefill == pytest.approx(0.5 + 5 * 0.6 + 3 * 0.3 + 2 * 0.6)
    assert found.rest.prefill == pytest.approx(0.5)
    assert found.rest.decode == pytest.approx(found.rest.prefill / 10)
    for block in range(5):
        mlp = 0.6 if block in (1, 3) else 0.3
        assert found.of[block, WHOLE].prefill == pytest.approx(0.6 + mlp)
        assert found.of[block, "no-mlp"].prefill == pytest.approx(0.6)
        assert found.of[block, "no-attention"].prefill == pytest.approx(mlp)
        assert found.of[block, "mlp75"].prefill == pytest.approx(0.6 + 0.75 * mlp)
        assert found.of[block, "drop"].prefill == 0
    assert found.noise == pytest.approx(0)
    assert {shape for shape, _ in shapes} == {(2, 7)}
    assert [layer.self_attn.layer_idx for layer in view.blocks] == [0, 1, 2, 3, 4]
    assert not any(isinstance(layer, PartOfLayer) for layer in view.blocks)


def test_a_plan_within_a_budget_becomes_a_variant(tiny_gqa, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    run = tmp_path / "run"
    argv = ["budget", str(tiny_gqa), "--out", str(run), "--device", "cpu", "--context", "12"]
    argv += ["--samples", "2", "--length", "16", "--runs", "1", "--calibration", "english"]
    argv += ["--check-plans", "3"]
    assert main([*argv, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not run.exists()
    assert main(argv) == 0
    capsys.readouterr()
    summary, rows = Budget.read(run), VersionRow.read(run)
    assert len(rows) == 5 * 7
    assert all(r.kl == 0 for r in rows if r.version == WHOLE)
    assert all(r.kl > 0 and r.nll > 0 for r in rows if r.version != WHOLE)
    assert told["passes"] == summary.passes < summary.plain_passes
    checked = PlanCheck.read(run)
    assert 1 <= len(checked) <= 3
    assert len(latency_errors(checked)) == len(checked)
    model = loading.load_model(tiny_gqa, CPU, torch.float32)
    drawn = sample("english", loading.load_tokenizer(tiny_gqa), 2, 16, 1234)
    for one in checked:
        removal = budgets.load(run).removal(one.choice.split())
        with BlockView(model).skip(removal) as cut:
            nll = plain.mean_loss(cut, [(r, r) for r in drawn.rows])
        assert one.nll == pytest.approx(nll, rel=1e-5)
        assert one.kl > 0 < one.prefill_s
        assert one.predicted_share <= one.latency
    info = headers.inspect(tiny_gqa)
    dense = budgets.load(run).dense()
    assert dense.params == info.parameters
    assert dense.weight_bytes == info.memory_bytes["float32"]
    assert dense.cache_bytes == info.kv_bytes(1, 12, "float32")
    assert summary.dense_decode_s > 0 < summary.rest_prefill_s + summary.rest_decode_s
    limit = round(0.75 * info.parameters)
    start = ["plan", str(run), "--protect-first", "0", "--protect-last", "0"]
    assert main([*start, "--params", str(limit)]) == 0
    file = tmp_path / "plan.json"
    file.write_text(capsys.readouterr().out)
    plan = json.loads(file.read_text())
    assert plan["criterion"] == "budget"
    assert plan["params"] <= limit
    assert main(["prune", str(tiny_gqa), "--plan", str(file), "--out", str(tmp_path / "cut")]) == 0
    record = Pruning.read(tmp_path / "cut")
    assert (record.parameters_after, record.criterion) == (plan["params"], "budget")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    assert sum(p.numel() for p in made.parameters()) == plan["params"]
    for bad, sentence in (
        (["--count", "2"], "--count does not apply to a budget run"),
        (["--params", "1"], "--params: the least possible is"),
        (["--latency", "0.5", "--criterion", "ppl"], "is a budget run, which has no criteria"),
        (["--latency", "0.5", "--pairs", str(run)], "has no measured pairs of blocks"),
        (["--latency", "0.5", "--pairs", "nowhere"], "--pairs: nowhere does not exist"),
    ):
        assert main([*start, *bad]) == 2
        assert sentence in capsys.readouterr().err


def test_a_killed_run_resumes_as_if_it_had_never_been_killed(tiny_gqa, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setattr("core.budget.command._most", lambda *_: 6)  # five versions in a pass
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    argv = ["budget", str(tiny_gqa), "--device", "cpu", "--context", "12", "--samples", "2"]
    argv += ["--length", "16", "--runs", "1", "--calibration", "english", "--check-plans", "0"]
    assert main([*argv, "--out", str(whole)]) == 0
    usual, calls = measure.losses_without, []

    def stopping(view, batch, sets, *args, **more):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(list(sets))
        return usual(view, batch, sets, *args, **more)

    monkeypatch.setattr(measure, "losses_without", stopping)
    assert main([*argv, "--out", str(killed)]) == 130
    assert not (killed / VersionRow.FILE).exists()
    with (killed / "measured.jsonl").open("a") as tape:
        tape.write('{"sets": [[0')  # a line cut short
    before = len(calls)
    monkeypatch.setattr(
        measure, "losses_without", lambda *a, **more: calls.append(a[2]) or usual(*a, **more)
    )
    assert jobs.restart(read_run(killed), Here(monkeypatch)).state == "done"
    summary = Budget.read(killed)
    assert len(calls) - before == 6 - before  # 30 versions, the first three passes are kept
    assert not any(frozenset() in some for some in calls[before:])

    def costs(folder):
        return [(r.block, r.version, r.kl, r.nll, r.params) for r in VersionRow.read(folder)]

    assert costs(killed) == costs(whole)
    assert summary.passes == Budget.read(whole).passes
    assert summary.dense_nll == Budget.read(whole).dense_nll
    assert (killed / NeuronOrder.FILE).read_text() == (whole / NeuronOrder.FILE).read_text()
    argv[argv.index("--length") + 1] = "17"
    assert main([*argv, "--out", str(killed), "--resume"]) == 2


class Here:
    """A launcher that carries the run out in this process."""

    def __init__(self, monkeypatch):
        self.env = monkeypatch

    def start(self, argv, folder):
        assert "--resume" in argv
        with self.env.context() as env:
            env.setenv(DETACHED, str(folder))
            assert main(argv[3:]) == 0


def test_what_cannot_be_measured_is_refused(tiny_gqa, tmp_path, capsys):
    depth.prune(tiny_gqa, Removal(attention=(2,)), tmp_path / "cut")
    whole, cut = str(tiny_gqa), str(tmp_path / "cut")
    for name, bad, sentence in (
        (whole, ["--versions", "drop,thin"], "--versions: unknown value 'thin'"),
        (whole, ["--versions", ""], "--versions is empty"),
        (whole, ["--context", "9999"], "exceed the model's context of 256. Use 247 or fewer"),
        (whole, ["--length", "999"], "exceed the model's context"),
        (cut, [], "Block 2 has no attention, so it has no version without a part"),
    ):
        assert main(["budget", name, "--out", str(tmp_path / "x"), "--dry-run", *bad]) == 2
        assert sentence in capsys.readouterr().err
    assert (
        main(["budget", cut, "--out", str(tmp_path / "x"), "--dry-run", "--versions", "drop"]) == 0
    )
    (tmp_path / "scores.csv").write_text("block,score\n0,1\n1,2\n2,3\n")
    scores = str(tmp_path / "scores.csv")
    capsys.readouterr()
    for argv, sentence in (
        (["plan", scores, "--latency", "0.5"], "--latency needs a budget run"),
        (["plan", scores, "--criterion", "budget", "--count", "1"], "needs a budget run"),
        (["plan", scores, "--count", "1"], "Missing required option: --criterion"),
    ):
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err


def test_a_busy_machine_is_told():
    quiet, busy = timing._Stack([], []), timing._Stack([], [])
    quiet.steps = [1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 9.0]
    busy.steps = [1.0, 1.5, 2.0, 2.5, 3.0]
    assert quiet.spread() < 0.1  # one disturbed step does not count
    assert busy.spread() == pytest.approx(0.75)
    assert "varied by 75%" in known.noise_in_words(Budget(noise=busy.spread()))
    assert not known.noise_in_words(Budget(noise=0.1))
    assert not known.noise_in_words(Budget())
