"""One verdict: what it weighs, what it says, and that every page, report and recipe asks it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import study_helpers as made
from streamlit.testing.v1 import AppTest

from core import commands
from core.checkpoint import headers
from core.compare.candidates import Candidate
from core.compare.choice import Budget
from core.compare.verdict import Figure, Verdict, protocol_of, verdict_of, whole_scene
from core.evaluate import generation
from core.findings import of_study
from core.recipes import command as recipe_command
from core.recipes.chain import Recipe
from core.recipes.chain import Verdict as Told
from core.recipes.spec import RecipeSpec
from core.report import build
from core.report.material import gather
from core.runs import workspace
from core.runs.run import Run
from core.runs.workspace import Workspace
from core.study import store, study

APP = str(Path(__file__).parents[2] / "app.py")


class Lab:
    """A workspace whose runs disagree on the winner.

    On the evaluation text LLM-Pruner is best; on held-out rows of the training data, which more
    checkpoints have, the retrained depth cut is. Depth is faster, width a little smaller.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.dense = folder / "ws", made.checkpoint(folder / "dense")
        self.total = headers.inspect(self.dense).parameters
        plan = {"protect_first": 1, "blocks": 6, "protected": [0]}
        cut = made.pruned(self.root, "cut", self.dense, [2, 3], 1, self.total, criterion="ppl",
                          plan=plan)  # fmt: skip
        made.checkpoint(cut, 4)
        wide = made.checkpoint(
            made.run(self.root, "wide", "width", 2, checkpoint=self.dense, method="llm-pruner")
        )
        left = {"method": "llm-pruner", "parameters_after": self.total - 2 * 7744}
        workspace.write_json(wide / "pruning.json", left)
        tuned = made.run(self.root, "tuned", "retrain", 3, checkpoint=cut, method="lora", data="t")
        made.checkpoint(tuned / "merged", 4)
        held = {"source": "train.jsonl", "rows": 20, "tokens": 300}
        ppl = {"heldout_ppl_dense": 9.0, "heldout_ppl_before": 12.0, "heldout_ppl_after": 8.0}
        workspace.write_json(tuned / "summary.json", {**ppl, "heldout": held})
        again = made.run(self.root, "again", "retrain", 4, checkpoint=cut, method="full", data="t")
        made.checkpoint(again / "merged", 4)
        workspace.write_json(again / "summary.json", {**ppl, "heldout_ppl_after": 8.5,
                                                      "heldout": held})  # fmt: skip
        self.paths = {"dense": self.dense, "cut": cut, "wide": wide, "tuned": tuned}

    def evaluated(
        self, name: str, ppl: float, right: float | None = None, at: float = 10, questions: int = 50
    ) -> None:
        run = made.run(self.root, f"judged-{name}-{at}", "evaluate", at,
                       checkpoint=self.paths[name])  # fmt: skip
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(run / "perplexity.csv", columns, [("english", 128, "once", 999, ppl)])
        if right is not None:
            columns = ("task", "metric", "value", "stderr", "samples")
            workspace.write_csv(
                run / "tasks.csv", columns, [("arc_easy", "acc", right, 0.04, questions)]
            )

    def timed(self, **costs: tuple[float, float]) -> None:
        rows = [
            {"variant": n, "batch_size": 1, "input_tokens": 12, "output_tokens": 8, "oom": False,
             "latency_s_mean": s, "latency_s_p50": s, "latency_s_std": 0.01, "runs": 16,
             "per_token_s": s / 8, "peak_memory_mib": m}
            for n, (s, m) in costs.items()
        ]  # fmt: skip
        paths = {n: str(self.paths[n]) for n in costs}
        made.benchmark(self.root, f"bench-{len(costs)}", 20, paths, rows, device_name="a processor")

    def verdict(self, **more) -> Verdict:
        known = study(Workspace(), str(self.dense))
        settings = store.of(str(self.dense), Workspace()).settings
        return verdict_of(known, replace(settings, **more))


@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    return Lab(tmp_path)


@pytest.fixture
def disagreeing(lab):
    """The study above with everything measured."""
    for name, ppl in (("dense", 10.0), ("cut", 14.0), ("wide", 11.0), ("tuned", 12.0)):
        lab.evaluated(name, ppl)
    lab.timed(dense=(1.0, 100.0), cut=(0.7, 80.0), wide=(0.98, 79.0))
    return lab


