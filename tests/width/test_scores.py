"""Scores of every method against plain computations; grouping under grouped-query attention."""

import dataclasses
import gc
import math
import random
import weakref

import naive
import pytest
import torch

from core.checkpoint import headers
from core.errors import NotFiniteError
from core.importance import taylor
from core.importance.branches import make_batch
from core.model.blocks import BlockView
from core.width import activations, controls, flap, llm_pruner, methods, plan, selection, wanda_sp
from core.width.units import Counts
from core.width.ways import ORDERS, Ways

FAMILIES = ("gqa", "qwen2", "qwen3", "mistral")


def rows(count=5, length=11, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(3, 320) for _ in range(length)] for _ in range(count)]


def make_job(folder, method, model=None, given=None, **options):
    """A job on a checkpoint; ``options`` are plan's and the job's."""
    own = {k: options.pop(k) for k in ("seed",) if k in options}
    fields = [f.name for f in dataclasses.fields(Ways)]
    options["ways"] = Ways(**{k: options.pop(k) for k in fields if k in options})
    view = BlockView(model or naive.load(folder))
    made = plan.make(headers.inspect(folder), methods.get(method), **options)
    return selection.Job(view, made, make_batch(given or rows(), view), **own)


# ------------------------------------------------------------------------------------ LLM-Pruner


