"""Detached runs, each a real process: started, watched, queued, cancelled, killed, restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_helpers import kill, wait_for, wait_until

from core import commands
from core.errors import InputError, OptionError, RunError
from core.runs import jobs, processes, workspace
from core.runs.device_lock import DeviceLock
from core.runs.workspace import read_run


def test_a_run_reports_while_it_works_and_when_it_is_done(place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("wait", {"steps": 4, "pause": 0.05, "go": str(go)}, place)
    assert record.state in ("starting", "running")
    assert record.path.parent == place.root
    assert record.spec["out"] == str(record.path)
    assert record.argv[:4] == ["python", "-m", "core", "wait"]
    wait_until(lambda: read_run(record.path).progress == (4, 4, "step 4"))
    running = read_run(record.path)
    assert running.state == "running"
    assert running.status["pid"] != os.getpid()
    assert os.getsid(running.status["pid"]) == running.status["pid"]  # outlives our session
    assert [m["step"] for m in running.metrics()] == [1, 2, 3, 4]
    beat = record.path / ".run/heartbeat"
    first = beat.stat().st_mtime
    wait_until(lambda: beat.stat().st_mtime > first)
    go.touch()
    done = wait_for(record, "done")
    assert done.finished >= done.started > 0
    assert (record.path / "result.csv").read_text() == "step,value\n0,\n1,\n2,\n3,\n"
    assert done.log_tail().count("work begins") == 1
    assert sorted(p.name for p in record.path.iterdir()) == [".run", "result.csv"]
    assert done.status["files"] == ["result.csv"]


def test_a_page_is_told_before_anything_is_written(place):
    with pytest.raises(OptionError, match="--steps: -1 is too small"):
        jobs.launch("wait", {"steps": -1}, place)
    with pytest.raises(OptionError, match="Unknown option: speed"):
        jobs.launch("wait", {"speed": 1}, place)
    with pytest.raises(OptionError, match="Unknown command 'frob'"):
        jobs.launch("frob", {}, place)
    with pytest.raises(InputError, match="inspect does not create a run"):
        jobs.launch("inspect", {"checkpoint": "demo"}, place)
    with pytest.raises(InputError, match="dry run"):
        jobs.launch("prune", {"checkpoint": "demo", "drop": (4,), "dry_run": True}, place)
    assert not place.root.exists()


def test_kill_9_is_shown_as_lost_frees_the_device_and_can_be_restarted(place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("wait", {"steps": 2, "device": "cpu", "go": str(go)}, place)
    wait_until(lambda: read_run(record.path).progress[0] == 2)
    assert DeviceLock("cpu").holder()["run"] == str(record.path)
    kill(read_run(record.path))
    lost = wait_for(record, "lost")
    assert lost.progress[0] == 2
    wait_until(lambda: DeviceLock("cpu").holder() is None)
    again = jobs.restart(lost)
    assert again.state in ("starting", "running")
    go.touch()
    done = wait_for(again, "done")
    assert done.error == ""
    assert (record.path / "result.csv").is_file()
    assert len(done.metrics()) == 2  # those of the first attempt are gone
    with pytest.raises(InputError, match="is done"):
        jobs.restart(done)


def test_a_command_that_can_resume_does_so_when_restarted(place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("resumable", {"steps": 2, "go": str(go)}, place)
    wait_until(lambda: read_run(record.path).progress[0] == 2)
    kill(read_run(record.path))
    lost = wait_for(record, "lost")
    assert lost.spec["resume"] is False
    go.touch()
    again = jobs.restart(lost)
    assert again.spec["resume"] is True  # before its process has said anything
    done = wait_for(again, "done")
    assert done.spec["resume"] is True
    assert [m["step"] for m in done.metrics()] == [1, 2, 1, 2]  # the first attempt's are kept


def test_a_run_outlives_the_process_and_the_session_that_started_it(place, tmp_path):
    """As when the dashboard is stopped with Ctrl-C, or killed, in the middle of a run."""
    go = tmp_path / "go"
    code = (
        "import sys, time, slow_commands\n"
        "from core.runs import jobs\n"
        "print(jobs.launch('wait', {'steps': 1, 'go': sys.argv[1]}).id, flush=True)\n"
        "time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(go)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as page:
        record = place.find(page.stdout.readline().strip())
        wait_until(lambda: read_run(record.path).progress[0] == 1)
        os.killpg(page.pid, signal.SIGINT)
        os.killpg(page.pid, signal.SIGKILL)
    assert read_run(record.path).state == "running"
    go.touch()
    assert (wait_for(record, "done").path / "result.csv").is_file()


def test_second_and_third_run_on_a_device_queue_in_order(place, tmp_path):
    gates = [tmp_path / f"go{i}" for i in range(3)]
    runs = []
    for gate in gates:
        runs.append(jobs.launch("wait", {"steps": 1, "device": "cpu", "go": str(gate)}, place))
        wait_for(runs[-1], "queued" if len(runs) > 1 else "running")
        wait_until(lambda: read_run(runs[0].path).device == "cpu")
    first, second, third = (read_run(r.path) for r in runs)
    assert second.waiting_for == str(first.path)
    assert third.waiting_for == f"{first.path}, {second.path}"
    assert f"behind {first.path}" in second.log_tail()
    gates[2].touch()
    gates[1].touch()
    time.sleep(0.5)
    assert [read_run(r.path).state for r in runs] == ["running", "queued", "queued"]
    gates[0].touch()
    ends = [wait_for(r, "done").finished for r in runs]
    assert ends == sorted(ends)
    assert read_run(runs[1].path).waiting_for == ""


def test_a_killed_run_lets_the_next_one_in(place, tmp_path):
    go = str(tmp_path / "go")
    first = jobs.launch("wait", {"steps": 0, "device": "cpu", "go": go}, place)
    wait_until(lambda: read_run(first.path).device == "cpu")
    second = jobs.launch("wait", {"steps": 1, "device": "cpu"}, place)
    wait_for(second, "queued")
    kill(read_run(first.path))
    wait_for(second, "done")
    assert read_run(first.path).state == "lost"


def test_cancel_is_cooperative_first(place):
    record = jobs.launch("wait", {"steps": 10000, "pause": 0.01}, place)
    wait_until(lambda: read_run(record.path).progress[0] > 2)
    ended = jobs.cancel(read_run(record.path))
    assert ended.state == "cancelled"
    assert ended.error == "Cancelled."
    assert not (record.path / ".run/cancel").exists()
    assert not (record.path / "result.csv").exists()
    assert jobs.cancel(ended).state == "cancelled"  # nothing more happens
    assert "Traceback" not in ended.log_tail()


def test_a_queued_run_can_be_cancelled(place):
    holder = DeviceLock("cpu", {"run": "the test"})
    holder.acquire()
    record = jobs.launch("wait", {"steps": 1, "device": "cpu"}, place)
    queued = wait_for(record, "queued")
    assert queued.waiting_for == "the test"
    assert jobs.cancel(queued).state == "cancelled"
    assert holder.waiting() == []
    holder.release()


def test_a_run_that_ignores_cancelling_is_killed(place, tmp_path):
    never = str(tmp_path / "never")
    record = jobs.launch("wait", {"steps": 0, "deaf": True, "go": never, "device": "cpu"}, place)
    wait_until(lambda: "work begins" in read_run(record.path).log_tail())
    pid, began = (read_run(record.path).status[k] for k in ("pid", "pid_started"))
    ended = jobs.cancel(read_run(record.path), grace_s=0.3)
    assert ended.state == "cancelled"
    assert "Killed" in ended.error
    assert not processes.is_alive(pid, began)
    wait_until(lambda: DeviceLock("cpu").holder() is None)


def test_a_run_ends_itself_when_its_grace_is_over(place, tmp_path):
    values = {"steps": 0, "deaf": True, "go": str(tmp_path / "never"), "device": "cpu"}
    record = jobs.launch("stubborn", values, place)
    wait_until(lambda: read_run(record.path).device == "cpu")
    jobs.request_cancel(read_run(record.path))  # as a page does; nobody waits for it
    ended = wait_for(record, "cancelled")
    assert "Killed: the run did not stop" in ended.error
    wait_until(lambda: not processes.is_alive(ended.status["pid"], ended.status["pid_started"]))
    wait_until(lambda: DeviceLock("cpu").holder() is None)
    assert ended.log_tail().count("Killed: the run did not stop") == 1


def test_sigterm_ends_a_run_as_cancelled(place):
    record = jobs.launch("wait", {"steps": 10000, "pause": 0.01}, place)
    wait_until(lambda: read_run(record.path).progress[0] > 0)
    os.kill(read_run(record.path).status["pid"], signal.SIGTERM)
    assert wait_for(record, "cancelled").error == "Cancelled."


@pytest.mark.parametrize(
    ("fail", "error", "hint", "traceback"),
    [
        ("error", "The text has 3 tokens, 10 are needed.", "Give a longer text.", False),
        ("crash", "Unexpected ZeroDivisionError: seven by zero.", "traceback", True),
        ("memory", "Out of memory: MemoryError.", "smaller dtype", True),
    ],
)
def test_failures_are_one_sentence_once(place, fail, error, hint, traceback):
    record = jobs.launch("wait", {"steps": 1, "fail": fail, "device": "cpu"}, place)
    failed = wait_for(record, "failed")
    assert failed.error == error
    assert hint in failed.hint
    log = failed.log_tail(200)
    assert log.count(f"Error: {error}") == 1
    assert ("Traceback" in log) == traceback
    wait_until(lambda: DeviceLock("cpu").holder() is None)


def test_what_a_process_says_before_it_begins_is_in_the_log(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # this process does not know the command
    record = jobs.launch("wait", {"steps": 1}, place)
    lost = wait_for(record, "lost")
    assert "Unknown command 'wait'" in lost.log_tail()


def test_a_run_started_in_another_folder_finds_the_project(place, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    launcher = jobs.LocalLauncher(root=place.root, cwd=tmp_path)
    lost = wait_for(jobs.launch("wait", {"steps": 1}, place, launcher), "lost")
    assert "Unknown command 'wait'" in lost.log_tail()


def test_who_dies_while_starting_a_run_leaves_no_new_options_with_an_old_end(place, monkeypatch):
    done = wait_for(jobs.launch("wait", {"steps": 1, "pause": 0.0}, place), "done")
    command = commands.get("wait")

    def dies(*_, **__):
        raise SystemExit(9)

    monkeypatch.setattr(jobs, "save_spec", dies)
    with pytest.raises(SystemExit):
        jobs.launch_in(done.path, "wait", command.spec_class(out=str(done.path), steps=2))
    left = read_run(done.path)
    assert (left.spec["steps"], left.state) == (1, "starting")  # and lost when nothing follows
    assert left.finished is None


def test_a_run_that_begins_leaves_alone_what_its_launcher_still_writes(place, monkeypatch):
    replace = Path.replace

    def late(temporary, target):
        if Path(target).name == "launch.json":
            wait_until(lambda: Path(target).with_name("heartbeat").exists())
        return replace(temporary, target)

    monkeypatch.setattr(Path, "replace", late)
    record = wait_for(jobs.launch("wait", {"steps": 1}, place), "done")
    launched = workspace.read_json(record.path / ".run/launch.json")
    assert launched["pid"] == record.status["pid"]


def test_a_run_that_cannot_be_started_has_failed(place):
    class Broken(jobs.LocalLauncher):
        def start(self, argv, folder):
            raise OSError(12, "Cannot allocate memory")

    with pytest.raises(RunError, match="Cannot allocate memory"):
        jobs.launch("wait", {}, place, Broken())
    (record,) = place.runs()
    assert record.state == "failed"
    assert "Cannot allocate memory" in record.error


def test_a_cancel_while_the_process_starts_is_kept(place):
    record = jobs.launch("wait", {"steps": 10000, "pause": 0.01}, place)
    jobs.request_cancel(record)
    assert wait_for(record, "cancelled", "done").state == "cancelled"


def test_a_folder_with_a_live_run_is_refused(place, tmp_path):
    record = jobs.launch("wait", {"steps": 0, "go": str(tmp_path / "go")}, place)
    wait_for(record, "running")
    argv = [sys.executable, "-m", "core", "wait", "--out", str(record.path), "--overwrite"]
    second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "A run is already in progress in" in second.stderr
    assert read_run(record.path).state == "running"
    (tmp_path / "go").touch()
    wait_for(record, "done")


def test_a_folder_that_a_page_prepared_is_not_taken_by_another(place):
    folder = place.new_dir("wait")
    command = commands.get("wait")
    spec = command.spec_class(out=str(folder))
    from core.runs.run import save_spec

    save_spec(folder, command, spec)
    start = {"state": "starting", "created": time.time() + 3600}  # young, however slow we are
    workspace.write_json(folder / ".run/status.json", start)
    argv = [sys.executable, "-m", "core", "wait", "--out", str(folder)]
    second = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "A run is already in progress" in second.stderr


def test_restart_from_another_folder_keeps_paths(place, tmp_path, monkeypatch):
    """A run started with relative paths restarts in its own folder wherever it is asked from."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    argv = [sys.executable, "-m", "core", "wait", "--out", "rel", "--steps", "0"]
    argv += ["--go", "gate", "--fail", "error"]
    (tmp_path / "here/gate").touch()
    assert subprocess.run(argv, capture_output=True, check=False).returncode == 2
    failed = read_run(tmp_path / "here/rel")
    assert failed.state == "failed"
    monkeypatch.chdir(tmp_path)
    assert wait_for(jobs.restart(failed), "failed").error == failed.error
    assert not (tmp_path / "rel").exists()


