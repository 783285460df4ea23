"""Losses against stock transformers: packed and unpacked, held-out, KL; steps against a loop."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.retrain import batches, loss, rows
from core.retrain.recovery import Held, Recovery
from core.retrain.spec import Goal, RetrainSpec, settings_of
from core.retrain.trainer import MicroBatches, Objective, RetrainTrainer, StepWatcher, arguments

CPU = torch.device("cpu")


def random_rows(count=10, seed=0, longest=14):
    """Rows whose first half is masked in every second one."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(4, longest, (1,), generator=generator))
        ids = torch.randint(5, 300, (length,), generator=generator).tolist()
        border = length // 2 if number % 2 else 1
        made.append(rows.Row(tuple(ids), (*[-100] * border, *ids[border:])))
    return made


def stock_loss(model, row):
    """Sum of NLL by transformers itself, the row alone."""
    out = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
    return float(out.loss) * row.items


@pytest.fixture(scope="module", params=["gqa", "qwen3"])
def model(request, tiny_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_dir(request.param)).eval()


@torch.no_grad()
def test_packed_rows_do_not_attend_to_each_other(model):
    made = random_rows()
    packs = batches.sequences(made, "packed", 40, 1)
    assert max(len(pack) for pack in packs) > 2
    batch = loss.collate(packs)
    logits, targets = loss.predicted_logits(model, batch)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    flat = [row for pack in packs for row in pack]
    got = [float(part.sum()) for part in nll.split([row.items for row in flat])]
    assert got == pytest.approx([stock_loss(model, row) for row in flat], abs=2e-4)
    # Without position ids they do, so the test above can fail.
    del batch["position_ids"]
    logits, targets = loss.predicted_logits(model, batch)
    mixed = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert float((mixed - nll).abs().max()) > 0.1


def test_heldout_loss_is_the_mean_over_tokens(model, monkeypatch):
    made = random_rows(9, seed=4)
    monkeypatch.setattr(loss, "TOKENS_AT_ONCE", 30)  # several batches
    with torch.no_grad():
        each = [stock_loss(model, row) for row in made]
    got = loss.row_losses(model, made, CPU)
    assert [nll for nll, _ in got] == pytest.approx(each, abs=1e-4)
    expected = sum(each) / sum(row.items for row in made)
    assert loss.heldout_loss(model, made, CPU) == pytest.approx(expected, abs=1e-5)


def test_kl_by_its_definition():
    student, teacher = torch.randn(2, 6, 11)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert float(loss.kl_sum(student, teacher)) == pytest.approx(
        float((p * (p / q).log()).sum()), rel=1e-5
    )
    assert float(loss.kl_sum(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def watcher(settings, clip=0.0):
    from core.runs.progress import SILENT

    held = Held(1.0)
    return StepWatcher(
        settings, SILENT, lambda: held, dense=None, before=held, clip=clip, memory=lambda: 0.0
    )


def trained(folder, tmp_path, made, micro, layout="grouped", teacher=None):
    """Weights after three full fine-tuning steps of six sequences."""
    spec = RetrainSpec(
        checkpoint="x", out="y", data="d", method="full", steps=3, batch=6, micro_batch=micro,
        lr=1e-2, schedule="constant", warmup=0, layout=layout,
    )  # fmt: skip
    settings = settings_of(spec, len(made))
    packs = batches.sequences(made, layout, 40, 1)
    plan = batches.StepPlan(
        [sum(len(r.ids) for r in p) for p in packs], 6, settings.accumulation, spec.seed
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = RetrainTrainer(
        model,
        arguments(spec, settings, tmp_path / f"{micro}{layout}", CPU),
        MicroBatches(packs, plan, 3),
        Objective(CPU, None, teacher, Goal(True, 0.5 if teacher else 0.0, 0)),
    )
    callback = watcher(settings)
    callback.trainer = trainer
    trainer.add_callback(callback)
    trainer.train()
    return model, [[packs[i] for i in plan.indices(step)] for step in range(3)]


def by_hand(folder, steps, teacher=None):
    """The same steps as a plain loop: AdamW, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for chosen in steps:
        flat = [row for pack in chosen for row in pack]
        items = sum(row.items for row in flat)
        for row in flat:
            ids = torch.tensor([row.ids])
            labels = torch.tensor([row.labels])
            out = model(input_ids=ids, labels=labels, use_cache=False)
            total = out.loss * row.items
            if teacher is not None:
                where = labels[0, 1:] != -100
                with torch.no_grad():
                    wanted = teacher(input_ids=ids).logits[0, :-1][where].softmax(-1)
                mine = out.logits[0, :-1][where].log_softmax(-1)
                total = total + 0.5 * (wanted * (wanted.log() - mine)).sum()
            (total / items).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def assert_same(model, other, tolerance=2e-4):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < tolerance


@pytest.mark.parametrize(("micro", "layout"), [(6, "grouped"), (2, "grouped"), (4, "packed")])
def test_steps_equal_a_plain_loop(tiny_gqa, tmp_path, micro, layout):
    model, steps = trained(tiny_gqa, tmp_path, random_rows(20, 2), micro, layout)
    assert_same(model, by_hand(tiny_gqa, steps))


def test_distillation_equals_a_plain_loop(tiny_gqa, tiny_dir, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_dir("gqa", seed=3)).eval()
    model, steps = trained(tiny_gqa, tmp_path, random_rows(20, 2), 3, teacher=teacher)
    assert_same(model, by_hand(tiny_gqa, steps, teacher))


def test_recovered_share():
    assert Recovery(2.0, Held(3.0), Held(2.25)).recovered == pytest.approx(0.75)
    assert Recovery(2.0, Held(3.0), Held(3.5)).recovered == pytest.approx(-0.5)
    assert Recovery(2.0, Held(2.04), Held(2.0)).recovered is None  # under 0.05 nats
    assert Recovery(None, Held(3.0), Held(2.0)).recovered is None
    assert Recovery(2.0, Held(3.0), Held(math.nan)).recovered is None
    found = Recovery(2.0, Held(3.0, 0.8), Held(2.5, 0.6))
    assert found.summary()["heldout_ppl_after"] == pytest.approx(math.exp(2.5))
    assert found.recovered_kl == pytest.approx(0.25)
    assert Recovery(2.0, Held(3.0, 0.01), Held(2.5, 0.0)).recovered_kl is None
    assert Recovery(2.0, Held(3.0), Held(2.5)).recovered_kl is None