def elementwise(folder, given, order):
    """|s| of every projection by plain autograd over the whole model."""
    model = naive.load(folder)
    per_row = naive.losses(model, given)
    mean = naive.gradients(model, per_row.mean())
    single = [naive.gradients(model, loss) for loss in per_row]
    result = []
    for block, layer in enumerate(model.model.layers):
        scores = {}
        for name in naive.PROJECTIONS:
            w, g = naive.projection(layer, name).weight.detach(), mean[block, name]
            h = sum(one[block, name] ** 2 for one in single) / len(given)
            s = {"first": w * g, "second": w**2 * h, "mixed": w * g - w**2 * h / 2}[order]
            scores[name] = s.abs()
        result.append(scores)
    return result


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("variant", FAMILIES)
def test_llm_pruner_equals_plain_autograd(tiny_dir, variant, order):
    folder = tiny_dir(variant)
    job = make_job(folder, "llm-pruner", ratio=0.5, layers="1:5", order=order)
    found = llm_pruner.scores(job, job.batch)
    expected = elementwise(folder, rows(), order)
    assert sorted(found) == [1, 2, 3, 4]
    for block, scores in found.items():
        unit = job.plan.units[block]
        groups, neurons = naive.unit_scores(expected[block], 4, 2, unit.head_dim)
        torch.testing.assert_close(scores.groups, torch.tensor(groups), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(scores.neurons, torch.tensor(neurons), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("variant", ["gqa", "qwen2"])
def test_llm_pruners_vector_variant_adds_up_each_channel_first(tiny_dir, variant):
    folder = tiny_dir(variant)
    job = make_job(folder, "llm-pruner", ratio=0.5, layers="1:5", order="vector")
    found = llm_pruner.scores(job, job.batch)
    model = naive.load(folder)
    mean = naive.gradients(model, naive.losses(model, rows()).mean())
    for block, scores in found.items():
        channels = {}
        for name, axis in naive.PROJECTIONS.items():
            weight = naive.projection(model.model.layers[block], name).weight.detach()
            channels[name] = (weight * mean[block, name]).sum(1 - axis).abs()
        d = job.plan.units[block].head_dim
        groups = [
            float(
                channels["k"][g * d : (g + 1) * d].sum() + channels["v"][g * d : (g + 1) * d].sum()
            )
            + sum(
                float(channels[n][h * d : (h + 1) * d].sum())
                for n in ("q", "o")
                for h in (2 * g, 2 * g + 1)
            )
            for g in range(2)
        ]
        neurons = channels["gate"] + channels["up"] + channels["down"]
        torch.testing.assert_close(scores.groups, torch.tensor(groups), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(scores.neurons, neurons, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", ["llm-pruner", "magnitude"])
@pytest.mark.parametrize("ratio", [0.2, 0.7])
def test_global_ranking_drops_the_lowest_of_all_blocks(tiny_gqa, method, ratio):
    job = make_job(tiny_gqa, method, ratio=ratio, layers="0:5", ranking="global")
    assert job.plan.counts is None
    chosen = methods.get(method).load().select(job)
    if method == "llm-pruner":
        parts = elementwise(tiny_gqa, rows(), "first")
        scores = [naive.unit_scores(p, 4, 2, 8) for p in parts]
    else:
        found = [controls.magnitudes(job, unit) for unit in job.plan.units]
        scores = [(f.groups.tolist(), f.neurons.tolist()) for f in found]
    every = [(s, b, "groups", n) for b, (g, _) in enumerate(scores) for n, s in enumerate(g)]
    every += [(s, b, "neurons", n) for b, (_, m) in enumerate(scores) for n, s in enumerate(m)]
    every.sort()
    gone = {unit[1:] for unit in every[: len(every) - int(len(every) * (1 - ratio))]}
    for block, keep in chosen.keep.items():
        for part, total in (("groups", 2), ("neurons", 48)):
            left = [n for n in range(total) if (block, part, n) not in gone]
            assert list(getattr(keep, part)) == left, (block, part)
    assert len({len(keep.neurons) for keep in chosen.keep.values()}) > 1


@pytest.mark.parametrize("order", ORDERS[:3])
def test_gradients_of_one_block_at_a_time(tiny_gqa, monkeypatch, order):
    job = make_job(tiny_gqa, "llm-pruner", ratio=0.5, layers="0:5", order=order)
    real, made, alive = taylor._block_gradient, [], []

    def watched(*arguments):
        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        below, found = real(*arguments)
        made.extend(weakref.ref(g) for g in (*found.gradients, *found.squares))
        return below, found

    monkeypatch.setattr(taylor, "_block_gradient", watched)
    llm_pruner.scores(job, job.batch)
    assert alive == [0] * 5
    assert len(made) == 5 * 9 * (1 if order == "first" else 2)
    assert all(p.grad is None for p in job.view.model.parameters())


# -------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("variant", FAMILIES)
def test_statistics_equal_two_plain_passes(tiny_dir, variant):
    folder = tiny_dir(variant)
    job = make_job(folder, "flap", ratio=0.3, given=rows(70, 24))  # several pieces of rows
    seen = {}
    units = dict(enumerate(job.plan.units))
    activations.walk(job.view, job.batch, units, lambda b, inputs: seen.update({b: inputs}))
    plain = naive.inputs_of(naive.load(folder), rows(70, 24))
    for block in range(5):
        for name in ("o", "down"):
            x, stats = plain[block, name], getattr(seen[block], name)
            mean = x.mean(0)
            assert stats.tokens == len(x) == 70 * 24
            torch.testing.assert_close(stats.mean, mean, rtol=1e-4, atol=1e-6)
            spread = ((x - mean) ** 2).sum(0)
            torch.testing.assert_close(stats.deviations, spread, rtol=1e-4, atol=1e-5)
            norm = (x**2).sum(0).sqrt()
            torch.testing.assert_close(stats.norm, norm, rtol=1e-4, atol=1e-5)


def test_statistics_of_a_large_mean_keep_their_digits():
    stats = activations.InputStats()
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) + 1000.0
    for piece in x.split(77):
        stats.add(piece)
    exact = x.double()
    expected = ((exact - exact.mean(0)) ** 2).sum(0)
    torch.testing.assert_close(stats.deviations, expected, rtol=1e-4, atol=0)


def test_padding_is_not_counted(tiny_gqa):
    given = [row[: 11 - n] for n, row in enumerate(rows())]
    job = make_job(tiny_gqa, "flap", ratio=0.3, given=given)
    seen = {}
    units = {2: job.plan.units[2]}
    activations.walk(job.view, job.batch, units, lambda b, inputs: seen.update({b: inputs}))
    model = naive.load(tiny_gqa)
    x = torch.cat([naive.inputs_of(model, [row])[2, "down"] for row in given])
    assert seen[2].down.tokens == len(x) == sum(map(len, given))
    torch.testing.assert_close(seen[2].down.mean, x.mean(0), rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------- FLAP


def flap_metric(folder, given, blocks, metric="wifv"):
    """The metric of every channel, written out: {(block, "o" | "down"): [channels]}."""
    model = naive.load(folder)
    seen = naive.inputs_of(model, given)
    result = {}
    for block in blocks:
        for name in ("o", "down"):
            x = seen[block, name]
            weight = naive.projection(model.model.layers[block], name).weight.double()
            fluctuation = ((x - x.mean(0)) ** 2).sum(0)
            found = {
                "wifv": fluctuation * (weight**2).sum(0),
                "ifv": fluctuation,
                "wifn": (weight.abs() * ((x**2).sum(0) / len(given)).sqrt()).mean(0),
            }[metric]
            result[block, name] = found**2 if name == "o" else found
    return result


def flap_by_hand(folder, given, blocks, metric="wifv"):
    """Standardised metric per block, written out: (groups, neurons)."""
    found = flap_metric(folder, given, blocks, metric)
    result = {}
    for block in blocks:
        parts = []
        for name in ("o", "down"):
            values = found[block, name]
            deviation = (((values - values.mean()) ** 2).sum() / (len(values) - 1)).sqrt()
            parts.append(((values - values.mean()) / deviation).tolist())
        width = len(parts[0]) // 4
        heads = [parts[0][h * width : (h + 1) * width] for h in range(4)]
        groups = [sum(heads[2 * g] + heads[2 * g + 1]) / (2 * width) for g in range(2)]
        result[block] = (groups, parts[1])
    return result


@pytest.mark.parametrize(
    ("ratio", "metric"),
    [(0.15, "wifv"), (0.4, "wifv"), (0.8, "wifv"), (0.4, "wifn"), (0.4, "ifv")],
)
def test_flap_keeps_what_the_definition_keeps(tiny_gqa, ratio, metric):
    job = make_job(tiny_gqa, "flap", ratio=ratio, metric=metric)
    chosen = flap.select(job)
    scores = flap_by_hand(tiny_gqa, rows(), range(5), metric)
    cost = (2 * 2 * 8 + 2 * 8) / 3
    every = [(s, cost) for groups, _ in scores.values() for s in groups]
    every += [(s, 1.0) for _, neurons in scores.values() for s in neurons]
    every.sort(reverse=True)
    wanted = (1 - ratio) * sum(c for _, c in every)
    kept, gaps = 0.0, []
    for _, c in every:
        kept += c
        gaps.append(abs(kept - wanted))
    threshold = every[gaps.index(min(gaps))][0]
    for block, (groups, neurons) in scores.items():
        above = [g for g, s in enumerate(groups) if s > threshold + 1e-9]
        best = [max(range(2), key=groups.__getitem__)]
        assert list(chosen.keep[block].groups) == (above or best)
        above = [n for n, s in enumerate(neurons) if s > threshold + 1e-9]
        assert list(chosen.keep[block].neurons) == above


@pytest.mark.parametrize("ratio", [0.9, 0.99, 0.9999])
def test_flap_never_empties_a_layer(tiny_gqa, ratio):
    chosen = flap.select(make_job(tiny_gqa, "flap", ratio=ratio))
    assert sorted(chosen.keep) == list(range(5))
    for keep in chosen.keep.values():
        assert len(keep.groups) >= 1
        assert len(keep.neurons) >= 1
    assert chosen.rescued  # without the guard these would be empty


def lowest(values, count):
    """The numbers of the ``count`` lowest values."""
    return sorted(sorted(range(len(values)), key=values.__getitem__)[:count])


@pytest.mark.parametrize("metric", ["wifv", "wifn", "ifv"])
@pytest.mark.parametrize(("structure", "heads"), [("ul-um", None), ("ul-mm", 5)])
def test_flap_cuts_every_block_alike(tiny_gqa, metric, structure, heads):
    """UL-UM: a share of heads and of neurons; UL-MM: heads given, neurons for the rest."""
    ratio = 0.5
    job = make_job(tiny_gqa, "flap", ratio=ratio, metric=metric, structure=structure, heads=heads)
    chosen = flap.select(job)
    found = flap_metric(tiny_gqa, rows(), range(5), metric)
    hidden, rep, d, neurons = 32, 2, 8, 48
    head = (2 * rep + 2) * d * hidden
    total = 2 * head + 3 * neurons * hidden
    gone_heads = int(ratio * 2) if heads is None else heads // 5
    gone_neurons = (
        int(ratio * neurons)
        if heads is None
        else int((ratio * total - gone_heads * head) / (3 * hidden))
    )
    for block, keep in chosen.keep.items():
        o = found[block, "o"].view(2, rep * d).sum(1).tolist()
        dropped = [g for g in range(2) if g not in keep.groups]
        assert dropped == lowest(o, gone_heads)
        dropped = [n for n in range(neurons) if n not in keep.neurons]
        assert dropped == lowest(found[block, "down"].tolist(), gone_neurons)
    counts = {b: keep.counts for b, keep in chosen.keep.items()}
    assert job.plan.counts == counts
    assert job.plan.parameters == job.plan.left(counts)


@pytest.mark.parametrize("heads", [0, 3])
def test_flap_ranks_heads_and_neurons_separately_with_al_mm(tiny_gqa, heads):
    job = make_job(tiny_gqa, "flap", ratio=0.4, structure="al-mm", heads=heads)
    chosen = flap.select(job)
    scores = flap_by_hand(tiny_gqa, rows(), range(5))
    head, neuron = (2 * 2 + 2) * 8 * 32, 3 * 32
    gone = int((0.4 * 5 * (2 * head + 48 * neuron) - heads * head) / neuron)
    for part, count, index in (("groups", heads, 0), ("neurons", gone, 1)):
        every = [(s, b, n) for b in scores for n, s in enumerate(scores[b][index])]
        dropped = {unit[1:] for unit in sorted(every)[:count]}
        for block, keep in chosen.keep.items():
            total = len(scores[block][index])
            left = [n for n in range(total) if (block, n) not in dropped]
            if not left:  # the best is kept
                assert f"{block} {'attention' if index == 0 else 'mlp'}" in chosen.rescued
                left = [max(range(total), key=scores[block][index].__getitem__)]
            assert list(getattr(keep, part)) == left
    assert math.isclose(job.plan.parameters, job.plan.left(
        {b: keep.counts for b, keep in chosen.keep.items()}
    ), rel_tol=0.05)  # fmt: skip


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("flap", {}),
        ("flap", {"structure": "ul-um"}),
        ("flap", {"structure": "al-mm", "heads": 3}),
        ("llm-pruner", {}),
        ("llm-pruner", {"ranking": "global"}),
        ("wanda-sp", {}),
    ],
)
def test_widths_are_rounded_to_the_nearest_multiple(tiny_gqa, method, options):
    more = {} if options.get("structure") == "al-mm" else {"layers": "1,3-4"}
    free = (
        methods.get(method).load().select(make_job(tiny_gqa, method, ratio=0.45, **more, **options))
    )
    made = make_job(tiny_gqa, method, ratio=0.45, round_to=16, **more, **options)
    rounded = methods.get(method).load().select(made)
    assert sorted(rounded.keep) == ([1, 3, 4] if more else [0, 1, 2, 3, 4])
    for block, keep in rounded.keep.items():
        wanted = len(free.keep[block].neurons)
        nearest = min((16, 32, 48), key=lambda n: (abs(n - wanted), -n))
        assert len(keep.neurons) == nearest
        assert set(keep.neurons) <= set(free.keep[block].neurons) or nearest > wanted
    if method != "wanda-sp":  # whose later blocks see the rounded ones
        for block, keep in rounded.keep.items():
            assert set(free.keep[block].neurons) <= set(keep.neurons) or nearest <= wanted


@pytest.mark.parametrize("method", ["llm-pruner", "flap", "wanda-sp", "magnitude", "random"])
def test_a_part_that_may_not_be_cut_stays_whole(tiny_gqa, method):
    options = {"ratio": 0.5, "attention_layers": "1", "mlp_layers": "2,4"}
    job = make_job(tiny_gqa, method, **options)
    chosen = methods.get(method).load().select(job)
    assert sorted(chosen.keep) == [1, 2, 4]
    for block, keep in chosen.keep.items():
        assert (len(keep.groups) < 2) == (block == 1), block
        assert (len(keep.neurons) < 48) == (block in (2, 4)), block


def test_a_layer_with_equal_scores_does_not_divide_by_zero():
    equal = flap.standardise(torch.full((4,), 3.0, dtype=torch.float64))
    assert equal.tolist() == [0.0] * 4
    assert flap.standardise(torch.ones(1, dtype=torch.float64)).tolist() == [0.0]


# ---------------------------------------------------------------------------------------- Wanda-sp


@pytest.mark.parametrize("variant", FAMILIES)
def test_wanda_feeds_the_pruned_output_to_the_next_layer(tiny_dir, variant):
    folder = tiny_dir(variant)
    job = make_job(folder, "wanda-sp", ratio=0.5)
    chosen = wanda_sp.select(job)
    model = naive.load(folder)
    dense_first = naive.inputs_of(model, rows())
    width = job.plan.units[0].head_dim
    differs = False
    for block, layer in enumerate(model.model.layers):
        seen = naive.inputs_of(model, rows())  # of the model as pruned so far
        columns = {}
        for name in ("o", "down"):
            weight = naive.projection(layer, name).weight.detach().double()
            columns[name] = weight.abs().mean(0) * seen[block, name].norm(dim=0)
        heads = [columns["o"][h * width : (h + 1) * width].sum() for h in range(4)]
        groups = [float(heads[0] + heads[1]), float(heads[2] + heads[3])]
        assert chosen.keep[block].groups == (max(range(2), key=groups.__getitem__),)
        order = sorted(range(48), key=lambda n: -float(columns["down"][n]))
        assert chosen.keep[block].neurons == tuple(sorted(order[:24]))
        differs |= not torch.allclose(seen[block, "down"], dense_first[block, "down"])
        gone = [g for g in range(2) if g not in chosen.keep[block].groups]
        channels = [g * 2 * width + c for g in gone for c in range(2 * width)]
        with torch.no_grad():
            layer.self_attn.o_proj.weight[:, channels] = 0.0
            layer.mlp.down_proj.weight[:, order[24:]] = 0.0
    assert differs


# ------------------------------------------------------------ controls and grouping of heads


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(tiny_gqa):
    job = make_job(tiny_gqa, "magnitude", ratio=0.5)
    layer = job.view.blocks[2]
    squares = {
        n: naive.projection(layer, n).weight.detach().double() ** 2 for n in naive.PROJECTIONS
    }
    groups, neurons = naive.unit_scores(squares, 4, 2, 8)
    found = controls.magnitudes(job, job.plan.units[2])
    torch.testing.assert_close(found.groups.double(), torch.tensor(groups).double().sqrt())
    torch.testing.assert_close(found.neurons.double(), torch.tensor(neurons).double().sqrt())


def test_random_follows_the_seed(tiny_gqa):
    def kept(seed):
        return controls.select(make_job(tiny_gqa, "random", ratio=0.5, seed=seed)).keep

    assert kept(1) == kept(1)
    assert kept(1) != kept(2)
    assert all(len(keep.neurons) == 24 for keep in kept(1).values())


def uneven(folder):
    """Query heads weigh 1, 6, 2, 3: contiguous groups have 7 and 5, folded ones 3 and 9."""
    model = naive.load(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("k", "v", "q", "o"):
                naive.projection(layer, name).weight.fill_(0.1)
            for head, size in enumerate((1.0, 6.0, 2.0, 3.0)):
                at = slice(head * 8, head * 8 + 8)
                layer.self_attn.q_proj.weight[at] *= size
                layer.self_attn.o_proj.weight[:, at] *= size
    return model


def kept_groups(folder, method):
    model = uneven(folder)
    job = make_job(folder, method, model, ratio=0.5, layers="1:4")
    return [keep.groups for keep in methods.get(method).load().select(job).keep.values()]


@pytest.mark.parametrize("method", ["magnitude", "wanda-sp"])
def test_a_group_is_its_own_contiguous_heads(tiny_gqa, monkeypatch, method):
    assert kept_groups(tiny_gqa, method) == [(0,)] * 3

    def folded(channels, unit):
        """The grouping of the public code, which adds up other groups' heads: the control."""
        heads = channels.view(unit.groups * unit.queries, unit.head_dim).sum(1)
        own = [naive.folded(g, unit.queries, unit.groups) for g in range(unit.groups)]
        return torch.stack([heads[heads_of].sum() for heads_of in own])

    for module in (selection, wanda_sp):
        monkeypatch.setattr(module, "by_group", folded)
    with pytest.raises(AssertionError):
        assert kept_groups(tiny_gqa, method) == [(0,)] * 3
    assert kept_groups(tiny_gqa, method) == [(1,)] * 3


@pytest.mark.parametrize("order", ORDERS[:3])
def test_llm_pruners_folded_groups_would_score_otherwise(tiny_gqa, order):
    job = make_job(tiny_gqa, "llm-pruner", ratio=0.5, layers="0:5", order=order)
    found = llm_pruner.scores(job, job.batch)
    parts = elementwise(tiny_gqa, rows(), order)
    right = [naive.unit_scores(p, 4, 2, 8)[0] for p in parts]
    wrong = [naive.unit_scores(p, 4, 2, 8, naive.folded)[0] for p in parts]
    ours = torch.stack([found[b].groups for b in range(5)])
    torch.testing.assert_close(ours, torch.tensor(right), rtol=1e-4, atol=1e-8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ours, torch.tensor(wrong), rtol=1e-4, atol=1e-8)


def test_scores_that_are_not_finite_are_an_error():
    scores = selection.UnitScores(torch.tensor([1.0, float("nan")]), torch.ones(3))
    with pytest.raises(NotFiniteError, match="attention of block 7 is NaN or infinite"):
        selection.keep_best(scores, Counts(1, 1), 7)
