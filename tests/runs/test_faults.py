"""Faults survived: records that lie, copies, deleted folders, signals, full disks, odd clocks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from run_helpers import wait_for, wait_until

from core import commands
from core.errors import InputError, OutOfMemoryError, OutputError
from core.runs import failures, jobs, jobs_command, memory_guard, processes, workspace
from core.runs import status as statuses
from core.runs.device_lock import DeviceLock
from core.runs.run import Run, execute, prepare
from core.runs.workspace import Workspace, read_run


def wait_command(folder, **options):
    command = commands.get("wait")
    return command, command.spec_class(out=str(folder), **{"pause": 0.0, **options})


def make(root, name, state="done", *, spec=True, **status):
    book = root / name / ".run"
    book.mkdir(parents=True)
    if spec:
        workspace.write_json(book / "spec.json", {"command": "wait", "spec": {}, "argv": []})
    workspace.write_json(book / "status.json", {"state": state, "created": 5.0, **status})
    return root / name


# ------------------------------------------------------------------ a record is data


def test_a_record_names_no_file_outside_its_run_that_would_be_removed(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, fail="error")) == 2
    outside = tmp_path / "outside"
    outside.mkdir()
    victims = [tmp_path / "thesis.txt", outside / "inner.txt", out / ".run/spec.json"]
    victims[0].write_text("precious")
    victims[1].write_text("precious")
    (out / "folder").symlink_to(outside)
    (out / "sub").mkdir()
    (out / "sub/old.csv").write_text("stale")
    (out / "old.csv").write_text("stale")
    (out / "link.csv").symlink_to(victims[0])
    names = ["../thesis.txt", str(victims[0]), "folder/inner.txt", "sub/../../thesis.txt", "sub"]
    names += [".run/spec.json", "", ".", "..", "a\0b", 7, None, ["x"], "x" * 5000]
    names += ["old.csv", "sub/old.csv", "link.csv"]
    status = out / ".run/status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "files": names}))
    assert execute(*wait_command(out, steps=1)) == 0
    assert [path.is_file() for path in victims] == [True, True, True]
    assert victims[0].read_text() == victims[1].read_text() == "precious"
    assert not (out / "old.csv").exists()
    assert not (out / "sub/old.csv").exists()
    assert not (out / "link.csv").is_symlink()  # the link itself is the run's own
    assert json.loads(status.read_text())["files"] == ["result.csv"]


def test_nothing_is_written_through_a_link_in_the_bookkeeping(place, tmp_path):
    out = tmp_path / "out"
    assert execute(*wait_command(out, fail="error")) == 2
    mine = tmp_path / "profile"
    mine.write_text("mine")
    for name in ("log.txt", "metrics.jsonl"):
        (out / ".run" / name).unlink(missing_ok=True)
        (out / ".run" / name).symlink_to(mine)
    assert execute(*wait_command(out, steps=1)) == 0
    assert mine.read_text() == "mine"
    other = make(tmp_path, "other")
    before = sorted((other / ".run").iterdir())
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.run").symlink_to(other / ".run")
    with pytest.raises(OutputError, match="is a link"):
        execute(*wait_command(tmp_path / "linked"))
    assert "is a link" in read_run(tmp_path / "linked").error
    with pytest.raises(OutputError, match="is a link"):
        jobs.launch_in(tmp_path / "linked", "wait", wait_command(tmp_path / "linked")[1])
    assert sorted((other / ".run").iterdir()) == before


def test_a_copy_of_a_running_run_is_shown_and_never_signalled(place, tmp_path):
    go = tmp_path / "go"
    record = jobs.launch("wait", {"steps": 1, "go": str(go)}, place)
    wait_until(lambda: read_run(record.path).progress[0] == 1)
    original = read_run(record.path)
    folder = place.root / "copied"
    shutil.copytree(record.path, folder)
    copy = read_run(folder)
    assert (copy.state, copy.status["pid"]) == ("lost", original.status["pid"])
    assert "is a copy of a run that had not ended" in copy.error
    assert {r.id: r.state for r in place.runs()} == {record.id: "running", "copied": "lost"}
    assert jobs.cancel(copy, grace_s=0).state == "lost"
    assert not jobs.LocalLauncher().kill(copy)
    jobs.request_cancel(copy)
    assert processes.is_alive(original.status["pid"], original.status["pid_started"])
    again = jobs.restart(copy)  # continues in its own folder, with its own process
    wait_for(again, "running")
    wait_until(lambda: read_run(folder).status.get("pid") not in (None, original.status["pid"]))
    moved = place.root / "moved"
    folder.rename(moved)  # the same folder under another name is no copy
    assert not statuses.is_copy(moved / ".run", read_run(moved).status)
    go.touch()
    assert wait_for(record, "done").error == ""


DAMAGED = [
    "",
    "[]",
    "{",
    '{"state": NaN, "created": NaN}',
    '{"state": "done", "created": 1e308, "finished": 1e308}',
    '{"state": "done", "created": -1e308, "finished": Infinity, "seconds": 1e308}',
    '{"state": "done", "created": "yesterday", "finished": "x", "seconds": "y"}',
    '{"state": "running", "created": 5, "clock": NaN, "pid": 1e308, "host": 7}',
    '{"state": "running", "created": 5, "progress": {"done": NaN, "total": 1e308, "at": "x"}}',
    '{"state": "running", "created": 5, "progress": {"done": "3", "total": [], "message": {}}}',
    '{"state": "done", "created": true, "error": {"a": 1}, "hint": [], "device": {}}',
    '{"state": "done", "created": 5, "files": {"a": 1}, "waiting_for": 3}',
    '{"state": "exploded", "created": 5}',
    '{"state": "done", "error": ' + "[" * 100_000,
    '{"state": "done", "error": ' + "[" * 500 + "]" * 500 + "}",
    '{"state": "done", "created": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("name", ["status.json", "spec.json", "launch.json", "name.json"])
def test_a_damaged_record_is_one_line_and_the_others_stay(tmp_path, name, text):
    where = Workspace(tmp_path)
    live = dict(state="running", **processes.identity())
    good = {make(tmp_path, "first"), make(tmp_path, "second", **live)}
    bad = make(tmp_path, "bad")
    (bad / ".run" / name).write_text(text)
    found = where.runs()
    assert {r.path for r in found} == {*good, bad}
    for record in found:
        line = json.dumps(jobs_command.describe(record, full=True), allow_nan=False)
        assert json.loads(line)["id"] == record.path.name
        assert record.seconds < statuses.LATEST_S
        assert time.localtime(record.started)
    assert {where.find(p.name).state for p in good} == {"done", "running"}
    record = read_run(bad)
    assert isinstance(record.error + record.hint + record.name + record.device, str)
    if name == "status.json" and ("[[[" in text or len(text) < 3):
        assert "status.json cannot be read" in record.error
    if name == "spec.json":
        with pytest.raises(InputError, match="spec.json cannot be read"):
            jobs.restart(read_run(bad))


def test_a_link_that_leads_nowhere_is_one_line(tmp_path):
    where = Workspace(tmp_path)
    good = make(tmp_path, "good")
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "notes.txt").write_text("not a run")
    found = {r.id: r for r in where.runs()}
    assert set(found) == {good.name, "dangling", "loop"}
    assert found["dangling"].state == "lost"
    assert "is a link to a folder that does not exist" in found["dangling"].error
    where.delete(found["dangling"])
    where.delete(found["loop"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "notes.txt"]


def test_deleting_a_linked_run_removes_the_link_alone(tmp_path):
    where = Workspace(tmp_path / "runs")
    elsewhere = make(tmp_path, "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/linked").symlink_to(elsewhere)
    where.delete(where.find("linked"))
    assert list((tmp_path / "runs").iterdir()) == []
    assert (elsewhere / ".run/spec.json").is_file()


def test_a_running_run_whose_folder_is_deleted_ends_and_leaves_no_ghost(place):
    record = jobs.launch("wait", {"steps": 10**6, "pause": 0.01}, place)
    wait_until(lambda: read_run(record.path).progress[0] > 1)
    status = read_run(record.path).status
    shutil.rmtree(record.path, ignore_errors=True)
    wait_until(lambda: not processes.is_alive(status["pid"], status["pid_started"]))
    assert not record.path.exists()
    assert place.runs() == []


def test_no_result_is_written_into_a_folder_that_is_gone(place, tmp_path):
    run = Run(*wait_command(tmp_path / "out"), tmp_path / "out")
    run.write_status(state="running")
    shutil.rmtree(tmp_path / "out")
    for write in (
        lambda: run.write_json("a.json", {}),
        lambda: run.write_csv("a.csv", (), []),
        lambda: run.progress.check_cancel(),
    ):
        with pytest.raises(Exception, match="folder was deleted"):
            write()
    run.finish("done")
    assert not (tmp_path / "out").exists()


def test_a_ghost_of_an_earlier_version_is_listed_and_can_be_deleted(tmp_path):
    where = Workspace(tmp_path)
    make(tmp_path, "ghost", "cancelled", spec=False)
    (ghost,) = where.runs()
    assert "spec.json is missing" in ghost.error
    where.delete(ghost)
    assert where.runs() == []
    make(tmp_path, "announced", "starting", spec=False, created=time.time())
    assert where.runs() == []  # its spec.json is about to be written


# ------------------------------------------------------------------------- endings


def start(out, *argv, **options):
    argv = [sys.executable, "-m", "core", "wait", "--out", str(out), *argv]
    process = subprocess.Popen(
        argv, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    wait_until(lambda: (record := read_run(out)) and record.progress[0] > 1)
    return process


def test_a_closed_terminal_is_recorded(place, tmp_path):
    process = start(tmp_path / "out", "--steps", "100000", "--pause", "0.01")
    os.kill(process.pid, signal.SIGHUP)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGHUP)  # the shell passes it on, then the kernel
    process.stderr.close()  # nobody reads any more
    assert process.wait(20) == 130
    record = read_run(tmp_path / "out")
    assert (record.state, record.error) == (
        "cancelled",
        "Cancelled: the terminal or the connection was closed.",
    )


def test_nohup_is_respected(place, tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    argv = ("--steps", "40", "--pause", "0.01")
    process = start(tmp_path / "out", *argv, preexec_fn=ignore)
    os.kill(process.pid, signal.SIGHUP)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert read_run(tmp_path / "out").state == "done"


def full_disk(monkeypatch, book, *, holds=True):
    """Nothing new can be written while the reserve is there; if it ``holds``, nor afterwards."""
    real = workspace.write_text
    number = errno.ENOSPC

    def write_text(path, text, **options):
        if holds or (book / "reserve").exists():
            raise workspace.cannot_write(path, OSError(number, os.strerror(number)))
        real(path, text, **options)

    monkeypatch.setattr(workspace, "write_text", write_text)


@pytest.mark.parametrize("holds", [False, True])
def test_the_end_is_recorded_on_a_full_disk(place, tmp_path, monkeypatch, holds):
    out = tmp_path / "out"
    command, spec = wait_command(out, steps=1, device="cpu")

    def fills_up(spec, run):
        assert (out / ".run/reserve").stat().st_size >= 64 * 1024
        full_disk(monkeypatch, out / ".run", holds=holds)
        run.write_csv("result.csv", ("x",), [[1]])

    import slow_commands

    monkeypatch.setattr(slow_commands, "run", fills_up)
    assert execute(command, spec) == 2
    record = read_run(out)
    assert record.state == "failed"
    assert "No space left on device" in record.error
    assert "Free up disk space" in record.hint
    assert not (out / ".run/reserve").exists()
    assert DeviceLock("cpu").holder() is None


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    asked = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if not mount or subprocess.run(asked, check=False, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_fills_up_while_weights_are_saved(place, small_disk, monkeypatch, capfd):
    """safetensors raises an exception of its own, which carries the system's reason."""
    import slow_commands
    import torch
    from safetensors.torch import save_file

    from core.retrain.weights import replace_folder

    def fills_up(spec, run):
        weights = {"w": torch.zeros(2**19)}
        replace_folder(run.path("merged"), lambda to: save_file(weights, to / "model.safetensors"))

    monkeypatch.setattr(slow_commands, "run", fills_up)
    out = small_disk / "out"
    assert execute(*wait_command(out, steps=1)) == 2
    record = read_run(out)
    assert record.state == "failed"
    assert record.error == f"Cannot write {out}: No space left on device."
    assert [p.name for p in out.iterdir()] == [".run"]
    assert capfd.readouterr().err == f"Error: {record.error} {record.hint}\n"


