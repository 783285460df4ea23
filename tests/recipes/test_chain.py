"""A recipe's steps are real runs: done once, taken up again, cancelled and blamed by name."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest
from run_helpers import kill, wait_for, wait_until

from core.errors import Cancelled, HandedOver, RunError
from core.importance.agreement import spearman
from core.recipes.chain import Chain, Step
from core.recipes.command import RecipeSpec
from core.runs import elements, jobs, processes, warm
from core.runs.device_lock import DeviceLock
from core.runs.progress import SILENT, Progress
from core.runs.workspace import BOOKKEEPING, STARTING_GRACE_S, read_json, read_run, write_json

WAIT = {"steps": 2, "pause": 0.01}


class Heard(Progress):
    """Keeps what it is told; may be asked to stop."""

    def __init__(self):
        self.steps, self.stop = [], False

    def step(self, done, total, message="", **more):
        self.steps.append((done, total, message))
        self.check_cancel()

    def check_cancel(self):
        if self.stop:
            raise Cancelled("Cancelled on request.", "")


@contextlib.contextmanager
def beside(work):
    """Do ``work`` in a thread while the body runs."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def chain(place, progress=SILENT, name="importance"):
    folder = place.root / "recipe-1"
    spec = RecipeSpec(name=name, out=str(folder))
    jobs.save_spec(folder, jobs.commands.get("recipe"), spec)
    return Chain(spec, folder, progress)


def test_steps_are_runs_in_the_recipe_and_done_once(place):
    heard = Heard()
    made = chain(place, heard)
    later = []

    def second(made):
        with (made.dir("one") / "result.csv").open() as handle:
            later.append(list(csv.DictReader(handle)))
        return WAIT

    steps = [Step("one", "wait", WAIT), Step("two", "wait", second)]
    made.run(steps)
    assert [row["step"] for row in later[0]] == ["0", "1"]
    done, total = zip(*[(d, t) for d, t, _ in heard.steps], strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1] == 200
    first = read_run(made.dir("one"))
    assert first.state == "done"
    assert {r.id for r in place.runs()} == {"recipe-1", "recipe-1/one", "recipe-1/two"}
    assert place.find("recipe-1/two").parent == "recipe-1"

    again = chain(place)
    again.run(steps)
    assert read_run(made.dir("one")).status["pid"] == first.status["pid"]  # not run again
    again.run([Step("one", "wait", {**WAIT, "steps": 3})])
    assert read_run(made.dir("one")).status["pid"] != first.status["pid"]  # other options


def test_computing_steps_are_forked_from_one_process(place, monkeypatch):
    monkeypatch.setattr(warm, "LIBRARIES", ())
    made = chain(place)
    work = {**WAIT, "device": "cpu"}
    bad = {**work, "fail": "crash"}
    steps = [Step("one", "compute", work), Step("other", "wait", WAIT), Step("two", "compute", bad)]
    with pytest.raises(RunError, match="Step two failed: .*seven by zero"):
        made.run(steps)
    logs = [read_run(made.dir(n)).log_tail() for n in ("one", "two")]
    parents = {re.search(r"parent: (\d+)", log)[1] for log in logs}
    assert len(parents) == 1
    assert parents != {str(os.getpid())}
    wait_until(lambda: processes.start_time(int(*parents)) is None)  # it ends with the recipe


def test_a_failed_step_is_named_and_an_optional_one_is_passed_over(place):
    made = chain(place)
    bad = {**WAIT, "fail": "error"}
    with pytest.raises(RunError, match="Step bad failed: The text has 3 tokens"):
        made.run([Step("bad", "wait", bad), Step("never", "wait", WAIT)])
    assert not made.dir("never").exists()
    made.run([Step("bad", "wait", bad, optional=True), Step("then", "wait", WAIT)])
    assert "3 tokens" in made.failed["bad"]
    assert read_run(made.dir("then")).state == "done"


def test_what_needs_a_failed_step_is_left_out_and_not_called_a_failure(place):
    made = chain(place)
    made.run([
        Step("bad", "wait", {**WAIT, "fail": "error"}, optional=True),
        Step("on-bad", "wait", WAIT, needs="bad"),
        Step("on-that", "wait", WAIT, needs="on-bad"),
        Step("then", "wait", WAIT),
        Step("on-then", "wait", WAIT, needs="then"),
    ])  # fmt: skip
    assert list(made.failed) == ["bad"]
    assert made.skipped == {"on-bad", "on-that"}
    assert not made.dir("on-bad").exists()
    assert not made.dir("on-that").exists()
    assert read_run(made.dir("on-then")).state == "done"