def shown(page: AppTest) -> str:
    page.run()
    assert not page.exception, page.exception
    return " ".join(
        e.value for kind in ("markdown", "caption", "info", "success") for e in getattr(page, kind)
    )


def opened(name: str, lab: Lab) -> str:
    page = AppTest.from_file(APP, default_timeout=90).switch_page(f"pages/{name}.py")
    page.query_params["model"] = str(lab.dense)
    return shown(page)


def test_every_place_names_the_same_winner(disagreeing, monkeypatch):
    lab = disagreeing
    found = lab.verdict()
    known = found.study
    assert known.protocols[0].bos == "held-out"  # what most checkpoints have
    assert found.protocol.source == "english"
    assert (found.quality.label, found.speed.label) == ("LLM-Pruner 21%", "PPL+ 21%")
    take = f"Take {found.take.label}, the best of 3 variants"
    assert take in found.sentence
    assert found.short.startswith(take)
    assert found.short.endswith(f"{found.take.ppl.times:.2f} times the dense perplexity.")
    assert take in opened("compare", lab)
    assert take in opened("presentation", lab)
    assert take in build.page(gather(str(lab.dense)))
    assert take in next(f for f in of_study(known) if f.key == "verdict").sentence

    recipe = Recipe("importance", "", "", lambda spec: [], lambda chain: Told("It ran."))
    monkeypatch.setattr(recipe_command.recipes, "get", lambda name: recipe)
    folder = lab.root / "recipe-1"
    (folder / ".run").mkdir(parents=True)
    spec = RecipeSpec(name="importance", checkpoint=str(lab.dense), out=str(folder))
    told = recipe_command.run(spec, Run(commands.get("recipe"), spec, folder))
    assert told["take"] == found.take.label
    assert take in told["study"]


def test_held_out_rows_count_only_if_the_evaluation_text_was_not_measured(lab):
    found = lab.verdict()
    assert found.protocol.bos == "held-out"
    assert found.quality.label == "PPL+ 21% + LoRA"
    assert "on held-out rows of train.jsonl" in found.sentence
    lab.evaluated("dense", 10.0)  # nothing to compare it with yet
    assert lab.verdict().protocol.bos == "held-out"
    lab.evaluated("wide", 11.0)
    assert lab.verdict().protocol.source == "english"
    known = study(Workspace(), str(lab.dense))
    assert protocol_of(known, "other.txt").source == "english"  # better than training data


def test_the_winner_by_speed_is_measured_and_of_equal_ones_the_better(disagreeing):
    """The retrained cut has the blocks of the plain one: its cost is that, but it is no winner."""
    found = disagreeing.verdict()
    cut, tuned = found.of("cut"), found.of("tuned")
    assert cut.speed.how == "measured"
    assert tuned.speed.how == "estimated"
    assert tuned.speed.value == pytest.approx(cut.speed.value)
    assert tuned.memory.value == pytest.approx(cut.memory.value)
    assert found.speed is not tuned
    assert found.memory.label == "LLM-Pruner 21%"
    disagreeing.timed(dense=(1.0, 100.0), cut=(0.7, 80.0), wide=(0.98, 79.0), tuned=(0.701, 80.2))
    assert disagreeing.verdict().speed.label == "PPL+ 21% + LoRA"  # faster by nothing, but better


def test_targets_decide_and_a_missed_one_is_said(disagreeing):
    fast = disagreeing.verdict(ms_per_token=100.0)
    assert fast.take.label == "PPL+ 21% + LoRA"
    assert "the best of 2 variants within the targets" in fast.sentence
    none = disagreeing.verdict(ms_per_token=1.0)
    assert none.missed
    assert "near the targets, as none is within the targets" in none.sentence
    away = disagreeing.verdict(ratio=0.6)
    assert away.missed
    settings = replace(away.settings, ratio=None)
    near = verdict_of(away.study, settings, budget=Budget(ppl_over_dense=1.15))
    assert [c.id for c in near.group] == ["wide"]


