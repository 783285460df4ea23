"""Runs through SLURM: a real slurmctld and two slurmd with munge, on loopback."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from run_helpers import all_gone, started, wait_for, wait_until

from core.errors import OptionError, PlaceError
from core.places import place as place_file
from core.runs import jobs, processes
from core.runs.device_lock import DeviceLock
from core.runs.workspace import read_run

ON = {"place": "farm"}
TWO_NODES = {**ON, "nodes": 2, "gpus": 2}


def facts(record) -> dict:
    return read_run(record.path).place_facts()


def job_of(record) -> str:
    return facts(record).get("job", "")


def state_of(cluster, record) -> str:
    return cluster.ask("squeue", "-h", "-t", "all", "-j", job_of(record), "-o", "%T")


def running(record):
    wait_until(lambda: read_run(record.path).progress[0] > 0)
    return read_run(record.path)


def fill(cluster) -> str:
    """Occupy the node of the partition ``short`` and return the job's number."""
    words = ["sbatch", "--parsable", "--exclusive", "--time=5", "--output=/dev/null", "--wrap"]
    number = cluster.ask(*words, "sleep 300")
    wait_until(lambda: cluster.ask("squeue", "-h", "-j", number, "-o", "%T") == "RUNNING")
    return number


def test_a_run_is_a_job_and_waits_for_no_lock_of_ours(slurm, place, tmp_path):
    go = tmp_path / "go"
    lock = DeviceLock("cpu")
    lock.acquire()
    on = {**ON, "gpus": 1, "time": "5"}
    values = {"steps": 2, "go": str(go), "device": "cpu"}
    record = jobs.launch("wait", values, place, on=on)
    assert record.argv[-6:] == ["--on", "farm", "--gpus", "1", "--time", "5"]
    now = running(record)
    assert (now.state, now.device, now.on) == ("running", "cpu", on)
    assert now.status["job"] == job_of(record)
    assert "TRES=cpu=1" in (told := slurm.ask("scontrol", "show", "job", job_of(record)))
    assert "TresPerJob=gres:gpu:1" in told
    assert "TimeLimit=00:05:00" in told
    assert "NumNodes=1 " in told
    go.touch()
    wait_for(record, "done")
    assert (record.path / "result.csv").exists()
    wait_until(lambda: facts(record).get("node") == socket.gethostname())
    lock.release()
    wait_until(lambda: state_of(slurm, record) == "COMPLETED")


def test_processes_of_a_run_are_spread_over_nodes(slurm, place):
    farm = place_file.find("farm", place.root)
    place_file.save({"farm": dataclasses.replace(farm, partition="wide")}, place.root)
    record, pids = started(place, on=TWO_NODES, steps=3)
    done = wait_for(record, "done")
    assert len(set(pids)) == 2
    told = slurm.ask("scontrol", "show", "job", job_of(record))
    assert "NumNodes=2 " in told
    assert "TresPerNode=gres:gpu:1" in told
    assert "on cpu of each of 2 nodes: n1, n2 " in (done.path / ".run" / "log.txt").read_text()
    assert json.loads((done.path / "summary.json").read_text())["shares"] == [
        "slice(0, 2, None)",
        "slice(2, 5, None)",
    ]
    failed = wait_for(started(place, on=TWO_NODES, steps=5, fail="error")[0], "failed")
    assert failed.error == "Process 2 of 2 (node n2, cpu): NaN here."

    record, pids = started(place, on=TWO_NODES, steps=10**6)
    os.kill(pids[1], signal.SIGKILL)
    failed = wait_for(record, "failed")
    assert failed.error.startswith("Process 2 of 2 (node n2, cpu) was ended by SIGKILL.")
    all_gone(pids)

    record, pids = started(place, on=TWO_NODES, steps=10**6)
    os.kill(pids[0], signal.SIGKILL)  # the first: the others end with it
    all_gone(pids)
    wait_until(lambda: state_of(slurm, record) not in ("RUNNING", "COMPLETING"))


def test_processes_must_fill_the_nodes(place):
    place_file.save({"farm": place_file.from_dict("farm", {"kind": "slurm"})}, place.root)
    for options, on, told in (
        ({"processes": 3}, {"nodes": 2}, "--nodes 2: 3 processes do not fill the nodes evenly"),
        ({}, {"nodes": 2}, "--nodes 2: 1 process uses one node. Set --processes to 2"),
    ):
        with pytest.raises(OptionError, match=told):
            jobs.launch("shared", {"device": "cpu", **options}, place, on={**ON, **on})
    with pytest.raises(OptionError, match="wait runs in one process, so it uses one node"):
        jobs.launch("wait", {}, place, on={**ON, "nodes": 2})
    with pytest.raises(PlaceError, match="3 GPUs cannot be split evenly among 2 nodes"):
        jobs.launch("shared", {"processes": 2}, place, on={**ON, "nodes": 2, "gpus": 3})


