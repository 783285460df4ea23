"""Counted tensor peaks: beside the states themselves, memory does not grow with the samples."""

from __future__ import annotations

import pytest
import tiny
import torch

from core.benchmark.meter import tensor_peak
from core.importance import branches, forward, similarity, taylor
from core.importance.branches import Batch, losses_without
from core.importance.similarity import Similarity
from core.model.blocks import BlockView

TOKENS = 16


@pytest.fixture(scope="module")
def view():
    model = tiny.model("gqa", hidden_size=64, intermediate_size=32, vocab_size=2048)
    return BlockView(model.eval().requires_grad_(False))


def batch_of(rows):
    ids = torch.randint(3, 2048, (rows, TOKENS), generator=torch.Generator().manual_seed(rows))
    lengths = torch.tensor([TOKENS - n % 5 for n in range(rows)])
    return Batch(ids, lengths)


def beside(work, held):
    """Bytes of ``work``'s peak beyond ``held(rows)``, for few and four times as many rows."""
    return [tensor_peak(lambda rows=rows: work(batch_of(rows))) - held(rows) for rows in (64, 256)]


def test_the_head_of_a_sweep_takes_bounded_memory(view, monkeypatch):
    sets = [frozenset(), *(frozenset({b}) for b in range(len(view)))]
    plain = losses_without(view, batch_of(64), sets).nll_sum
    state = TOKENS * 64 * 4
    for module in (branches, similarity):
        monkeypatch.setattr(module, "HEAD_TOKENS", 4 * TOKENS)
    monkeypatch.setattr(forward, "CPU_TOKENS", 4 * TOKENS)
    few, many = beside(
        lambda batch: losses_without(view, batch, sets), lambda rows: len(sets) * rows * state
    )
    # Concatenating the states would add 6 * 192 * state; embedding the ids takes part of one.
    assert many - few < 192 * state
    torch.testing.assert_close(losses_without(view, batch_of(64), sets).nll_sum, plain)


def test_similarities_take_bounded_memory(monkeypatch):
    monkeypatch.setattr(similarity, "HEAD_TOKENS", 4 * TOKENS)

    def work(states):
        found = Similarity(batch_of(len(states[0])))
        found.observe(0, *states)
        return found

    def peak(rows):
        before = torch.randn(rows, TOKENS, 64)
        after = before + 1
        return tensor_peak(lambda: work((before, after)))

    assert peak(256) < 256 * TOKENS * 64 * 4 / 2  # less than half of one float32 copy
    before = torch.randn(30, TOKENS, 64)
    found, batch = work((before, before + 1)), batch_of(30)
    x, y = before[batch.valid], before[batch.valid] + 1
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1).mean()
    assert found.block_influence == [pytest.approx(1 - float(cosine), rel=1e-5)]
    update = ((y - x).norm(dim=-1) / y.norm(dim=-1)).mean()
    assert found.relative_update == [pytest.approx(float(update), rel=1e-5)]


def test_logits_of_taylor_take_bounded_memory(view, monkeypatch):
    """256 rows have 32 MiB of logits in float32, of which a plain loss holds several copies."""
    batch, hidden = batch_of(256), torch.randn(256, TOKENS, 64)
    monkeypatch.setattr(taylor, "TAYLOR_LOGITS", {"cpu": 2**16})
    found = []

    def work():
        found.append(taylor._head_gradient(view, batch, hidden, branches.SILENT))

    assert tensor_peak(work) < 4 * hidden.nbytes
    x = hidden.clone().requires_grad_()
    predicts = batch.valid[:, 1:]
    logits = view.model.lm_head(view.final_norm(x)[:, :-1][predicts])
    torch.nn.functional.cross_entropy(logits, batch.ids[:, 1:][predicts]).backward()
    torch.testing.assert_close(found[0], x.grad, rtol=1e-4, atol=1e-9)
