"""Closed-form repairs against plain least squares, the published form, and stock transformers."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math

import pytest
import tiny
import torch
from run_helpers import full_disk_before_work
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from core.__main__ import main
from core.benchmark.meter import tensor_peak
from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.commands import COMMANDS
from core.data.calibration import calibration_rows
from core.errors import DataError, PlanError
from core.heal import divergence
from core.heal.command import PruneSpec, healing_flops
from core.heal.healing import Kept, applied, heal, heal_narrower
from core.heal.ridge import Normal
from core.importance import forward
from core.importance.branches import make_batch, states_without
from core.importance.estimate import block_flops
from core.importance.forward import Channels
from core.model import loading
from core.model.blocks import BlockView
from core.prune import depth
from core.prune.results import Pruning
from core.runs.workspace import read_run
from core.study import variants
from core.study.kinds import Variant

torch.set_num_threads(1)
ROWS, TOKENS, DROP = 32, 24, (2, 4)
HELD = torch.arange(ROWS) % 4 == 3


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 320, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    """A model of 7 blocks with a bias in every projection."""
    return tiny.model(num_hidden_layers=7, mlp_bias=True, attention_bias=True)


@pytest.fixture(scope="module")
def found(model, ids):
    """Repairs by every method."""
    view = BlockView(model)
    batch = make_batch(ids.tolist(), view)
    return {name: heal(view, DROP, batch, name) for name in ("refit", "linear", "scale", "auto")}


@contextlib.contextmanager
def skipping(model, drop):
    """Make blocks identities, whatever the project's own code does."""
    layers = [model.model.layers[block] for block in drop]
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    yield
    for layer in layers:
        del layer.forward


def seen(model, block, ids, drop=()):
    """Return what stock transformers computes around a block: stream in, between and inside."""
    layer, seen = model.model.layers[block], {}

    def keep(name):
        return lambda module, inputs: seen.update({name: inputs[0].double()})

    hooks = [
        layer.register_forward_pre_hook(keep("in")),
        layer.post_attention_layernorm.register_forward_pre_hook(keep("middle")),
        layer.mlp.down_proj.register_forward_pre_hook(keep("inner")),
    ]
    with torch.no_grad(), skipping(model, drop):
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def log_p(model, ids, drop=()):
    with torch.no_grad(), skipping(model, drop):
        return model(ids, use_cache=False).logits.log_softmax(-1).double()


