"""Whether a run fits, streams or cannot run; and that a streamed run leaves the same files."""

import dataclasses
import json

import pytest
import tiny

from core import commands
from core.__main__ import main
from core.budget import command as budget_command
from core.budget import demand
from core.checkpoint import headers
from core.heal import command as heal_command
from core.heal import demand as heal_demand
from core.importance import capacity, curve_command, forward
from core.importance import command as importance
from core.prune import budgets
from core.prune.version_results import (
    VERSIONS,
    WHOLE,
    Budget,
    PlanCheck,
    VersionRow,
    latency_errors,
)
from core.runs import footprint, run, scratch_file
from core.runs.dtypes import Formats
from core.runs.progress import SILENT
from core.runs.spec import build
from core.search import command as search_command
from core.search.results import HeldoutRow
from core.width import command as width_command

F32 = Formats("float32", "float32")
METRICS = ("ppl", "kl", "taylor", "magnitude", "block-influence", "angular")


def decided(info, limit, rows=10, metrics=METRICS, tokens=24):
    found = importance.demands(info, metrics)
    return capacity.decide(info, F32, "cpu", limit, rows, tokens, found)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text(200, seed=3), encoding="utf-8")
    return str(path)


@pytest.fixture
def bare(monkeypatch):
    """Without the interpreter and the fixed buffers, beside which a tiny model is nothing."""
    monkeypatch.setattr(footprint, "PROCESS_BYTES", {"cpu": 0, "gpu": 0})
    monkeypatch.setattr(capacity, "LOGITS_BYTES", {"cpu": 0, "gpu": 0})


def test_fits_streams_in_one_pass_or_several_or_cannot(tiny_dir, bare):
    info = headers.inspect(tiny_dir("gqa"))
    open_ = decided(info, None)
    assert (open_.way, open_.rows, open_.groups) == ("fits", 10, 1)
    assert decided(info, open_.in_memory_bytes).way == "fits"
    tight = decided(info, open_.streamed_bytes)
    assert open_.streamed_bytes < open_.in_memory_bytes
    assert (tight.way, tight.rows, tight.groups, tight.group) == ("streams", 10, 1, 0)
    tight.check()
    few = decided(info, tight.least_bytes, metrics=("ppl",), rows=400)
    least = decided(info, 1, metrics=("ppl",), rows=400).least_bytes
    few = decided(info, least, metrics=("ppl",), rows=400)
    assert (few.way, few.rows, few.groups, few.group) == ("streams", 1, 400, 1)
    none = decided(info, least - 1, metrics=("ppl",), rows=400)
    assert none.way == "cannot"
    with pytest.raises(capacity.OptionError, match="are too little; even block by block"):
        none.check()


