"""One run in the foreground: what may be written where, how it ends, what it leaves."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from core import commands
from core.errors import Cancelled, OutputError
from core.runs import workspace
from core.runs.run import Run, execute, prepare
from core.runs.workspace import read_run


def wait_command(folder, **options):
    command = commands.get("wait")
    return command, command.spec_class(out=str(folder), **{"pause": 0.0, **options})


def call(*argv, **options):
    argv = [sys.executable, "-m", "core", *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, **options)


def test_a_run_in_the_foreground_leaves_results_and_bookkeeping(place, tmp_path, capsys):
    assert execute(*wait_command(tmp_path / "deep/out", steps=3)) == 0
    record = read_run(tmp_path / "deep/out")
    assert (record.state, record.command, record.progress) == ("done", "wait", (3, 3, "step 3"))
    assert record.spec == {**record.spec, "steps": 3, "deaf": False}
    assert "work begins" in record.log_tail()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "work begins" in captured.err
    saved = json.loads((record.path / ".run/spec.json").read_text())
    assert saved["argv"][:4] == ["python", "-m", "core", "wait"]
    assert saved["schema"] == 1


def test_existing_output_is_not_overwritten_unasked(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1)) == 0
    before = (out / "result.csv").read_text()
    with pytest.raises(OutputError, match="exists and is not empty") as caught:
        execute(*wait_command(out, steps=2))
    assert "--overwrite" in caught.value.hint
    assert (out / "result.csv").read_text() == before
    assert read_run(out).spec["steps"] == 1
    assert execute(*wait_command(out, steps=2), overwrite=True) == 0
    assert (out / "result.csv").read_text() == "step,value\n0,\n1,\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        execute(*wait_command(tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_results_of_an_earlier_run_do_not_mix_with_new_ones(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1, megabytes=1)) == 0
    (out / "notes.txt").write_text("mine")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (out / f".run/.status.json.{gone.pid}.abc.tmp").write_text("left by a killed process")
    (out / ".run/.odd.tmp").write_text("nobody's")
    mine = out / f".run/.name.json.{os.getpid()}.abc.tmp"
    mine.write_text("being written by a page")
    assert execute(*wait_command(out, steps=1), overwrite=True) == 0
    assert sorted(p.name for p in out.iterdir()) == [".run", "notes.txt", "result.csv"]
    assert list((out / ".run").glob(".*.tmp")) == [mine]


def test_death_while_an_earlier_result_is_cleared_never_leaves_a_finished_run(
    place, tmp_path, monkeypatch
):
    from core.runs import run as runs

    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1)) == 0

    def dies(folder, *_):
        (folder / "result.csv").unlink()
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "clear", dies)
        with pytest.raises(SystemExit):
            execute(*wait_command(out, steps=2), overwrite=True)
    left = read_run(out)
    assert (left.state, left.finished) == ("running", None)  # this process lives still
    assert left.status["files"] == ["result.csv"]  # the next one clears the rest


def test_the_end_is_written_when_the_request_to_cancel_has_gone(place, tmp_path, monkeypatch):
    run = Run(*wait_command(tmp_path / "out"), tmp_path / "out")
    run.write_status(state="running")
    (run.book / "cancel").touch()
    seen = []
    monkeypatch.setattr(run, "_put_status", lambda: seen.append((run.book / "cancel").exists()))
    run.finish("cancelled")
    assert seen == [False]


def test_results_of_another_command_are_not_overwritten_even_when_asked(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1)) == 0
    _, spec = wait_command(out, steps=1)
    with pytest.raises(OutputError, match="already contains a wait run"):
        execute(commands.get("stubborn"), spec, overwrite=True)
    assert read_run(out).state == "done"


def test_a_failed_run_can_be_run_again_without_overwrite(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1, fail="error")) == 2
    assert read_run(out).state == "failed"
    assert execute(*wait_command(out, steps=1)) == 0
    assert read_run(out).error == ""


@pytest.mark.parametrize("where", ["file", "file/below/it", "x" * 300])
def test_output_that_cannot_be_written_is_told(place, tmp_path, where):
    (tmp_path / "file").write_text("precious")
    ended = call("wait", "--out", tmp_path / where)
    assert ended.returncode == 2
    assert ended.stderr.startswith("Error: ")
    assert str(tmp_path / where) in ended.stderr
    assert "--out" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "file").read_text() == "precious"


def test_a_bookkeeping_folder_that_is_a_file(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.run").write_text("x")
    with pytest.raises(OutputError, match="Cannot write"):
        prepare(tmp_path / "out")


def test_a_full_disk_fails_the_run_and_leaves_no_half_file(place, tmp_path):
    """Files are limited to 1 MiB in the process, which to it is a disk that is full."""
    out = tmp_path / "out"
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
        "from core.__main__ import main; sys.exit(main())"
    )
    argv = [sys.executable, "-c", limited, "wait", "--out", str(out), "--megabytes", "3"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "big.csv: File too large. Free up disk space" in ended.stderr
    record = read_run(out)
    assert record.state == "failed"
    assert record.error == f"Cannot write {out / 'big.csv'}: File too large."
    assert [p.name for p in out.iterdir()] == [".run"]


def test_bookkeeping_that_cannot_be_written_does_not_hide_the_end(place, tmp_path, monkeypatch):
    """The disk fills up in the middle: the exit status is still right and the device is free."""
    from core.runs.device_lock import DeviceLock

    command, spec = wait_command(tmp_path / "out", steps=2, device="cpu", fail="error")
    real = workspace.write_json

    def full(path, value, **options):
        if value.get("state") == "failed":
            raise OutputError("Cannot write: no space.", "Free space.")
        real(path, value, **options)

    monkeypatch.setattr(workspace, "write_json", full)
    assert execute(command, spec) == 2
    assert DeviceLock("cpu").holder() is None


@pytest.mark.parametrize(("number", "state"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_ctrl_c_gives_130(place, tmp_path, number, state):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "core", "wait", "--out", str(out)]
    argv += ["--steps", "100000", "--pause", "0.01"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (out.is_dir() and (record := read_run(out)) and record.progress[0] > 1):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, text = process.communicate(timeout=20)
    assert process.returncode == state
    assert text.count("Cancelled.") == 1
    assert "Traceback" not in text
    assert read_run(out).state == "cancelled"


def test_a_second_ctrl_c_ends_a_run_that_does_not_look(place, tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "core", "wait", "--out", str(out), "--steps", "0", "--deaf"]
    argv += ["--go", str(tmp_path / "never")]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "work begins" in process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    assert "Press Ctrl-C again to stop at once" in process.stderr.readline()
    assert read_run(out).state == "running"
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=15)  # well within the grace after which it ends itself
    assert process.returncode == 130
    assert read_run(out).state == "cancelled"


def test_a_terminal_sees_one_moving_line(place, tmp_path):
    """Progress goes to standard error, and only there."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "core", "wait", "--out", str(tmp_path / "out"), "--steps", "3"]
    process = subprocess.Popen(argv, stderr=theirs, stdout=subprocess.PIPE)
    os.close(theirs)
    assert process.communicate(timeout=30)[0] == b""
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(ours)
    assert process.returncode == 0
    assert b"\r\x1b[K[3/3] step 3" in seen