def test_cancelling_the_recipe_cancels_its_step(place, tmp_path):
    heard = Heard()
    made = chain(place, heard)
    step = Step("slow", "wait", {**WAIT, "go": str(tmp_path / "never")})

    def stop_it():
        wait_until(lambda: read_run(made.dir("slow")))
        heard.stop = True

    with beside(stop_it), pytest.raises(Cancelled):
        made.run([step])
    assert read_run(made.dir("slow")).state == "cancelled"


@pytest.mark.parametrize(("option", "value", "again"), [("deaf", None, False), ("steps", 9, True)])
def test_a_step_from_before_an_option_existed_is_not_repeated(place, option, value, again):
    made = chain(place)
    made.run([Step("one", "wait", WAIT)])
    path = made.dir("one") / BOOKKEEPING / "spec.json"
    record = read_json(path)
    before = {**record["spec"]}
    before.pop(option) if value is None else before.update({option: value})
    write_json(path, {**record, "spec": before})
    first = read_run(made.dir("one")).status["created"]
    chain(place).run([Step("one", "wait", WAIT)])
    assert (read_run(made.dir("one")).status["created"] != first) is again


def test_a_step_found_live_that_turns_out_lost_is_started_again(place):
    """The recipe was killed between announcing its step and starting the step's process."""

    class Announced(Heard):
        """Lets the announced run grow old once the recipe has been seen to wait for it."""

        def step(self, done, total, message="", **more):
            super().step(done, total, message, **more)
            if message == "one: starting" and (status := read_json(path)) and "pid" not in status:
                write_json(path, {**status, "created": time.time() - 2 * STARTING_GRACE_S})

    step = Step("one", "wait", WAIT)
    chain(place).run([step])
    heard = Announced()
    made = chain(place, heard)
    path = made.dir("one") / BOOKKEEPING / "status.json"
    path.with_name("launch.json").unlink()
    start = {"state": "starting", "host": read_json(path)["host"]}
    write_json(path, {**start, "created": time.time() + 3600})
    made.run([step])
    assert "one: starting" in [message for _, _, message in heard.steps]
    assert read_run(made.dir("one")).state == "done"


def test_a_step_lost_under_the_recipe_s_eyes_fails_it(place, tmp_path):
    made = chain(place)

    def kill_it():
        wait_until(lambda: read_run(made.dir("one")))
        kill(wait_for(read_run(made.dir("one")), "running"))

    with beside(kill_it), pytest.raises(RunError, match="Step one lost"):
        made.run([Step("one", "wait", {**WAIT, "go": str(tmp_path / "never")})])


@pytest.mark.usefixtures("prepared_runs")
def test_a_killed_recipe_goes_on_with_the_step_that_still_runs(place, tiny_gqa):
    """The real command in a process of its own; kill -9, then start it again."""
    text = "Tom has a red ball. " * 400
    source = place.root / "text.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join([text] * 12))
    options = {"name": "importance", "checkpoint": str(tiny_gqa), "data": str(source)}
    record = jobs.launch("recipe", options, place)
    wait_until(lambda: read_run(record.path / "scores"))
    kill(read_run(record.path))
    assert wait_for(record, "lost")
    pid = read_run(record.path / "scores").status.get("pid")
    done = wait_for(jobs.restart(read_run(record.path)), "done", "failed", seconds=90)
    assert done.state == "done", done.log_tail()
    scores = read_run(record.path / "scores")
    assert scores.state == "done"
    assert pid in (None, scores.status["pid"])
    place.delete(done)
    assert not record.path.exists()
    assert place.runs() == []


def test_spearman_is_the_rank_correlation_of_pandas():
    a = [3.0, 1.0, 2.0, 2.0, 8.5]
    b = [0.1, 0.4, 0.4, 0.3, 0.9]
    assert spearman(a, b) == pytest.approx(pd.Series(a).corr(pd.Series(b), method="spearman"))
    assert spearman(a, a) == pytest.approx(1.0)
    assert spearman(a, [1.0] * 5) == 0.0