def test_rows_are_held_in_chunks_that_go_through_a_block_together(tiny_dir, bare):
    info = headers.inspect(tiny_dir("gqa"))
    chunk = round(capacity.CPU_TOKENS / 24)
    open_ = decided(info, None, rows=4000, metrics=("ppl",))
    for share in (0.3, 0.5, 0.9):
        found = decided(info, round(share * open_.streamed_bytes), rows=4000, metrics=("ppl",))
        assert found.rows % chunk == 0
        assert found.streamed_bytes <= found.limit_bytes or not found.streams
        assert found.groups == -(-4000 // found.rows)


def test_taylor_needs_the_states_of_all_rows(tiny_dir, bare):
    info = headers.inspect(tiny_dir("gqa"))
    one = decided(info, 1, metrics=("taylor",), rows=1)
    many = decided(info, 1, metrics=("taylor",), rows=100)
    state = 24 * 32 * 4
    assert many.least_bytes - one.least_bytes >= 99 * state * (info.blocks + 3)


def ran(folder, out, text, command="importance", **options):
    values = {"checkpoint": str(folder), "out": str(out), "calibration": text, "samples": 7,
              "length": 12, "device": "cpu"}  # fmt: skip
    known = commands.get(command)
    assert run.execute(known, build(known.spec_class, values | options)) == 0
    return out


@pytest.fixture
def streaming(monkeypatch):
    """A function after which the runs of a module stream their weights, whatever the memory."""

    def switch(module):
        def decide(*arguments):
            return dataclasses.replace(capacity.decide(*arguments), way="streams")

        monkeypatch.setattr(module, "decide", decide)

    return switch


HEALED = {"samples": 40, "length": 16}
HEALS = {"heal": "refit", "heal_samples": 40, "heal_length": 16}


@pytest.mark.parametrize(
    ("command", "options", "files"),
    [
        ("importance", {"metrics": METRICS},
         ("blocks.csv", "weights.csv", "samples.csv", "angular.csv")),
        ("width", {"method": "flap", "ratio": 0.5}, ("model.safetensors",)),
        ("width", {"method": "wanda-sp", "ratio": 0.5}, ("model.safetensors",)),
        ("width", {"method": "llm-pruner", "ratio": 0.5}, ("model.safetensors",)),
        ("width", {"method": "magnitude", "ratio": 0.5}, ("model.safetensors",)),
        ("width", HEALS | {"method": "flap", "ratio": 0.5}, ("model.safetensors",)),
        ("width", HEALS | {"method": "magnitude", "ratio": 0.4}, ("model.safetensors",)),
        ("curve", {"criteria": ("ppl",)}, ("curve.csv",)),
        ("search", {"counts": (1, 2), "methods": ("greedy", "pairs")},
         ("pairs.csv", "heldout_rows.csv")),
        ("search", {"counts": (2,), "methods": ("one-shot",), "units": "sublayer"},
         ("heldout_rows.csv",)),
        ("search", HEALED | {"counts": (1, 2), "methods": ("greedy",), "heal": "refit"},
         ("heldout_rows.csv",)),
        ("search", HEALED | {"counts": (2,), "methods": ("one-shot",), "heal": "scale"},
         ("heldout_rows.csv",)),
        ("prune", HEALED | {"drop": (2, 4), "heal": "auto"}, ("model.safetensors",)),
        ("prune", HEALED | {"drop": (2,), "heal": "scale"}, ("model.safetensors",)),
        ("prune", HEALED | {"attention": (1,), "mlp": (2, 3), "heal": "refit"},
         ("model.safetensors",)),
    ],
)  # fmt: skip
def test_a_streamed_run_leaves_the_same_files(
    tiny_gqa, tmp_path, text, streaming, command, options, files
):
    if command == "curve":
        options |= {"scores": str(ran(tiny_gqa, tmp_path / "scores", text, metrics=("ppl",)))}
    here = ran(tiny_gqa, tmp_path / "here", text, command, **options)
    for module in (importance, curve_command, width_command, search_command, heal_command):
        streaming(module)
    there = ran(tiny_gqa, tmp_path / "there", text, command, **options)
    log = (there / ".run" / "log.txt").read_text()
    assert "The weights are read block by block" in log
    assert "Loading" not in log
    for name in files:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


def test_too_little_memory_is_one_sentence(tiny_gqa, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    out = ["--out", str(tmp_path / "x"), "--device", "cpu", "--memory-limit", "0.05"]
    assert main(["importance", str(tiny_gqa), *out]) == 2
    said = capsys.readouterr().err
    assert "--memory-limit: 0.05 GiB are too little; even block by block this needs 0." in said
    assert main(["importance", str(tiny_gqa), *out, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["way"], shown["memory_limit_mib"]) == ("cannot", 51.2)


@pytest.mark.parametrize("command", ["search", "prune", "width"])
def test_healing_with_too_little_memory_ends_before_it_starts(
    command, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    options = ["--heal", "refit", "--memory-limit", "0.1", "--device", "cpu"]
    options += ["--out", str(tmp_path / "out")]
    more = {"prune": ["--drop", "5"], "width": ["--method", "flap", "--ratio", "0.5"]}
    options += more.get(command, [])
    assert main([command, "demo", *options, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["way"] == "cannot"
    assert main([command, "demo", *options]) == 2
    assert "--memory-limit: 0.10 GiB are too little" in capsys.readouterr().err


def test_healing_a_narrower_model_counts_to_what_is_needed(tiny_dir, bare):
    info = headers.inspect(tiny_dir("gqa"))
    options = {"checkpoint": "x", "out": "y", "method": "magnitude", "ratio": 0.5, "device": "cpu"}

    def room(**more):
        spec = build(width_command.WidthSpec, options | more)
        plan, _ = width_command.make_plan(spec, info, SILENT)
        return width_command.planned_capacity(spec, plan)

    plain, few = room(), room(**HEALS)
    assert few.least_bytes - plain.least_bytes > 40 * 16 * 32 * 4 * heal_demand.STATES
    more = room(**HEALS | {"heal_samples": 80})
    assert more.least_bytes - few.least_bytes >= 40 * 16 * 32 * 4 * heal_demand.STATES


def test_states_of_many_rows_to_heal_on_are_kept_on_the_disk(tiny_dir, bare):
    info = headers.inspect(tiny_dir("gqa"))
    tokens, state = 16, 16 * 32 * 4

    def needed(rows, limit=None):
        need = heal_demand.demand(info, ("scale",), 0, rows, tokens, "cpu", F32)
        return capacity.decide(info, F32, "cpu", limit, rows, tokens, [need])

    few, many = needed(400), needed(40000)
    assert (few.disk_bytes, many.disk_bytes) == (0, 0)
    room = needed(40000, many.in_memory_bytes - 3 * 40000 * state)
    assert (room.way, room.groups, room.group) == ("fits", 1, 0)
    assert room.used_bytes <= room.limit_bytes < many.in_memory_bytes
    assert room.disk_bytes == 2.75 * 40000 * state  # two streams and three of a quarter
    assert "Hidden states, 0.21 GiB, are kept on the disk." in room.sentence()
    least = needed(40000, 1)
    assert (least.way, least.streams) == ("cannot", False)
    tight = needed(40000, least.least_bytes)
    assert (tight.way, tight.disk_bytes) == ("streams", room.disk_bytes)


@pytest.mark.parametrize(
    ("command", "options", "files"),
    [
        ("prune", HEALED | {"drop": (2, 4), "heal": "auto"}, ("model.safetensors",)),
        ("width", HEALS | {"method": "flap", "ratio": 0.5}, ("model.safetensors",)),
        ("search", HEALED | {"counts": (1, 2), "methods": ("greedy",), "heal": "refit"},
         ("heldout_rows.csv",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["fits", "streams"])
def test_healing_with_states_on_the_disk_leaves_the_same_files(
    tiny_gqa, tmp_path, text, monkeypatch, command, options, files, way
):
    # of a search, rows beside those that are healed on go through the model in groups
    grouped = {"rows": 27, "groups": 2} if command == "search" else {}
    monkeypatch.setattr(forward, "CPU_TOKENS", 9 * HEALED["length"])
    here = ran(tiny_gqa, tmp_path / "here", text, command, **options)

    def decide(*arguments):
        found = capacity.decide(*arguments)
        return dataclasses.replace(found, way=way, disk_bytes=12 * 2**20, **grouped)

    for module in (width_command, search_command, heal_command):
        monkeypatch.setattr(module, "decide", decide)
    opened = []
    opens = scratch_file.ScratchFile.__init__
    monkeypatch.setattr(
        scratch_file.ScratchFile,
        "__init__",
        lambda self, folder, content: opened.append(content) or opens(self, folder, content),
    )
    there = ran(tiny_gqa, tmp_path / "there", text, command, **options)
    assert opened.count("hidden states") >= 4
    if grouped:
        rows = {row.row for row in HeldoutRow.read(there)}
        assert len(rows) > 27
    assert "Hidden states, 0.01 GiB, are kept on the disk." in (
        (there / ".run" / "log.txt").read_text()
    )
    for name in files:
        assert (there / name).read_bytes() == (here / name).read_bytes(), name


def test_versions_cost_the_same_streamed_and_only_as_many_blocks_are_timed_as_fit(
    tiny_gqa, tmp_path, text, streaming, monkeypatch
):
    options = {"context": 12, "runs": 1, "check_plans": 2}
    here = ran(tiny_gqa, tmp_path / "here", text, "budget", **options)
    streaming(budget_command)
    monkeypatch.setattr(demand, "layers", lambda *arguments: demand.LEAST_BLOCKS)
    there = ran(tiny_gqa, tmp_path / "there", text, "budget", **options)
    assert "Timing 4 blocks at a time" in (there / ".run" / "log.txt").read_text()
    costs = [[(r.block, r.version, r.kl, r.nll) for r in VersionRow.read(f)] for f in (here, there)]
    assert costs[0] == costs[1]
    assert all(r.decode_s > 0 for r in VersionRow.read(there) if r.version == WHOLE)
    assert (Budget.read(here).timed_layers, Budget.read(there).timed_layers) == (5, 4)
    assert Budget.read(there).dense_decode_s is None
    plans = PlanCheck.read(there)
    assert plans
    assert all(plan.kl > 0 and plan.decode_s is None for plan in plans)
    assert not latency_errors(plans)
    assert budgets.load(there).dense().latency_s > 0


def test_timing_fits_with_fewer_blocks_than_the_model_has(tiny_dir, bare):
    info, versions = headers.inspect(tiny_dir("gqa")), tuple(VERSIONS)
    needs = demand.demands(info, versions, F32, "float32", 1, 8)[1:]  # without measuring KL

    def layers(limit):
        room = capacity.decide(info, F32, "cpu", limit, 2, 8, needs)
        return room.way, demand.layers(info, versions, room, "float32", "cpu", 1, 8)

    open_ = capacity.decide(info, F32, "cpu", None, 2, 8, needs)
    assert layers(None) == ("fits", info.blocks)
    assert layers(open_.in_memory_bytes) == ("fits", demand.LEAST_BLOCKS)
    assert layers(open_.in_memory_bytes * 2) == ("fits", info.blocks)
    assert layers(open_.streamed_bytes) == ("streams", demand.LEAST_BLOCKS)
    assert layers(open_.streamed_bytes - 1)[0] == "cannot"
