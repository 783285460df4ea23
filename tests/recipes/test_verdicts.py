"""Verdicts say what the files of the steps say, noise included."""

from __future__ import annotations

import json

import pytest

from core import recipes
from core.recipes.chain import Chain
from core.recipes.command import RecipeSpec
from core.recipes.demo_command import SHORT, steps
from core.runs import jobs, workspace
from core.runs.progress import SILENT


def chain(folder, name):
    return Chain(RecipeSpec(name=name, checkpoint="demo", out=str(folder)), folder, SILENT)


def scores(folder, values, dense):
    columns = ("block", "ppl", "taylor", "magnitude", "block_influence")
    rows = [(b, v, v, -v, v if b else 9.0) for b, v in enumerate(values)]
    workspace.write_csv(folder / "scores" / "blocks.csv", columns, rows)
    about = {"device": "cpu", "dtype": "float32", "samples": 4, "length": 24, "seed": 1}
    about |= {"calibration": "demo", "dense_ppl": dense}
    workspace.write_json(folder / "scores" / "summary.json", about)


def timings(folder, dense, pruned):
    rows = [
        (name, 1, visit, seconds)
        for name, times in (("demo", dense), ("cut", pruned))
        for visit, seconds in times
    ]
    workspace.write_csv(
        folder / "speed" / "runs.csv", ("variant", "batch_size", "visit", "latency_s"), rows
    )
    variants = {"variants": [{"name": "demo"}, {"name": "cut"}], "device": "cpu"}
    workspace.write_json(folder / "speed" / "summary.json", variants)


def test_importance_names_cheap_blocks_and_the_worst(tmp_path):
    scores(tmp_path, [40.0, 2.2, 2.1, 2.4], 2.0)
    found = recipes.get("importance").verdict(chain(tmp_path, "importance"))
    assert "2 of 4 blocks" in found.sentence
    assert ": 1 to 2." in found.sentence
    assert "Without block 0 it is 20.0 x" in found.sentence
    assert found.figures["factors"] == pytest.approx([20.0, 1.1, 1.05, 1.2])
    assert found.figures["rank_agreement"]["taylor"] == pytest.approx(1.0)
    assert found.figures["rank_agreement"]["magnitude"] == pytest.approx(-1.0)


@pytest.mark.parametrize(("pruned_s", "noisy"), [(0.5, False), (0.99, True)])
def test_drop_one_tells_a_gain_from_noise(tmp_path, pruned_s, noisy):
    record = {"dropped": [2], "ratio": 0.2, "blocks_before": 5, "blocks_after": 4}
    workspace.write_json(tmp_path / "without-one" / "pruning.json", record)
    for name, ppl in (("dense", 2.0), ("without-one", 2.5)):
        rows = [("demo", 128, "once", 100, ppl)]
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(tmp_path / f"evaluate-{name}" / "perplexity.csv", columns, rows)
    shake = (0.97, 1.0, 1.03, 1.01)
    timings(
        tmp_path,
        [(i % 2, 1.0 * s) for i, s in enumerate(shake)],
        [(i % 2, pruned_s * s) for i, s in enumerate(shake)],
    )
    found = recipes.get("drop-one").verdict(chain(tmp_path, "drop-one"))
    assert "1.250 x dense" in found.sentence
    assert "20.0% fewer parameters" in found.sentence
    assert ("no change beyond the noise" in found.sentence) is noisy
    assert found.figures["speedup"] == pytest.approx(1 / pruned_s)
    assert "perplexity on held-out text is" in found.sentence


@pytest.mark.parametrize("share", [0.75, None])
def test_restore_states_a_share_only_where_there_is_one(tmp_path, share):
    record = {"dropped": [4, 5], "ratio": 0.2}
    workspace.write_json(tmp_path / "light" / "pruning.json", record)
    found = {f"heldout_loss_{k}": v for k, v in (("dense", 1.0), ("before", 1.4), ("after", 1.1))}
    found |= {"recovered": share, "steps": 40, "trainable_parameters": 1000, "device": "cpu"}
    found |= {"compute_dtype": "float32", "settings": {"batch": 16}, "data": {"source": "demo"}}
    found |= {"heldout": {"rows": 10, "source": "demo", "tokens": 100}}
    workspace.write_json(tmp_path / "lora" / "summary.json", found)
    verdict = recipes.get("restore").verdict(chain(tmp_path, "restore"))
    assert ("75%" in verdict.sentence) is (share is not None)
    assert ("recovery is not reported" in verdict.sentence) is (share is None)
    assert "1.0000 dense, 1.4000 pruned, 1.1000 retrained" in verdict.findings[0]


def test_the_demo_shares_the_scores_of_its_recipes(tmp_path):
    spec = RecipeSpec(name=SHORT[0], checkpoint="demo", out=str(tmp_path))
    names = [step.name for step in steps(spec)]
    assert names.count("scores") == 1
    assert names[0] == "scores"
    assert {"without-one", "speed", "light", "lora"} <= set(names)


def test_a_plan_step_writes_what_the_command_prints(tmp_path):
    """The steps of `cut`, carried out: an instant command, then a run that takes its file."""
    from core.recipes import parts

    made = chain(tmp_path, "drop-one")
    values = [(b, float(10 - b)) for b in range(14)]
    workspace.write_csv(tmp_path / "scores" / "blocks.csv", ("block", "ppl"), values)
    plan, prune = parts.cut(made.spec, "small", "ppl", count=2)
    made.run([plan])
    written = json.loads((tmp_path / "plan-small" / "plan-small.json").read_text())
    assert written["drop"] == [11, 10]
    options = prune.values(made)
    assert options["plan"] == str(tmp_path / "plan-small" / "plan-small.json")
    jobs.build(jobs.commands.get("prune").spec_class, {**options, "out": "x"})
