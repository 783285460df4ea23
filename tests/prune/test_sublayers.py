"""Blocks without attention or MLP: plans, the written variant, what it equals and what refuses."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from core.__main__ import main
from core.benchmark import analytic
from core.checkpoint import headers, own_code
from core.checkpoint.drop import Removal, check_removal
from core.errors import CheckpointError, DataError, PlanError
from core.export import mergekit
from core.live.whatif import WhatIf
from core.model.blocks import BlockView
from core.model.loading import load_model
from core.prune import depth, plan, scores
from core.prune.outlook import outlook
from core.prune.results import Pruning

CUT = Removal((1,), (0, 3), (2,))
OUTPUTS = {"attention": ("self_attn", "o_proj"), "mlp": ("mlp", "down_proj")}
CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def silenced(folder, removal):
    """The stock model whose output projections of what is removed are zero; nothing is cut."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gone = {*removal.parts, *((b, part) for b in removal.drop for part in OUTPUTS)}
    for block, part in gone:
        module, name = OUTPUTS[part]
        for parameter in getattr(getattr(model.model.layers[block], module), name).parameters():
            parameter.data.zero_()
    return model


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_variant_equals_the_original_with_the_parts_silenced(tiny_dir, tmp_path, variant):
    source, out = tiny_dir(variant), tmp_path / "out"
    record = depth.prune(source, CUT, out)
    cut = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    naive = silenced(source, CUT)
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    view = BlockView(load_model(source, CPU, torch.float32))
    with torch.no_grad():
        expected = naive(ids, use_cache=False).logits
        torch.testing.assert_close(cut(ids).logits, expected, rtol=1e-5, atol=1e-5)
        wanted = naive.generate(ids[:, :20], **GREEDY)
        made = cut.generate(ids[:, :20], **GREEDY, return_dict_in_generate=True)
        static = cut.generate(ids[:, :20], **GREEDY, cache_implementation="static")
        with view.skip(CUT) as skipping:
            torch.testing.assert_close(skipping(ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert skipping.generate(ids[:, :20], **GREEDY).equal(wanted)
        whole = silenced(source, Removal()).generate(ids[:, :20], **GREEDY)
        assert view.model.generate(ids[:, :20], **GREEDY).equal(whole)  # all is restored
    assert made.sequences.equal(wanted)
    assert static.equal(wanted)
    cache = getattr(made, "cache", None) or made.past_key_values
    assert len(cache.layers) == 2  # of 5 blocks: one was dropped, two lost their attention
    info = headers.inspect(out)
    assert sum(p.numel() for p in cut.parameters()) == record.parameters_after == info.parameters
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    length = cache.layers[0].keys.shape[2]
    if all(layer.keys.shape[2] == length for layer in cache.layers):
        assert held == info.kv_bytes(2, length, "float32")
    assert not info.unused_tensors
    assert own_code.is_trusted(out)


def test_the_live_perplexity_and_the_sizes_are_those_of_the_written_variant(tiny_gqa, tmp_path):
    rows = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(1)).tolist()
    text = WhatIf(BlockView(load_model(tiny_gqa, CPU, torch.float32)), rows, 2**20)
    shown = outlook(headers.inspect(tiny_gqa), CUT, batch=3, context=7, dtype="float16")
    depth.prune(tiny_gqa, CUT, tmp_path / "cut")
    info = headers.inspect(tmp_path / "cut")
    assert (shown.parameters, shown.kv_bytes) == (info.parameters, info.kv_bytes(3, 7, "float16"))
    planned = analytic.without(headers.inspect(tiny_gqa), CUT)
    rates = analytic.Rates(1e9, 1e10, block_overhead_s=1e-4)
    for estimate in (
        lambda shapes: analytic.memory_bytes(shapes, 2, 5, 9, "float32"),
        lambda shapes: analytic.latency_s(shapes, rates, 2),
    ):
        assert estimate(planned) == estimate(info)
    dense = analytic.memory_bytes(headers.inspect(tiny_gqa), 2, 5, 9, "float32")
    found = analytic.memory_bytes(planned, 2, 5, 9, "float32")
    assert 5 * found["kv_cache"] == 2 * dense["kv_cache"]  # 2 of 5 blocks attend
    model = load_model(tmp_path / "cut", CPU, torch.float32)
    with torch.no_grad():
        loss = model(torch.tensor(rows), labels=torch.tensor(rows)).loss
    for removal in (CUT, Removal(mlp=(2,)), Removal(), CUT):  # prefixes of each other are shared
        found = text.answer(removal).ppl
    assert found == pytest.approx(float(loss.exp()), rel=1e-5)


def test_a_variant_is_cut_again_and_saved_again(tiny_gqa, tmp_path):
    depth.prune(tiny_gqa, CUT, tmp_path / "a", name="owner/base")
    # Its blocks are 0, 2, 3, 4 of the base; block 0 loses the rest of it, block 3 its attention.
    record = depth.prune(tmp_path / "a", Removal(mlp=(0,), attention=(3,)), tmp_path / "b")
    assert (record.dropped, record.original_blocks) == ((0,), (2, 3, 4))
    assert (record.without_attention, record.without_mlp) == ((3, 4), (2,))
    assert (record.lineage[0].attention, record.lineage[0].mlp) == ((0, 3), (2,))
    ids = torch.randint(3, 320, (1, 12), generator=torch.Generator().manual_seed(0))
    total = Removal((0, 1), (3, 4), (2,))
    again = load_model(tmp_path / "b", CPU, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, silenced(tiny_gqa, total)(ids).logits)
    again.save_pretrained(tmp_path / "c")
    b, c = (headers.inspect(tmp_path / name) for name in "bc")
    assert b.block_shapes == c.block_shapes
    with pytest.raises(CheckpointError, match="lacks the attention or the MLP of block 3; passthr"):
        mergekit.recipe(mergekit.locate.open(str(tmp_path / "b")))


SHAPES = [{"heads": 4, "intermediate": 48}] * 3 + [{"heads": 0, "intermediate": 48}]


@pytest.mark.parametrize(
    ("removal", "message"),
    [
        (Removal((1,), (1,)), "Block 1 is dropped whole, so its attention cannot be removed"),
        (Removal((2,), mlp=(0, 2)), "Block 2 is dropped whole, so its MLP cannot be removed"),
        (Removal(attention=(4,)), "Block 4 does not exist: the checkpoint has 4 blocks"),
        (Removal(mlp=(-1,)), "Block -1 does not exist"),
        (Removal(mlp=(1, 1)), "Block 1 is listed twice"),
        (Removal(attention=(3,)), "Block 3 has no attention"),
        (Removal((0, 1), (2,), (2, 3)), "All 4 blocks are selected"),
        (Removal(), "No blocks are selected"),
    ],
)
def test_what_cannot_be_removed_is_refused(removal, message):
    with pytest.raises(PlanError, match=message):
        check_removal(removal, SHAPES)


def test_a_block_that_loses_all_it_has_is_dropped():
    assert check_removal(Removal((0,), (1,), (1, 2, 3)), SHAPES) == Removal((0, 1, 3), (), (2,))


def test_plan_takes_the_cheapest_parts(tiny_gqa, tmp_path, capsys):
    ppl = {(b, p): 9.0 - b + (p == "mlp") / 2 for b in range(5) for p in ("attention", "mlp")}
    table = tmp_path / "sublayers.csv"
    table.write_text("block,part,ppl\n" + "".join(f"{b},{p},{v}\n" for (b, p), v in ppl.items()))
    found = scores.load(table)
    assert found.available == ("sublayers",)
    info = headers.inspect(tiny_gqa)
    # Blocks 0 and 4 are protected; the rest in ascending order: 3a, 3m, 2a, 2m, 1a, 1m.
    chosen = plan.choose(found, "sublayers", count=3, info=info)
    assert (chosen.drop, chosen.attention, chosen.mlp) == ((3,), (2,), ())
    attention, mlp = 4 * 32 * 8 * 2 + 2 * 32 * 16, 3 * 32 * 48  # q, o and k, v; gate, up, down
    assert info.parameters - chosen.params == attention + mlp + 2 * 32 + 32 * 32 * 2 + 32 * 16 * 2
    near = plan.choose(found, "sublayers", params=chosen.params + 10, info=info)
    assert near.removal == chosen.removal
    with pytest.raises(PlanError, match="--count 7 exceeds the number of removable parts"):
        plan.choose(found, "sublayers", count=7)
    lacking = replace(
        found, sublayers={u: v for u, v in found.sublayers.items() if u != (2, "mlp")}
    )
    with pytest.raises(DataError, match="The score of block 2 without its MLP"):
        plan.choose(lacking, "sublayers", count=3, info=info)
    depth.prune(tiny_gqa, Removal(mlp=(2,)), tmp_path / "cut")
    again = plan.choose(lacking, "sublayers", count=4, info=headers.inspect(tmp_path / "cut"))
    assert (again.drop, again.attention, again.mlp) == ((3, 2), (1,), ())
    file = tmp_path / "plan.json"
    assert main(["plan", str(table), "--criterion", "sublayers", "--count", "3"]) == 0
    file.write_text(capsys.readouterr().out)
    out = tmp_path / "out"
    assert main(["prune", str(tiny_gqa), "--plan", str(file), "--out", str(out)]) == 0
    record = Pruning.read(out)
    assert record.removal == chosen.removal
    assert record.parameters_after == chosen.params
    assert "1 block and 1 part of blocks" in (out / "README.md").read_text()
    table.write_text("block,part,ppl\n0,attention,2.0\n0,ffn,2.0\n")
    with pytest.raises(DataError, match="'ffn' is not a part of a block"):
        scores.load(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop", "1", "--attention", "1"], "Block 1 is dropped whole"),
        (["--attention", "9"], "Block 9 does not exist"),
        (["--attention", "1", "--heal", "linear"], "of block 1 only the attention is removed"),
    ],
)
def test_command_refuses_in_one_sentence(tiny_gqa, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert main(["prune", str(tiny_gqa), *options, "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert not (out / "config.json").exists()


def test_a_config_with_a_block_of_nothing_is_refused(tiny_gqa, tmp_path):
    depth.prune(tiny_gqa, CUT, tmp_path / "cut")
    path = tmp_path / "cut" / "config.json"
    config = json.loads(path.read_text())
    config["layer_intermediate_size"][0] = 0
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gives block 0 neither attention heads nor MLP"):
        headers.inspect(tmp_path / "cut")


@pytest.mark.parametrize(
    ("variant", "fields"),
    [("gqa", {"mlp_bias": True, "dtype": "bfloat16"}), ("qwen2", {"shard_bytes": 40_000})],
)
def test_a_narrower_mlp_equals_the_original_with_its_neurons_silenced(
    tiny_dir, tmp_path, variant, fields
):
    source, out = tiny_dir(variant, **fields), tmp_path / "out"
    info = headers.inspect(source)
    left = {1: [5, 0, 47], 3: [*range(30, 10, -1)]}
    order = {b: [*n, *(m for m in range(48) if m not in n)] for b, n in left.items()}
    values = {"checkpoint_key": info.key, "order": {str(b): n for b, n in order.items()}}
    (tmp_path / "order").mkdir()
    (tmp_path / "order" / "neurons.json").write_text(json.dumps(values))
    width = tuple((block, len(kept)) for block, kept in left.items())
    removal = Removal((0,), (), (2,), width, str(tmp_path / "order"))
    record = depth.prune(source, removal, out)
    cut = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
    naive = silenced(source, removal)
    for block, kept in left.items():
        down = naive.model.layers[block].mlp.down_proj.weight.data
        down[:, [n for n in range(48) if n not in kept]] = 0
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    view = BlockView(load_model(source, CPU, torch.float32))
    with torch.no_grad():
        expected = naive(ids, use_cache=False).logits
        torch.testing.assert_close(cut.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
        with view.skip(removal) as skipping:
            torch.testing.assert_close(skipping(ids).logits, expected, rtol=1e-5, atol=1e-5)
            wanted = naive.generate(ids[:, :20], **GREEDY)
            assert skipping.generate(ids[:, :20], **GREEDY).equal(wanted)
    assert view.blocks[1].mlp.gate_proj.weight.shape[0] == 48  # all is restored
    assert sum(p.numel() for p in cut.parameters()) == record.parameters_after
    written = headers.inspect(out)
    assert (written.parameters, written.dtype) == (record.parameters_after, info.dtype)
    assert [s["intermediate"] for s in written.block_shapes] == [3, 0, 20, 48]
    assert analytic.without(info, removal).parameters == record.parameters_after
    text = WhatIf(view, ids.tolist(), 2**20)
    whole = text.answer(Removal())
    there = WhatIf(BlockView(load_model(out, CPU, torch.float32)), ids.tolist(), 2**20)
    assert text.answer(removal).ppl == pytest.approx(there.answer(Removal()).ppl, rel=1e-5)
    assert text.answer(Removal()).ppl == whole.ppl


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--mlp-width", "1:24"], "Which MLP neurons to keep is not known"),
        (["--mlp-width", "1"], "--mlp-width: '1' is not block:neurons"),
        (["--mlp-width", "1:24", "--neurons", "nowhere"], "nowhere has no order of MLP neurons"),
        (["--mlp-width", "1:48", "--neurons", "."], "cannot be cut to 48 neurons: it has 48"),
        (["--mlp-width", "1:9", "--mlp", "1"], "Block 1 loses its MLP, so its MLP cannot keep 9"),
        (["--mlp-width", "1:9,1:8"], "Block 1 is listed twice"),
        (["--mlp-width", "9:9"], "Block 9 does not exist"),
        (["--mlp-width", "1:9", "--neurons", "other"], "were ranked for other weights"),
        (["--mlp-width", "1:9", "--neurons", "short"], "does not rank the 48 neurons of block 1"),
    ],
)
def test_widths_that_cannot_be_cut(tiny_gqa, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    key = headers.inspect(tiny_gqa).key
    for name, values in {
        "other": {"checkpoint_key": "x", "order": {"1": [*range(48)]}},
        "short": {"checkpoint_key": key, "order": {"1": [*range(47)]}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "neurons.json").write_text(json.dumps(values))
    for last in ([], ["--dry-run"]):
        assert main(["prune", str(tiny_gqa), *options, "--out", "x", *last]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "x" / "config.json").exists()
