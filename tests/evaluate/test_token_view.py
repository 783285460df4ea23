"""Texts token by token: losses of stock transformers, their text, HTML, and where they are kept."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.checkpoint.drop import Removal
from core.demo import CHECKPOINT
from core.errors import DataError
from core.evaluate import token_view
from core.evaluate.token_losses import pieces
from core.evaluate.token_losses import token_view as read
from core.evaluate.token_view import TokenView
from core.live.protocol import Tokens
from core.live.reading import read as read_live
from core.live.store import Store
from core.live.token_pair import TokenPair
from core.model import loading
from core.model.blocks import BlockView
from core.runs.workspace import Workspace

CPU = torch.device("cpu")
TEXT = 'Ann sees the "red ball" – ärgerlich, 世界 <b>x</b>\n  by the river.'


@pytest.fixture
def model(tiny_gqa):
    return loading.load_model(tiny_gqa, CPU, torch.float32)


@pytest.fixture
def tokenizer(tiny_gqa):
    return loading.load_tokenizer(tiny_gqa)


def test_losses_and_likeliest_tokens_are_those_of_stock_transformers(
    model, tokenizer, tiny_gqa, monkeypatch
):
    monkeypatch.setattr("core.evaluate.token_losses.ROWS", 7)  # several pieces
    ids = tokenizer.encode(TEXT)
    found = read(model, tokenizer, ids, "x")
    stock = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32).eval()
    with torch.no_grad():
        scores = stock(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [-float(scores[at, token]) for at, token in enumerate(ids[1:])]
    assert found.nll[0] is None
    assert found.nll[1:] == pytest.approx(wanted, abs=2e-4)
    assert found.mean == pytest.approx(sum(wanted) / len(wanted), abs=2e-4)
    for at in (1, 9, len(ids) - 1):
        best = scores[at - 1].exp().topk(5)
        assert [share for _, share in found.top[at]] == pytest.approx(
            best.values.tolist(), abs=2e-5
        )
        assert len(found.top[at]) == 5
    assert found.top[0] == ()


@pytest.mark.parametrize("name", ["bytes", "demo", "sentencepiece"])
def test_the_pieces_are_the_text(tiny_gqa, tmp_path, name):
    folder = {
        "bytes": lambda: tiny_gqa,
        "demo": lambda: CHECKPOINT,
        "sentencepiece": lambda: tiny.write_sentencepiece(tmp_path / "sp"),
    }[name]()
    text = TEXT if name != "demo" else 'Anna had two nuts. "I have two nuts," said Anna.'
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode(text)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "\ufffd" not in "".join(found)


def test_a_text_of_one_token_or_of_another_vocabulary_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="fewer than two tokens"):
        read(model, tokenizer, [5])
    with pytest.raises(DataError, match="Token id 999 is outside"):
        read(model, tokenizer, [5, 999])


def made(*nll):
    ids = tuple(range(len(nll)))
    names = ("<s>", " a<b", " c", "\n", " d")[: len(nll)]
    top = ((), *[((" a<b", 0.5), ('"', 0.25))] * (len(nll) - 1))
    return TokenView(source="t", ids=ids, pieces=names, nll=nll, top=top)


def test_colours_and_hovering_say_what_both_models_think():
    dense, other = made(None, 1.0, 3.0, 0.2, 9.0), made(None, 4.0, 2.2, 0.3, 9.1)
    shown = token_view.by_loss(dense, other, "dense", "cut")
    assert "a&lt;b" in shown
    assert "<b" not in shown
    alphas = [float(a) for a in re.findall(r"rgba\(0,114,178,([\d.]+)\)", shown)]
    assert alphas == pytest.approx([0.11, 0.33, 0.02, 0.65], abs=0.006)
    hover = re.findall(r'title="([^"]*)"', shown)
    assert "dense: loss 1.00 nats" in hover[1]
    assert "50.0%  &quot; a&lt;b&quot;" in hover[1]
    assert "cut: loss 4.00 nats" in hover[1]
    assert "difference 3.00 nats" in hover[1]
    assert "the first token has no loss" in hover[0]
    apart = token_view.by_difference(dense, other, "cut", "dense")
    assert len(re.findall(r"solid rgb\(213,94,0\)", apart)) == 1
    assert len(re.findall(r"dotted rgb\(0,114,178\)", apart)) == 1
    said = token_view.summary(dense, other, "cut")
    assert said.startswith("5 tokens: the dense model loses 3.300 nats per token, cut 3.900")
    assert "the worst tenth of the tokens has 94% of what it loses more." in said


def test_an_evaluation_keeps_the_beginning_of_each_text_and_reuses_it(tiny_gqa, tmp_path):
    where, text = tmp_path / "workspace", tmp_path / "text.txt"
    text.write_text(tiny.text(60))

    def evaluate(checkpoint, name, *more):
        argv = ["evaluate", checkpoint, "--perplexity", text, "--window", "32", "--device", "cpu"]
        assert main([*map(str, argv), "--out", str(where / name), *more]) == 0
        return token_view.read(where / name)

    (found,) = evaluate(tiny_gqa, "first", "--token-view", "50")
    assert len(found.ids) == 50
    assert "".join(found.pieces[1:]).startswith(tiny.text(60)[:40])
    assert evaluate(tiny_gqa, "again", "--token-view", "50") == (found,)  # nothing computed
    assert evaluate(tiny_gqa, "none", "--token-view", "0") == ()
    cut = tmp_path / "cut"
    assert main(["prune", str(tiny_gqa), "--drop", "2", "--out", str(cut)]) == 0
    (other,) = evaluate(cut, "cut", "--token-view", "50")
    assert token_view.pairs([found], [other]) == [(found, other)]
    (where / "cut" / token_view.FILE).write_text('{"ids": [1], "pieces": []}\nnonsense\n')
    assert token_view.read(where / "cut") == ()


def test_the_live_model_reads_a_text_without_blocks_too(tiny_gqa, tmp_path, model, tokenizer):
    loaded = Store(CPU, "float32", 1000).get(str(tiny_gqa))
    ids = tokenizer.encode(TEXT)
    whole = read_live(loaded, Tokens(checkpoint="x", text=TEXT))
    assert whole.nll == read(model, tokenizer, ids).nll
    skipped = read_live(loaded, Tokens(checkpoint="x", text=TEXT, skip=(1, 3)))
    with BlockView(model).skip(Removal((1, 3))) as cut:
        assert skipped.nll == read(cut, tokenizer, ids).nll
    assert skipped.nll != whole.nll
    long = read_live(loaded, Tokens(checkpoint="x", text="red ball " * 300))
    assert len(long.ids) == 256  # the model's context
    assert long.left_out > 0
    with pytest.raises(DataError, match="The text is empty"):
        read_live(loaded, Tokens(checkpoint="x", text="  "))


def test_two_readings_are_asked_in_the_background(tiny_gqa, tmp_path):
    loaded = Store(CPU, "float32", 1000).get(str(tiny_gqa))

    def ask(question, stop):
        yield read_live(loaded, Tokens(**question))

    questions = ({"checkpoint": "x", "skip": []}, {"checkpoint": "x", "skip": [9]})
    pair = TokenPair(TEXT, ("a", "b"), questions, Workspace(tmp_path), ask=ask).start()
    pair.join(20)
    assert len(pair.readings) == 1
    assert "9" in pair.error