def test_pruning_that_does_not_pay_is_said_with_the_best_option(lab):
    for name, ppl in (("dense", 10.0), ("cut", 34.0), ("wide", 30.0), ("tuned", 22.0)):
        lab.evaluated(name, ppl)
    lab.timed(dense=(1.0, 100.0), cut=(0.7, 80.0), wide=(0.98, 79.0))
    found = lab.verdict()
    assert not found.pays
    assert found.sentence.startswith("Pruning does not pay here: PPL+ 21% + LoRA, the best of 3")
    assert "has a perplexity of 22 on english (2.20 times the dense model's)" in found.sentence
    assert "No variant of this study pays yet" in found.sentence
    assert found.short.endswith("on english (2.20 times the dense model's).")
    small = made.pruned(lab.root, "small", lab.dense, [3], 5, lab.total)
    lab.paths["small"] = small
    lab.evaluated("small", 11.0)
    found = lab.verdict()
    assert f"The best option is {found.of('small').noun}" in found.sentence


def test_tasks_are_counted_in_plain_words_and_chance_makes_no_winner(lab):
    for name, ppl, right in (("dense", 10.0, 0.88), ("cut", 14.0, 0.84), ("wide", 11.0, 0.82)):
        lab.evaluated(name, ppl, right)
    found = lab.verdict()
    assert "answers 41 of 50 science questions, 44 before" in found.sentence
    assert found.tasks is found.quality  # one question more is chance
    lab.evaluated("dense", 10.0, 0.5, at=12, questions=20)  # fewer do not replace more
    assert "answers 41 of 50 science questions, 44 before" in lab.verdict().sentence
    lab.evaluated("wide", 11.0, 0.2, at=13)
    assert lab.verdict().tasks.label == "PPL+ 21%"


def test_noise_and_estimates_are_not_sold_as_a_gain(lab):
    found = lab.verdict()
    one = replace(found.of("cut"), ppl=Figure(11.0, 10.0), memory=None)
    near = replace(one, speed=Figure(1.02, 1.0, "measured", 0.05))
    assert not near.pays
    same = "as fast as dense (the difference is within the noise of 5%)"
    assert same in found.facts(near)
    whole = replace(found, group=(near,), quality=near)
    assert f"is {same}; " in whole.sentence
    assert "not faster" not in whole.sentence
    assert whole.sentence.count("as fast") == 1
    loud = replace(one, speed=Figure(1.3, 1.0, "measured", 0.4))
    assert "but with a noise of 40%" in found.facts(loud)
    guess = replace(one, speed=Figure(1.3, 1.0, "estimated"))
    assert "about 1.30 times as fast (estimated)" in found.facts(guess)


def test_a_study_without_measurements_has_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    dense = made.checkpoint(tmp_path / "dense")
    settings = store.of(str(dense), Workspace()).settings
    found = verdict_of(study(Workspace(), str(dense)), settings)
    assert found.take is None
    assert found.sentence == ""
    assert whole_scene(found.study, settings).protocol is None
    assert isinstance(found.dense.candidate, Candidate)


def write(lab, name, chosen, written, at):
    """An evaluation of multiple choice and of written answers, with the raw text of the latter."""
    run = made.run(lab.root, f"asked-{name}-{at}", "evaluate", at, checkpoint=lab.paths[name])
    columns = ("task", "metric", "value", "stderr", "samples")
    rows = [
        ("arc_easy", "acc", chosen, 0.02, 400),
        ("gsm8k", "exact_match,strict-match", 0.0, 0.0, 100),
        ("gsm8k", "exact_match,flexible-extract", written, 0.04, 100),
    ]
    workspace.write_csv(run / "tasks.csv", columns, rows)
    text = "It is 7. " + ("So it is 7. " * 8 if written < 0.3 else "Seven pears are left for us.")
    common = {"task": "gsm8k", "index": 0, "content": "q", "target": "7", "question": "How many?"}
    lines = [
        {**common, "filter": which, "metrics": {"exact_match": right}, "generated": [text],
         "answer": "7"}
        for which, right in (("strict-match", 0.0), ("flexible-extract", 1.0))
    ]  # fmt: skip
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_written_answers_stand_beside_the_mean_and_never_in_it(disagreeing):
    lab = disagreeing
    write(lab, "dense", 0.80, 0.50, 30)
    write(lab, "wide", 0.78, 0.10, 31)
    found = lab.verdict()
    one = found.quality
    assert (one.label, one.accuracy) == ("LLM-Pruner 21%", 0.78)
    assert [(a.task, a.metric, a.right) for a in one.written] == [
        ("gsm8k", "exact_match,flexible-extract", 0.10)
    ]
    said = (
        "answers 312 of 400 science questions, 320 before; writes the answer to 10 of 100 school "
        "maths problems, 50 before"
    )
    assert said in found.facts(one)
    page = AppTest.from_file(APP, default_timeout=90).switch_page("pages/compare.py")
    page.query_params["model"] = str(lab.dense)
    compare, presented = shown(page), opened("presentation", lab)
    for words in said.split("; "):
        assert words in compare
    assert "Writes the answer to 10 of 100 school maths problems, 50 before." in presented
    finding = next(f for f in of_study(found.study) if f.key == "generation-lost")
    assert finding.sentence.startswith("LLM-Pruner 21% keeps its choices but not its own words")
    assert finding.evidence["right written answers, dense"] == 0.5
    report = build.page(gather(str(lab.dense)))
    assert "keeps its choices but not its own words" in report
    assert "Text written in tasks (measured)" in report
    assert "repeated 4-grams" in report
    # its text repeats itself, that of the dense model does not
    repeated = [
        generation.diversity(lab.root / f"asked-{name}", "gsm8k").repetition
        for name in ("dense-30", "wide-31")
    ]
    assert repeated[0] == 0.0
    assert repeated[1] > 0.5
    # and so says the table on Compare, with nothing for what wrote no text
    tables = [d.value for d in page.dataframe if "variant" in d.value]
    table = pd.concat(tables).set_index("variant")
    column = table["repeated 4-grams, gsm8k"]
    assert column["LLM-Pruner 21%"] == pytest.approx(repeated[1])
    assert table["more than dense, gsm8k"]["LLM-Pruner 21%"] == pytest.approx(repeated[1])
    assert column.notna().sum() == 2
    assert table["words, gsm8k"].max() == 35.0
    assert "4-grams that repeat an earlier one" in compare


