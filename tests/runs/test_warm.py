"""A process forked from a template is like any other, and outlives its template."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_helpers import wait_until

from core.errors import Cancelled
from core.runs import jobs, processes, warm

ROOT = Path(__file__).parents[2]
KEEP = warm.keep
MACHINERY = ROOT / "tests" / "machinery"


@pytest.fixture(autouse=True)
def _light(monkeypatch):
    """The template imports nothing, which takes no time; it finds the modules of the tests."""
    monkeypatch.setattr(warm, "LIBRARIES", ())
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(MACHINERY), str(ROOT))))


@contextlib.contextmanager
def started():
    """A template in an environment that stays the same while a test is set up and run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")
        with warm.template("cpu", lambda: None) as made:
            assert made is not None
            yield made


@pytest.fixture
def template(_light):
    with started() as made:
        yield made


def environment(**more):
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | more


def forked(template, folder, *argv, env=None, session=True):
    """Start ``python -m`` with ``argv`` from the template; output goes to files in ``folder``."""
    with (
        (folder / "in").open("w+") as given,
        (folder / "out").open("w") as out,
        (folder / "err").open("w") as err,
    ):
        given.write("a line\n")
        given.seek(0)
        streams = (given.fileno(), out.fileno(), err.fileno())
        env = environment() if env is None else env
        return template.start(list(argv), streams=streams, env=env, cwd=folder, session=session)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_forked_process_is_like_one_that_was_started(template, tmp_path):
    env = environment(DEPTHCUT_DETACHED="here", PYTHONUNBUFFERED="1")
    process = forked(template, tmp_path, "told", "one", "--two", env=env)
    assert process.wait() == process.poll() == 3
    plain = subprocess.run(
        [sys.executable, "-m", "told", "one", "--two"], env=env, cwd=tmp_path, text=True,
        input="a line\n", capture_output=True, start_new_session=True, check=False,
    )  # fmt: skip
    assert plain.returncode == 3
    told, expected = json.loads((tmp_path / "out").read_text()), json.loads(plain.stdout)
    assert told == expected
    assert told["leads"]
    assert told["input"] == "a line\n"
    assert (tmp_path / "err").read_text() == plain.stderr == "last\n"


def test_an_error_is_a_traceback_and_status_1(template, tmp_path):
    assert forked(template, tmp_path, "nowhere").wait() == 1
    assert "No module named nowhere" in (tmp_path / "err").read_text()


def test_a_killed_process_has_the_status_of_its_signal(template, tmp_path):
    process = forked(template, tmp_path, "told", "--wait")
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert processes.start_time(process.pid) is None
    process.kill()  # nothing is left to be signalled


def test_what_a_library_may_have_read_must_be_equal(template, tmp_path):
    assert forked(template, tmp_path, "told", env=environment(OMP_NUM_THREADS="7")) is None
    assert forked(template, tmp_path, "told", "x" * 2**20) is None  # longer than a request may be


def test_a_process_outlives_its_template_and_the_template_its_asker(tmp_path):
    with started() as made:
        process = forked(made, tmp_path, "told", "--wait")
        source = parent_of(process.pid)
    assert processes.start_time(source) is not None  # waits for the process it has forked
    os.kill(source, signal.SIGKILL)
    wait_until(lambda: processes.start_time(source) is None)
    assert processes.start_time(process.pid) is not None
    assert forked(made, tmp_path, "told") is None
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == 1  # nobody is left who knows


def test_a_template_ends_with_the_last_of_its_processes(tmp_path):
    with started() as made:
        process = forked(made, tmp_path, "told", "--wait")
        source = parent_of(process.pid)
    process.kill()
    wait_until(lambda: processes.start_time(source) is None)


def test_a_forked_process_asks_the_same_template(tmp_path, monkeypatch):
    """Also if a library sets a variable when it is imported; the process has it too."""
    (tmp_path / "sets_variable.py").write_text("import os; os.environ['SET_BY_IMPORT'] = '1'\n")
    monkeypatch.setattr(warm, "LIBRARIES", ("sets_variable",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"])))
    nested = tmp_path / "nested.py"
    nested.write_text(
        "import os\n"
        "from core.runs import warm\n"
        "with warm.template('cuda:0', None) as none:\n"
        "    assert none is None\n"
        "with warm.template('cpu', None) as made:\n"
        "    process = made.start(['told'], streams=(0, 1, 2), env=os.environ)\n"
        "print(process.wait(), os.getppid())\n"
    )
    with started() as made:
        process = forked(made, tmp_path, "nested")
        source = parent_of(process.pid)
        assert process.wait() == 0, (tmp_path / "err").read_text()
    told, last = (tmp_path / "out").read_text().splitlines()
    assert json.loads(told)["input"] == "a line\n"
    assert json.loads(told)["env"]["SET_BY_IMPORT"] == "1"
    assert last == f"3 {source}"


@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_only_for_a_cpu(device):
    with warm.template(device, lambda: None) as made:
        assert made is None


def test_libraries_that_start_threads_are_refused(tmp_path, monkeypatch):
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(warm, "LIBRARIES", ("threaded",))
    with warm.template("cpu", lambda: None) as made:
        assert made is None


def test_waiting_for_the_libraries_can_be_cancelled(tmp_path, monkeypatch):
    (tmp_path / "slow_import.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(warm, "LIBRARIES", ("slow_import",))

    def stop():
        raise Cancelled("Cancelled on request.", "")

    began = time.monotonic()
    with pytest.raises(Cancelled), warm.template("cpu", stop):
        pass
    assert time.monotonic() - began < 20


def test_the_computing_libraries_start_no_threads_and_touch_no_device():
    """What makes the fork sound, asked of the real libraries in a process of their own."""
    code = (
        "import importlib, os, torch\n"
        "from core.runs import warm\n"
        "for name in warm.LIBRARIES: importlib.import_module(name)\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not torch.cuda._is_in_bad_fork()\n"
    )
    env = {**os.environ, warm.OWN_THREADS: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_process_keeps_one_template_for_its_runs_and_goes_on_without(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    monkeypatch.setattr(warm, "_kept", None)
    monkeypatch.setattr(warm, "_keeping", threading.Lock())
    for name in ("one", "two", "three"):
        (tmp_path / name / ".run").mkdir(parents=True)

    def parent_of_run(name):
        jobs.LocalLauncher().start([sys.executable, "-m", "told", "--wait"], tmp_path / name)
        pid = json.loads((tmp_path / name / ".run" / "launch.json").read_text())["pid"]
        found = parent_of(pid)
        os.kill(pid, signal.SIGKILL)
        return found

    KEEP()
    KEEP()
    wait_until(warm.kept)
    try:
        source = parent_of_run("one")
        assert source != os.getpid()
        assert parent_of_run("two") == source
        os.kill(source, signal.SIGKILL)
        wait_until(lambda: processes.start_time(source) is None)
        assert parent_of_run("three") == os.getpid()
    finally:
        warm.kept().close(at_once=True)