def test_a_pending_job_shows_its_reason_and_can_be_cancelled(slurm, place):
    holder = fill(slurm)
    record = jobs.launch("wait", {"steps": 10}, place, on=ON)
    wait_until(
        lambda: "Expected start: 2" in read_run(record.path).place_facts().get("waiting", "")
    )
    pending = read_run(record.path)
    assert pending.state == "queued"
    assert (
        f"Job {job_of(record)} waits in SLURM's queue: Resources (the nodes are busy)."
        in (pending.place_facts()["waiting"])
    )
    ended = jobs.cancel(pending)
    assert (ended.state, ended.error) == ("cancelled", "Cancelled.")
    assert state_of(slurm, record) == "CANCELLED"
    slurm.ask("scancel", holder)


def test_a_running_job_is_cancelled_or_killed(slurm, place):
    record = jobs.launch("wait", {"steps": 10**6}, place, on=ON)
    ended = jobs.cancel(running(record))
    assert (ended.state, ended.error) == ("cancelled", "Cancelled.")
    record = jobs.launch("wait", {"steps": 10**6, "deaf": True}, place, on=ON)
    wait_until(lambda: read_run(record.path).state == "running")
    wait_until(lambda: len(read_run(record.path).metrics()) > 1)
    ended = jobs.cancel(read_run(record.path), grace_s=0)
    assert (ended.state, ended.error) == ("cancelled", "Killed.")
    wait_until(lambda: state_of(slurm, record) not in ("RUNNING", "COMPLETING"))


def test_what_sbatch_refuses_is_told_in_its_own_words(slurm, place):
    farm = place_file.find("farm", place.root)
    place_file.save({"farm": farm.with_ask({"gpus": 9})}, place.root)
    failed = wait_for(jobs.launch("wait", {"steps": 1}, place, on=ON), "failed")
    assert "farm: SLURM refused the job: " in failed.error
    assert "Requested node configuration is not available" in failed.error
    assert failed.hint == "Change the place's settings."


def test_a_job_that_dies_fails_with_slurms_words(slurm, place):
    record = jobs.launch("wait", {"steps": 10**6}, place, on=ON)
    os.kill(running(record).status["pid"], signal.SIGKILL)
    failed = wait_for(record, "failed")
    assert failed.error == f"Job {job_of(record)} ended as FAILED."
    assert "restart it" in failed.hint


