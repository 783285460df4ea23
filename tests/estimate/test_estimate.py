"""The table of what commands take: against what METHODS states, and against measured small runs."""

import json

import pytest
import tiny
import torch

from core import commands
from core.__main__ import main
from core.budget import command as budget
from core.budget.command import BudgetSpec
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.estimate import shapes, table
from core.estimate.machines import MACHINES
from core.evaluate.perplexity import streamed_losses
from core.heal import seams
from core.heal.healing import heal, heal_narrower
from core.importance import command as importance
from core.importance.branches import make_batch
from core.importance.estimate import block_flops, head_flops
from core.importance.forward import Channels
from core.importance.greedy import greedy
from core.importance.sweep import sweep
from core.importance.taylor import taylor
from core.model.streaming import StreamedView
from core.runs.devices import MIB
from core.runs.dtypes import Formats

LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    "vocab_size": 32000, "max_position_embeddings": 2048, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b():
    return headers.describe("llama-7b", LLAMA_7B, None, None)


def row(made, start):
    (found,) = [r for r in made.rows() if r.what.startswith(start)]
    return found


def test_the_limits_of_the_hardware(llama_7b):
    """METHODS 9: tokens/s of LLaMA-7B, and a leave-one-out of it."""
    h100, h200 = MACHINES["h100"], MACHINES["h200"]
    assert table.tokens_per_s(llama_7b, h100) == pytest.approx(253, abs=1)
    assert table.tokens_per_s(llama_7b, h200) == pytest.approx(363, abs=1)
    sweep_ = row(table.Table(llama_7b, h100), "perplexity and KL")
    assert sweep_.flops == pytest.approx(0.29e15, rel=0.05)
    assert 0.6 < sweep_.compute_s < 1.5
    pairs = row(table.Table(llama_7b, h100), "all pairs")
    assert pairs.compute_s < 15
    assert pairs.flops / sweep_.flops == pytest.approx(32**3 / 6 / (32 * 33 / 2), rel=0.15)


def test_shapes_are_those_of_llama_3():
    sizes = {name: shapes.info_of(name).parameters for name in shapes.SHAPES}
    assert sizes == {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800}


def test_70b_streams_once_through_a_card_that_it_does_not_fit(llama_7b):
    made = table.Table(shapes.info_of("70b"), MACHINES["h100"])
    found = row(made, "perplexity and KL")
    assert (found.way, found.passes) == ("streams", 1)
    assert found.read_bytes == pytest.approx(141e9, rel=0.01)
    assert found.memory_bytes <= made.limit
    assert found.seconds == pytest.approx(max(found.compute_s, found.disk_s))
    assert row(table.Table(llama_7b, MACHINES["h100"]), "perplexity and KL").way == "fits"
    tuned = row(made, "LoRA, ")
    assert (tuned.way, tuned.seconds) == ("no memory", None)
    larger = table.Table(shapes.info_of("70b"), MACHINES["h200"])
    assert row(larger, "Block Influence").way == "streams"
    assert row(table.Table(shapes.info_of("8b"), MACHINES["rtx4090"]), "LoRA, ").way == "whole"


