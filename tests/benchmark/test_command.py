"""The benchmark command in whole: files, columns, order, and real out-of-memory errors."""

from __future__ import annotations

import csv
import json
import statistics

import pytest
import torch

from core.__main__ import main
from core.benchmark import analytic, command, worker
from core.checkpoint import headers
from core.runs import warm
from core.runs.device_lock import DeviceLock

pytestmark = pytest.mark.usefixtures("prepared_runs")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A function that runs the command and returns points.csv, runs.csv and summary.json."""
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))

    def run(*arguments):
        out = tmp_path / "out"
        command = ["benchmark", *map(str, arguments), "--out", str(out), "--device", "cpu"]
        assert main(command) == 0, (out / ".run" / "log.txt").read_text()
        return read(out)

    return run


def read(out):
    with (out / "points.csv").open() as handle:
        points = list(csv.DictReader(handle))
    with (out / "runs.csv").open() as handle:
        runs = list(csv.DictReader(handle))
    return points, runs, json.loads((out / "summary.json").read_text())


def narrowed(folder, out):
    """Write a width-pruned checkpoint whose blocks have shapes of their own."""
    given = ["width", str(folder), "--method", "flap", "--ratio", "0.3", "--out", str(out)]
    assert main([*given, "--device", "cpu", "--samples", "4", "--length", "16"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "depthcut_llama"
    return out


def test_two_variants_are_measured_twice_in_reversed_order(bench, tmp_path, tiny_dir):
    one, two = tiny_dir("gqa"), narrowed(tiny_dir("gqa"), tmp_path / "flap")
    points, runs, summary = bench(
        one, two, "--batch-sizes", "1,3", "--output-tokens", "8", "--runs", "5",
        "--warmup", "2",
    )  # fmt: skip
    assert summary["order"] == ["gqa", "flap", "flap", "gqa"]
    assert [(p["variant"], p["batch_size"]) for p in points] == [
        ("gqa", "1"), ("gqa", "3"), ("flap", "1"), ("flap", "3"),
    ]  # fmt: skip
    for point in points:
        mine = [
            float(r["latency_s"])
            for r in runs
            if (r["variant"], r["batch_size"]) == (point["variant"], point["batch_size"])
        ]
        assert len(mine) == int(point["runs"]) == 5
        assert float(point["latency_s_mean"]) == pytest.approx(statistics.fmean(mine))
        rate = int(point["batch_size"]) * 8 / float(point["latency_s_mean"])
        assert float(point["tokens_per_s"]) == pytest.approx(rate)
        assert point["oom"] == "false"
        assert float(point["utilisation_pct"]) > 0
        assert float(point["process_mib"]) > float(point["reserved_mib"]) > 0
        guess = float(point["estimated_memory_mib"])
        assert guess == pytest.approx(float(point["peak_memory_mib"]), rel=0.15)
    assert summary["peak_memory"] == "tensors"
    for variant, folder in zip(summary["variants"], (one, two), strict=True):
        info = headers.inspect(folder)
        assert variant["weight_bytes"] == analytic.weight_bytes(info, "float32")
        assert variant["weight_bytes"] == info.memory_bytes["float32"]
    pairs = [(float(p["estimated_latency_s"]), float(p["latency_s_mean"])) for p in points]
    worst = max(100 * abs(e / m - 1) for e, m in pairs)
    assert summary["analytic"]["latency"]["worst_error_pct"] == pytest.approx(worst)


def once_refused(start):
    """A template's ``start`` that refuses once: that worker is started as on other systems."""
    asked = []

    def refusing(*arguments, **options):
        asked.append(arguments)
        return start(*arguments, **options) if len(asked) > 1 else None

    return refusing


def test_running_out_of_memory_is_a_result(bench, tiny_dir, monkeypatch):
    monkeypatch.setattr(warm.Template, "start", once_refused(warm.Template.start))
    folder = tiny_dir("gqa", vocab_size=20000)
    points, _, summary = bench(
        folder, "--batch-sizes", "1,1000,2000", "--output-tokens", "2", "--runs", "2",
        "--warmup", "0", "--memory-limit-mib", "200", "--random-weights", "--time-limit-s", "600",
    )  # fmt: skip
    assert [(p["batch_size"], p["oom"]) for p in points] == [("1", "false"), ("1000", "true")]
    assert points[1]["latency_s_mean"] == ""
    assert [s["batch_size"] for s in summary["skipped"]] == [2000]
    largest = summary["variants"][0]["largest_batch"]
    assert 1 < largest["batch_size"] < largest["fails_at"] <= 1000