def test_before_its_time_limit_a_run_stops_and_the_next_job_continues(slurm, place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("resumable", {"steps": 3, "go": str(go)}, place, on=ON)
    running(record)
    first = job_of(record)
    slurm.ask("scancel", "--signal=USR1", "--batch", first)  # what --signal has SLURM send
    wait_until(lambda: job_of(record) not in ("", first))
    wait_until(lambda: read_run(record.path).status.get("job") == job_of(record))
    wait_until(lambda: read_run(record.path).spec["resume"] is True)
    again = read_run(record.path)
    assert again.state == "running"
    assert "Stopped before the time limit of its job" in again.log_tail()
    go.touch()
    wait_for(record, "done")
    wait_until(lambda: state_of(slurm, record) == "COMPLETED")


def test_without_continuing_the_time_limit_ends_a_run_cleanly(slurm, place):
    record = jobs.launch("wait", {"steps": 10**6}, place, on=ON)  # it cannot resume
    running(record)
    slurm.ask("scancel", "--signal=USR1", "--batch", job_of(record))
    ended = wait_for(record, "cancelled")
    assert ended.error == "Stopped before the time limit of its job; completed results were kept."


def test_a_job_that_slurm_starts_again_resumes(slurm, place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("resumable", {"steps": 2, "go": str(go), "deaf": True}, place, on=ON)
    wait_until(lambda: len(read_run(record.path).metrics()) == 2)
    number, pid = job_of(record), read_run(record.path).status["pid"]
    slurm.ask("scontrol", "requeue", number)
    wait_until(lambda: state_of(slurm, record) == "PENDING")
    slurm.ask("scontrol", "update", f"jobid={number}", "StartTime=now")
    wait_until(lambda: read_run(record.path).status.get("pid") not in (None, pid), 60)
    assert job_of(record) == number
    wait_until(lambda: read_run(record.path).spec["resume"] is True)
    go.touch()
    wait_for(record, "done")


def test_processes_of_a_job_share_a_run_and_end_with_it(slurm, place):
    """The notice of the time limit, cancelling and killing each reach the whole run."""
    values = {"processes": 2, "device": "cpu", "steps": 10**6}

    def members(record) -> list[int]:
        file = record.path / "pids.json"
        wait_until(file.exists, 60)
        found = json.loads(file.read_text())["pids"]
        file.unlink()
        assert len(found) == 2
        assert all(processes.start_time(pid) for pid in found)
        return found

    record = jobs.launch("shared", values, place, on=ON)
    first = members(record)
    number = job_of(record)
    assert "CPUs/Task=2" in slurm.ask("scontrol", "show", "job", number)
    slurm.ask("scancel", "--signal=USR1", "--batch", number)  # what --signal has SLURM send
    wait_until(lambda: job_of(record) not in ("", number))
    second = members(record)
    all_gone(first)
    again = read_run(record.path)
    assert again.spec["resume"] is True
    assert "Stopped before the time limit of its job" in again.log_tail()
    ended = jobs.cancel(running(record))
    assert (ended.state, ended.error) == ("cancelled", "Cancelled.")
    all_gone(second)

    record = jobs.launch("shared", {**values, "pause": 600.0}, place, on=ON)
    third = members(record)
    ended = jobs.cancel(read_run(record.path), grace_s=0)
    assert (ended.state, ended.error) == ("cancelled", "Killed.")
    all_gone(third)


def test_a_restart_follows_a_job_that_goes_on(slurm, place, tmp_path):
    holder = fill(slurm)
    record = jobs.launch("wait", {"steps": 1}, place, on=ON)
    wait_until(lambda: job_of(record) and read_run(record.path).state == "queued")
    number = job_of(record)
    follower = json.loads((record.path / ".run/launch.json").read_text())["pid"]
    os.killpg(follower, signal.SIGKILL)
    again = jobs.restart(wait_for(record, "lost"))
    wait_until(lambda: "waiting" in read_run(again.path).place_facts())
    assert job_of(again) == number
    slurm.ask("scancel", holder)
    wait_for(record, "done")


def test_a_place_is_tested_with_sbatch(slurm, place):
    words = [sys.executable, "-m", "core", "places", "test", "farm"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout
    assert "slurm-wlm" in done.stdout
    farm = place_file.from_dict("farm", {"kind": "slurm", "partition": "nowhere"})
    place_file.save({"farm": farm}, place.root)
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "nvalid partition" in done.stderr


def test_jobs_are_submitted_over_ssh(slurm, place, sshd, tmp_path):
    there = tmp_path / "there"
    farm = sshd.place("farm", there, kind="slurm", partition="wide")
    more = {**farm.environment, **slurm.env}
    place_file.save({"farm": sshd.place("farm", there, kind="slurm", partition="wide",
                                         environment=more)}, place.root)  # fmt: skip
    record = jobs.launch("wait", {"steps": 3, "pause": 0.2}, place, on=ON)
    wait_until(lambda: job_of(record))
    done = wait_for(record, "done")
    assert (record.path / "result.csv").exists()
    assert (there / record.id / ".run/job.sh").stat().st_mode & 0o777 == 0o600
    assert done.place_facts()["job"]
    assert len(done.metrics()) == 3


def test_a_machine_without_slurm_is_one_sentence(place, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    values = {"kind": "slurm", "python": sys.executable}
    place_file.save({"farm": place_file.from_dict("farm", values)}, place.root)
    (tmp_path / "env").symlink_to("/usr/bin/env")
    failed = wait_for(jobs.launch("wait", {"steps": 1}, place, on=ON), "failed")
    assert "sbatch is not installed on the machine that submits jobs" in failed.error


def test_a_recipe_continues_in_the_next_job(slurm, place):
    values = {"name": "importance", "checkpoint": "demo", "device": "cpu"}
    record = jobs.launch("recipe", values, place, on=ON)
    wait_until(lambda: any(r.parent and r.state == "running" for r in place.runs()), 60)
    first = job_of(record)
    slurm.ask("scancel", "--signal=USR1", "--batch", first)
    wait_until(lambda: job_of(record) not in ("", first), 60)
    done = wait_for(record, "done", seconds=150)
    assert "Stopped before the time limit" in done.log_tail(200)
    assert {r.state for r in place.runs() if r.parent} == {"done"}
