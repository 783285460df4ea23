"""The command line: help, one-sentence errors, exit statuses, what is printed where, no torch."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from core import __version__, commands, noise, reference
from core.__main__ import main
from core.runs import jobs
from core.runs.workspace import read_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def refused(capsys, *argv):
    """Call with bad input and return the one sentence that it is answered with."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("Error: ")
    assert "Traceback" not in captured.err
    return lines[-1]


def test_help_names_every_command_and_option(capsys):
    for argv in ([], ["--help"], ["help"]):
        assert main(argv) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^  {name} ", text, re.M) for name in commands.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    with pytest.raises(SystemExit) as caught:
        main(["prune", "--help"])
    assert caught.value.code == 0
    assert "--drop" in capsys.readouterr().out


def test_libraries_do_not_warn_of_what_means_nothing_here(monkeypatch, capsys):
    loggers = [logging.getLogger(name) for name in noise.LOGGERS]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.WARNING)
        logger.manager._clear_cache()
    assert main(["--version"]) == 0
    assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
    assert all(logger.isEnabledFor(logging.ERROR) for logger in loggers)


def test_the_reference_in_docs_is_true():
    written = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    assert written == reference.markdown(), "python -m core.reference > docs/command-line.md"


def test_the_reference_has_every_flag():
    text = reference.markdown()
    for command in commands.COMMANDS.values():
        section = text.split(f"\n## {command.name}\n")[1].split("\n## ")[0]
        for name in command.spec_class.__dataclass_fields__:
            flag, word = "--" + name.replace("_", "-"), name.upper()
            assert f"`{flag}" in section or f"`{word}`" in section


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["frob"], "Unknown command 'frob'. Commands: inspect, import, importance"),
        (["inspect"], "CHECKPOINT. See: python -m core inspect --help."),
        (["inspect", "demo", "--frob", "3"], "--frob"),
        (["importance", "demo"], "required: --out."),
        (
            ["importance", "demo", "--out", "x", "--samples", "0"],
            "--samples: 0 is too small.",
        ),
        (["importance", "demo", "--out", "x", "--sam", "3"], "--sam"),
        (["importance", "demo", "--out", "x", "--dtype", "int4"], "--dtype: unknown value 'int4'"),
        (
            ["importance", "demo", "--out", "x", "--metrics", "ppl,luck"],
            "unknown value 'luck'",
        ),
        (["prune", "demo", "--out", "x", "--drop", "3,b"], "--drop: 'b' is not a whole number"),
        (["prune", "demo", "--out"], "--out: expected one argument"),
        (["prune"], "CHECKPOINT, --out"),
        (["jobs", "destroy"], "ACTION: unknown value 'destroy'. Choose from: list"),
        (["jobs", "show"], "jobs show needs a run"),
        (["inspect", "no/such/place"], "no/such/place"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, words):
    assert words in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        (["--drop", "0-4"], "5"),  # all
        (["--drop", "5"], "5"),  # out of range
        (["--drop=-1"], "-1"),
        (["--drop", "2,2"], "2"),
        ([], "Neither --drop nor --plan"),
        (["--drop", ""], "Neither --drop nor --plan"),
        (["--plan", "no-such-plan.json"], "no-such-plan.json"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_blocks_that_cannot_be_dropped(capsys, tmp_path, tiny_gqa, drop, words, dry):
    out = tmp_path / "out"
    argv = ["prune", tiny_gqa, *drop, "--out", out, *(["--dry-run"] if dry else [])]
    assert words in refused(capsys, *argv)
    assert not (out / "config.json").exists()
    if dry:
        assert not out.exists()
    else:
        assert read_run(out).state == "failed"
        assert sorted(p.name for p in out.iterdir()) == [".run"]


def test_a_dry_run_prints_json_and_writes_nothing(capsys, tmp_path, tiny_gqa):
    out = tmp_path / "out"
    assert main(["prune", str(tiny_gqa), "--drop", "1,3", "--out", str(out), "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main(["prune", str(tiny_gqa), "--drop", "1,3", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Wrote 3 of 5 blocks" in captured.err
    weights = load_file(out / "model.safetensors")
    assert told["parameters_after"] == sum(w.numel() for w in weights.values())


def test_a_variant_is_not_overwritten_unasked(capsys, tmp_path, tiny_gqa):
    out = tmp_path / "out"
    argv = ["prune", str(tiny_gqa), "--out", str(out)]
    assert main([*argv, "--drop", "1"]) == 0
    before = (out / "model.safetensors").read_bytes()
    assert "exists and is not empty" in refused(capsys, *argv, "--drop", "2,3")
    assert (out / "model.safetensors").read_bytes() == before
    assert main([*argv, "--drop", "2,3", "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3


def test_options_and_places_come_in_any_order(capsys, tiny_gqa, tmp_path):
    flags = ["--dry-run", "--out", str(tmp_path / "x")]
    assert main(["prune", "--drop", "1", str(tiny_gqa), *flags]) == 0
    one = capsys.readouterr().out
    assert main(["prune", *flags, str(tiny_gqa), "--drop=1"]) == 0
    assert capsys.readouterr().out == one


def test_nan_in_the_weights_names_the_tensor(capsys, tmp_path, tiny_dir):
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_dir("gqa"), folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    weights[name][5, 7] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "text.txt").write_text("Ann sees the red ball in the garden by the river.\n" * 20)
    argv = ["importance", folder, "--calibration", tmp_path / "text.txt", "--samples", "2"]
    argv += ["--length", "8", "--out", tmp_path / "out", "--device", "cpu"]
    assert main([str(a) for a in argv]) == 1
    assert f"Error: NaN or infinity in the weights: {name}." in capsys.readouterr().err
    record = read_run(tmp_path / "out")
    assert record.state == "failed"
    assert name in record.error
    assert not (tmp_path / "out/blocks.csv").exists()


def test_an_unexpected_error_is_one_sentence_too(capsys, monkeypatch):
    from core.checkpoint import inspect_command

    def broken(_):
        raise ZeroDivisionError("seven by zero")

    monkeypatch.setattr(inspect_command, "run", broken)
    assert main(["inspect", "demo"]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "Error: Unexpected ZeroDivisionError: seven by zero. "
        "DEPTHCUT_DEBUG=1 shows the traceback.\n"
    )
    monkeypatch.setenv("DEPTHCUT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "demo"])


NO_TORCH = """
import sys
from core.__main__ import main
import json
for argv in json.loads(sys.argv[1]):
    status = main(argv)
    heavy = {"torch", "transformers", "streamlit", "pandas"} & set(sys.modules)
    assert status == 0 and not heavy, (argv, status, heavy)
"""


def test_light_commands_import_no_torch(tmp_path, tiny_gqa):
    scores = tmp_path / "scores.csv"
    scores.write_text("block,score\n" + "".join(f"{i},{5 - i}\n" for i in range(5)))
    (tmp_path / "text.txt").write_text(tiny.text())
    model, out, text = str(tiny_gqa), str(tmp_path / "out"), str(tmp_path / "text.txt")
    calls = [
        ["inspect", model],
        ["plan", str(scores), "--criterion", "ppl", "--count", "2"],
        ["prune", model, "--drop", "2", "--out", out],
        ["inspect", out],
        ["jobs", "list"],
        ["jobs", "show", out],
        ["jobs", "cancel", out],
        ["--help"],
    ]
    dry = {
        "retrain": ["--data", text, "--cutoff", "32"],
        "importance": ["--calibration", text],
        "curve": ["--calibration", text, "--scores", str(scores), "--criteria", "ppl"],
        "prune": ["--drop", "1"],
        "width": ["--method", "wanda-sp", "--ratio", "0.3", "--calibration", text],
        "evaluate": ["--perplexity", text, "--window", "32"],
        "export": ["--format", "gguf"],
        "quantize": ["--bits", "8"],
        "generate": ["--prompts", text, "--max-tokens", "9", "--prompt-tokens", "4"],
    }
    for name, command in commands.COMMANDS.items():
        if "dry_run" in command.spec_class.__dataclass_fields__:
            extra = ["--out", f"{out}-{name}", "--dry-run", *dry.get(name, [])]
            calls.append([name, "smollm2" if name == "import" else model, *extra])
    argv = [sys.executable, "-c", NO_TORCH, json.dumps(calls)]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("out-")]


def test_pages_read_runs_and_specs_without_torch():
    code = (
        "import sys, core.runs.run, core.runs.jobs, core.runs.workspace, core.runs.device_lock\n"
        "import core.reference\n"
        "core.reference.markdown()\n"
        "assert not {'torch', 'transformers', 'streamlit'} & set(sys.modules)"
    )
    argv = [sys.executable, "-c", code]
    ended = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_reader_that_leaves_is_no_error(tiny_gqa):
    command = f"{sys.executable} -m core inspect {tiny_gqa} | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr


def test_importance_stops_within_a_block(place, tmp_path, tiny_gqa):
    """Far more work than can be done here: the run must look up inside a block to stop soon."""
    (tmp_path / "text.txt").write_text("Ann sees the red ball in the garden by the river.\n" * 4000)
    options = {"calibration": str(tmp_path / "text.txt"), "samples": 3000, "length": 9}
    given = {"checkpoint": str(tiny_gqa), "device": "cpu", "metrics": ("ppl",)}
    record = jobs.launch("importance", {**given, **options, "seed": 0}, place)
    deadline = time.monotonic() + 90
    while not read_run(record.path).progress[1]:
        now = read_run(record.path)
        assert now.is_live, now.log_tail()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ended = jobs.cancel(read_run(record.path), grace_s=15)  # then it would be killed
    assert ended.state == "cancelled"
    assert ended.error == "Cancelled."
    assert not (record.path / "blocks.csv").exists()
    assert os.listdir(record.path) == [".run"]
