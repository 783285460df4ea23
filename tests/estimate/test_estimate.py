"""The table of what commands take: against what METHODS states, and against measured small runs."""

import json

import pytest
import tiny
import torch

from core.__main__ import main
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.estimate import shapes, table
from core.estimate.machines import MACHINES
from core.evaluate.perplexity import streamed_losses
from core.heal import seams
from core.heal.healing import heal, heal_narrower
from core.importance.branches import make_batch
from core.importance.estimate import block_flops, head_flops
from core.importance.forward import Channels
from core.importance.greedy import greedy
from core.importance.sweep import sweep
from core.importance.taylor import taylor
from core.model.streaming import StreamedView

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
        assert round(whole / made.stored) == often, start


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
    width = row(large, "FLAP, healed")
    assert (width.way, width.passes) == ("streams", 44)  # scoring, and half of 80 blocks for each
    assert width.memory_bytes <= large.limit
    assert width.seconds == pytest.approx(max(width.compute_s, width.disk_s))
    cut = row(large, "a quarter of the blocks, healed")
    roomy = row(table.Table(shapes.info_of("70b"), MACHINES["h200"]), "a quarter of the blocks, h")
    assert (cut.way, roomy.way, cut.passes) == ("streams", "streams", roomy.passes)
    removal, tokens = large.spaced(20), 512 * 320  # 20 for each of 8,192 dimensions
    state = 2 * tokens * 8192
    moved = 2 * seams.passes("refit", removal, 80) * state  # of the H100 alone, on its disk
    assert cut.read_bytes - roomy.read_bytes == pytest.approx(moved)
    huge = table.Table(shapes.info_of("405b"), MACHINES["h100"])
    assert row(huge, "FLAP, healed").way == "cannot"  # a matrix of 53,248 neurons in float64
    assert row(huge, "FLAP, healed").passes < 100
    for blocks, passes in ((14, 588), (30, 2700)):  # as docs/results/budget.md measured them
        info = headers.describe("x", LLAMA_7B | {"num_hidden_layers": blocks}, None, None)
        made = table.Table(info, MACHINES["h100"])
        block = block_flops(info, 0, 10, 128)
        heads = (6 * blocks + 1 + table.PLANS) * head_flops(info, 10, 128)
        beside = (1 + table.PLANS) * blocks * block
        assert row(made, "KL of 6").flops == pytest.approx(passes * block + heads + beside)


def test_training_in_several_processes_and_on_four_bits():
    made = table.Table(shapes.info_of("70b"), MACHINES["h100"])
    assert row(made, "LoRA, ").way == "no memory"
    assert row(made, "LoRA on a base in 4 bits").way == "whole"
    small = table.Table(shapes.info_of("8b"), MACHINES["h100"])
    one, several = row(small, "LoRA, "), row(small, "LoRA with 8 processes")
    assert several.memory_bytes == one.memory_bytes
    assert several.compute_s == pytest.approx(one.compute_s / 8)


def test_the_command_prints_what_it_assumes(capsys):
    assert main(["estimate", "70b", "--on", "h100", "--disk-gb-s", "6"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "estimated"
    assert said["assumes"]["disk_bytes_per_s"] == 6e9
    rows = {r["what"]: r for r in said["rows"]}
    assert all(r["flops"] >= 0 and r["read_bytes"] > 0 for r in rows.values())
    assert {r["command"] for r in said["rows"]} == {
        "importance", "search", "width", "budget", "evaluate", "prune", "retrain", "benchmark",
    }  # fmt: skip
    assert main(["estimate", "70b", "--on", "abacus"]) == 2
    assert "Choose from: h100" in capsys.readouterr().err
    assert main(["estimate", "9b"]) == 2
    assert "There is no shape '9b'. Choose from: 8b, 70b, 405b; or" in capsys.readouterr().err
    assert main(["estimate", "nowhere/at/all"]) == 2
    assert "nowhere/at/all" in capsys.readouterr().err
