"""The bundled checkpoint and the shipped files, with stock transformers."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from core.demo import CHECKPOINT, DATA
from core.demo.evaluate import accuracy, leave_one_out, story_loss, without_block
from core.demo.questions import CHANCE, SKILLS, questions
from core.demo.world import entropy, stories


@pytest.fixture(scope="module")
def bundled():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT).eval()
    return model, AutoTokenizer.from_pretrained(CHECKPOINT)


def test_importing_the_demo_needs_no_torch():
    code = (
        "import sys, core.demo, core.demo.world, core.demo.questions, core.demo.export;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKPOINT.parents[2])


def test_it_is_a_small_grouped_query_llama(bundled):
    model, tokenizer = bundled
    config = AutoConfig.from_pretrained(CHECKPOINT)
    assert isinstance(model, LlamaForCausalLM)
    assert config.num_hidden_layers >= 12
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size == len(tokenizer)
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 15_000_000
    assert str(config.dtype) == "torch.float32" == str(next(model.parameters()).dtype)


def test_the_tokenizer_is_lossless_and_starts_with_bos(bundled):
    _, tokenizer = bundled
    for text in [stories(1, 0, "heldout")[0], "Zürich, 12 km: \t 漢字 🙂"]:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_stories_are_long_enough_for_calibration_rows(bundled):
    _, tokenizer = bundled
    lengths = [len(tokenizer(text).input_ids) for text in stories(100, 0, "calibration")]
    assert sum(128 <= length <= 300 for length in lengths) >= 80


def test_heldout_loss_is_near_the_entropy_of_the_generator(bundled):
    model, tokenizer = bundled
    loss, tokens = story_loss(model, tokenizer, stories(10, 0, "heldout"))
    assert 0 < loss < 1.25 * entropy(10, 0) * 10 / tokens


def test_the_skills_together_are_above_chance(bundled):
    model, tokenizer = bundled
    shares = {skill: accuracy(model, tokenizer, skill, 8, 5) for skill in SKILLS}
    assert shares["cause"] == shares["opposite"] == shares["compare"] == 1
    assert sum(shares.values()) > 1.8 * sum(CHANCE.values()), shares


def test_it_goes_on_in_its_world(bundled):
    model, tokenizer = bundled
    given = tokenizer("Once upon a time there was a", return_tensors="pt")
    out = model.generate(**given, max_new_tokens=30, do_sample=False)
    words = set(tokenizer.decode(out[0], skip_special_tokens=True).replace(".", "").split())
    known = set(" ".join(stories(200, 0, "train")).replace(".", "").split())
    assert words <= known


def test_taking_a_block_out_equals_a_naive_forward(bundled):
    model, tokenizer = bundled
    rows = tokenizer(stories(1, 0, "heldout")[0], return_tensors="pt").input_ids
    with torch.no_grad(), without_block(model, 3):
        ours = model(input_ids=rows, use_cache=False).logits
    kept = model.model.layers[3].forward
    model.model.layers[3].forward = lambda hidden_states, **_: hidden_states
    with torch.no_grad():
        naive = model(input_ids=rows, use_cache=False).logits
    model.model.layers[3].forward = kept
    assert torch.allclose(ours, naive, atol=1e-5)
    assert model.config.num_hidden_layers == len(model.model.layers)


def test_first_block_matters_and_some_unprotected_ones_hardly(bundled):
    model, tokenizer = bundled
    rows = leave_one_out(model, tokenizer, stories(6, 0, "heldout"))
    ratio = {row["block"]: row["ppl"] / rows[0]["ppl"] for row in rows}
    blocks = len(rows) - 1
    assert math.isfinite(max(ratio.values()))
    assert ratio[0] >= 5
    assert sorted(ratio[block] for block in range(4, blocks - 2))[1] <= 1.15


def test_shipped_files_are_what_the_generator_gives():
    lines = (DATA / "heldout.txt").read_text().splitlines()
    assert lines[:5] == stories(5, 0, "heldout")
    assert (DATA / "train_sample.txt").read_text().splitlines()[:5] == stories(5, 0, "train")
    for skill in SKILLS:
        rows = (DATA / f"questions_{skill}.jsonl").read_text().splitlines()
        assert len(rows) == 200
        assert [json.loads(row) for row in rows[:10]] == list(questions(skill, 10, 0))
    rows = (DATA / "instructions.jsonl").read_text().splitlines()
    assert set(json.loads(rows[0])) == {"instruction", "input", "output"}
