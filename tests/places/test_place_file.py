"""places.yaml is read strictly, and what a run reads is found among its options."""

from __future__ import annotations

import dataclasses

import pytest

from core import commands
from core.errors import PlaceError
from core.places import inputs, slurm
from core.places import place as place_file
from core.places.place import Place, from_dict
from core.runs import jobs
from core.runs.spec import hints_of, kind_of

GOOD = """
box:
  kind: ssh
  host: gpu.example
  user: ada
  port: 2222
  environment: {HF_HOME: /scratch/hf, OMP_NUM_THREADS: 4}
farm:
  kind: slurm
  partition: gpu
  time: "04:00:00"
  gres: gpu:a100:1
  modules: [cuda/12.4]
  requeue: 3
"""


def test_a_file_is_read_and_written(tmp_path):
    (tmp_path / "places.yaml").write_text(GOOD)
    found = place_file.read(tmp_path)
    assert found["box"].environment == {"HF_HOME": "/scratch/hf", "OMP_NUM_THREADS": "4"}
    assert found["farm"].modules == ("cuda/12.4",)
    assert [p.text for p in found.values()] == [
        "ada@gpu.example over SSH",
        "SLURM (partition gpu, gpu:a100:1)",
    ]
    place_file.save(found, tmp_path)
    assert place_file.read(tmp_path) == found
    assert place_file.find("farm", tmp_path).with_ask({"place": "farm", "gpus": 2}).gpus == 2
    with pytest.raises(PlaceError, match=r"Unknown place 'moon'\. Places: box, farm\."):
        place_file.find("moon", tmp_path)
    assert place_file.read(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("place", "ask", "run", "words"),
    [
        ({"gpus": 1}, {}, {"processes": 1}, ["--gpus=1"]),
        ({"gpus": 1}, {}, {"processes": 4}, ["--gpus=4", "--cpus-per-task=4"]),
        ({"gpus": 8, "cpus": 32}, {}, {"processes": 4}, ["--gpus=8", "--cpus-per-task=32"]),
        ({}, {"gpus": 6}, {"processes": 4}, ["--gpus=6", "--cpus-per-task=4"]),
        ({}, {}, {"processes": 4, "device": "cuda"}, ["--gpus=4", "--cpus-per-task=4"]),
        ({}, {}, {"processes": 4, "device": "auto"}, ["--cpus-per-task=4"]),
        ({"gpus": 1}, {}, {"processes": 2, "device": "cpu"}, ["--gpus=1", "--cpus-per-task=2"]),
        ({"gres": "gpu:a100:1"}, {}, {"processes": 4}, ["--gres=gpu:a100:4", "--cpus-per-task=4"]),
        ({"gres": "lic:2,gpu"}, {"gpus": 3}, {"processes": 2},
         ["--gres=lic:2,gpu:3", "--cpus-per-task=2"]),
        ({"gpus": 1}, {"nodes": 2}, {"processes": 4},
         ["--gpus-per-node=2", "--cpus-per-task=2"]),
        ({"gres": "gpu:a100:1"}, {"nodes": 2, "gpus": 8}, {"processes": 4},
         ["--gres=gpu:a100:4", "--cpus-per-task=2"]),
    ],
)  # fmt: skip
def test_a_job_asks_for_what_its_processes_need(place, ask, run, words):
    farm = from_dict("farm", {"kind": "slurm", **place}).for_run(ask, run)
    found = slurm.options(farm.to_dict(), "a", "log", 60)
    mine = ("--gres", "--gpus", "--cpus")
    assert [word for word in found if word.startswith(mine)] == words