@pytest.mark.parametrize(
    ("chosen", "written"),
    [(0.60, 0.10), (0.80, 0.45), (0.80, 0.42)],
    ids=["the choices are lost too", "kept", "within chance"],
)
def test_generation_is_lost_only_if_the_mean_is_kept_and_chance_does_not_explain_it(
    disagreeing, chosen, written
):
    write(disagreeing, "dense", 0.80, 0.50, 30)
    write(disagreeing, "wide", chosen, written, 31)
    assert not any(f.key == "generation-lost" for f in of_study(disagreeing.verdict().study))


def test_what_retraining_recovered_is_said_by_both_measures(disagreeing):
    """In the verdict's figures, the findings and the report: held-out rows, and the study's text.

    On the text the losses follow from perplexities 10, 14 and 12 until the run measured it itself.
    """
    tuned = disagreeing.root / "tuned"
    summary = json.loads((tuned / "summary.json").read_text())
    summary |= {"recovered": 0.5, "recovered_kl": 0.1, "heldout_loss_before": 2.5,
                "heldout_loss_after": 2.1, "heldout_loss_dense": 1.7}  # fmt: skip
    workspace.write_json(tuned / "summary.json", summary)
    found = disagreeing.verdict()
    one = found.of("tuned")
    assert one is not None
    share = math.log(14 / 12) / math.log(14 / 10)
    assert [(s.text, s.by_loss, s.by_kl) for s in one.shares] == [
        ("held-out rows of train.jsonl", 0.5, 0.1),
        ("english", pytest.approx(share), None),
    ]
    assert "50% of the loss gap and 10% of the KL to the dense model on held-out" in one.recovery
    assert "adaptation to the training text" in one.recovery
    known = study(Workspace(), str(disagreeing.dense))
    said = next(f for f in of_study(known) if f.key == "adaptation")
    assert said.evidence["recovered by KL, held-out rows of train.jsonl"] == 0.1
    assert one.label in said.sentence
    columns = ("source", "measure", "dense", "before", "after", "items")
    table = [("english", "loss", 2.0, 3.0, 2.5, 9), ("english", "kl", 0.0, 0.5, 0.25, 9)]
    workspace.write_csv(tuned / "evaluation.csv", columns, table)
    text = disagreeing.verdict().of("tuned").shares[1]
    assert (text.text, text.by_loss, text.by_kl) == ("english", 0.5, 0.5)


def test_the_verdict_says_what_retraining_recovered_if_it_takes_that(lab):
    lab.evaluated("dense", 10.0)
    lab.evaluated("cut", 14.0)
    lab.evaluated("tuned", 11.0)
    found = lab.verdict()
    assert found.take is not None
    assert found.take.id == "tuned"
    assert "Retraining recovered 72% of the loss gap on english." in found.rest