@pytest.mark.parametrize("again", [False, True])
def test_no_step_outlives_its_recipe(place, tmp_path, monkeypatch, again):
    """Whatever ends the recipe; a second Ctrl-C while a deaf step may still stop kills it."""

    class Broken(Heard):
        def step(self, done, total, message="", **more):
            if (record := read_run(made.dir("slow"))) and "work begins" in record.log_tail():
                raise OSError(5, "the terminal is gone")

    ask = jobs.request_cancel

    def impatient(record):
        ask(record)
        monkeypatch.setattr(jobs, "request_cancel", ask)
        raise KeyboardInterrupt

    made = chain(place, Broken())
    if again:
        monkeypatch.setattr(jobs, "request_cancel", impatient)
    with pytest.raises(KeyboardInterrupt if again else OSError):
        made.run([Step("slow", "wait", {**WAIT, "go": str(tmp_path / "never"), "deaf": again})])
    record = read_run(made.dir("slow"))
    assert record.state == "cancelled"
    pid, began = record.status["pid"], record.status["pid_started"]
    wait_until(lambda: not processes.is_alive(pid, began))


@pytest.mark.parametrize("command", ["wait", "compute"])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_recipe_stops_its_step(place, tmp_path, number, command):
    """The runner of recipes in a process of its own, with a step that would never end."""
    code = (
        "import sys\n"
        "from core import commands\n"
        "from core.recipes import command as recipe\n"
        "from core.recipes.chain import Chain, Step\n"
        "from core.recipes.spec import RecipeSpec\n"
        "from core.runs import warm\n"
        "from core.runs.run import execute\n"
        "out, go, name = sys.argv[1:]\n"
        "warm.LIBRARIES = ()\n"
        "def work(spec, run):\n"
        "    step = Step('slow', name, {'steps': 1, 'go': go, 'device': 'cpu'})\n"
        "    Chain(spec, run.dir, run.progress).run([step])\n"
        "recipe.run, recipe.check = work, lambda spec: None\n"
        "sys.exit(execute(commands.get('recipe'), RecipeSpec(name='importance', out=out)))\n"
    )
    out = tmp_path / "recipe"
    argv = [sys.executable, "-c", code, str(out), str(tmp_path / "never"), command]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: (step := read_run(out / "slow")) and step.device == "cpu")
    os.kill(process.pid, number)
    assert process.wait(30) == 130
    assert read_run(out).state == "cancelled"
    step = read_run(out / "slow")
    assert step.state == "cancelled"
    wait_until(lambda: not processes.is_alive(step.status["pid"], step.status["pid_started"]))
    wait_until(lambda: DeviceLock("cpu").holder() is None)


def test_independent_steps_are_handed_over_and_what_they_left_is_taken(place, monkeypatch):
    made = chain(place)
    good, bad = Step("good", "wait", WAIT, group="all"), {**WAIT, "fail": "error"}
    steps = [Step("before", "wait", WAIT), good,
             Step("bad", "wait", bad, optional=True, group="all"),
             Step("third", "resumable", WAIT, optional=True, group="all"),
             Step("after", "wait", WAIT)]  # fmt: skip
    monkeypatch.setenv(elements.WANTED, "1")
    with pytest.raises(HandedOver, match="3 independent steps become one job array"):
        made.run(steps)
    assert read_run(made.dir("before")).state == "done"
    handed = elements.read(made.folder / BOOKKEEPING)
    assert handed.names == ("good", "bad", "third")
    assert handed.elements[1].words[-2:] == ("--fail", "error")
    for element in handed.elements[:2]:
        words = [sys.executable, "-m", "core", element.command, *element.words]
        subprocess.run(words, check=False, env=processes.environment())
    with pytest.raises(HandedOver, match="2 independent"):  # one that is done is not handed over
        made.run(steps)
    left = elements.read(made.folder / BOOKKEEPING)
    left.noted(made.folder / BOOKKEEPING, ended=True)
    made.run(steps)
    assert "3 tokens" in made.failed["bad"]
    assert read_run(made.dir("third")).state == "done"  # it had never begun
    assert read_run(made.dir("after")).state == "done"
    monkeypatch.delenv(elements.WANTED)
    again = chain(place)
    again.run(steps)  # here, steps run one after another, failed ones again
    assert "3 tokens" in again.failed["bad"]


def test_a_damaged_list_of_elements_is_none(place, tmp_path):
    for text in ("", "[1]", '{"elements": [{"name": 3}]}', '{"elements": 7, "indices": []}'):
        (tmp_path / elements.FILE).write_text(text)
        assert elements.read(tmp_path) is None