def test_jobs_on_the_command_line(place, tmp_path):
    def call(*argv):
        argv = [sys.executable, "-m", "core", "jobs", *argv]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    record = jobs.launch("wait", {"steps": 10000, "pause": 0.01}, place)
    wait_until(lambda: read_run(record.path).progress[0] > 2)
    (row,) = json.loads(call("list").stdout)["runs"]
    assert (row["id"], row["command"], row["state"]) == (record.id, "wait", "running")
    assert row["eta_s"] > 10
    shown = json.loads(call("show", record.id).stdout)
    assert shown["spec"]["steps"] == 10000
    assert any("work begins" in line for line in shown["log"])
    assert shown["metrics"][-1]["step"] > 2
    assert json.loads(call("rename", record.id, "my try").stdout)["name"] == "my try"
    refused = call("delete", "my try")
    assert refused.returncode == 2
    assert "Cancel it first" in refused.stderr
    ended = json.loads(call("cancel", "--grace", "10", str(record.path)).stdout)
    assert ended["state"] == "cancelled"
    assert json.loads(call("delete", "my try").stdout) == {"deleted": record.id}
    assert json.loads(call().stdout)["runs"] == []
    absent = call("show", "nothing")
    assert absent.returncode == 2
    assert absent.stderr.startswith("Error: No run 'nothing'")
    assert absent.stdout == ""


def test_the_page_shows_the_command_it_runs(place):
    command = commands.get("wait")
    spec = command.spec_class(out="a b", steps=3)
    assert jobs.command_line("wait", spec) == "python -m core wait --out 'a b' --steps 3"