def test_bytes_read_are_those_of_measured_runs(tiny_gqa):
    """Passes over the weights, counted while small runs read a checkpoint block by block."""
    info = headers.inspect(tiny_gqa)
    made = table.Table(info, MACHINES["h100"])
    given = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(0)).tolist()
    ends = 2 * info.vocab * tiny.HIDDEN * 4  # embedding and head

    def read(work):
        view = StreamedView(tiny_gqa, torch.float32, torch.device("cpu"))
        work(view, make_batch(given, view))
        view.close()
        return view.source.bytes_read

    measured = {
        "perplexity and KL": read(lambda v, b: sweep(v, b, kl=True)),
        "Taylor": read(taylor),
        "Block Influence": read(lambda v, b: sweep(v, b, perplexity=False)),
        "greedy removal (": read(greedy),
        "perplexity of": read(lambda v, b: streamed_losses(v, given)),
    }
    for start, count in measured.items():
        often = row(made, start).passes
        if start.startswith("greedy"):
            often = min(info.blocks // 2, info.blocks - 2)
        whole = count + (0 if start != "Block Influence" else ends // 2)  # it needs no head
        assert round(whole / info.stored_bytes) == often, start


@pytest.fixture
def reads(monkeypatch):
    """Count the blocks that streamed views read to compute with them."""
    found = []
    taken = StreamedView._taken
    monkeypatch.setattr(
        StreamedView, "_taken", lambda self, block: found.append(block) or taken(self, block)
    )
    return found


def test_healing_reads_the_blocks_as_often_as_estimated(tiny_gqa, reads):
    info = headers.inspect(tiny_gqa)
    given = torch.randint(3, 320, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()

    def times(work):
        reads.clear()
        view = StreamedView(tiny_gqa, torch.float32, torch.device("cpu"))
        work(view, make_batch(given, view))
        view.close()
        return len(reads) / info.blocks

    parts = Removal((), (1, 3), (2,))
    for removal in (Removal((2,)), Removal((1, 2, 4)), Removal((1, 3)), parts):
        found = seams.seams_of(removal)
        often = times(lambda view, batch, cut=removal: heal(view, cut, batch, "refit"))
        assert often == pytest.approx(seams.reads(found, info.blocks), abs=0.01), removal
    keeps = {block: Channels(torch.arange(30)) for block in range(info.blocks)}
    found = seams.seams_between((), {2 * block + 1 for block in keeps})
    often = times(lambda view, batch: heal_narrower(view, keeps, batch))
    assert often == pytest.approx(seams.reads(found, info.blocks))


def test_healing_and_budgets_of_large_models():
    large = table.Table(shapes.info_of("70b"), MACHINES["h100"])
    width = row(large, "FLAP, 20%, healed")
    # scoring takes two passes, and each block's refit half of the 80 blocks
    assert (width.way, width.passes) == ("streams", 45)
    assert width.memory_bytes <= large.limit
    assert width.seconds == pytest.approx(
        max(width.compute_s, width.read_bytes / large.disk) + width.written_bytes / large.disk
    )
    cut = row(large, "a quarter of the blocks, healed")
    roomy = row(table.Table(shapes.info_of("70b"), MACHINES["h200"]), "a quarter of the blocks, h")
    assert (cut.way, roomy.way, cut.passes) == ("streams", "streams", roomy.passes)
    removal, tokens = large.spaced(20), 512 * 320  # 20 for each of 8,192 dimensions
    state = 2 * tokens * 8192
    moved = 2 * seams.passes("refit", removal, 80) * state  # of the H100 alone, on its disk
    assert cut.read_bytes - roomy.read_bytes == pytest.approx(moved)
    huge = table.Table(shapes.info_of("405b"), MACHINES["h100"])
    assert row(huge, "FLAP, 20%, healed").way == "cannot"  # a matrix of 53,248 neurons in float64
    assert row(huge, "FLAP, 20%, healed").passes < 100


def test_a_budget_run_takes_the_block_passes_that_were_measured():
    """As docs/results/budget.md has them; neurons are ranked in one more pass."""
    for blocks, passes in ((14, 588), (30, 2700)):
        info = headers.describe("x", LLAMA_7B | {"num_hidden_layers": blocks}, None, None)
        spec = BudgetSpec(checkpoint="x", out="", device="cpu", memory_limit=1000.0, check_plans=0)
        block = block_flops(info, 0, 10, 128)
        kl = passes * block + (6 * blocks + 1) * head_flops(info, 10, 128)
        timed = 7 * 6 * blocks * block_flops(info, 0, 1, 512)
        taken = budget.footprint(spec, info, Formats("bfloat16", "bfloat16"), None)
        assert taken.flops == pytest.approx(kl + blocks * block + timed)


def test_training_on_four_bits():
    made = table.Table(shapes.info_of("70b"), MACHINES["h100"])
    assert row(made, "LoRA, ").way == "no memory"
    assert row(made, "LoRA on a base in 4 bits").way == "whole"


def test_processes_share_rows_and_weights():
    info, config = shapes.opened("8b")
    h100 = MACHINES["h100"]
    one = {r.what: r for r in table.Table(info, h100, config=config).rows()}
    made = table.Table(info, h100, config=config, processes=8).rows()
    eight = {r.what.replace(" (FSDP)", ""): r for r in made}
    assert one.keys() == eight.keys()
    shared = {r.command for r in eight.values() if r.processes == 8}
    named = {name for name, c in commands.COMMANDS.items() if "processes" in
             c.spec_class.__dataclass_fields__ and name != "estimate"}  # fmt: skip
    assert shared == named
    for name, many in eight.items():
        alone = one[name]
        if many.processes == 1:
            assert many == alone, name
            continue
        assert many.memory_bytes <= alone.memory_bytes, name
        scale = many.flops / alone.flops / 8
        assert many.compute_s == pytest.approx(alone.compute_s * scale), name
    full = "all weights, 1,000 steps of 64 x 256 tokens"
    assert (one[full].way, eight[full].way) == ("no memory", "whole")  # FSDP
    # each holds its own rows: of 10 here 2, with 33 states of every row, and three for Taylor
    sweep_ = "perplexity and KL without each block, 10 x 128 tokens"
    assert one[sweep_].memory_bytes > eight[sweep_].memory_bytes > info.stored_bytes


def test_rows_are_what_the_commands_say_in_a_dry_run(tiny_gqa, tmp_path, text):
    """One rule: the dry run of a run in two processes, and the row of the table for it."""
    info, formats = headers.inspect(tiny_gqa), Formats("float32", "float32")
    spec = importance.ImportanceSpec(
        checkpoint=str(tiny_gqa), out="", device="cpu", calibration=text, processes=2
    )
    said, taken = importance.dry_run(spec), importance.footprint(spec, info, formats)
    assert said["read_bytes"] == taken.read_bytes
    assert said["flops"] == taken.flops
    assert said["in_memory_mib"] == pytest.approx(taken.memory_bytes / MIB, abs=0.1)
    assert said["rows_of_each"] == [5, 5]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_models_of_few_blocks_have_the_rows_that_make_sense(blocks, tmp_path, capsys):
    config = LLAMA_7B | {"num_hidden_layers": blocks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["estimate", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    names = {(one["command"], one["what"]) for one in said["left_out"]}
    assert len(said["rows"]) + len(names) == 31
    assert all(one["why"].endswith(".") for one in said["left_out"])
    assert (("budget", "defaults") in names) == (blocks == 1)
    assert (("search", "healed") in names) == (blocks < 3)  # block 0 has none before it
    assert (("search", "pairs") in names) == (blocks == 1)


def test_rows_are_no_longer_than_the_context(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"max_position_embeddings": 64}))
    assert main(["estimate", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["left_out"] == []
    assert "Taylor, 10 x 64 tokens" in {one["what"] for one in said["rows"]}


def test_fields_that_a_config_lacks_have_the_defaults_of_transformers(tmp_path, capsys):
    for missing in ("hidden_size", "vocab_size", "torch_dtype", "architectures"):
        config = {key: value for key, value in LLAMA_7B.items() if key != missing}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["estimate", str(tmp_path)]) == 0
        assert json.loads(capsys.readouterr().out)["parameters"] == 6_738_415_616
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"hidden_size": "wide"}))
    assert main(["estimate", str(tmp_path)]) == 2
    assert "hidden_size" in capsys.readouterr().err


def test_the_command_prints_what_it_assumes(capsys):
    assert main(["estimate", "70b", "--on", "h100", "--disk-gb-s", "6"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "estimated"
    assert said["assumes"]["disk_bytes_per_s"] == 6e9
    rows = {r["what"]: r for r in said["rows"]}
    assert all(r["flops"] >= 0 and r["read_bytes"] > 0 for r in rows.values())
    assert {r["command"] for r in said["rows"]} == {
        "importance", "search", "budget", "curve", "prune", "width", "quantize", "retrain",
        "generate", "evaluate", "benchmark", "live", "export", "import",
    }  # fmt: skip
    assert said["left_out"] == []
    assert rows["one model loaded, 128 tokens for one prompt"]["ways"]["h200"] == "no memory"
    assert main(["estimate", "8b", "--processes", "0"]) == 2
    assert "--processes: 0 is too small" in capsys.readouterr().err
    assert main(["estimate", "70b", "--on", "abacus"]) == 2
    assert "Choose from: h100" in capsys.readouterr().err
    assert main(["estimate", "9b"]) == 2
    assert "There is no shape '9b'. Choose from: 8b, 70b, 405b; or" in capsys.readouterr().err
    assert main(["estimate", "nowhere/at/all"]) == 2
    assert "nowhere/at/all" in capsys.readouterr().err
