"""The sweep, Taylor and the curve against the naive way of computing each number."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.doctor import plain
from core.errors import Cancelled, NotFiniteError
from core.importance.branches import losses_without, make_batch
from core.importance.greedy import greedy
from core.importance.sweep import sublayer_perplexity, sweep
from core.importance.taylor import block_sums, magnitude, taylor
from core.model import loading
from core.model.blocks import MODULES, BlockView
from core.runs.progress import Progress

FAMILIES = ("mha", "gqa", "llama3", "mistral", "qwen2", "qwen3")
CPU = torch.device("cpu")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return loading.load_model(folder, CPU, dtype)


def rows_for(model: Any, count: int = 4, length: int = 24) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    size = (count, length)
    return torch.randint(0, model.config.vocab_size, size, generator=generator).tolist()


def without(model: Any, drop: tuple[int, ...]) -> Any:
    """Return a model of its own from which the blocks are really gone."""
    smaller = copy.deepcopy(model)
    keep = [i for i in range(model.config.num_hidden_layers) if i not in drop]
    smaller.model.layers = nn.ModuleList([smaller.model.layers[i] for i in keep])
    for number, layer in enumerate(smaller.model.layers):
        layer.self_attn.layer_idx = number
    smaller.config.num_hidden_layers = len(keep)
    if getattr(smaller.config, "layer_types", None):
        smaller.config.layer_types = [model.config.layer_types[i] for i in keep]
    return smaller


def plain_nll(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the mean NLL of each row by the stock model's own loss."""
    with torch.no_grad():
        return torch.stack(
            [
                model(torch.tensor([row]), labels=torch.tensor([row]), use_cache=False).loss
                for row in rows
            ]
        )


def plain_ppl(model: Any, rows: list[list[int]]) -> float:
    return math.exp(float(plain_nll(model, rows).double().mean()))


@pytest.fixture(scope="module", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, tiny_dir: Any) -> Any:
    return load(tiny_dir(request.param))


def test_sweep_equals_really_removing_every_block(family_model: Any) -> None:
    rows = rows_for(family_model)
    view = BlockView(family_model)
    result = sweep(view, make_batch(rows, view), kl=True)
    assert result.dense_ppl == pytest.approx(plain_ppl(family_model, rows), rel=1e-5)
    for block in range(len(view)):
        smaller = without(family_model, (block,))
        kl = plain.divergence(family_model, smaller, rows)
        assert result.kl[block] == pytest.approx(kl, rel=1e-5)
        assert result.ppl[block] == pytest.approx(plain_ppl(smaller, rows), rel=1e-5)
        expected = plain_nll(smaller, rows).tolist()
        assert result.sample_nll[block + 1] == pytest.approx(expected, rel=1e-4)
        each = [plain.divergence(family_model, smaller, [row]) for row in rows]
        assert result.sample_kl[block] == pytest.approx(each, rel=1e-4, abs=1e-7)
    assert max(result.ppl) > 1.01 * min(result.ppl)


