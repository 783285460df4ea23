"""The retraining recipes: their steps on tiny models, and tables that follow from the runs."""

import csv
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
from retrain_helpers import write_jsonl

from core import commands, recipes
from core.errors import OptionError
from core.recipes import ablation, retraining
from core.recipes.chain import Chain
from core.recipes.command import RecipeSpec
from core.retrain.rows import kind_of
from core.runs import run, workspace
from core.runs.progress import SILENT
from core.runs.spec import build


def summary_of(chain, step):
    return workspace.read_json(chain.dir(step) / "summary.json")


def carry_out(name, checkpoint, folder, **options):
    """Do a recipe's steps in this process, in order, and return chain, verdict and table."""
    spec = RecipeSpec(name=name, checkpoint=str(checkpoint), out=str(folder), device="cpu",
                      **options)  # fmt: skip
    recipe, chain = recipes.get(name), Chain(spec, folder, SILENT)
    for step in recipe.steps(spec):
        entry = commands.get(step.command)
        values = dict(step.values(chain) if callable(step.values) else step.values)
        values = {k: str(v) if k in ("checkpoint", "scores", "plan") else v
                  for k, v in values.items()}  # fmt: skip
        if entry.computes:
            values["device"] = "cpu"
        if not entry.is_run:
            result = entry.load().run(build(entry.spec_class, values))
            workspace.write_json(chain.dir(step.name) / f"{step.name}.json", result)
            continue
        made = build(entry.spec_class, {**values, "out": str(chain.dir(step.name))})
        assert run.execute(entry, made) == 0, step.name
    verdict = recipe.verdict(chain)
    with (folder / "table.csv").open() as file:
        return chain, verdict, list(csv.DictReader(file))


def value(table, variant, evaluated_on, measure):
    (row,) = [r for r in table if (r["variant"], r["evaluated_on"], r["measure"])
              == (variant, evaluated_on, measure)]  # fmt: skip
    return float(row["value"])


@pytest.fixture
def source(tmp_path):
    def write(name, seed):
        lines = dict.fromkeys(tiny.text(60, seed).splitlines())
        return write_jsonl(tmp_path / f"{name}.jsonl", [{"text": line} for line in lines])

    return write


def test_ablation(pruned, source, tmp_path):
    data, general = source("a", 3), source("b", 4)
    chain, verdict, table = carry_out(
        "ablation", pruned, tmp_path / "r", data=f"{data},{general}", steps=2
    )
    lora, full = summary_of(chain, "lora"), summary_of(chain, "full")
    # The same rows, tokens and pruned model for both.
    for name in ("tokens", "heldout_loss_before", "heldout_loss_dense", "heldout"):
        assert lora[name] == full[name]
    assert value(table, "lora", "held out", "recovered") == lora["recovered"]
    assert value(table, "full", "held out", "loss") == full["heldout_loss_after"]
    assert value(table, "pruned", "held out", "loss") == lora["heldout_loss_before"]
    for variant in ("pruned", "lora", "full"):
        assert value(table, variant, general, "kl") > 0
        assert value(table, variant, general, "loss") > 0
    assert f"LoRA {lora['recovered']:.0%}" in verdict.sentence
    assert not any(row["variant"] == "dense" and row["measure"] == "kl" for row in table)


def test_ablation_of_the_demo_trains_on_stories_and_judges_by_instructions_too(pruned, tmp_path):
    spec = RecipeSpec(name="ablation", checkpoint=str(pruned), data="demo", out=str(tmp_path))
    recipe, chain = recipes.get("ablation"), Chain(spec, tmp_path, SILENT)
    for step in recipe.steps(spec):
        values = step.values(chain)
        (other,) = values["also"]
        assert values["data"] == "demo"
        assert "instruction" in json.loads(Path(other).read_text().splitlines()[0])
        made = build(commands.get("retrain").spec_class, {**values, "out": "x"})
        assert kind_of(made, "demo") == "text"
        chain.dir(step.name).mkdir()
        row = {"source": other, "measure": "loss", "dense": 1, "before": 3, "after": 2, "items": 9}
        workspace.write_csv(
            chain.dir(step.name) / "evaluation.csv", list(row), [list(row.values())]
        )
        summary = {"recovered": 0.5, "heldout": {"tokens": 7}}
        workspace.write_json(chain.dir(step.name) / "summary.json", summary)
    table = [asdict(row) for row in ablation.table(chain)]
    assert value(table, "dense", "demo instructions", "loss") == 1
    assert value(table, "full", "demo instructions", "loss") == 2


