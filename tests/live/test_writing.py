"""Generated text: the tokens of stock transformers on the really pruned checkpoint."""

from __future__ import annotations

import pytest
import tiny
import torch
from live_helpers import CPU

from core.errors import DataError, OptionError, PlanError
from core.live.protocol import Generate
from core.live.replies import Token
from core.live.store import Store
from core.live.writing import _Decoder, write
from core.model import loading
from core.prune import depth

PROMPT = "Ann sees the red ball"


def generate(loaded, **values):
    events = []
    ask = Generate(**{"checkpoint": "x", "prompt": PROMPT, "max_tokens": 12, **values})
    done = write(loaded, ask, events.append, lambda: False)
    return [e for e in events if isinstance(e, Token)], done


@pytest.fixture
def loaded(tiny_dir):
    def get(variant="gqa"):
        return Store(CPU, "float32", 1000).get(str(tiny_dir(variant)))

    return get


def stock(folder, prompt, **options):
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    set_seed(5)
    batch = ids.repeat(options.pop("batch", 1), 1)
    out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=12,
                         pad_token_id=2, use_cache=True, **options)  # fmt: skip
    return out[:, ids.shape[1] :].tolist(), tokenizer


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_greedy_tokens_equal_stock_on_the_pruned_checkpoint(loaded, tmp_path, variant):
    one = loaded(variant)
    folder = tmp_path.parent  # where the fixture's checkpoint lies does not matter
    for number, drop in enumerate([(1,), (), (3, 0), (2,)]):
        source = one.view.model.config._name_or_path
        folder = tmp_path / str(number)
        if drop:
            depth.prune(source, drop, folder)
        wanted, tokenizer = stock(folder if drop else source, PROMPT, do_sample=False)
        events, done = generate(one, skip=drop, temperature=0.0)
        rows = [e.ids[0] for e in events if e.ids]
        assert rows == wanted[0][: len(rows)]
        assert len(rows) == len(wanted[0]) == done.tokens
        text = "".join(e.texts[0] for e in events)
        assert text == tokenizer.decode(wanted[0], skip_special_tokens=True)
        assert done.blocks == tiny.BLOCKS - len(drop)


def test_sampling_draws_what_stock_draws(loaded, tmp_path):
    one = loaded()
    depth.prune(one.view.model.config._name_or_path, (2,), tmp_path / "p")
    options = {"temperature": 1.3, "top_k": 30, "top_p": 0.9}
    wanted, _ = stock(tmp_path / "p", PROMPT, do_sample=True, batch=3, **options)
    events, done = generate(one, skip=(2,), seed=5, batch=3, **options)
    got = [[e.ids[row] for e in events if e.ids] for row in range(3)]
    assert got == wanted
    assert len({tuple(row) for row in got}) == 3
    again, _ = generate(one, skip=(2,), seed=5, batch=3, **options)
    assert again == events
    other, _ = generate(one, skip=(2,), seed=6, batch=3, **options)
    assert other != events


def test_parameters_and_memory_are_those_of_the_column(loaded, tmp_path):
    one = loaded("tied")
    depth.prune(one.view.model.config._name_or_path, (1, 2), tmp_path / "p")
    small = loading.load_model(tmp_path / "p", CPU, torch.float32)
    _, done = generate(one, skip=(1, 2), batch=2)
    assert done.parameters == sum(p.numel() for p in small.parameters())
    assert done.weights_mib == pytest.approx(4 * done.parameters / 2**20)
    tokens = done.prompt_tokens + 12
    # keys and values, 3 blocks, 2 heads of width 8, float32, 2 rows
    assert done.cache_mib == pytest.approx(2 * 3 * 2 * 8 * 4 * 2 * tokens / 2**20)
    assert done.tokens_per_s == pytest.approx(done.tokens / done.seconds)
    assert 0 < done.first_token_s < done.seconds


def test_the_checkpoints_own_sampling_settings_stay_out(loaded, tiny_gqa):
    one = loaded()
    one.view.model.generation_config.temperature = 0.01
    one.view.model.generation_config.do_sample = True
    first, _ = generate(one, temperature=5.0, top_k=0, top_p=1.0, seed=1)
    second, _ = generate(one, temperature=5.0, top_k=0, top_p=1.0, seed=2)
    assert first != second
    greedy, _ = generate(one, temperature=0.0, seed=3)
    assert [e.ids for e in greedy] == [e.ids for e in generate(one, temperature=0.0)[0]]


def test_characters_of_several_tokens_come_whole(tiny_gqa):
    tokenizer = loading.load_tokenizer(tiny_gqa)
    text = "Ann é 日本 x"
    decoder = _Decoder(tokenizer)
    pieces = [decoder.add(t) for t in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) + decoder.rest() == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ({"prompt": "  "}, DataError, "The prompt is empty"),
        ({"max_tokens": 1000}, OptionError, "more than the model's context of 256.*--max-tokens"),
        ({"prompt": "a b " * 400}, OptionError, "Shorten the prompt"),
        ({"chat": True}, OptionError, "has no chat template"),
        ({"skip": range(5)}, PlanError, "All 5 blocks are selected"),
    ],
)
def test_what_cannot_be_generated(loaded, values, error, sentence):
    with pytest.raises(error) as caught:
        generate(loaded(), **values)
    import re

    assert re.search(sentence, str(caught.value))


def test_a_chat_template_is_used(loaded):
    one = loaded()
    one.tokenizer.chat_template = (
        "{% for m in messages %}{{ bos_token }}{{ m['content'] }} ->{% endfor %}"
    )
    _, done = generate(one, chat=True)
    wanted = one.tokenizer.encode(f"<s>{PROMPT} ->", add_special_tokens=False)
    assert done.prompt_tokens == len(wanted)
