"""Runs on another machine: this one, over a real sshd on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import wait_for, wait_until

from core.places import place as place_file
from core.runs import jobs, processes
from core.runs.workspace import read_run

ON = {"place": "box"}


def there_of(box, record) -> Path:
    return Path(box.folder) / record.id


def remote(box, record):
    return read_run(there_of(box, record))


def test_a_run_is_carried_out_there_and_its_results_come_back(box, place, tmp_path):
    go = tmp_path / "go"
    values = {"steps": 3, "pause": 0.05, "go": str(go)}
    record = jobs.launch_once("resumable", values, place, on=ON)
    assert record.state == "starting"
    assert record.place == "box"
    assert record.argv[-2:] == ["--on", "box"]
    assert jobs.launch_once("resumable", values, place, on=ON).id == record.id
    wait_until(lambda: read_run(record.path).progress == (3, 3, "step 3"))
    running = read_run(record.path)
    assert running.state == "running"
    assert [m["step"] for m in running.metrics()] == [1, 2, 3]
    assert running.place_facts()["folder"] == str(there_of(box, record))
    assert not (record.path / "result.csv").exists()
    go.touch()
    done = wait_for(record, "done")
    assert (record.path / "result.csv").read_text() == "step,value\n0,\n1,\n2,\n"
    assert sorted(p.name for p in record.path.iterdir()) == [".run", "result.csv"]
    assert done.status["files"] == ["result.csv"]
    assert done.log_tail().count("work begins") == 1
    assert done.on == {"place": "box"}
    assert remote(box, record).state == "done"
    assert done.place_facts()["folder"] == str(there_of(box, record))


def test_a_broken_connection_and_a_stopped_server_are_waited_out(box, place, sshd, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("wait", {"steps": 2, "go": str(go)}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] == 2)
    pid = remote(box, record).status["pid"]
    children = sshd.children()
    sshd.stop()
    for child in children:
        os.kill(child, signal.SIGKILL)
    # an ssh that dies may say nothing: that the connection broke is then all that is known at first
    wait_until(
        lambda: "cannot be reached" in read_run(record.path).place_facts().get("trouble", "")
    )
    assert read_run(record.path).state == "running"
    go.touch()
    wait_until(lambda: remote(box, record).state == "done")  # it did not need us
    assert remote(box, record).status["pid"] == pid
    sshd.start()
    done = wait_for(record, "done")
    assert "trouble" not in done.place_facts()
    assert (record.path / "result.csv").exists()


def test_cancelling_reaches_the_process_there(box, place):
    record = jobs.launch("wait", {"steps": 10**6}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] > 0)
    there = remote(box, record)
    ended = jobs.cancel(read_run(record.path))
    assert (ended.state, ended.error) == ("cancelled", "Cancelled.")
    assert not processes.is_alive(there.status["pid"], there.status["pid_started"])
    assert not processes.is_alive(record.status.get("pid"), record.status.get("pid_started"))


def test_a_run_that_does_not_listen_is_killed_there(box, place):
    record = jobs.launch("wait", {"steps": 10**6, "deaf": True}, place, on=ON)
    wait_until(lambda: (r := remote(box, record)) and r.state == "running")
    there = remote(box, record)
    ended = jobs.cancel(read_run(record.path), grace_s=0)
    assert (ended.state, ended.error) == ("cancelled", "Killed.")
    wait_until(lambda: not processes.is_alive(there.status["pid"], there.status["pid_started"]))


def test_what_went_wrong_there_is_shown_here(box, place):
    record = jobs.launch("wait", {"steps": 1, "fail": "error"}, place, on=ON)
    failed = wait_for(record, "failed")
    assert failed.error == "The text has 3 tokens, 10 are needed."
    assert failed.hint == "Give a longer text."


def test_a_process_that_is_killed_there_fails_here(box, place):
    record = jobs.launch("wait", {"steps": 10**6}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] > 0)
    os.kill(remote(box, record).status["pid"], signal.SIGKILL)
    failed = wait_for(record, "failed")
    assert failed.error == "The process at box exited without recording a result."


def test_a_restart_follows_what_is_still_going_on(box, place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("resumable", {"steps": 2, "go": str(go)}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] == 2)
    pid = remote(box, record).status["pid"]
    os.killpg(read_run(record.path).status["pid"], signal.SIGKILL)
    lost = wait_for(record, "lost")
    assert "followed this run at box" in lost.error
    assert "restart it to follow it again" in lost.hint
    again = jobs.restart(lost)
    wait_until(lambda: read_run(record.path).state == "running")
    assert remote(box, again).status["pid"] == pid
    go.touch()
    done = wait_for(again, "done")
    assert done.log_tail().count("work begins") == 1
    assert len(done.metrics()) == 2


def test_a_cancelled_run_is_resumed_there(box, place):
    record = jobs.launch("resumable", {"steps": 10**6}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] > 0)
    cancelled = jobs.cancel(read_run(record.path))
    again = jobs.restart(cancelled)
    wait_until(lambda: read_run(record.path).state == "running")
    assert remote(box, again).spec["resume"] is True
    jobs.cancel(read_run(record.path), grace_s=0)


def test_inputs_are_sent_once_and_results_name_them_as_they_are_here(box, place, tiny_gqa):
    first = jobs.launch("prune", {"checkpoint": str(tiny_gqa), "drop": (2,)}, place, on=ON)
    done = wait_for(first, "done", seconds=90)
    cut = json.loads((first.path / "pruning.json").read_text())
    assert cut["source"] == str(tiny_gqa)
    sent = list(Path(box.folder).glob("inputs/*/*/config.json"))
    assert len(sent) == 1
    before = sent[0].stat().st_mtime_ns, sent[0].stat().st_ino
    second = jobs.launch("prune", {"checkpoint": first.id, "drop": (1,)}, place, on=ON)
    wait_for(second, "done", seconds=90)
    assert remote(box, second).spec["checkpoint"] == str(there_of(box, first))
    third = jobs.launch("prune", {"checkpoint": str(tiny_gqa), "drop": (1,)}, place, on=ON)
    wait_for(third, "done", seconds=90)
    assert (sent[0].stat().st_mtime_ns, sent[0].stat().st_ino) == before
    assert "copying" not in read_run(second.path).log_tail().lower().replace("copying results", "")
    here = jobs.launch("prune", {"checkpoint": str(tiny_gqa), "drop": (2,)}, place)
    wait_for(here, "done", seconds=90)
    same = [(r.path / "model.safetensors").read_bytes() for r in (here, done)]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"python": "/nowhere/python"}, "There is no Python at box as /nowhere/python."),
        ({"port": 1}, "box (127.0.0.1, port 1) cannot be reached: "),
        ({"host": "no-such-host.invalid"}, "No machine named no-such-host.invalid is known."),
        ({"known_hosts": "/dev/null"}, "is not known here."),
        ({"identity": "/dev/null"}, "did not accept the login"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_sentence(change, sentence, box, place, sshd):
    place_file.save({"box": sshd.place("box", Path(box.folder), **change)}, place.root)
    record = jobs.launch("wait", {"steps": 1}, place, on=ON)
    failed = wait_for(record, "failed")
    assert sentence in failed.error
    assert failed.hint


def test_a_changed_host_key_is_refused(box, place, sshd):
    sshd.stop()
    sshd.make_key("host_key")
    sshd.start()
    failed = wait_for(jobs.launch("wait", {"steps": 1}, place, on=ON), "failed")
    assert "The host key of box (127.0.0.1, port" in failed.error
    assert "has changed" in failed.error


def test_the_command_line_follows_a_run_there(box, place, tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "core", "wait", "--steps", "2", "--out", str(out), "--on", "box"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"run": str(out), "place": "box", "state": "done"}
    assert "work begins" in done.stderr
    assert (out / "result.csv").exists()
    words[-1] = "moon"
    refused = subprocess.run([*words, "--overwrite"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "Unknown place 'moon'. Places: box." in refused.stderr
    assert time.time() - (out / "result.csv").stat().st_mtime < 60


def test_a_place_is_tested(box, place):
    words = [sys.executable, "-m", "core", "places"]
    done = subprocess.run([*words, "test", "box"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    import torch

    assert found["versions"]["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    listed = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert [p["name"] for p in json.loads(listed.stdout)["places"]] == ["box"]


def test_rates_measured_there_are_not_taken_for_this_machines(box, place):
    from core.runs import pace, workspace

    for name, on in (("evaluate-far", {"place": "box"}), ("evaluate-near", {})):
        folder = place.root / name
        (folder / ".run").mkdir(parents=True)
        spec = {"command": "evaluate", "spec": {}, "on": on}
        workspace.write_json(folder / ".run" / "spec.json", spec)
        workspace.write_json(folder / ".run" / "status.json", {"state": "done", "created": 1.0})
        rate = 9e12 if on else 1e9
        found = {"device": "cpu", "flops_per_s": rate, "parameters": 1000}
        workspace.write_json(folder / "summary.json", found)
    assert pace.flops_per_s("evaluate", "cpu", 1000) == 1e9


def test_a_recipe_runs_there_and_its_steps_come_back(box, place, tiny_gqa):
    values = {"name": "importance", "checkpoint": "demo", "device": "cpu"}
    record = jobs.launch("recipe", values, place, on=ON)
    done = wait_for(record, "done", seconds=200)
    steps = [r for r in place.runs() if r.parent == done.id]
    assert steps
    assert {s.state for s in steps} == {"done"}
    assert {s.place for s in steps} == {"box"}
    assert str(box.folder) not in json.dumps([s.spec for s in steps])


def test_a_restart_fetches_a_run_that_ended_meanwhile(box, place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("wait", {"steps": 2, "go": str(go)}, place, on=ON)
    wait_until(lambda: read_run(record.path).progress[0] == 2)
    os.killpg(read_run(record.path).status["pid"], signal.SIGKILL)
    go.touch()
    wait_until(lambda: remote(box, record).state == "done")
    ended = remote(box, record).finished
    wait_for(jobs.restart(wait_for(record, "lost")), "done")
    assert (record.path / "result.csv").exists()
    assert remote(box, record).finished == ended  # it did not run again