def test_progress_counts_each_phase_from_its_start(place, tmp_path):
    command, spec = wait_command(tmp_path / "out")
    run = Run(command, spec, tmp_path / "out")
    run.progress.step(5, 10, "first phase")
    began = run.status["progress"]["since"]
    run.progress.step(6, 10, "first phase")
    assert run.status["progress"]["since"] == began
    assert run.status["progress"]["first"] == 5
    run.progress.step(1, 3, "second phase")
    assert run.status["progress"]["first"] == 1
    assert json.loads((run.book / "status.json").read_text())["progress"]["total"] == 10


def test_a_cancel_request_raises_at_the_next_step(place, tmp_path):
    command, spec = wait_command(tmp_path / "out")
    prepare(tmp_path / "out")
    run = Run(command, spec, tmp_path / "out")
    run.progress.check_cancel()
    (run.book / "cancel").touch()
    for act in (run.progress.check_cancel, lambda: run.progress.step(1, 2)):
        with pytest.raises(Cancelled):
            act()


def test_the_first_end_counts(place, tmp_path):
    command, spec = wait_command(tmp_path / "out")
    run = Run(command, spec, tmp_path / "out")
    run.finish("cancelled", error="Ended by force.")
    run.finish("done")
    run.write_status(state="running")
    status = json.loads((run.book / "status.json").read_text())
    assert (status["state"], status["error"]) == ("cancelled", "Ended by force.")


def test_two_starts_at_once_in_one_folder(place, tmp_path):
    """The folder's own lock holds even where the status does not tell yet."""
    import fcntl

    out = tmp_path / "out"
    prepare(out)
    with (out / ".run/lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="A run is already in progress"):
            execute(*wait_command(out))
    assert execute(*wait_command(out, steps=1)) == 0