def test_a_finished_run_keeps_no_reserve(place, tmp_path):
    assert execute(*wait_command(tmp_path / "out", steps=1)) == 0
    assert not (tmp_path / "out/.run/reserve").exists()


class SafetensorError(Exception):
    """As the library's own, which is written in Rust."""


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        SafetensorError("Error while serializing: IoError(Os { code: 28, kind: StorageFull })"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_a_full_disk_is_told_as_such_whoever_notices_it(error, tmp_path):
    known = failures.as_known(error, folder=tmp_path)
    assert isinstance(known, OutputError)
    assert known.message == f"Cannot write {tmp_path}: No space left on device."
    assert "Free up disk space" in known.hint


def test_torch_does_not_say_why_it_cannot_write(tmp_path, monkeypatch):
    error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert "Unexpected RuntimeError: PytorchStreamWriter" in str(
        failures.as_known(error, "", tmp_path)
    )
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    known = failures.as_known(error, "", tmp_path / "not/yet")
    assert "No space left on device" in known.message


@pytest.mark.parametrize(
    "text",
    [
        "unable to mmap 1024 bytes from file </x>: Cannot allocate memory (12)",
        "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried",
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "libtorch_cpu.so: failed to map segment from shared object",
        "can't start new thread",
        "std::bad_alloc",
    ],
)
def test_a_memory_limit_is_told_as_such(text):
    known = failures.as_known(RuntimeError(text))
    assert isinstance(known, OutOfMemoryError)
    assert known.message == f"Out of memory: {text}."


def test_what_is_not_about_memory_is_not_called_so(monkeypatch):
    for text in (
        "unable to mmap 1024 bytes from file </x>: No such device (19)",
        "libx.so: cannot allocate memory in static TLS block",
    ):
        assert "Unexpected RuntimeError" in failures.as_known(RuntimeError(text)).message
    monkeypatch.setattr(failures, "limit_bytes", lambda: 2**31)
    assert "2.0 GiB of address space (ulimit -v)" in failures.as_known(MemoryError()).hint


def test_a_process_stuck_at_its_memory_limit_is_ended(place, tmp_path, monkeypatch):
    clock, used = [100.0], [0]
    monkeypatch.setattr(memory_guard, "limit_bytes", lambda: 2**31)
    monkeypatch.setattr(memory_guard, "used_bytes", lambda: used[0])
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def stuck_after(seconds, mark):
        clock[0] += seconds
        return guard.is_stuck(mark)

    guard = memory_guard.MemoryGuard()
    assert len(guard._spare) == memory_guard.SPARE_BYTES
    assert not stuck_after(60, 1)
    used[0] = 2**31 - 4096
    assert not stuck_after(2, 1)
    assert guard._spare is None  # given up, so that the exception can come out
    assert not stuck_after(8, 1)
    assert not stuck_after(8, 2)  # it makes progress
    assert not stuck_after(8, 2)
    assert stuck_after(11, 2)
    assert "the limit of 2.0 GiB of address space (ulimit -v) is reached" in guard.error().message


def test_without_a_memory_limit_nothing_is_watched(monkeypatch):
    monkeypatch.setattr(memory_guard, "limit_bytes", lambda: None)
    guard = memory_guard.MemoryGuard()
    assert guard._spare is None
    assert not guard.is_stuck(None)


def test_a_stuck_main_thread_does_not_keep_the_run_from_ending(place, tmp_path):
    """The real guard in a process that takes all the address space it may have, again and again."""
    code = (
        "import resource, sys, time, slow_commands\n"
        "from core import commands\n"
        "from core.runs import memory_guard, workspace\n"
        "from core.runs.run import execute\n"
        "memory_guard.STUCK_S, workspace.HEARTBEAT_S = 0.2, 0.1\n"
        "def run(spec, run):\n"
        "    held = []\n"
        "    while True:\n"
        "        try:\n"
        "            held.append(bytearray(1 << 20))\n"
        "        except MemoryError:\n"
        "            time.sleep(0.01)\n"
        "slow_commands.run = run\n"
        "limit = memory_guard.used_bytes() + (200 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "command = commands.get('wait')\n"
        "sys.exit(execute(command, command.spec_class(out=sys.argv[1])))\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "out")]
    assert subprocess.run(argv, capture_output=True, check=False, timeout=30).returncode == 1
    record = read_run(tmp_path / "out")
    assert record.state == "failed"
    assert "address space (ulimit -v) is reached" in record.error


def test_a_start_over_after_a_kill_while_a_folder_was_written(place, tmp_path):
    """Merging writes a folder beside its target; kill -9 leaves it there."""
    out = tmp_path / "out"
    assert execute(*wait_command(out, steps=1, fail="error")) == 2
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    for name in (".merged.tmp", f".merged.{gone.pid}.abcdef.tmp"):
        (out / name).mkdir()
        (out / name / "model.safetensors").write_text("half")
    assert execute(*wait_command(out, steps=1)) == 0
    assert sorted(p.name for p in out.iterdir()) == [".run", "result.csv"]


# ---------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [-86400.0, 2 * 86400.0])
def test_durations_do_not_follow_the_wall_clock(place, tmp_path, monkeypatch, jump):
    out = tmp_path / "out"
    run = Run(*wait_command(out), out)
    run.write_status(state="running", **statuses.born(run.book), **processes.identity())
    run.progress.step(0, 10, "begins")
    time.sleep(0.2)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    run.progress.step(5, 10, "half")
    run.write_status()
    record = read_run(out)
    assert record.state == "running"
    assert 0.1 < record.eta_s < 2.0
    assert 0.2 <= record.seconds < 5.0
    run.finish("done")
    record = read_run(out)
    assert 0.2 <= record.seconds < 5.0
    assert record.finished >= record.started


def test_a_status_of_before_a_restart_of_the_machine_has_no_age():
    status = {"created": time.time(), "clock": time.monotonic() + 1e6}
    assert statuses.age_s(status) is None
    assert statuses.ending(status, "failed")["seconds"] == 0.0


def test_the_queue_does_not_follow_the_wall_clock(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    holder, order, threads = DeviceLock("cpu", {"run": "holder"}), [], []
    holder.acquire()
    times = iter(range(10**18, 0, -(10**17)))
    monkeypatch.setattr(time, "time_ns", lambda: next(times))  # set back before every arrival

    def work(name):
        lock = DeviceLock("cpu", {"run": name})
        lock.acquire()
        order.append(name)
        lock.release()

    for name in ("a", "b", "c"):
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        wait_until(lambda n=name: n in [o.get("run") for o in holder.waiting()])
    assert [o["run"] for o in holder.waiting()] == ["a", "b", "c"]
    holder.release()
    for thread in threads:
        thread.join(20)
    assert order == ["a", "b", "c"]


def test_a_run_announced_in_the_future_can_be_cancelled_and_deleted(place):
    folder = make(place.root, "future", "starting", created=time.time() + 86400)
    record = read_run(folder)
    assert record.state == "starting"
    ended = jobs.cancel(record)
    assert (ended.state, ended.error) == ("cancelled", "Cancelled.")
    place.delete(ended)
    assert place.runs() == []
    clocked = {"clock": time.monotonic() - 60, "created": time.time() + 86400}
    assert read_run(make(place.root, "clocked", "starting", **clocked)).state == "lost"


def test_a_process_that_comes_up_after_its_cancellation_stops(place, monkeypatch):
    folder = make(place.root, "late", "starting", created=time.time() + 86400)
    command, spec = wait_command(folder, steps=1)
    jobs.save_spec(folder, command, spec)
    assert jobs.cancel(read_run(folder)).state == "cancelled"
    monkeypatch.setenv("DEPTHCUT_DETACHED", str(folder))
    assert execute(command, spec) == 130
    assert read_run(folder).state == "cancelled"
    assert not (folder / "result.csv").exists()


# ---------------------------------------------------------------- one launch per intent


def test_one_wish_from_many_tabs_starts_one_run(place, tmp_path):
    values = {"steps": 1, "go": str(tmp_path / "go")}
    found = []

    def click():
        found.append(jobs.launch_once("wait", values, place).id)

    tabs = [threading.Thread(target=click) for _ in range(3)]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join(30)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert [r.id for r in place.runs()] == found[:1]
    other = jobs.launch_once("wait", {**values, "steps": 2}, place)
    assert other.id not in found  # other options are another wish
    (tmp_path / "go").touch()
    done = wait_for(other, "done")
    status = {**done.status, "clock": time.monotonic() - 60}
    workspace.write_json(done.path / ".run/status.json", status)
    again = jobs.launch_once("wait", {**values, "steps": 2}, place)
    assert again.id != done.id  # asked again later, it runs again
    wait_for(again, "done")


def test_two_tabs_restart_one_run(place, tmp_path):
    go = tmp_path / "go"
    failed = make(place.root, "failed", "failed")
    command, spec = wait_command(failed, go=str(go))
    jobs.save_spec(failed, command, spec)
    seen = read_run(failed)
    first = jobs.restart(seen)
    second = jobs.restart(seen)  # the other tab still shows the failed run
    assert workspace.read_json(failed / ".run/launch.json")["pid"]
    assert first.status["created"] == second.status["created"]
    with pytest.raises(OutputError, match="already in progress"):
        jobs.launch_in(failed, "wait", command.spec_class(out=str(failed), steps=3))
    go.touch()
    wait_for(first, "done")


def test_a_read_only_workspace_is_known(tmp_path, monkeypatch):
    assert Workspace(tmp_path / "not/yet").is_writable()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not Workspace(tmp_path / "not/yet").is_writable()


def test_prepare_accepts_a_folder_again_after_a_copy_was_made(place, tmp_path):
    folder = make(tmp_path, "copy", "running", inode=1, **processes.identity())
    assert read_run(folder).state == "lost"
    prepare(folder)
