"""The device lock: one holder, first come first served, freed by death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from core.errors import OutputError
from core.runs.device_lock import DeviceLock, lock_dir

HOLD = """
import sys, time
from core.runs.device_lock import DeviceLock
lock = DeviceLock("cpu", {"run": sys.argv[1]})
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))


@pytest.fixture
def hold():
    """A function that starts a process holding the device and returns it when it does."""
    started = []

    def start(name):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def test_kill_9_frees_the_device(hold):
    process = hold("first")
    assert process.stdout.readline() == "held\n"
    lock = DeviceLock("cpu")
    assert lock.holder()["run"] == "first"
    assert lock.holder()["pid"] == process.pid
    said = []

    def killed_while_waiting(ahead):
        said.append(ahead)
        os.kill(process.pid, signal.SIGKILL)

    lock.acquire(killed_while_waiting)
    assert said[0] == "first"
    assert lock.held
    lock.release()
    assert lock.holder() is None


def test_first_come_first_served():
    holder, order, threads = DeviceLock("cpu", {"run": "holder"}), [], []
    holder.acquire()
    heard = {}

    def work(name):
        lock = DeviceLock("cpu", {"run": name})
        lock.acquire(lambda ahead: heard.setdefault(name, ahead))
        order.append(name)
        time.sleep(0.05)
        lock.release()

    for name in ("a", "b", "c"):
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        until(lambda n=name: n in heard)
    assert [o["run"] for o in holder.waiting()] == ["a", "b", "c"]
    assert order == []
    holder.release()
    for thread in threads:
        thread.join(20)
    assert order == ["a", "b", "c"]
    assert heard == {"a": "holder", "b": "holder, a", "c": "holder, a, b"}
    assert holder.waiting() == []
    assert list((lock_dir() / "cpu.queue").iterdir()) == []


def test_who_dies_in_line_holds_nobody_up(hold):
    holder = DeviceLock("cpu", {"run": "me"})
    holder.acquire()
    waiting = hold("dies")
    until(lambda: [o.get("run") for o in holder.waiting()] == ["dies"])
    waiting.kill()
    waiting.wait()
    assert holder.waiting() == []
    holder.release()
    after = DeviceLock("cpu")
    after.acquire(lambda ahead: pytest.fail(f"waits behind {ahead}"))
    after.release()


def test_giving_up_leaves_the_line():
    holder, other = DeviceLock("cuda:1"), DeviceLock("cuda:1")
    holder.acquire()

    def give_up(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.acquire(give_up)
    assert not other.held
    assert holder.waiting() == []
    holder.release()
    holder.release()  # harmless


def test_devices_do_not_wait_for_each_other():
    one, two = DeviceLock("cuda:0"), DeviceLock("cuda:1")
    one.acquire()
    two.acquire(lambda ahead: pytest.fail(f"waits behind {ahead}"))
    assert one.held
    assert two.held
    one.release()
    two.release()


def test_a_lock_folder_that_cannot_be_used_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="DEPTHCUT_LOCK_DIR"):
        DeviceLock("cpu")


@pytest.mark.parametrize("kind", ["link", "group", "others"])
def test_a_lock_folder_that_others_control_is_refused(tmp_path, monkeypatch, kind):
    folder = tmp_path / "real"
    folder.mkdir(mode=0o700)
    used, reason = folder, "other users can write to it"
    if kind == "link":
        used, reason = tmp_path / "link", "symbolic link"
        used.symlink_to(folder)
    else:
        folder.chmod(0o770 if kind == "group" else 0o707)
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(used))
    with pytest.raises(OutputError, match=f"{reason}.*DEPTHCUT_LOCK_DIR"):
        DeviceLock("cpu").acquire()
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(folder))
    DeviceLock("cpu").acquire()


def test_a_lock_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    (tmp_path / "locks").mkdir(mode=0o700)
    with pytest.raises(OutputError, match="belongs to another user"):
        DeviceLock("cpu")
