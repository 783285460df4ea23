"""Differences pair by pair, flips, and what each block costs: against slow independent ways."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.evaluate import compare, suites, zero_shot
from core.evaluate.results import BlockCost, Sample, read_windows
from core.runs.workspace import read_json


def test_the_error_of_a_perplexity_difference_is_that_of_resampling():
    draw = random.Random(5)
    hard = [draw.gauss(1.0, 0.4) for _ in range(300)]
    first = [h + draw.gauss(0, 0.02) for h in hard]
    second = [h + 0.05 + draw.gauss(0, 0.04) for h in hard]
    found = compare.perplexity_delta(first, second)

    def difference(rows):
        means = [statistics.fmean(losses[r] for r in rows) for losses in (first, second)]
        return math.exp(means[1]) - math.exp(means[0])

    bootstrap = [difference([draw.randrange(300) for _ in range(300)]) for _ in range(800)]
    assert found.value == pytest.approx(difference(range(300)))
    assert found.stderr == pytest.approx(statistics.stdev(bootstrap), rel=0.15)
    assert found.certain
    alone = compare.unpaired_delta((2.7, 0.06), (2.84, 0.07))
    assert alone.stderr == pytest.approx(math.sqrt(0.06**2 + 0.07**2))
    assert found.stderr < alone.stderr / 5
    assert compare.perplexity_delta(first, second[1:]) is None
    assert compare.perplexity_delta(first, first).value == 0


def sample(index, right, answer=0, target=0, content="q", task="t"):
    return Sample(
        task=task, index=index, filter="none", content=f"{content}{index}",
        metrics={"acc": float(right)}, target=target, answer=answer,
        question=f"Question {index}?", choices=(" red", " blue"),
        loglikelihoods=(-1.0, -2.0),
    )  # fmt: skip


def test_flips_name_question_and_answers():
    first = [sample(0, 1), sample(1, 0, answer=1), sample(2, 1), sample(3, 1, content="other")]
    second = [sample(2, 1), sample(1, 1), sample(0, 0, answer=1), sample(3, 0)]
    lost, gained = compare.flips(first, second, "t", "acc")
    assert (lost.index, lost.kind, lost.first, lost.second) == (0, "lost", "red", "blue")
    assert (gained.index, gained.kind, gained.first, gained.second) == (1, "gained", "blue", "red")
    assert (lost.question, lost.choices, lost.target) == ("Question 0?", ("red", "blue"), "red")
    delta = compare.task_delta(first, second, "t", "acc")
    assert (delta.value, delta.pairs) == (0, 3)
    assert delta.stderr == pytest.approx(statistics.stdev([-1, 1, 0]) / math.sqrt(3))
    assert compare.task_delta(first, second, "other", "acc") is None


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (6, 0, 2 / 64), (5, 1, 14 / 64), (4, 4, 1.0)],
)
def test_sign_test_is_mcnemars_exact(lost, gained, p):
    assert compare.sign_test(lost, gained) == pytest.approx(p)
    assert compare.sign_test(gained, lost) == pytest.approx(p)


def test_an_answer_by_length_is_the_one_that_is_judged():
    one = replace(
        sample(0, 1, answer=1),
        choices=("a long answer", "no"),
        loglikelihoods=(-9.0, -4.0),
        metrics={"acc": 0.0, "acc_norm": 1.0},
    )
    other = replace(one, loglikelihoods=(-20.0, -2.0), metrics={"acc": 0.0, "acc_norm": 0.0})
    (flip,) = compare.flips([one], [other], "t", "acc_norm")
    assert (flip.first, flip.second) == ("a long answer", "no")
    assert compare.flips([one], [other], "t", "acc") == []


def test_what_each_block_costs_equals_asking_the_really_pruned_model(tiny_dir, tmp_path):
    """Of a tiny checkpoint, with choices of several tokens, against lm-eval's own model class."""
    folder = tiny_dir("qwen3")
    tasks, limit = ("demo_counting", "demo_location"), 8
    out = tmp_path / "out"
    short = tmp_path / "tasks"  # stories are longer than the tiny model's context: cut them
    short.mkdir()
    names = []
    for task in tasks:
        names.append(f"short_{task}")
        (short / f"{task}.yaml").write_text(
            f"include: {suites.DEMO_TASKS / (task + '.yaml')}\ntask: short_{task}\n"
            'doc_to_text: "{{context[-60:]}}"\n'
        )
    argv = ["evaluate", folder, "--tasks", ",".join(names), "--task-dir", short, "--limit", limit]
    assert main([str(a) for a in [*argv, "--each-block", "--out", out, "--device", "cpu"]]) == 0
    rows = BlockCost.read(out)
    assert [(r.block, r.task) for r in rows] == [
        (b, t) for t in names for b in range(-1, tiny.BLOCKS)
    ]

    places = suites.find(names, str(short))
    manager = zero_shot.manager(places)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = {}
    for block in range(-1, tiny.BLOCKS):
        variant = folder
        if block >= 0:
            variant = tmp_path / f"without{block}"
            assert main(["prune", str(folder), "--drop", str(block), "--out", str(variant)]) == 0
        model = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float32).eval()
        lm = zero_shot.harness_model(model, tokenizer, 4)
        for place in places:
            found = zero_shot.ask(lm, place, zero_shot.load(manager, place), limit)
            (row,) = [r for r in rows if (r.block, r.task) == (block, place.name)]
            dense.setdefault(place.name, found)
            value = found.scores[0].value
            assert row.value == value
            assert row.stderr == found.scores[0].stderr
            assert row.delta == pytest.approx(value - dense[place.name].scores[0].value)
            if block >= 0:
                both = zip(dense[place.name].samples, found.samples, strict=True)
                gaps = [b.metrics["acc"] - a.metrics["acc"] for a, b in both]
                assert row.delta_stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(limit))
    summary = read_json(out / "summary.json")
    assert [s["task"] for s in summary["skills"]] == names
    assert {r.value for r in rows} != {rows[0].value}


