"""Processes that share a run: what each takes, and that none outlives it, however it ends."""

from __future__ import annotations

import json
import os
import signal

import pytest
from run_helpers import all_gone, kill, started, wait_for

from core.errors import DataError, OptionError
from core.importance import capacity
from core.runs import devices, jobs, ranks
from core.runs.ranks import Ranks
from core.runs.run import Run
from core.runs.workspace import read_run


@pytest.mark.parametrize(("count", "step"), [(10, 1), (10, 4), (7, 3), (2, 4), (64, 16), (3, 1)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_everything_is_taken_once_and_in_order(count, step, size):
    shares = [Ranks(rank, size).share(count, step) for rank in range(size)]
    taken = [at for part in shares for at in range(count)[part]]
    assert taken == list(range(count))
    if count // step >= size:
        assert all(part.start % step == 0 for part in shares)
        lengths = [part.stop - part.start for part in shares]
        assert max(lengths) - min(lengths) < 2 * step


def test_one_process_sends_nothing():
    value = [1.0, 2.0]
    assert ranks.ALONE.gather(value) == [value]
    assert ranks.ALONE.joined(value) == value
    assert ranks.ALONE.first(value) is value
    assert ranks.ALONE.sum_(value) is value


@pytest.fixture
def gpus(monkeypatch):
    """Emulate a machine with so many GPUs."""

    def emulate(count):
        monkeypatch.setattr(devices, "gpu_names", lambda: tuple(f"cuda:{i}" for i in range(count)))
        monkeypatch.setattr(devices, "_best", lambda: "cuda:0" if count else "cpu")

    return emulate


def test_each_process_takes_a_gpu_of_its_own(gpus):
    gpus(3)
    assert ranks.places("auto", 2) == ("cuda:0", "cuda:1")
    assert ranks.places("cuda", 3) == ("cuda:0", "cuda:1", "cuda:2")
    assert ranks.places("cuda:1", 1) == ("cuda:1",)
    assert ranks.places("cpu", 4) == ("cpu",) * 4
    with pytest.raises(OptionError, match=r"--processes 4 needs .* 3 GPUs are available.*ses 3"):
        ranks.places("auto", 4)
    with pytest.raises(OptionError, match=r"--device cuda:1 names one GPU.*CUDA_VISIBLE_DEVICES"):
        ranks.places("cuda:1", 2)
    gpus(0)
    assert ranks.places("auto", 2) == ("cpu", "cpu")
    with pytest.raises(OptionError, match="no GPUs are available"):
        ranks.places("cuda", 2)
    with pytest.raises(OptionError, match="one Apple GPU"):
        ranks.places("mps", 2)


def test_more_processes_than_rows_are_refused():
    with pytest.raises(DataError, match="4 processes cannot share 3 rows"):
        ranks.facts(4, 3)
    assert ranks.facts(2, 5) == {"processes": 2, "rows_of_each": [2, 3]}
    assert ranks.facts(1, 5) == {}


def test_processes_share_the_memory_of_a_cpu_but_not_of_gpus(gpus, monkeypatch):
    gpus(2)
    assert capacity.limit_of("cpu", 6.0, 3) == 2 * devices.GIB
    assert capacity.limit_of("cuda", 6.0, 3) == 6 * devices.GIB


def test_every_gpu_of_a_run_is_held_until_it_ends(gpus, place, tmp_path, monkeypatch):
    from slow_commands import REGISTRY, SharedSpec

    from core.runs.device_lock import DeviceLock

    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    run = Run(REGISTRY["shared"], SharedSpec(out=str(tmp_path / "run")), tmp_path / "run")
    run.take_devices(("cuda:1", "cuda:0"))
    assert all(DeviceLock(f"cuda:{i}").holder() for i in (0, 1))
    assert run.status["device"] == "cuda:1, cuda:0"
    run.finish("done")
    assert not any(DeviceLock(f"cuda:{i}").holder() for i in (0, 1))


# ------------------------------------------------------------------ two real processes


def test_two_processes_meet_and_end(place):
    record, pids = started(place, steps=3)
    done = wait_for(record, "done")
    assert json.loads((done.path / "summary.json").read_text())["shares"] == [
        "slice(0, 2, None)",
        "slice(2, 5, None)",
    ]
    assert len(set(pids)) == 2
    assert pids[0] == done.status["pid"]
    all_gone(pids)


@pytest.mark.parametrize("slow", [0.0, 600.0])
def test_a_killed_process_ends_the_run_with_its_signal(place, slow):
    """Whether the first process waits for it or is busy with something else."""
    record, pids = started(place, steps=100_000, slow=slow)
    os.kill(pids[1], signal.SIGKILL)
    failed = wait_for(record, "failed")
    assert f"Process 2 of 2 (pid {pids[1]}, cpu) was ended by SIGKILL." in failed.error
    assert "Start the run again" in failed.hint
    all_gone(pids)


@pytest.mark.parametrize(
    ("fail", "expected"),
    [
        ("error", "Process 2 of 2 (pid {pid}, cpu): NaN here."),
        ("crash", "Process 2 of 2 (pid {pid}, cpu): Unexpected ZeroDivisionError: seven by zero."),
    ],
)
def test_what_a_process_raises_is_the_reason(place, fail, expected):
    record, pids = started(place, steps=100_000, fail=fail)
    failed = wait_for(record, "failed")
    assert failed.error == expected.format(pid=pids[1])
    if fail == "crash":
        assert "ZeroDivisionError: seven by zero\n" in failed.log_tail(200) + "\n"
    all_gone(pids)


def test_a_stopped_process_does_not_outlive_a_cancelled_run(place):
    """The first process waits for it in vain, and leaves by force once its grace is over."""
    record, pids = started(place, steps=100_000)
    os.kill(pids[1], signal.SIGSTOP)
    jobs.cancel(record)
    wait_for(record, "cancelled")
    all_gone(pids)


def test_cancelling_reaches_every_process(place):
    record, pids = started(place, steps=100_000)
    jobs.cancel(record)
    wait_for(record, "cancelled")
    all_gone(pids)


def test_no_process_outlives_a_run_that_is_killed(place):
    record, pids = started(place, steps=100_000)
    kill(read_run(record.path))
    all_gone(pids)
    wait_for(record, "lost")
