"""The recipe's steps, and its verdict from files as its steps leave them."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from core import commands
from core.__main__ import main
from core.recipes import depth_vs_width as recipe
from core.recipes.chain import Chain
from core.recipes.command import RecipeSpec
from core.runs import workspace
from core.runs.progress import SILENT
from core.runs.spec import build

SPEED = {
    "dense": 1.0, "depth-ppl": 0.7, "depth-taylor": 0.68, "width-llm-pruner": 0.98,
    "width-flap": 1.02, "width-wanda-sp": 1.1,
}  # fmt: skip
"""Seconds at batch 1."""
DEPTH = {"plan": {"blocks": 8, "protected": [0, 7]}}
CUT_IN = {
    "ppl": DEPTH, "taylor": DEPTH, "pruner": {"layers": [1, 2, 3, 4, 5, 6]},
    "flap": {"layers": list(range(8))}, "sp": {"layers": list(range(8))},
}  # fmt: skip
"""By the last part of a name: what pruning.json says of the blocks that might be cut."""


def chain_of(folder, jitter: float = 0.01, missing: str = "") -> Chain:
    """Write what benchmark and evaluate leave, with times that spread by ``jitter``."""
    spec = RecipeSpec(name="depth-vs-width", out=str(folder))
    made = Chain(spec, folder, SILENT)
    if missing:
        made.failed[missing] = "too small"
    names = [n for n in SPEED if n != missing]
    points, runs = [], []
    for place, name in enumerate(names):
        for visit in (0, 1):
            for n in range(5):
                seconds = SPEED[name] * (1 + jitter * (n - 2))
                runs.append((name, 1, visit, seconds))
        points.append((name, 1, 100.0 - 10 * place))
        measured = ("demo", 128, "once", 9, 2.0 + 0.1 * place)
        columns = ("source", "window", "bos", "tokens", "ppl")
        workspace.write_csv(folder / f"evaluate-{name}" / "perplexity.csv", columns, [measured])
        if name != "dense":
            workspace.write_json(folder / name / "pruning.json", CUT_IN[name.split("-")[-1]])
    where = folder / "benchmark"
    workspace.write_csv(where / "runs.csv", ("variant", "batch_size", "visit", "latency_s"), runs)
    columns = ("variant", "batch_size", "peak_memory_mib")
    workspace.write_csv(where / "points.csv", columns, points)
    sizes = {n: 1000 if n == "dense" else 670 for n in names}
    entries = [{"name": n, "path": n, "parameters": sizes[n]} for n in names]
    workspace.write_json(where / "summary.json", {"variants": entries})
    return made


def test_the_verdict_is_the_figures_of_the_files(tmp_path):
    found = recipe.verdict(chain_of(tmp_path))
    figures = found.figures
    assert list(figures) == list(SPEED)
    for place, name in enumerate(SPEED):
        assert figures[name]["speedup"] == pytest.approx(1 / SPEED[name])
        assert figures[name]["ppl_over_dense"] == pytest.approx(1 + 0.05 * place)
        assert figures[name]["ratio"] == pytest.approx(0 if name == "dense" else 0.33)
    assert "depth runs at 1.47 x dense" in found.sentence
    assert "fastest width baseline at 1.02 x dense" in found.sentence
    assert "depth is 44% faster than width, beyond the noise" in found.sentence
    assert "1.050 x dense with depth pruning (PPL+)" in found.sentence
    assert "and to 1.150 x with width pruning (LLM-Pruner)" in found.sentence
    assert len(found.findings) == 5


def test_the_verdict_says_where_each_method_might_cut(tmp_path):
    found = recipe.verdict(chain_of(tmp_path))
    assert found.sentence.endswith(
        "Allowed to cut by default, as in the papers (--same-layers gives all the same blocks): "
        "PPL+, Taylor+, LLM-Pruner in blocks 1 to 6; FLAP, Wanda-sp in 0 to 7."
    )
    said = ["1 to 6"] * 3 + ["0 to 7"] * 2
    assert all(
        f"cut in blocks {blocks}, " in line
        for line, blocks in zip(found.findings, said, strict=True)
    )
    assert found.figures["width-flap"]["cut_in"] == list(range(8))
    assert found.figures["dense"]["cut_in"] == []


def test_with_same_layers_all_widths_get_the_blocks_that_depth_may_drop(tmp_path):
    made = chain_of(tmp_path)
    for prefix in ("", recipe.LIGHT):
        plan = {"blocks": 14, "protect_first": 4, "protect_last": 2}
        workspace.write_json(tmp_path / f"{prefix}plan-ppl" / f"{prefix}plan-ppl.json", plan)
    own = [s.values(made) for s in recipe.steps(made.spec) if s.command == "width"]
    assert not any("layers" in values for values in own)
    spec = replace(made.spec, same_layers=True)
    same = [s.values(made)["layers"] for s in recipe.steps(spec) if s.command == "width"]
    assert same == ["4:12"] * 6
    for name in ("width-flap", "width-wanda-sp"):
        workspace.write_json(tmp_path / name / "pruning.json", {"layers": [1, 2, 3, 4, 5, 6]})
    assert recipe.verdict(made).sentence.endswith(
        "Allowed to cut: PPL+, Taylor+, LLM-Pruner, FLAP, Wanda-sp in blocks 1 to 6."
    )


def test_what_is_below_the_noise_is_called_so(tmp_path):
    found = recipe.verdict(chain_of(tmp_path, jitter=0.3))
    assert "there is no telling which is faster" in found.sentence
    assert "too noisy to tell" in found.findings[3]
    times = [1 + 0.3 * (n - 2) for n in range(5)] * 2
    quarters = statistics.quantiles(times, n=4)
    one = 2 * 1.2533 * (quarters[2] - quarters[0]) / 1.349 / len(times) ** 0.5
    assert found.figures["width-flap"]["noise"] == pytest.approx(2**0.5 * one)


def test_a_width_variant_that_could_not_be_made_is_left_out(tmp_path):
    found = recipe.verdict(chain_of(tmp_path, missing="width-flap"))
    assert "width-flap" not in found.figures
    assert len(found.findings) == 4


def test_every_step_is_a_command_with_options_it_knows(tmp_path):
    made = chain_of(tmp_path)
    steps = recipe.steps(made.spec)
    assert len({s.name for s in steps}) == len(steps)
    for step in steps:
        values = dict(step.values(made) if callable(step.values) else step.values)
        values = {k: str(v) if hasattr(v, "parts") else v for k, v in values.items()}
        entry = commands.get(step.command)
        build(entry.spec_class, {**values, **({"out": "DIR"} if entry.is_run else {})})
    matched = [s for s in steps if s.command == "width"]
    assert [s.values(made)["match"].name for s in matched] == ["depth-ppl"] * 3 + [
        "light-depth-ppl"
    ] * 3
    measured = steps[[s.name for s in steps].index("benchmark")].values(made)["checkpoints"]
    assert measured == ("demo", *(str(tmp_path / n) for n in list(SPEED)[1:]))


def test_a_checkpoint_that_cannot_be_used_is_bad_input_before_any_step(tmp_path, capsys):
    other = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    workspace.write_json(tmp_path / "gpt/config.json", other)
    for name, sentence in (("gone", "There is no folder"), ("gpt", "'gpt2' is not supported")):
        out = tmp_path / f"recipe-{name}"
        asked = ["recipe", "depth-vs-width", str(tmp_path / name), "--out", str(out)]
        assert main(asked) == 2
        assert sentence in capsys.readouterr().err
        assert not (out / "scores").exists()
