"""The dense model's kept distributions: what is in them, the loss on them, and when they count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from retrain_helpers import dies_after, execute, summary
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.checkpoint import locate
from core.errors import OptionError, OutputError
from core.retrain import batches, caches, loss, row_cache, session, teacher, trainer
from core.retrain.rows import IGNORED, Row
from core.retrain.spec import RetrainSpec, goal_of
from core.runs.progress import SILENT

CPU = torch.device("cpu")
KL = {
    "method": "lora", "template": "plain", "cutoff": 96, "steps": 4, "batch": 4, "micro_batch": 2,
    "lr": 5e-3, "holdout": 4, "eval_every": 2, "warmup": 0, "loss": "kl", "teacher_top_k": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path / "workspace"


@pytest.fixture
def made():
    """Rows of several lengths, one of them twice, with masked prompts."""
    chance = torch.Generator().manual_seed(4)
    found = []
    for length in (5, 30, 12, 7, 21):
        ids = torch.randint(5, 250, (length,), generator=chance).tolist()
        masked = length // 3 + 1
        found.append(Row(tuple(ids), (*[IGNORED] * masked, *ids[masked:])))
    return [*found, found[1]]


def kept(folder, model, made, k):
    return teacher.write(folder, model, made, k, (CPU, None), SILENT)


def test_what_is_kept_is_what_the_model_says(tiny_gqa, made, tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "PART_BYTES", 900)  # several files
    monkeypatch.setattr(loss, "TOKENS_AT_ONCE", 40)
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa).eval()
    cache = kept(tmp_path / "teachers" / "key", model, made, 8)
    assert len(list((tmp_path / "teachers" / "key").glob("part-*"))) > 1
    packs = [(made[2],), (made[0], made[4]), (made[5],)]
    found = cache.of(packs)
    expected = []
    for row in (row for pack in packs for row in pack):
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0, :-1]
        expected.append(logits[torch.tensor(row.labels[1:]) != IGNORED].double().log_softmax(-1))
    whole = torch.cat(expected)
    values, ids = whole.topk(8)
    assert torch.equal(found["teacher_ids"].long(), ids)
    assert torch.allclose(found["teacher_logp"].double(), values, atol=4e-3)
    rest = (1 - values.exp().sum(1)).log()
    assert torch.allclose(found["teacher_rest"].double(), rest, atol=4e-3)


def test_the_loss_is_the_divergence_of_what_was_kept():
    chance = torch.Generator().manual_seed(1)
    wanted, own = (3 * torch.randn(6, 40, generator=chance) for _ in range(2))
    own.requires_grad_()
    ids, logp, rest = (part.double() for part in teacher.largest(wanted, 5))
    ids = ids.long()
    # By hand, in double precision: the kept tokens, and all others as one.
    p = torch.cat([logp, rest[:, None]], 1).softmax(1)
    q = own.double().softmax(1)
    picked = q.gather(1, ids)
    q = torch.cat([picked, (1 - picked.sum(1))[:, None]], 1)
    by_hand = (p * (p.log() - q.log())).sum()
    (expected,) = torch.autograd.grad(by_hand, own)
    got = teacher.kl_kept(own, *teacher.largest(wanted, 5))
    (gradient,) = torch.autograd.grad(got, own)
    assert float(got.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    assert float((gradient - expected).abs().max()) < 1e-5
    full = loss.kl_sum(own, wanted)
    assert float(got.detach()) < float(full.detach())
    everything = teacher.kl_kept(own, *teacher.largest(wanted, 40))
    assert float(everything.detach()) == pytest.approx(
        float(full.detach()), rel=2e-3
    )  # kept in half precision


def test_a_model_that_agrees_has_no_loss():
    logits = 4 * torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    assert float(teacher.kl_kept(logits, *teacher.largest(logits, 20))) == pytest.approx(
        0, abs=2e-4
    )


def test_only_the_same_rows_of_the_same_model_share_a_cache(tiny_dir, made):
    one, other = (locate.open(tiny_dir("gqa", seed=seed)) for seed in (0, 3))
    keys = {
        teacher.key_of(one, made, 8, "float32"),
        teacher.key_of(one, made[:-2], 8, "float32"),
        teacher.key_of(one, made, 9, "float32"),
        teacher.key_of(one, made, 8, "bfloat16"),
        teacher.key_of(other, made, 8, "float32"),
    }
    assert len(keys) == 5
    masked = [Row(made[0].ids, (*[IGNORED] * (len(made[0].ids) - 1), made[0].ids[-1])), *made[1:]]
    assert teacher.key_of(one, masked, 8, "float32") not in keys
    assert teacher.key_of(one, list(made), 8, "float32") in keys


def test_an_interrupted_or_damaged_cache_is_not_trusted(tiny_gqa, made, tmp_path, monkeypatch):
    monkeypatch.setattr(row_cache, "PART_BYTES", 1000)
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa).eval()
    folder = tmp_path / "teachers" / "key"
    usual = row_cache.save_file
    monkeypatch.setattr(row_cache, "save_file", lambda *_: (_ for _ in ()).throw(SystemExit(9)))
    with pytest.raises(SystemExit):
        kept(folder, model, made, 8)
    assert teacher.find(folder, made) is None
    monkeypatch.setattr(row_cache, "save_file", usual)
    # kill -9 leaves the draft; the next one who writes deletes it
    stale = folder.with_name("key.4194000")
    stale.mkdir(parents=True)
    kept(folder, model, made, 8)
    assert not stale.exists()
    assert [one.name for one in folder.parent.iterdir()] == ["key"]
    assert teacher.find(folder, made)
    assert teacher.find(folder, made[:-2]) is None
    file = next(folder.glob("part-*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert teacher.find(folder, made) is None
    assert kept(folder, model, made, 8).of([(made[0],)])["teacher_rest"].shape == (made[0].items,)


def test_a_full_disk_is_one_sentence(tiny_gqa, made, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher.caches, "needed_bytes", lambda *_: 2**60)
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa).eval()
    with pytest.raises(OutputError, match="The dense model's distributions take"):
        kept(tmp_path / "teachers" / "key", model, made, 8)
    assert not list((tmp_path / "teachers").iterdir())


def test_read_ahead_gives_the_same(monkeypatch):
    asked = []

    def make(number):
        asked.append(number)
        return number * number

    get = teacher.read_ahead(make, 5)
    assert [get(n) for n in (0, 1, 2, 4, 3)] == [0, 1, 4, 16, 9]
    assert sorted(set(asked)) == [0, 1, 2, 3, 4]


def test_goals():
    def goal(**options):
        return goal_of(RetrainSpec(checkpoint="x", data="d", out="y", **options))

    assert goal().kl_weight == 0
    assert goal(distil=True).is_live
    assert goal(loss="both", teacher_top_k=0).is_live
    assert goal(loss="both").is_kept
    assert goal(loss="both").entropy
    assert not goal(loss="kl").entropy
    assert goal(loss="kl", kl_weight=9.0).kl_weight == 1
    with pytest.raises(OptionError, match="--distil"):
        goal(loss="kl", distil=True)


@pytest.fixture
def options(pruned, dense, tasks, tmp_path):
    return {
        "checkpoint": str(pruned), "dense": str(dense), "data": tasks,
        "out": str(tmp_path / "run"), "device": "cpu", **KL,
    }  # fmt: skip


def adapter(folder):
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def test_training_on_kept_distributions(options, root, tmp_path, monkeypatch):
    """No second model is in memory, the next run on these rows reads them, resuming is exact."""
    seen = []
    usual = session.Session.objective

    def objective(self):
        seen.append(self.teacher)
        return usual(self)

    monkeypatch.setattr(session.Session, "objective", objective)
    assert execute(**options) == 0
    assert seen == [None]
    (cache,) = (root / caches.FOLDER).iterdir()
    assert caches.taken(root).number == 1
    assert caches.taken(root).bytes > 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert len([line for line in lines if "event" not in line]) == 4

    monkeypatch.setattr(teacher, "write", pytest.fail)
    again = {**options, "out": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        dies_after(patch, 3)
        assert execute(**again) == 1
    assert execute(**again, resume=True) == 0
    one, other = adapter(tmp_path / "run"), adapter(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert summary(tmp_path / "again")["heldout_loss_after"] == pytest.approx(
        summary(tmp_path / "run")["heldout_loss_after"], abs=1e-6
    )
    caches.delete(root)
    assert not (root / caches.FOLDER).exists()
    assert caches.taken(root).number == 0


def test_only_the_rows_of_a_short_training_are_read(options, root):
    assert execute(**{**options, "steps": 2, "batch": 3, "eval_every": 2}) == 0
    (cache,) = (root / caches.FOLDER).iterdir()
    assert len(json.loads((cache / caches.COMPLETE).read_text())["places"]) == 6


def test_kept_distributions_train_as_a_live_teacher_does(options, tmp_path, dense):
    """With all tokens kept, the weights are those of training beside the dense model."""
    vocabulary = locate.open(dense).info.vocab
    short = {"steps": 2, "dropout": 0.0, "eval_every": 2}
    for name, k in (("live", 0), ("all", vocabulary), ("few", 8)):
        out = str(tmp_path / name)
        assert execute(**{**options, **short, "teacher_top_k": k, "out": out}) == 0
    live, every, few = (adapter(tmp_path / name) for name in ("live", "all", "few"))

    def apart(one, other):
        return sum(float((one[n] - other[n]).norm()) for n in one)

    assert apart(live, every) < 0.05 * apart(live, few)


def test_the_dense_model_is_needed(options, capsys):
    assert execute(**{**options, "dense": None, "checkpoint": options["dense"]}) == 2
    assert "--loss kl needs the dense model" in capsys.readouterr().err


def test_packed_rows_find_their_distributions(tiny_gqa, made, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_gqa).eval()
    cache = kept(tmp_path / "teachers" / "key", model, made, 250)
    packs = batches.sequences(made, "packed", 64, 1)
    batch = trainer.with_kept(packs, cache)
    with torch.no_grad():
        logits, _ = loss.predicted_logits(model, batch)
    found = teacher.kl_kept(logits, *(batch[name] for name in teacher.NAMES))
    assert float(found) == pytest.approx(0, abs=1e-2)


def test_the_divergence_on_held_out_rows_is_that_of_whole_distributions(tiny_dir, made):
    """Up to what the 128 likeliest of 300 tokens leave out; the loss is the plain one exactly."""
    dense, other = (
        AutoModelForCausalLM.from_pretrained(tiny_dir("gqa", seed=seed)).eval() for seed in (0, 3)
    )
    held = teacher.yardstick(dense, made, CPU)
    assert held.loss == loss.heldout_loss(dense, made, CPU)
    assert held.measure(dense, CPU).kl == pytest.approx(0, abs=1e-4)
    found = held.measure(other, CPU)
    assert found.loss == loss.heldout_loss(other, made, CPU)
    whole = loss.mean_kl(other, dense, made, CPU)
    assert found.kl == pytest.approx(whole, rel=0.5)
    assert 0 < found.kl < whole
    assert teacher.Yardstick(made).measure(other, CPU).kl is None


@pytest.mark.parametrize("marker", ['{"places": 3, "bytes": []}', '{"places": [[0]]}', "[]", "{"])
def test_a_damaged_marker_is_no_cache(made, tmp_path, marker):
    (tmp_path / caches.COMPLETE).write_text(marker)
    assert teacher.find(tmp_path, made) is None
