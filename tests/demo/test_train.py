"""The recipe, on a model small enough to train while one waits."""

import csv
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from core.demo.train import (
    Recipe,
    Text,
    batch_rows,
    learning_rate,
    loss_of,
    main,
    padded,
    train,
)

TINY = Recipe(
    steps=24, device="cpu", blocks=3, hidden=32, intermediate=64, heads=4, kv_heads=2,
    vocabulary=400, stories=60, length=64, batch=4, lr=5e-3, warmup=4, every=8, threads=1,
    easy=6, packed=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    train(TINY, out)
    torch.set_num_threads(threads)
    return out


def test_loss_falls(whole):
    rows = list(csv.DictReader((whole / "training.csv").open()))
    assert [int(row["step"]) for row in rows] == [8, 16, 24]
    assert list(rows[0]) == ["step", "tokens", "loss", "heldout_loss", "lr", "seconds"]
    assert float(rows[-1]["heldout_loss"]) < float(rows[0]["heldout_loss"]) < 6.5
    assert 0 < int(rows[0]["tokens"]) < int(rows[-1]["tokens"])
    assert int(rows[-1]["tokens"]) > 18 * 4 * 80 + 6 * 2 * 64  # no story is shorter than 80 tokens


def test_resuming_gives_the_same_weights(whole, tmp_path):
    train(TINY, tmp_path, stop=11)
    train(TINY, tmp_path, resume=True)
    one = load_file(whole / "checkpoint" / "model.safetensors")
    two = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_seed_gives_other_weights(whole, tmp_path):
    train(replace(TINY, seed=1, steps=2), tmp_path)
    one = load_file(whole / "checkpoint" / "model.safetensors")
    two = load_file(tmp_path / "checkpoint" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])


def test_the_rate_warms_up_stays_and_decays():
    recipe = replace(TINY, steps=100, warmup=10, decay=0.3, lr=1.0)
    assert learning_rate(0, recipe) == pytest.approx(0.1)
    assert [learning_rate(step, recipe) for step in (9, 40, 70)] == [1.0, 1.0, 1.0]
    assert learning_rate(85, recipe) == pytest.approx(0.5)
    assert learning_rate(99, recipe) == pytest.approx(1 / 30)


def test_a_pass_takes_every_row_once():
    seen = torch.cat([batch_rows(step, 22, 4, seed=1) for step in range(5)])
    assert len(set(seen.tolist())) == 20
    again = torch.cat([batch_rows(step, 22, 4, seed=1) for step in range(5, 10)])
    assert seen.tolist() != again.tolist()


def test_the_text_is_short_stories_then_all_then_packed_rows():
    told = [[0, *[i + 10] * (i + 3), 1] for i in range(40)]  # story i has i + 5 tokens, all its own
    recipe = replace(TINY, steps=40, easy=4, packed=10, length=16)
    text = Text(told, recipe)
    steps = [text.step(step) for step in range(40)]

    def stories_of(ids, labels):
        assert bool(((labels == ids) | (labels == -100)).all())
        rows = [row[keep].tolist() for row, keep in zip(ids, labels != -100, strict=True)]
        assert all(row in told for row in rows)
        return [row[1] - 10 for row in rows]

    easy = [i for step in steps[:4] for i in stories_of(*step)]
    assert max(easy) <= 20
    assert len(set(easy)) == len(easy) == 16
    whole = [i for step in steps[4:14] for i in stories_of(*step)]
    assert sorted(whole) == list(range(40))
    again = [i for step in steps[14:24] for i in stories_of(*step)]
    assert sorted(again) == list(range(40))
    assert again != whole
    for ids, labels in steps[30:]:
        assert ids.shape == (2, 16)
        assert torch.equal(ids, labels)


def test_padding_changes_no_loss(tiny_gqa):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gqa).eval()
    told = [[1, *range(5, 30), 2], [1, *range(40, 50), 2]]
    together = loss_of(model, *padded(told)).item()
    alone = [loss_of(model, torch.tensor([story])).item() for story in told]
    tokens = [len(story) - 1 for story in told]
    mean = sum(a * n for a, n in zip(alone, tokens, strict=True)) / sum(tokens)
    assert together == pytest.approx(mean, rel=1e-5)


def test_command_line(tmp_path):
    small = {"stories": 30, "steps": 2, "blocks": 2, "hidden": 16, "intermediate": 16}
    small |= {"heads": 2, "kv-heads": 1, "vocabulary": 300, "length": 32}
    arguments = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    main([*arguments, "--out", str(tmp_path)])
    assert (tmp_path / "checkpoint" / "config.json").exists()
    assert (tmp_path / "training.pt").exists()