def test_better_than_dense_is_said_beside_the_share():
    assert retraining.percent(0.8) == "80%"
    assert retraining.percent(8.0) == "800% (better than dense)"
    assert "not reported" in retraining.percent(None)


def test_stability(pruned, source, tmp_path):
    chain, verdict, table = carry_out(
        "stability", pruned, tmp_path / "r", data=source("a", 3), steps=2, seed=7
    )
    for place, rate in ((1, 3e-3), (2, 1e-3)):
        runs = [summary_of(chain, f"rate{place}-seed{seed}") for seed in (7, 8, 9)]
        assert len({r["heldout_loss_after"] for r in runs}) == 3  # the seed does something
        assert [r["settings"]["lr"] for r in runs] == pytest.approx([rate] * 3)
        shares = [r["recovered"] for r in runs]
        label = f"learning rate {rate:g}"
        assert value(table, label, "mean", "recovered") == pytest.approx(statistics.mean(shares))
        (row,) = [r for r in table if r["variant"] == label and r["evaluated_on"] == "mean"]
        assert float(row["spread"]) == pytest.approx(statistics.stdev(shares))
        assert f"{label}: {statistics.mean(shares):.1%}" in verdict.sentence


def test_domain(pruned, source, tmp_path):
    a, b = source("a", 3), source("b", 4)
    chain, _, table = carry_out("domain", pruned, tmp_path / "r", data=f"{a},{b}", steps=2)
    on_a = summary_of(chain, "on-a")
    assert value(table, f"trained on {a}", a, "recovered") == on_a["recovered"]
    on_b = summary_of(chain, "on-b")
    assert value(table, f"trained on {b}", b, "loss") == on_b["heldout_loss_after"]
    cross = value(table, f"trained on {a}", b, "loss")
    dense, before = value(table, "dense", b, "loss"), value(table, "pruned", b, "loss")
    share = (before - cross) / (before - dense)
    assert value(table, f"trained on {a}", b, "recovered") == pytest.approx(share)
    # Judged by the same rows of B, whichever it was trained on, and by none it was trained on.
    names = {p.name: p for p in (tmp_path / "r" / "data").iterdir()}
    rows = {n: {json.loads(x)["text"] for x in p.read_text().splitlines()}
            for n, p in names.items()}  # fmt: skip
    assert not rows["b-train.jsonl"] & rows["b-heldout.jsonl"]
    assert (
        len({r["items"] for r in table if r["evaluated_on"] == b and r["measure"] == "loss"}) == 1
    )


def test_cpt_lora(pruned, source, tmp_path):
    chain, _, table = carry_out("cpt-lora", pruned, tmp_path / "r", data=source("a", 3), steps=4)
    first, second = summary_of(chain, "continued"), summary_of(chain, "continued-lora")
    assert (first["steps"], second["steps"], summary_of(chain, "lora")["steps"]) == (2, 2, 4)
    assert second["heldout_loss_before"] == pytest.approx(first["heldout_loss_after"], abs=1e-5)
    dense, before = first["heldout_loss_dense"], first["heldout_loss_before"]
    share = (before - second["heldout_loss_after"]) / (before - dense)
    label = "continued, then LoRA"
    assert value(table, label, "held out", "recovered") == pytest.approx(share)


def test_a_dense_checkpoint_is_pruned_first(dense, tmp_path):
    spec = RecipeSpec(name="ablation", checkpoint=str(dense), out=str(tmp_path))
    names = [step.name for step in recipes.get("ablation").steps(spec)]
    assert names == ["scores", "plan", "pruned", "lora", "full"]


def test_domain_wants_two_sources(pruned, tmp_path):
    spec = RecipeSpec(name="domain", checkpoint=str(pruned), out=str(tmp_path), data="one.txt")
    with pytest.raises(OptionError, match="takes two"):
        recipes.get("domain").steps(spec)