def test_similarities_equal_hooked_hidden_states(family_model: Any) -> None:
    rows = rows_for(family_model)
    view = BlockView(family_model)
    result = sweep(view, make_batch(rows, view), perplexity=False)
    states: list[torch.Tensor] = []
    hooks = [
        view.blocks[0].register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
    ]
    for layer in view.blocks:
        hooks.append(
            layer.register_forward_hook(
                lambda _m, _a, out: states.append(
                    (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
        )
    with torch.no_grad():
        family_model(torch.tensor(rows), use_cache=False)
    for hook in hooks:
        hook.remove()
    for block in range(len(view)):
        x, y = states[block], states[block + 1]
        cosine = nn.functional.cosine_similarity(x, y, dim=-1).mean()
        assert result.block_influence[block] == pytest.approx(1 - float(cosine), abs=1e-5)
        update = ((y - x).norm(dim=-1) / y.norm(dim=-1)).mean()
        assert result.relative_update[block] == pytest.approx(float(update), rel=1e-4)
    found = {(start, length): distance for start, length, distance in result.angular}
    count = len(view)
    assert len(found) == count * (count + 1) // 2
    for (start, length), distance in found.items():
        x, y = states[start][:, -1], states[start + length][:, -1]
        angle = torch.arccos(nn.functional.cosine_similarity(x, y, dim=-1).clamp(-1, 1))
        assert distance == pytest.approx(float((angle / math.pi).mean()), abs=2e-4)


def test_taylor_equals_a_whole_model_backward(family_model: Any) -> None:
    rows = rows_for(family_model)
    view = BlockView(family_model)
    scores = taylor(view, make_batch(rows, view))
    plain = copy.deepcopy(family_model).requires_grad_(True)
    ids = torch.tensor(rows)
    plain(ids, labels=ids, use_cache=False).loss.backward()
    expected = {
        f"model.layers.{block}.{path}.weight": float((weight * weight.grad).abs().sum().detach())
        for block, layer in enumerate(plain.model.layers)
        for _, path in MODULES
        for weight in [layer.get_submodule(path).weight]
    }
    assert {s.name: s.value for s in scores} == pytest.approx(expected, rel=1e-4)
    sums = block_sums(scores, len(view))
    assert sum(sums) == pytest.approx(sum(expected.values()), rel=1e-4)


def test_taylor_over_chunks_is_over_the_whole_set(
    family_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_for(family_model)
    view = BlockView(family_model)
    whole = taylor(view, make_batch(rows, view))
    monkeypatch.setattr("core.importance.taylor.chunk_rows", lambda *_: 1)
    pieces = taylor(view, make_batch(rows, view))
    assert [s.value for s in pieces] == pytest.approx([s.value for s in whole], rel=1e-4)


def test_taylor_keeps_the_gradients_of_one_block_only(tiny_dir: Any) -> None:
    model = load(tiny_dir("mha"))
    view = BlockView(model)
    taylor(view, make_batch(rows_for(model), view))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    alive: list[int] = []
    real = torch.autograd.grad

    def counting(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(p.numel() for p in inputs) if isinstance(inputs, list) else 0)
        return real(outputs, inputs, *args, **kwargs)

    torch.autograd.grad = counting
    try:
        taylor(view, make_batch(rows_for(model), view))
    finally:
        torch.autograd.grad = real
    block = sum(p.numel() for p in view.blocks[0].parameters())
    state = 4 * 24 * model.config.hidden_size
    assert max(alive) <= block + state


def test_magnitude_is_the_sum_of_absolute_weights(tiny_dir: Any) -> None:
    model = load(tiny_dir("gqa"))
    for score in magnitude(BlockView(model)):
        weight = dict(model.named_parameters())[score.name]
        assert score.value == pytest.approx(float(weight.double().abs().sum()), rel=1e-5)


def test_sets_of_blocks_equal_really_removed_ones(family_model: Any) -> None:
    view, rows = BlockView(family_model), rows_for(family_model)
    last = len(view) - 1
    sets = [(), (1,), (1, 2), (0, last), (2, 1), (last,)]
    losses = losses_without(view, make_batch(rows, view), [frozenset(s) for s in sets])
    assert losses is not None
    expected = [plain_ppl(without(family_model, s), rows) for s in sets]
    assert losses.perplexity == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_near_float32(tiny_dir: Any) -> None:
    model = load(tiny_dir("mha"), torch.bfloat16)
    view, rows = BlockView(model), rows_for(model)
    result = sweep(view, make_batch(rows, view))
    wide = copy.deepcopy(model).float()
    assert result.dense_ppl == pytest.approx(plain_ppl(wide, rows), rel=2e-3)
    assert all(math.isfinite(s.value) for s in taylor(view, make_batch(rows, view)))


def test_rows_of_different_lengths_ignore_the_padding(tiny_dir: Any) -> None:
    model = load(tiny_dir("mha"))
    view = BlockView(model)
    rows = [row[: 8 + 5 * i] for i, row in enumerate(rows_for(model, 3))]
    result = sweep(view, make_batch(rows, view))
    assert result.sample_nll[0] == pytest.approx(plain_nll(model, rows).tolist(), rel=1e-4)


def test_nan_weights_are_named(tiny_dir: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(tiny_dir("mha"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        loading.load_model(folder, CPU, torch.float32)


def test_progress_per_block_and_cancel_within_one(tiny_dir: Any) -> None:
    model = load(tiny_dir("mha"))
    view = BlockView(model)

    class Watch(Progress):
        def __init__(self, allow: int) -> None:
            self.seen: list[tuple[int, int]] = []
            self.allow = allow

        def step(self, done: int, total: int, message: str = "") -> None:
            self.seen.append((done, total))

        def check_cancel(self) -> None:
            self.allow -= 1
            if self.allow < 0:
                raise Cancelled("stop")

    watch = Watch(10_000)
    sweep(view, make_batch(rows_for(model), view), watch)
    assert len(watch.seen) >= len(view)
    assert watch.seen[-1][0] == watch.seen[-1][1]
    assert [d for d, _ in watch.seen] == sorted(d for d, _ in watch.seen)
    with pytest.raises(Cancelled):
        sweep(view, make_batch(rows_for(model), view), Watch(2))


def test_greedy_search_equals_really_removing_round_by_round(family_model: Any) -> None:
    rows = rows_for(family_model)
    view = BlockView(family_model)
    found = greedy(view, make_batch(rows, view), rounds=2)
    gone: tuple[int, ...] = ()
    for step in found:
        free = [b for b in range(1, len(view) - 1) if b not in gone]
        values = {b: plain_ppl(without(family_model, (*gone, b)), rows) for b in free}
        assert step.block == min(values, key=lambda b: values[b])
        assert step.ppl == pytest.approx(values[step.block], rel=1e-5)
        gone = (*gone, step.block)
    assert len(greedy(view, make_batch(rows, view), rounds=99)) == len(view) - 2


def test_sublayer_scores_equal_silencing_the_part(family_model: Any) -> None:
    """A part is left out by making its last projection give zero."""
    rows = rows_for(family_model)
    view = BlockView(family_model)
    found = {(b, p): v for b, p, v in sublayer_perplexity(view, make_batch(rows, view))}
    assert len(found) == 2 * len(view)
    for block, path in ((0, "self_attn.o_proj"), (2, "mlp.down_proj"), (3, "self_attn.o_proj")):
        silent = copy.deepcopy(family_model)
        projection = silent.model.layers[block].get_submodule(path)
        with torch.no_grad():
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
        part = "attention" if "attn" in path else "mlp"
        assert found[block, part] == pytest.approx(plain_ppl(silent, rows), rel=1e-5)
