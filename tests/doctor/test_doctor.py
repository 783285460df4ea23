"""The doctor: each way a check can end, and the checks themselves on the CPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core import commands
from core.__main__ import main
from core.commands import COMMANDS
from core.doctor import checks, command, paths, plain, plan, worker
from core.doctor.checks import Bench
from core.doctor.results import FAILED, GOOD, SKIPPED, WRONG, Diagnosis
from core.errors import Cancelled
from core.runs import devices, processes
from core.runs.run import execute

MACHINE = {"device": "cpu", "device_name": "Emulated", "torch": "2.13.0", "total_bytes": 2**34}
FINE = {"agrees": True, "text": "equal"}


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """What an emulated worker answers to each check; and the command, run with these answers."""
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    given: dict[str, Any] = {"machine": {"machine": MACHINE}}

    class Emulated:
        def __init__(self, *_: Any) -> None:
            self.asked: list[str] = []

        def ask(self, check: str, limit_s: float) -> dict[str, Any]:
            found = given.get(check, FINE)
            return found(limit_s) if callable(found) else found

        def stop(self) -> None:
            pass

    monkeypatch.setattr(command, "Workers", Emulated)
    monkeypatch.setattr(devices, "unusable", lambda **_: ())
    return given


def doctor(tmp_path, *arguments: str) -> tuple[int, Diagnosis]:
    out = tmp_path / "out"
    status = main(["doctor", "--device", "cpu", "--out", str(out), *arguments])
    found = Diagnosis.read(out)
    assert found is not None
    return status, found


def state(found: Diagnosis, name: str) -> str:
    return next(check.state for check in found.checks if check.name == name)


def test_all_agree(answers, tmp_path, capsys):
    status, found = doctor(tmp_path)
    assert status == 0
    assert found.agrees
    assert [check.name for check in found.checks] == list(plan.NAMES)
    assert state(found, "importance") == GOOD
    assert state(found, "seven-billion") == SKIPPED
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == "cpu: Emulated"
    assert "cpu works: All " in printed
    assert found.verdict in (tmp_path / "out" / "doctor.md").read_text().splitlines()[2]


def test_a_disagreement_is_exit_status_1_and_named(answers, tmp_path, capsys):
    answers["width:flap"] = {"agrees": False, "text": "973 dropped, 4 of which are others here"}
    status, found = doctor(tmp_path)
    assert status == 1
    assert not found.agrees
    assert state(found, "width:flap") == WRONG
    assert state(found, "width:wanda-sp") == GOOD
    printed = capsys.readouterr()
    assert "WRONG    Width pruning, FLAP: 973 dropped, 4 of which are others here" in printed.out
    assert "1 check did not pass on cpu: Width pruning, FLAP." in printed.err


def test_an_error_is_reported_with_its_reason_and_the_rest_goes_on(answers, tmp_path, capsys):
    answers["importance"] = {"error": "AcceleratorError: CUDA error: device-side assert"}
    answers["live"] = {"error": "not finished within 90 s", "late": True}
    status, found = doctor(tmp_path)
    assert status == 1
    assert [state(found, n) for n in ("importance", "live", "lora")] == [FAILED, FAILED, GOOD]
    said = "FAILED   Importance, all metrics, float32: AcceleratorError: CUDA error: device-side"
    assert said in capsys.readouterr().out


def test_json_is_one_document(answers, tmp_path, capsys):
    answers["lora"] = {"agrees": False, "text": "1 number"}
    status, found = doctor(tmp_path, "--json", "--only", "lora,refusal")
    document = json.loads(capsys.readouterr().out)
    assert status == 1
    assert document["agrees"] is False
    assert [check["name"] for check in document["checks"]] == ["lora", "refusal"]
    assert document["verdict"] == found.verdict


def test_a_missing_library_skips_its_checks(answers, tmp_path, monkeypatch):
    find = command.importlib.util.find_spec
    absent = ("lm_eval", "peft")
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a)
    )
    status, found = doctor(tmp_path)
    assert status == 0
    said = {check.name: check.text for check in found.checks if check.state == SKIPPED}
    assert said["tasks"] == "lm-eval is not installed"
    assert said["lora"] == "peft is not installed"
    assert "Zero-shot tasks" in found.verdict


def test_checks_beyond_the_time_limit_are_skipped_and_named(answers, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 8))
    monkeypatch.setattr(command.time, "monotonic", lambda: float(next(clock)))
    status, found = doctor(tmp_path, "--minutes", "3")
    late = [check for check in found.checks if "time limit of 3 minutes" in check.text]
    assert status == 0
    assert state(found, "arithmetic") == GOOD
    assert late
    assert all(check.title in found.verdict for check in late)


def test_a_check_cut_off_by_the_time_limit_is_not_held_against_the_device(answers, tmp_path):
    answers["arithmetic"] = lambda limit_s: {"error": f"not finished in {limit_s}", "late": True}
    status, found = doctor(tmp_path, "--minutes", "0.2", "--only", "arithmetic")
    assert status == 0
    assert found.checks[0].state == SKIPPED
    assert found.verdict.startswith("Nothing was compared on cpu.")


def test_a_gpu_that_auto_passes_over_does_not_pass(answers, tmp_path, monkeypatch, capsys):
    gpu = devices.Unusable("NVIDIA H100", "the driver is too old", "Update it.")
    monkeypatch.setattr(devices, "unusable", lambda **_: (gpu,))
    assert main(["doctor", "--out", str(tmp_path / "out")]) == 1
    assert "The device: NVIDIA H100 is present but cannot be used: the driver is too old." in (
        capsys.readouterr().out
    )


def test_a_device_that_does_not_exist_is_exit_status_2(answers, tmp_path, capsys):
    answers["machine"] = {"error": "--device: x", "input": True, "message": "--device: x.",
                          "hint": "Use cpu."}  # fmt: skip
    assert main(["doctor", "--out", str(tmp_path / "out")]) == 2
    assert "--device: x. Use cpu." in capsys.readouterr().err


def workers(monkeypatch, tmp_path, script: str, cancelled: Any = None) -> command.Workers:
    """Real processes that run ``script`` in place of the worker."""
    monkeypatch.setattr(command, "WORKER", ("-c", script))
    progress = SimpleNamespace(check_cancel=cancelled or (lambda: None))
    return command.Workers("cpu", tmp_path, SimpleNamespace(progress=progress))  # type: ignore[arg-type]


READY = "import sys; sys.stdin.readline(); print('{}', flush=True); sys.stdin.readline()\n"


def test_a_check_that_hangs_or_dies_is_an_answer_and_the_next_gets_a_new_process(
    monkeypatch, tmp_path
):
    hanging = workers(monkeypatch, tmp_path, READY + "import time; time.sleep(60)")
    assert hanging.ask("one", 0.3) == {"error": "not finished within 0 s", "late": True}
    assert hanging._process is None
    monkeypatch.setattr(command, "WORKER", ("-c", READY + "print('{\"agrees\": true}')"))
    assert hanging.ask("two", 20.0) == {"agrees": True}
    hanging.stop()
    (tmp_path / "dying").mkdir()
    dying = workers(
        monkeypatch, tmp_path / "dying", READY + "print('no room', file=sys.stderr); sys.exit(3)"
    )
    assert dying.ask("one", 20.0)["error"] == "its process ended with exit status 3: no room"
    killed = READY + "import os; os.kill(os.getpid(), 9)"
    monkeypatch.setattr(command, "WORKER", ("-c", killed))
    assert dying.ask("two", 20.0)["error"] == "its process ended with signal SIGKILL"


def test_cancelling_ends_the_process(monkeypatch, tmp_path):
    calls: list[int] = []

    def cancelled() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise Cancelled("Cancelled.")

    made = workers(monkeypatch, tmp_path, READY + "import time; time.sleep(60)", cancelled)
    with pytest.raises(Cancelled):
        made.ask("one", 20.0)
    process = made._process
    assert process is not None
    made.stop()
    assert process.poll() is not None


def test_the_real_worker_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    began = time.monotonic()
    chosen = "arithmetic,perplexity,live,width:flap,streamed,budget,refusal"
    status, found = doctor(tmp_path, "--only", chosen)
    assert status == 0, capsys.readouterr()
    assert [check.state for check in found.checks] == [GOOD] * 7
    assert found.machine.device == "cpu"
    assert found.machine.torch == torch.__version__
    assert found.machine.rates[0].matmul_flops_per_s > 1e8
    assert found.machine.rates[0].bandwidth_bytes_per_s > 1e7
    assert found.seconds <= round(time.monotonic() - began, 1)
    assert not list(tmp_path.glob("depthcut-doctor-*"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(torch.device("cpu"), tmp_path_factory.mktemp("bench"))


class Twin(Bench):
    """A second device, which is the CPU again: takes the way of a GPU."""

    def __init__(self, folder: Any) -> None:
        super().__init__(torch.device("cpu", 0), folder)
        self.is_cpu = False

    def run(self, name: str, on: torch.device, key: str = "", **options: Any) -> Any:
        twin = f"{key or name}-twin" if on == self.device else key
        return super().run(name, torch.device("cpu"), twin, **options)


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    return Twin(tmp_path_factory.mktemp("twin"))


def test_the_plain_way_of_every_metric_agrees(bench, monkeypatch):
    monkeypatch.setattr(checks, "ROUNDS", 1)
    monkeypatch.setattr(checks, "SAMPLES", 2)
    outcome = checks.importance(bench)
    assert outcome.agrees, outcome.text


@pytest.mark.parametrize("name", ["perplexity", "live", "width:magnitude", "tasks", "own_process"])
def test_a_device_is_compared_with_the_cpu(twin, name):
    answer = worker._check(twin, {"check": name})
    assert answer["agrees"], answer["text"]
    assert "the CPU" in answer["text"]


@pytest.mark.usefixtures("prepared_runs")
def test_two_processes_are_compared_with_one(bench, monkeypatch):
    """With this process as the first of each two, which is sooner than starting another."""

    def here(bench, command, spec):
        return None if execute(commands.get(command), spec) == 0 else checks.Outcome(False, "")

    monkeypatch.setattr(checks, "_in_own_process", here)
    monkeypatch.setattr(checks, "SAMPLES", 3)
    monkeypatch.setattr(checks, "ROUNDS", 1)
    outcome = checks.several(bench)
    assert outcome.agrees, outcome.text
    assert "those of one process by at most" in outcome.text
    assert "; training with split weights by at most" in outcome.text


def test_it_is_skipped_without_two_gpus(monkeypatch, tmp_path):
    check = next(check for check in plan.CHECKS if check.name == "several")
    doctor = command.Doctor(command.DoctorSpec(out=str(tmp_path)), None, print)
    doctor.machine = command.Machine(device="cuda:0")
    monkeypatch.setattr(command.devices, "gpu_names", lambda: ("cuda:0",))
    assert doctor._check(check, None).text == "only with 2 GPUs; there is 1"
    doctor.machine = command.Machine(device="cpu")
    assert doctor._check(check, None).text == "only on an NVIDIA or AMD GPU"


def test_wrong_numbers_do_not_pass(bench, monkeypatch):
    monkeypatch.setattr(checks, "_ppl", lambda folder: 2.40)
    monkeypatch.setattr(plain, "perplexity", lambda model, rows: 2.41)
    outcome = checks.perplexity(bench)
    assert not outcome.agrees
    assert "differs from plain transformers by 4.1e-03" in outcome.text


def test_other_units_do_not_pass(twin, monkeypatch):
    real = checks.WidthPruning.read

    def read(folder):
        found = real(folder)
        return replace(found, blocks=found.blocks[:-3]) if "twin" in folder.name else found

    monkeypatch.setattr(checks.WidthPruning, "read", staticmethod(read))
    outcome = checks.width(twin, "random")
    assert not outcome.agrees
    assert "dropped, 512 on the CPU; 64 are dropped on only one of the two" in outcome.text


@pytest.mark.parametrize(
    ("reference", "found", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.02], 0.01),
        ([1.0, 2.0], [1.0, float("nan")], float("inf")),
        ([1.0, 2.0], [1.0], float("inf")),
        ([100.0, 100.0, 1e-9], [100.0, 100.0, 1e-3], 2e-4),  # compared with 5% of the median
    ],
)
def test_differences_are_relative(reference, found, expected):
    off, where = checks.differ({"a": reference}, {"a": found})
    assert off == pytest.approx(expected, rel=1e-3)
    assert where == "a"


def test_every_check_has_a_function():
    for check in plan.CHECKS:
        name = check.function.partition(":")[0]
        assert callable(getattr(paths, name, None) or getattr(checks, name))
    assert COMMANDS["doctor"].computes


def test_an_error_in_a_check_is_an_answer(tmp_path):
    path = tmp_path / "answers"
    with path.open("w") as handle:

        def fail() -> None:
            raise RuntimeError("CUDA error: device-side assert triggered\nmore")

        assert worker._answer(handle, fail) is None
    answer = json.loads(path.read_text())
    assert answer["error"].startswith("RuntimeError: CUDA error: device-side assert triggered")
    assert answer["works"] is True


def test_the_worker_ends_with_its_caller():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, *command.WORKER], stdin=subprocess.DEVNULL, timeout=60,
        cwd=processes.PROJECT, capture_output=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0
