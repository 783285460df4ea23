"""A recipe's independent steps as one job array, on a real slurmctld."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from run_helpers import wait_for, wait_until

from core.places import place as place_file
from core.runs import elements, jobs, workspace
from core.runs.workspace import BOOKKEEPING, read_run

MACHINERY = Path(__file__).parents[1] / "machinery"
ON = {"place": "farm"}


@pytest.fixture
def farm(slurm, place):
    """A cluster that runs two steps of a recipe at once."""
    environment = {"PYTHONPATH": str(MACHINERY), "DEPTHCUT_TEST_RECIPES": "1"}
    values = {"kind": "slurm", "python": sys.executable, "requeue": 2, "at_once": 2,
              "environment": environment}  # fmt: skip
    place_file.save({"farm": place_file.from_dict("farm", values)}, place.root)
    return slurm


def launch(place, *grid):
    """Launch the recipe whose independent steps are ``NAME|OPTION=VALUE``."""
    values = {"name": "sweep", "checkpoint": "demo", "grid": grid, "device": "cpu"}
    return jobs.launch("recipe", values, place, on=ON)


def element(record, name):
    return read_run(record.path / name)


def array_of(record):
    found = elements.read(record.path / BOOKKEEPING)
    return found.job if found else ""


def submitted(cluster, record) -> list[str]:
    """Return the numbers of all jobs and arrays that were ever submitted for a recipe."""
    name = f"--name=depthcut-{record.path.name}"
    told = cluster.ask("squeue", "-h", "-t", "all", name, "-o", "%F")
    return sorted(set(told.split()), key=int)


def state_in(cluster, number):
    return cluster.ask("squeue", "-h", "-t", "all", "-r", "-j", number, "-o", "%T")


def follower(record) -> int:
    return json.loads((record.path / ".run/launch.json").read_text())["pid"]


def log_of(record) -> str:
    return read_run(record.path).log_tail(400)


def test_independent_steps_are_one_array_of_which_each_may_fail(farm, place, tmp_path):
    go = tmp_path / "go"
    record = launch(place, f"a|go={go}", f"b|go={go}", "c|fail=error", "d", "e|steps=1")
    wait_until(lambda: (r := element(record, "b")) and r.progress[0] > 0, 60)
    array = array_of(record)
    wait_until(lambda: "JobArrayTaskLimit" in element(record, "c").place_facts().get("waiting", ""))
    waiting = element(record, "c")
    assert waiting.state == "queued"
    assert "as many steps run as the place allows at once" in waiting.place_facts()["waiting"]
    wait_until(
        lambda: read_run(record.path).progress[2] == "0 of 5 steps done, 2 running, 3 waiting"
    )
    assert read_run(record.path).state == "running"
    assert "ArrayTaskThrottle=2" in farm.ask("scontrol", "show", "job", array)
    jobs.request_cancel(element(record, "e"))  # one that has not started
    cancelled = wait_for(element(record, "e"), "cancelled")
    assert cancelled.error == "Cancelled."
    go.touch()
    done = wait_for(record, "done", seconds=60)
    assert (record.path / "fan.csv").read_text().split() == ["name", "a", "b", "d"]
    states = {n: element(record, n).state for n in ("first", *"abcde", "last")}
    assert states == {**dict.fromkeys(("first", *"abd", "last"), "done"), "c": "failed",
                      "e": "cancelled"}  # fmt: skip
    assert element(record, "a").status["job"] != element(record, "b").status["job"]
    failed = json.loads((record.path / "summary.json").read_text())["failed"]
    assert "The text has 3 tokens" in failed["c"]
    assert "Step e cancelled" in failed["e"]
    assert len(submitted(farm, record)) == 3  # what comes before, the array, what comes after
    assert "5 independent steps become one job array." in done.log_tail(400)


def test_a_killed_coordinator_finds_its_array_again(farm, place, tmp_path):
    go = tmp_path / "go"
    record = launch(place, f"a|go={go}", f"b|go={go}", "c")
    wait_until(lambda: (r := element(record, "b")) and r.progress[0] > 0, 60)
    array = array_of(record)
    book = record.path / BOOKKEEPING
    os.killpg(follower(record), signal.SIGKILL)
    wait_for(record, "lost")
    # as if it had been killed after sbatch, and before it noted the number of the job
    elements.read(book).noted(book, job="", rounds=0)
    again = jobs.restart(read_run(record.path))
    wait_until(lambda: array_of(again) == array)
    wait_until(lambda: "running" in read_run(record.path).progress[2])
    assert len(submitted(farm, record)) == 2
    go.touch()
    wait_for(record, "done", seconds=60)
    assert len(submitted(farm, record)) == 3
    assert {element(record, n).state for n in "abc"} == {"done"}


def test_an_array_is_cancelled_and_restarted_with_what_is_left(farm, place, tmp_path):
    go = tmp_path / "go"
    record = launch(place, "a|steps=1", f"b|go={go}", f"c|go={go}", f"d|go={go}")
    wait_until(lambda: (r := element(record, "c")) and r.progress[0] > 0, 60)
    array = array_of(record)
    jobs.request_cancel(read_run(record.path))
    ended = wait_for(record, "cancelled")
    assert ended.error == "Cancelled."
    assert [element(record, n).state for n in "abcd"] == ["done", *["cancelled"] * 3]
    wait_until(lambda: set(state_in(farm, array).split()) <= {"COMPLETED", "CANCELLED", "FAILED"})
    jobs.restart(ended)
    wait_until(lambda: array_of(record) not in ("", array), 60)
    left = elements.read(record.path / BOOKKEEPING)
    assert left.names == ("b", "c", "d")
    wait_until(lambda: element(record, "c").progress[0] > 0, 60)
    jobs.kill_now(read_run(record.path))
    killed = wait_for(record, "cancelled")
    assert killed.error == "Killed."
    wait_until(lambda: not farm.ask("squeue", "-h"))
    assert {element(record, n).state for n in "bcd"} == {"cancelled"}


def test_single_elements_are_continued_and_requeued(farm, place, tmp_path):
    go = tmp_path / "go"
    record = launch(place, f"a|go={go}", f"b|go={go}|deaf=true")
    wait_until(lambda: (r := element(record, "a")) and r.progress[0] > 0, 60)
    wait_until(lambda: (r := element(record, "b")) and len(r.metrics()) == 5, 60)
    array, pid = array_of(record), element(record, "b").status["pid"]
    farm.ask("scontrol", "requeue", f"{array}_1")
    wait_until(lambda: "PENDING" in state_in(farm, f"{array}_1"))
    number = farm.ask("squeue", "-h", "-r", "-j", f"{array}_1", "-o", "%A")
    farm.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
    farm.ask("scancel", "--signal=USR1", "--batch", f"{array}_0")  # its time limit is near
    wait_until(lambda: element(record, "b").status.get("pid") not in (None, pid), 60)
    wait_until(lambda: element(record, "b").spec["resume"] is True)  # written after the process
    wait_until(lambda: element(record, "a").status.get("continues") is True)
    go.touch()
    wait_until(lambda: array_of(record) not in ("", array), 60)
    assert elements.read(record.path / BOOKKEEPING).indices == (0,)
    wait_for(record, "done", seconds=60)
    assert element(record, "a").spec["resume"] is True
    assert "Stopped before the time limit of its job" in element(record, "a").log_tail()
    assert {element(record, n).state for n in "ab"} == {"done"}


def test_one_at_once_is_one_job(farm, place):
    values = place_file.find("farm", place.root).to_dict()
    place_file.save({"farm": place_file.from_dict("farm", {**values, "at_once": 1})}, place.root)
    record = launch(place, "a|steps=1", "b|steps=1")
    wait_for(record, "done", seconds=60)
    assert len(submitted(farm, record)) == 1
    assert not workspace.read_json(record.path / BOOKKEEPING / elements.FILE)


def test_an_array_is_submitted_over_ssh(slurm, place, sshd, tmp_path):
    there = tmp_path / "there"
    plain = sshd.place("farm", there, kind="slurm").environment
    environment = {**plain, **slurm.env, "DEPTHCUT_TEST_RECIPES": "1"}
    far = sshd.place("farm", there, kind="slurm", partition="wide", environment=environment)
    place_file.save({"farm": far}, place.root)
    record = launch(place, "a|steps=2", "b|fail=error", "c|steps=1")
    wait_until(lambda: "of 3 steps done" in read_run(record.path).progress[2], 60)
    wait_for(record, "done", seconds=90)
    assert (record.path / "fan.csv").read_text().split() == ["name", "a", "c"]
    assert (record.path / "a" / "result.csv").exists()
    assert [element(record, n).state for n in "abc"] == ["done", "failed", "done"]
    assert len(submitted(slurm, record)) == 3