def mean_kl(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_kl_is_that_of(repair, model, before, after, gone, ids):
    """Compare a repair's figures with those of models without ``gone``, before and after it."""
    dense = log_p(model, ids[HELD])
    for name, one in (("kl_before", before), ("kl_after", after)):
        with silent(one, gone):
            found = log_p(one, ids[HELD])
        assert getattr(repair, name) == pytest.approx(mean_kl(dense, found), rel=1e-4)
    assert repair.kl_after < repair.kl_before


def plain_least_squares(method, seam, dense, healed, ids):
    """Return the new weight and bias before a seam, by lstsq on the system with the ridge in it."""
    block = seam.first - 1
    below = [b for b in DROP if b < block]
    target = seen(dense, seam.last + 1, ids)["in"].flatten(0, 1)
    parts = seen(healed, block, ids, below)
    middle, inner = parts["middle"].flatten(0, 1), parts["inner"].flatten(0, 1)
    down = healed.model.layers[block].mlp.down_proj
    weight, bias = down.weight.double(), down.bias.double()
    if method == "refit":
        x, y, prior = inner, target - middle - bias, weight.t()
        share = target.square().mean(-1).rsqrt()[:, None]
    else:
        x, y, prior = inner @ weight.t() + bias, target - middle, torch.eye(32).double()
        share = torch.ones(len(x), 1).double()
    ridge = math.sqrt(seam.alpha * float((x * share).detach().square().sum(0).mean()))
    system = torch.cat([x * share, ridge * torch.eye(x.shape[1]).double()])
    solution = torch.linalg.lstsq(system, torch.cat([y * share, ridge * prior])).solution
    if method == "refit":
        return solution.t(), bias
    return solution.t() @ weight, solution.t() @ bias


@pytest.mark.parametrize("method", ["refit", "linear"])
def test_equals_plain_least_squares(model, ids, found, method):
    repair, healed = found[method], copy.deepcopy(model)
    assert [(seam.first, seam.last) for seam in repair.seams] == [(2, 2), (4, 4)]
    assert any(seam.kept for seam in repair.seams)
    for seam in repair.seams:
        weight, bias = plain_least_squares(method, seam, model, healed, ids[~HELD])
        if not seam.kept:
            continue
        name = f"model.layers.{seam.first - 1}.mlp.down_proj"
        down = healed.model.layers[seam.first - 1].mlp.down_proj
        got = repair.tensors[f"{name}.weight"](down.weight)
        torch.testing.assert_close(got.double(), weight, rtol=1e-4, atol=1e-5)
        assert (got - down.weight).abs().max() > 1e-3
        with torch.no_grad():
            down.weight.copy_(got)
            if method == "linear":
                got = repair.tensors[f"{name}.bias"](down.bias)
                torch.testing.assert_close(got.double(), bias, rtol=1e-4, atol=1e-5)
                down.bias.copy_(got)
    dense = log_p(model, ids[HELD])
    assert repair.kl_before == pytest.approx(
        mean_kl(dense, log_p(model, ids[HELD], DROP)), rel=1e-4
    )
    assert repair.kl_after == pytest.approx(
        mean_kl(dense, log_p(healed, ids[HELD], DROP)), rel=1e-4
    )
    assert repair.kl_after < repair.kl_before
    after = log_p(healed, ids[HELD], DROP)
    for value, logs in ((repair.nll_dense, dense), (repair.nll_after, after)):
        own = -logs[:, :-1].gather(-1, ids[HELD][:, 1:, None]).mean()
        assert value == pytest.approx(float(own), rel=1e-5)


def test_scale_equals_the_published_form(model, ids, found):
    repair, published = found["scale"], copy.deepcopy(model)
    assert any(seam.kept for seam in repair.seams)
    total = 1.0
    for seam in repair.seams:
        below = [b for b in DROP if b < seam.first]
        before = seen(published, seam.first, ids[~HELD], below)["in"] / 1.0
        target = seen(model, seam.last + 1, ids[~HELD])["in"]
        factor = float((target.abs().mean((0, 1)) / before.abs().mean((0, 1))).mean())
        # Ours is what everything above is divided by, that of the seams below included.
        assert seam.scale == pytest.approx(factor * total, rel=1e-3)
        if seam.kept:
            total *= factor
            with torch.no_grad():
                published.model.embed_tokens.weight.mul_(factor)
                for layer in published.model.layers[: seam.first]:
                    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                        linear.weight.mul_(factor)
                        linear.bias.mul_(factor)
    with applied(BlockView(model), repair):
        ours = log_p(model, ids, DROP)
    theirs = log_p(published, ids, DROP)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert (ours - log_p(model, ids, DROP)).abs().max() > 0.01


def test_auto_takes_the_best(found):
    auto = found["auto"]
    assert auto.tried == {name: found[name].kl_after for name in ("refit", "linear", "scale")}
    assert auto.kl_after == min(auto.tried.values()) == auto.tried[auto.method]
    assert auto.tensors.keys() == found[auto.method].tensors.keys()


def test_a_harmful_repair_is_refused(model, ids, monkeypatch):
    view = BlockView(model)
    batch = make_batch(ids.tolist(), view)
    at_the_end = heal(view, (6,), batch, "scale")  # the last norm does not see a factor
    assert (at_the_end.method, at_the_end.tensors) == ("none", {})
    solve = Normal.solve
    monkeypatch.setattr(Normal, "solve", lambda self, alpha: -20 * solve(self, alpha))
    repair = heal(view, DROP, batch, "refit")
    assert repair.method == "none"
    assert not repair.tensors
    assert [seam.kept for seam in repair.seams] == [False, False]
    assert all(seam.kl_after > seam.kl_before for seam in repair.seams)
    assert repair.kl_after == repair.kl_before


def test_what_cannot_be_healed(model, ids):
    view = BlockView(model)
    with pytest.raises(PlanError, match=r"begins at block 0.*there is none"):
        heal(view, (0, 1), make_batch(ids.tolist(), view), "refit")
    with pytest.raises(PlanError, match=r"at block 0.*Keep all of block 0, or leave out --heal"):
        heal(view, Removal((2,), (0,)), make_batch(ids.tolist(), view), "auto")  # scale cannot
    with pytest.raises(
        DataError, match=r"at least 640 tokens \(20 for each of 32 .* 4 rows have 96"
    ):
        heal(view, (2,), make_batch(ids[:4].tolist(), view), "refit")


@contextlib.contextmanager
def silent(model, removal):
    """Make the parts in ``removal`` add nothing to the stream."""
    kept = []
    for block, layer in enumerate(model.model.layers):
        for part, linear in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            if removal.misses(block, part):
                kept += [(p, p.detach().clone()) for p in linear.parameters()]
    with torch.no_grad():
        for parameter, _ in kept:
            parameter.zero_()
        yield
        for parameter, value in kept:
            parameter.copy_(value)


def test_seams_of_parts_equal_plain_least_squares(model, ids):
    """The MLP before an attention that goes is refitted, and the attention before an MLP."""
    view, removal = BlockView(model), Removal((4,), (2,), (5,))
    repair = heal(view, removal, make_batch(ids.tolist(), view), "auto")
    assert [(s.first, s.last) for s in repair.seams] == [(2, 2), (4, 4), (5, 5)]
    assert repair.tried.keys() == {"refit"}
    healed = copy.deepcopy(model)
    below = [Removal(), Removal((), (2,)), Removal((4,), (2,))]
    places = [(1, "mlp.down_proj"), (3, "mlp.down_proj"), (5, "self_attn.o_proj")]
    targets = [(2, "middle"), (5, "in"), (6, "in")]
    for seam, gone, (block, path), (after, where) in zip(
        repair.seams, below, places, targets, strict=True
    ):
        linear = healed.model.layers[block].get_submodule(path)
        target = seen(model, after, ids[~HELD])[where].flatten(0, 1)
        inputs = {}
        hook = linear.register_forward_pre_hook(
            lambda module, given, inputs=inputs: inputs.update(x=given[0].double())
        )
        with silent(healed, gone):
            before = seen(healed, block, ids[~HELD])["middle" if "mlp" in path else "in"]
        hook.remove()
        x, weight = inputs["x"].flatten(0, 1), linear.weight.double()
        y = target - before.flatten(0, 1) - linear.bias.double()
        share = target.square().mean(-1).rsqrt()[:, None]
        ridge = math.sqrt(seam.alpha * float((x * share).square().sum(0).mean()))
        system = torch.cat([x * share, ridge * torch.eye(x.shape[1]).double()])
        wanted = torch.linalg.lstsq(system, torch.cat([y * share, ridge * weight.t()])).solution.t()
        if seam.kept:
            got = repair.tensors[f"model.layers.{block}.{path}.weight"](linear.weight)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                linear.weight.copy_(got)
    assert any(seam.kept for seam in repair.seams)
    assert_kl_is_that_of(repair, model, model, healed, removal, ids)


@pytest.fixture(scope="module")
def lacking(tiny_gqa, tmp_path_factory):
    """The folder of a variant whose block 1 has no MLP and block 3 no attention."""
    out = tmp_path_factory.mktemp("parts") / "cut"
    depth.prune(tiny_gqa, Removal(attention=(3,), mlp=(1,)), out)
    return out


def test_parts_that_were_missing_belong_to_the_seam(tiny_gqa, lacking, ids):
    """The repair is that of the whole model without them, in which they add nothing."""
    load = functools.partial(loading.load_model, device=torch.device("cpu"), dtype=torch.float32)
    whole, part = load(tiny_gqa), load(lacking)
    twin, view = BlockView(whole), BlockView(part)
    batch = make_batch(ids.tolist(), view)
    with torch.no_grad():
        whole.model.layers[3].self_attn.o_proj.weight.zero_()
        whole.model.layers[1].mlp.down_proj.weight.zero_()
    theirs = heal(twin, Removal((2,), (3,), (1,)), batch, "refit")
    kept = Kept(view, batch)
    for ours in (
        heal(view, Removal((2,)), batch, "refit"),
        heal(view, (2,), batch, "refit", kept=kept),
    ):
        assert [(s.first, s.last, s.removed, s.kept) for s in ours.seams] == [(2, 2, "", True)]
        assert ours.kl_before == pytest.approx(theirs.kl_before, rel=1e-4)
        assert ours.kl_after == pytest.approx(theirs.kl_after, rel=1e-4)
        (name,) = theirs.tensors
        assert name == "model.layers.1.self_attn.o_proj.weight"
        before = part.get_parameter(name).detach()
        got, wanted = ours.tensors[name](before), theirs.tensors[name](before)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    dense = log_p(part, ids[HELD])
    for method in ("linear", "scale"):
        repair = heal(view, (2,), batch, method)
        with applied(view, repair), view.skip((2,)):
            found = log_p(part, ids[HELD])
        assert repair.kl_after == pytest.approx(mean_kl(dense, found), rel=1e-4)
    attention = {1: Channels(queries=torch.arange(16), keys=torch.arange(8))}
    narrower = heal_narrower(view, attention, batch)
    assert [(s.first, s.last) for s in narrower.seams] == [(1, 1)]
    assert narrower.tensors.keys() == {name}  # its MLP is missing
    assert narrower.kl_after < narrower.kl_before


def test_a_full_disk_is_said_before_healing(tiny_gqa, tmp_path, monkeypatch, capsys):
    argv = ["prune", str(tiny_gqa), "--drop", "2", "--heal", "refit"]
    full_disk_before_work(argv, tmp_path / "out", capsys, monkeypatch)


def test_prune_heals_what_lacked_parts_before(lacking, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.text(), encoding="utf-8")
    argv = ["prune", str(lacking), "--drop", "2", "--heal", "refit", "--calibration", str(text)]
    argv += ["--length", "24", "--samples", "40", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--out", str(out)]) == 0
    record = Pruning.read(out)
    assert record.healed == "refit"
    assert (record.without_attention, record.without_mlp) == ((3,), (1,))
    rows = calibration_rows(str(text), loading.load_tokenizer(lacking), 40, 24, 1234)
    held = torch.tensor(rows)[torch.arange(40) % 4 == 3]
    loaded = [
        AutoModelForCausalLM.from_pretrained(one, trust_remote_code=True, dtype=torch.float32)
        for one in (lacking, out)
    ]
    dense, healed = (log_p(one, held) for one in loaded)
    assert mean_kl(dense, healed) == pytest.approx(record.healing.kl_after, rel=2e-3)


def ranked(folder, blocks, neurons, key=""):
    """Write an order of neurons; the best are those with the highest numbers."""
    order = {str(block): list(range(neurons))[::-1] for block in range(blocks)}
    folder.mkdir()
    found = {"schema": 1, "checkpoint_key": key, "order": order}
    (folder / "neurons.json").write_text(json.dumps(found))
    return str(folder)


def narrow_(model, width):
    """Zero what the first neurons add: those that a narrower MLP does not keep."""
    with torch.no_grad():
        for block, kept in width:
            weight = model.model.layers[block].mlp.down_proj.weight
            weight[:, : weight.shape[1] - kept] = 0


def test_narrower_mlps_equal_plain_least_squares(model, ids, tmp_path):
    """Alone, before the attention of the next block, and before a whole block that goes."""
    size = model.config.intermediate_size
    width = ((0, size // 2), (2, size // 4), (4, size // 2))
    removal = Removal((5,), (3,), (), width, ranked(tmp_path / "order", 7, size))
    view, batch = BlockView(model), make_batch(ids.tolist(), BlockView(model))
    repair = heal(view, removal, batch, "auto")
    assert [(s.first, s.last, s.removed) for s in repair.seams] == [
        (0, 0, "MLP neurons of 0"),
        (3, 3, "attention of 3 and MLP neurons of 2"),
        (5, 5, "block 5 and MLP neurons of 4"),
    ]
    healed, gone = copy.deepcopy(model), Removal((5,), (3,))
    plain = copy.deepcopy(model)
    narrow_(plain, width)
    targets, below = (
        [(1, "in"), (3, "middle"), (6, "in")],
        [Removal(), Removal(), Removal((), (3,))],
    )
    for seam, (block, kept), (after, where), skip in zip(
        repair.seams, width, targets, below, strict=True
    ):
        target = seen(model, after, ids[~HELD])[where].flatten(0, 1)
        down = healed.model.layers[block].mlp.down_proj
        with silent(healed, skip):
            parts = seen(healed, block, ids[~HELD])
        x, weight = parts["inner"].flatten(0, 1)[:, -kept:], down.weight.double()[:, -kept:]
        y = target - parts["middle"].flatten(0, 1) - down.bias.double()
        share = target.square().mean(-1).rsqrt()[:, None]
        ridge = math.sqrt(seam.alpha * float((x * share).square().sum(0).mean()))
        system = torch.cat([x * share, ridge * torch.eye(kept).double()])
        wanted = torch.linalg.lstsq(system, torch.cat([y * share, ridge * weight.t()])).solution.t()
        narrow_(healed, ((block, kept),))
        if seam.kept:
            name = f"model.layers.{block}.mlp.down_proj.weight"
            got = repair.tensors[name](down.weight)
            assert got.shape == (32, kept)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                down.weight[:, -kept:] = got
    assert any(seam.kept for seam in repair.seams)
    assert_kl_is_that_of(repair, model, plain, healed, gone, ids)
    again = heal(view, removal, batch, "refit", kept=Kept(view, batch))
    assert again.seams == repair.seams
    with applied(view, repair), view.skip(removal) as narrower, torch.no_grad():
        ours = narrower(ids, use_cache=False).logits.log_softmax(-1).double()
    with silent(healed, gone):
        torch.testing.assert_close(ours, log_p(healed, ids), rtol=0, atol=1e-5)


def thinned_(model, block, kept):
    """Zero what a narrower block does not have, and add its biases."""
    layer = model.model.layers[block]
    with torch.no_grad():
        for linear, columns, bias in (
            (layer.self_attn.o_proj, kept.queries, kept.o_bias),
            (layer.mlp.down_proj, kept.neurons, kept.down_bias),
        ):
            if columns is not None:
                mask = torch.zeros(linear.weight.shape[1])
                mask[columns] = 1
                linear.weight.mul_(mask)
            if bias is not None:
                linear.bias.add_(bias)


def test_narrower_blocks_equal_plain_least_squares(model, ids):
    """Neurons, heads (with added biases) and both: the down projections are refitted."""
    view, size = BlockView(model), model.config.intermediate_size
    heads, width = model.config.num_attention_heads, model.model.layers[0].self_attn.head_dim
    groups = model.config.num_key_value_heads
    own = heads // groups * width
    assert groups > 1
    queries, keys = torch.arange(own, heads * width), torch.arange(width, groups * width)
    neurons = torch.arange(size // 2, size)
    bias = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) / 10
    thin = {
        1: Channels(neurons=neurons),
        3: Channels(queries=queries, keys=keys, o_bias=bias[0], down_bias=bias[1]),
        4: Channels(neurons=neurons, queries=queries, keys=keys),
    }
    repair = heal_narrower(view, thin, make_batch(ids.tolist(), view))
    plain, healed = copy.deepcopy(model), copy.deepcopy(model)
    for block, kept in thin.items():
        thinned_(plain, block, kept)
    assert [s.removed for s in repair.seams] == [f"narrower block {b}" for b in thin]
    for seam, (block, kept) in zip(repair.seams, thin.items(), strict=True):
        thinned_(healed, block, kept)
        target = seen(model, block + 1, ids[~HELD])["in"].flatten(0, 1)
        parts, down = seen(healed, block, ids[~HELD]), healed.model.layers[block].mlp.down_proj
        columns = torch.arange(size) if kept.neurons is None else kept.neurons
        x, weight = parts["inner"].flatten(0, 1)[:, columns], down.weight.double()[:, columns]
        y = target - parts["middle"].flatten(0, 1) - down.bias.double()
        share = target.square().mean(-1).rsqrt()[:, None]
        ridge = math.sqrt(seam.alpha * float((x * share).square().sum(0).mean()))
        system = torch.cat([x * share, ridge * torch.eye(len(columns)).double()])
        wanted = torch.linalg.lstsq(system, torch.cat([y * share, ridge * weight.t()])).solution.t()
        if seam.kept:
            got = repair.tensors[f"model.layers.{block}.mlp.down_proj.weight"](down.weight)
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                down.weight[:, columns] = got
    assert any(seam.kept for seam in repair.seams)
    dense = log_p(model, ids[HELD])
    for name, one in (("kl_before", plain), ("kl_after", healed)):
        expected = mean_kl(dense, log_p(one, ids[HELD]))
        assert getattr(repair, name) == pytest.approx(expected, rel=1e-4)
    assert repair.kl_after < repair.kl_before


def test_prune_heals_narrower_mlps(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("gqa"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.text(), encoding="utf-8")
    model = loading.load_model(source, torch.device("cpu"), torch.float32)
    size = model.config.intermediate_size
    order = ranked(tmp_path / "order", tiny.BLOCKS, size, headers.inspect(source).key)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"mlp_width": {"2": size // 2}, "neurons": order}))
    argv = ["prune", str(source), "--plan", str(plan), "--calibration", str(text)]
    argv += ["--length", "24", "--samples", "40", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--heal", "linear", "--out", str(out)]) == 2
    assert f"the MLP of block 2 keeps {size // 2} neurons" in capsys.readouterr().err
    assert main([*argv, "--heal", "refit", "--out", str(out), "--overwrite"]) == 0
    record = Pruning.read(out)
    assert (record.healed, record.healing.kl_after < record.healing.kl_before) == ("refit", True)
    assert "MLP neurons of 2: alpha" in (out / "README.md").read_text().split("healed seams")[1]

    rows = calibration_rows(str(text), loading.load_tokenizer(source), 40, 24, 1234)
    view = BlockView(model)
    batch = make_batch(rows, view)
    removal = Removal((), (), (), ((2, size // 2),), order)
    repair = heal(view, removal, batch, "refit")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with applied(view, repair), view.skip(removal) as narrower, torch.no_grad():
        wanted = narrower(batch.ids, use_cache=False).logits.log_softmax(-1).double()
    torch.testing.assert_close(log_p(stock.eval(), batch.ids), wanted, rtol=0, atol=1e-5)


def test_prune_heals_a_cut_of_parts(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source, text, out = tiny_dir("gqa"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.text(), encoding="utf-8")
    argv = ["prune", str(source), "--attention", "2", "--mlp", "3", "--calibration", str(text)]
    argv += ["--length", "24", "--samples", "40", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--heal", "scale", "--out", str(out)]) == 2
    assert "of block 2 only the attention is removed" in capsys.readouterr().err
    assert main([*argv, "--heal", "auto", "--out", str(out), "--overwrite"]) == 0
    record = Pruning.read(out)
    assert (record.healed, record.healing.kl_after < record.healing.kl_before) == ("refit", True)
    assert "attention of 2: alpha" in (out / "README.md").read_text().split("healed seams")[1]

    # the written model, by its own code, is the dense one with these parts silent and healed
    model = loading.load_model(source, torch.device("cpu"), torch.float32)
    rows = calibration_rows(str(text), loading.load_tokenizer(source), 40, 24, 1234)
    view = BlockView(model)
    batch = make_batch(rows, view)
    repair = heal(view, Removal((), (2,), (3,)), batch, "refit")
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True)
    with applied(view, repair), silent(model, Removal((), (2,), (3,))):
        wanted = log_p(model, batch.ids)
    torch.testing.assert_close(log_p(stock.eval(), batch.ids), wanted, rtol=0, atol=1e-5)


def test_prune_writes_what_was_healed(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    source = tiny_dir("tied", dtype="bfloat16", shard_bytes=40_000)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(tiny.text(), encoding="utf-8")
    argv = ["prune", str(source), "--drop", "2,3", "--heal", "refit", "--calibration", str(text)]
    argv += ["--length", "24", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--samples", "4", "--out", str(out)]) == 2
    assert "at least 640 tokens" in capsys.readouterr().err
    assert main([*argv, "--samples", "40", "--out", str(out), "--overwrite"]) == 0

    record = Pruning.read(out)
    healing = record.healing
    assert record.healed == "refit"
    assert (healing.tokens, healing.heldout_tokens) == (720, 240)
    assert healing.kl_after < healing.kl_before
    assert healing.nll_dense < healing.nll_after
    assert healing.perplexity("after") == pytest.approx(math.exp(healing.nll_after))
    assert (healing.calibration.source, healing.calibration.samples) == (text.name, 40)
    assert (healing.device, healing.seams[0].kept) == ("cpu", True)
    assert "refitted in closed form" in (out / "README.md").read_text()
    assert headers.inspect(out).to_dict()["healed"] == "refit"
    assert headers.inspect(out).key != headers.inspect(source).key
    dense = Variant("dense", "dense", "dense")
    made = variants.made(read_run(out), dense, dense)
    assert (made.label.endswith("healed"), made.healed) == (True, "refit")

    # stock transformers loads it, and it gives the logits of the model healed in memory
    model = loading.load_model(source, torch.device("cpu"), torch.float32)
    rows = calibration_rows(str(text), loading.load_tokenizer(source), 40, 24, 1234)
    view = BlockView(model)
    batch = make_batch(rows, view)
    stored = dict.fromkeys(dict(model.named_parameters()), torch.bfloat16)
    repair = heal(view, (2, 3), batch, "refit", stored=stored)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with applied(view, repair), view.skip((2, 3)) as healed, torch.no_grad():
        wanted = healed(batch.ids, use_cache=False).logits
    with torch.no_grad():
        got = stock(batch.ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert repair.kl_after == pytest.approx(healing.kl_after, rel=1e-3)
    (file,) = [
        f
        for f in out.glob("*.safetensors")
        if "model.layers.1.mlp.down_proj.weight" in load_file(f)
    ]
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(load_file(file)[name], repair.tensors[name](model.get_parameter(name)))

    # a plain cut says nothing of healing, and computes nothing
    assert main([*argv[:4], "--out", str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "pruning.json").read_text())["healing"] is None
    assert not COMMANDS["prune"].takes_device({"heal": "none"})
    assert COMMANDS["prune"].takes_device({"heal": "auto"})


@pytest.mark.parametrize(("method", "drop"), [("auto", (3, 1)), ("scale", (2, 3))])
def test_the_estimate_counts_what_healing_computes(tiny_gqa, ids, method, drop):
    """The counter does not see products in place, so a plain pass shows by how much it is low."""
    info = headers.inspect(tiny_gqa)
    view = BlockView(AutoModelForCausalLM.from_pretrained(tiny_gqa))
    batch = make_batch(ids.tolist(), view)
    with FlopCounterMode(display=False) as plain:
        states_without(view, batch, [frozenset()])
    with FlopCounterMode(display=False) as healing:
        heal(view, drop, batch, method)
    spec = PruneSpec(checkpoint="", heal=method, samples=ROWS, length=TOKENS, out="")
    once = sum(block_flops(info, block, ROWS, TOKENS) for block in range(info.blocks))
    counted = healing.get_total_flops() * once / plain.get_total_flops()
    assert healing_flops(spec, info, Removal(drop)) == pytest.approx(counted, rel=0.3)


@pytest.mark.parametrize(
    ("removal", "method"),
    [
        (Removal(DROP), "auto"),
        (Removal((2, 3), (5,), (4,)), "refit"),
        (None, "refit"),
    ],
)
def test_streams_on_disk_give_the_same_numbers_in_bounded_memory(
    model, ids, tmp_path, monkeypatch, removal, method
):
    monkeypatch.setattr(forward, "CPU_TOKENS", 5 * TOKENS)  # the last chunk is smaller
    monkeypatch.setattr(divergence, "LOGITS_CPU", 320 * 50)
    view = BlockView(model)

    def healed(rows, **options):
        batch = make_batch(rows.tolist(), view)
        if removal is None:
            keep = Channels(
                queries=torch.arange(16), keys=torch.arange(16), neurons=torch.arange(9)
            )
            return heal_narrower(view, {2: keep, 5: keep}, batch, **options)
        return heal(view, removal, batch, method, **options)

    here, there = healed(ids), healed(ids, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert here.record(method) == there.record(method)
    assert here.kl_after < here.kl_before
    assert here.tensors.keys() == there.tensors.keys()
    for name, change in here.tensors.items():
        before = view.tensor(name)
        assert change(before).equal(there.tensors[name](before)), name
    many = ids.repeat(8, 1)
    state = len(many) * TOKENS * view.hidden_size * 4
    few, peak = (tensor_peak(lambda r=r: healed(r, folder=tmp_path)) for r in (ids, many))
    assert peak - few < state / 2 < tensor_peak(lambda: healed(many)) - few