def test_a_dry_run_says_what_will_run_from_a_config(tmp_path, tiny_dir, capsys):
    (tmp_path / "config.json").write_text((tiny_dir("gqa") / "config.json").read_text())
    arguments = ["benchmark", str(tmp_path), "--out", str(tmp_path / "x"), "--dry-run"]
    assert main([*arguments, "--random-weights", "--batch-sizes", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    info = headers.inspect(tmp_path)
    weights = analytic.weight_bytes(info, "float32") / 2**20
    assert said["points"][0]["weights_mib"] == pytest.approx(weights, abs=0.01)
    assert said["generations"] == 30
    assert not (tmp_path / "x").exists()


def test_a_variant_deleted_meanwhile_is_told_before_waiting_for_the_device(
    tmp_path, tiny_dir, capsys, monkeypatch
):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    busy = DeviceLock("cpu", {"run": "another"})
    busy.acquire()
    given = [str(tiny_dir("gqa")), str(tmp_path / "gone"), "--device", "cpu"]
    assert main(["benchmark", *given, "--out", str(tmp_path / "x")]) == 2
    found = capsys.readouterr().err
    assert f"There is no folder {tmp_path / 'gone'}" in found
    assert "Waiting" not in found
    busy.release()


def test_too_long_for_the_context_is_one_sentence(tmp_path, tiny_dir, capsys):
    folder = str(tiny_dir("gqa"))
    assert main(["benchmark", folder, "--out", str(tmp_path / "x"), "--output-tokens", "300"]) == 2
    assert "312 tokens" in capsys.readouterr().err


def compiled_of(out):
    with (out / "compiled.csv").open() as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def in_process(monkeypatch):
    """Have the workers' work done here, so that a test can say what compiling does."""

    def talk(request, progress, template=None):
        told = []
        worker.work(worker.Request(**request), lambda kind, **values: told.append((kind, values)))
        yield from ({"event": kind, **json.loads(json.dumps(values))} for kind, values in told)
        yield {"event": "ended", "status": 0}

    monkeypatch.setattr(command, "_talk", talk)


def test_compiled_steps_are_a_series_of_their_own(
    bench, tmp_path, tiny_dir, monkeypatch, in_process
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda step, **_: compiled.append(step) or step)
    one, two = tiny_dir("gqa"), narrowed(tiny_dir("gqa"), tmp_path / "flap")
    points, _, summary = bench(
        one, two, "--batch-sizes", "1,2", "--output-tokens", "6", "--runs", "4",
        "--warmup", "2", "--compile",
    )  # fmt: skip
    rows = compiled_of(tmp_path / "out")
    assert [(r["variant"], r["batch_size"], r["visits"], r["runs"]) for r in rows] == [
        (p["variant"], p["batch_size"], "2", "4") for p in points
    ]
    assert len(compiled) >= 2
    assert all(float(r["compile_s"]) > 0 and float(r["latency_s_p50"]) > 0 for r in rows)
    assert all(float(p["latency_s_p50"]) > 0 and p["runs"] == "4" for p in points)
    assert summary["compiled"]
    assert summary["order"] == ["gqa", "flap", "flap", "gqa"]
    assert not any(v["uncompiled"] for v in summary["variants"])


def test_a_model_that_cannot_be_compiled_keeps_its_eager_points(
    bench, tmp_path, tiny_dir, monkeypatch, in_process
):
    def refuse(step, **_):
        raise RuntimeError("\nNo working C++ compiler was found.\nA long traceback")

    monkeypatch.setattr(torch, "compile", refuse)
    points, _, summary = bench(
        tiny_dir("gqa"), "--batch-sizes", "1", "--output-tokens", "6", "--runs", "4",
        "--warmup", "2", "--compile",
    )  # fmt: skip
    assert float(points[0]["latency_s_p50"]) > 0
    failed = summary["variants"][0]["uncompiled"]
    assert failed == "RuntimeError: No working C++ compiler was found."
    assert compiled_of(tmp_path / "out") == []
