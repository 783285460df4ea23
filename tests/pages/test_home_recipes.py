"""The home page offers recipes, starts one as a run, and shows its verdict."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from streamlit.testing.v1 import AppTest

from core import recipes
from core.checkpoint import headers
from core.recipes import earlier
from core.recipes.command import RecipeSpec
from core.runs import jobs, workspace
from core.study.names import names as names_of
from core.ui.recipes import OFFERED

APP = str(Path(__file__).parents[2] / "app.py")


def home(folder):
    page = AppTest.from_file(APP, default_timeout=60)
    page.query_params["model"] = str(folder)
    page.run()
    assert not page.exception, page.exception
    return page


def test_every_recipe_has_steps_and_a_description():
    for name in recipes.NAMES:
        recipe = recipes.get(name)
        assert recipe.name == name
        assert recipe.title
        assert recipe.about[-1] in ".?"
        found = [s.name for s in recipe.steps(RecipeSpec(name=name, out="DIR"))]
        assert len(found) == len(set(found)) > 0


def test_a_recipe_starts_as_a_run_with_the_command_shown(here, tiny_gqa):
    page = home(tiny_gqa)
    assert any("recipe importance" in code.value for code in page.code)
    button = next(b for b in page.button if b.label == "Run the recipe")
    button.click().run()
    (record,) = here.runs("recipe")
    assert record.spec["name"] == OFFERED[0]
    assert record.spec["checkpoint"] == str(tiny_gqa)


def times(page):
    return [c.value for c in page.caption if "this recipe" in c.value]


def test_the_time_of_the_last_run_is_told(here, tiny_gqa):
    assert times(home(tiny_gqa)) == ["Time: unknown until this recipe has finished on this device."]
    folder = here.root / "recipe-1"
    spec = RecipeSpec(name="importance", checkpoint=str(tiny_gqa), out=str(folder))
    jobs.save_spec(folder, jobs.commands.get("recipe"), spec)
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    steps = [{"name": "scores", "seconds": 150.0}, {"name": "pruned", "seconds": 50.0}]
    workspace.write_json(folder / "summary.json", {"verdict": "Done.", "steps": steps})
    name = names_of(here.runs()).checkpoint(str(tiny_gqa))
    assert times(home(tiny_gqa)) == [f"The last run of this recipe took 3 min 20 s on {name}."]
    parameters = headers.inspect(tiny_gqa).parameters
    asked = RecipeSpec(name="importance", steps=7, out="DIR")
    double, far = earlier.nearest(asked, 2 * parameters), earlier.nearest(asked, 5 * parameters)
    assert (double.scaled, double.is_same_size, double.is_same_work) == (400.0, False, False)
    assert (far.seconds, far.scaled, far.is_whole) == (200.0, None, True)
    other = dataclasses.replace(asked, name="restore")
    assert earlier.nearest(other, parameters) is None
    spec = dataclasses.replace(spec, checkpoint="demo", limit=7)
    jobs.save_spec(folder, jobs.commands.get("recipe"), spec)
    assert times(home(tiny_gqa)) == [
        "Time: unknown for a model of this size. The last run of this recipe, with other options, "
        "took 3 min 20 s on demo."
    ]


def test_a_verdict_is_shown_with_its_findings(here, tiny_gqa):
    spec = RecipeSpec(name="importance", checkpoint=str(tiny_gqa), out=str(here.root / "recipe-1"))
    folder = here.root / "recipe-1"
    jobs.save_spec(folder, jobs.commands.get("recipe"), spec)
    workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
    summary = {"verdict": "Block 2 can go.", "findings": ["It is cheap."], "failed": {"w": "no"}}
    workspace.write_json(folder / "summary.json", summary)
    workspace.write_csv(
        folder / "table.csv", ("model", "ppl", "none"), [("a", 2.5, None), ("b", None, None)]
    )
    page = home(tiny_gqa)
    (table,) = (t.value for t in page.dataframe if "ppl" in t.value)
    assert list(table.columns) == ["model", "ppl"]
    assert table["ppl"].tolist()[0] == 2.5
    assert "Block 2 can go." in [s.value for s in page.success]
    assert "- It is cheap." in [m.value for m in page.markdown]
    assert any("w failed: no" in w.value for w in page.warning)


def test_the_home_page_checks_this_machine(here, tiny_gqa, monkeypatch):
    from core.doctor.results import Diagnosis, Verdict
    from core.runs import devices
    from core.ui import runs

    started = []
    monkeypatch.setattr(runs, "launch_once", lambda *asked: started.append(asked))
    gpu = devices.Unusable("NVIDIA *H100*", "the driver is 535.1", "Update the driver.")
    monkeypatch.setattr(devices, "unusable", lambda **_: (gpu,))
    page = home(tiny_gqa)
    assert any(code.value == "python -m core doctor" for code in page.code)
    sidebar = [warning.value for warning in page.sidebar.warning]
    assert sidebar == [r"NVIDIA \*H100\* is present but cannot be used: the driver is 535.1."]
    assert any(code.value == "Update the driver." for code in page.sidebar.code)
    button = next(b for b in page.button if b.label == "Check this machine")
    button.click().run()
    assert started == [("doctor", {"device": "auto"})]
    folder = here.new_dir("doctor")
    (folder / ".run").mkdir(parents=True, exist_ok=True)
    workspace.write_json(folder / ".run" / "spec.json", {"command": "doctor", "spec": {}})
    workspace.write_json(folder / ".run" / "status.json", {"state": "failed", "created": 1.0})
    made = Diagnosis(
        verdict="cuda:0 does not pass: Benchmark. 9 checks agree.",
        checks=(Verdict(name="benchmark", title="Benchmark", state="disagrees", text="x | *y*"),),
    )
    workspace.write_json(folder / Diagnosis.FILE, made.to_dict())
    page = home(tiny_gqa)
    assert [e.value for e in page.error] == [made.verdict]
    assert page.dataframe[0].value["what was found"].tolist() == ["x | *y*"]