def test_log_likelihoods_without_each_block_are_lm_evals(tiny_gqa):
    """Continuations of one and several tokens, a shared context, and one too long to fit."""
    from core.evaluate.block_tasks import loglikelihoods
    from core.model.blocks import BlockView

    model = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_gqa)
    view = BlockView(model)
    draw = random.Random(3)
    context = [1, *(draw.randrange(5, 300) for _ in range(20))]
    long = [draw.randrange(5, 300) for _ in range(300)]
    pairs = [
        (context, [7]),
        (context, [9]),
        (context, [7, 8, 9]),
        (context[:2], [4]),
        (long, [5, 6]),
    ]
    sets = [frozenset(), frozenset({0}), frozenset({3})]
    found = loglikelihoods(view, pairs, sets, 256)
    lm = zero_shot.harness_model(model, tokenizer, 2)
    requests = [((str(i), ""), *pair) for i, pair in enumerate(pairs)]
    for variant, dropped in enumerate(sets):
        with view.skip(dropped):
            theirs = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for ours, other in zip(found, theirs, strict=True):
            assert ours[variant][0] == pytest.approx(other[0], abs=1e-4)
            assert ours[variant][1] == other[1]
    best = int(model(torch.tensor([context])).logits[0, -1].argmax())
    assert loglikelihoods(view, [(context, [best])], sets[:1], 256)[0][0][1] is True


def test_windows_of_two_runs_pair(tiny_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(60))
    losses = []
    for name, folder in (("a", tiny_dir("gqa")), ("b", tiny_dir("gqa", seed=1))):
        argv = ["evaluate", folder, "--perplexity", text, "--window", "32", "--device", "cpu"]
        assert main([str(a) for a in [*argv, "--out", tmp_path / name]]) == 0
        losses.append(read_windows(tmp_path / name, str(text), 32, "once"))
    delta = compare.perplexity_delta(*losses)
    before, after = (read_json(tmp_path / n / "summary.json")["perplexity"][0]["ppl"] for n in "ab")
    assert delta.value == pytest.approx(after - before)
    assert delta.pairs == len(losses[0]) > 5


def test_a_perplexity_over_questions_is_not_paired_by_their_log_likelihoods():
    def samples(value):
        return [Sample(task="t", index=i, content=str(i), metrics={"perplexity": value, "acc": 1.0})
                for i in range(3)]  # fmt: skip

    assert compare.task_delta(samples(-2.0), samples(-4.0), "t", "perplexity") is None
    assert compare.task_delta(samples(-2.0), samples(-4.0), "t", "acc").value == 0.0