def test_fewer_gpus_than_processes_are_refused_before_the_run_starts(tmp_path):
    place_file.save({"farm": from_dict("farm", {"kind": "slurm"})}, tmp_path)
    with pytest.raises(PlaceError) as error:
        jobs.launcher_at({"place": "farm", "gpus": 2}, tmp_path, spec={"processes": 4})
    assert str(error.value) == (
        "Place farm: 4 processes take a GPU each, but --gpus 2 asks for fewer. "
        "Use --gpus 4, --processes 2, or --device cpu."
    )
    jobs.launcher_at({"place": "farm", "gpus": 2}, tmp_path, spec={"processes": 2})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- box", "does not list places by name"),
        ("box: [1", "is not valid YAML"),
        ("box: 3", "Place box is not a list of settings"),
        ("box: {kind: ssh}", "Place box: host is missing"),
        ("box: {kind: moon, host: a}", "unknown kind 'moon'"),
        ("box: {kind: ssh, host: a, password: x}", "unknown setting 'password'"),
        ("box: {kind: ssh, host: -oProxyCommand=x}", "host: invalid value"),
        ("box: {kind: ssh, host: 'a b'}", "host: invalid value 'a b'"),
        ("box: {kind: ssh, host: a, port: '22'}", "port: invalid value '22'"),
        ("box: {kind: ssh, host: a, port: 70000}", "Give a number from 0 to 65,535"),
        ("box: {kind: ssh, host: a, folder: there}", "begins with / or ~/"),
        ("box: {kind: ssh, host: a, partition: gpu}", "partition is for SLURM"),
        ("'-x': {kind: ssh, host: a}", "cannot be the name of a place"),
        ("farm: {kind: slurm, partition: 'a;b'}", "partition: invalid value 'a;b'"),
        ("farm: {kind: slurm, time: 4:00:00}", "Put the time in quotes"),
        ("farm: {kind: slurm, modules: cuda}", "Give a list of names"),
        ("farm: {kind: slurm, environment: {A B: x}}", "environment: invalid value 'A B'"),
        ('farm: {kind: slurm, environment: {A: "x\\ny"}}', "Give one line of text"),
        ("farm: {kind: slurm, environment: {A: yes}}", "put words in quotes"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(text, sentence, tmp_path):
    (tmp_path / "places.yaml").write_text(text)
    with pytest.raises(PlaceError) as error:
        place_file.read(tmp_path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_every_option_that_is_text_is_known_as_something_to_read_or_not():
    for command in commands.COMMANDS.values():
        if not command.goes_elsewhere:
            continue
        hints = hints_of(command.spec_class)
        for field in dataclasses.fields(command.spec_class):
            text = kind_of(hints[field.name])[0] is str and not field.metadata["choices"]
            if text and field.name not in ("out", "device", "dtype"):
                known = field.name in (*inputs.READS, *inputs.OTHERS)
                assert known, f"{command.name} --{field.name}: add it to core/places/inputs.py"


def test_inputs_are_found_and_named_as_they_are_there(tmp_path, tiny_gqa):
    runs = tmp_path / "workspace"
    (runs / "importance-1" / ".run").mkdir(parents=True)
    (runs / "importance-1" / ".run" / "spec.json").write_text('{"command": "importance"}')
    (tmp_path / "my text.jsonl").write_text("{}")
    spec = {
        "checkpoint": str(tiny_gqa),
        "scores": "importance-1",
        "calibration": "my text.jsonl::body",
    }
    found = inputs.stage("curve", spec, "/r/curve-2", "/r", runs, tmp_path)
    assert found.spec["out"] == "/r/curve-2"
    assert found.spec["scores"] == "/r/importance-1"
    text = found.spec["calibration"]
    assert text.startswith("/r/inputs/")
    assert text.endswith("/my-text.jsonl::body")
    assert found.spec["checkpoint"].startswith("/r/inputs/")
    assert [one.run for one in found.inputs] == ["", "/r/importance-1", ""] or len(
        found.inputs
    ) == 3
    assert {str(one.here) for one in found.inputs} == {
        str(tiny_gqa), str(runs / "importance-1"), str(tmp_path / "my text.jsonl")
    }  # fmt: skip
    same = {"checkpoint": "demo", "calibration": "auto", "data": "hub:wikitext", "dense": "a/b"}
    assert inputs.stage("retrain", same, "/o", "/r", runs, tmp_path).inputs == ()


def test_files_among_the_values_of_a_grid_are_inputs_too(tmp_path):
    (tmp_path / "mine.txt").write_text("words")
    grid = ("data=demo,mine.txt", "lr=1e-3,3e-3")
    staged = inputs.stage("recipe", {"grid": grid}, "/r/out", "/r", tmp_path / "w", tmp_path)
    (needed,) = staged.inputs
    assert needed.here == tmp_path / "mine.txt"
    assert staged.spec["grid"] == [f"data=demo,{needed.there}", "lr=1e-3,3e-3"]


def test_a_job_script_quotes_what_it_is_given():
    words = ["/a b/python", "-m", "core", "prune", "x;y", "--out", "$HOME"]
    text = slurm.script(words, {"A": "it's $x"}, ["cuda/12"], resumes=True)
    assert "export A='it'\"'\"'s $x'" in text
    assert "exec '/a b/python' -m core prune \"$@\" 'x;y' --out '$HOME'" in text
    assert text.startswith("#!/bin/bash -l\nmodule load cuda/12 || exit 1\n")
    given = slurm.options(Place(name="f", kind="slurm", gpus=2).to_dict(), "n", "/p%j/l", 60)
    assert "--output=/p%%j/l" in given
    assert "--gpus=2" in given
    assert "--signal=B:USR1@60" in given
    limits = ("30", "30:15", "2:30:15", "1-2", "1-2:30", "1-2:30:15", "UNLIMITED", "")
    known = [1800, 1815, 9015, 93600, 95400, 95415, 0, 0]
    assert [slurm.seconds(limit) for limit in limits] == known
    assert from_dict("f", {"kind": "slurm"}).signal_s == 180
