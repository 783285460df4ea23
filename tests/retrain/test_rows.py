"""Rows: masks, cutoff, held-out rows, packing, order; and messages for bad data."""

import itertools
import json
import random
from collections import Counter

import pytest
from retrain_helpers import instructions, write_jsonl
from transformers import AutoTokenizer

from core.data.templates import prompt_of
from core.errors import DataError, OptionError
from core.retrain import batches, encoders, rows
from core.retrain.spec import RetrainSpec


def spec(source, **options):
    return RetrainSpec(checkpoint="x", out="y", data=source, **options)


@pytest.fixture(scope="module")
def encoder(tiny_gqa):
    return encoders.ModelTokenizer(AutoTokenizer.from_pretrained(tiny_gqa))


def prepare(encoder, source, **options):
    options = {"cutoff": 128, "template": "plain", **options}
    return rows.prepare(spec(source, **options), encoder, vocab=320, context=256)


def test_only_the_response_has_labels(encoder):
    row = {"instruction": "Say it", "input": "softly", "output": "Ann sees the red ball."}
    got = rows.instruction_row(row, encoder, "alpaca")
    tokenizer = encoder.tokenizer
    predicted = [label for label in got.labels if label != rows.IGNORED]
    assert tokenizer.decode(predicted) == "Ann sees the red ball.</s>"
    masked = [i for i, label in zip(got.ids, got.labels, strict=True) if label == rows.IGNORED]
    text = tokenizer.decode(masked)
    assert text.startswith("<s>Below is an instruction")
    assert text.endswith("### Input:\nsoftly\n\n### Response:\n")
    assert [la for la in got.labels if la != -100] == list(got.ids[len(masked) :])


def test_without_input_the_prompt_has_no_input_part():
    prompt = prompt_of({"instruction": "Say it", "input": "", "output": "x"}, "alpaca")
    assert "Input" not in prompt
    assert "### Instruction:\nSay it\n\n### Response:\n" in prompt


def test_a_token_across_the_border_counts_as_response():
    class Merging:
        eos_id = None

        def encode(self, text):
            return [1, 2, 9] if text.endswith("b") else [1, 2, 3]

    row = {"instruction": "a", "input": "", "output": "b"}
    assert rows.instruction_row(row, Merging(), "plain").labels == (-100, -100, 9)


def test_text_has_loss_on_all_but_the_first_token_and_loses_nothing(encoder, texts):
    found = prepare(encoder, texts, cutoff=8, format="text")
    assert all(row.labels == (-100, *row.ids[1:]) for row in found.train)
    assert max(len(row.ids) for row in found.train) <= 8
    pieces = rows.text_pieces(list(range(20)), 8)
    assert [len(p.ids) for p in pieces] == [8, 8, 4]


def test_preview_shows_the_masked_part_as_it_trains(encoder):
    row = rows.instruction_row(
        {"instruction": "Say", "input": "", "output": "Ann sees."}, encoder, "plain"
    )
    first, second = rows.preview(row, encoder)
    assert (first["masked"], second["masked"]) == (True, False)
    assert first["text"].endswith("Say\n")
    assert second["text"] == "Ann sees.</s>"


def test_file_tokenizer_gives_the_same_ids_without_transformers(encoder, tiny_gqa):
    other = encoders.FileTokenizer(tiny_gqa)
    text = "Ann sees the red ball.\n\n### Response:\nü"
    assert other.encode(text) == encoder.encode(text)
    assert other.eos_id == encoder.eos_id == 2


def test_heldout_rows_are_never_trained_on_and_do_not_depend_on_the_seed(encoder, tmp_path):
    doubled = instructions(40) + instructions(40)  # every row twice
    source = write_jsonl(tmp_path / "d.jsonl", doubled)
    one, other = (prepare(encoder, source, holdout=5, seed=s) for s in (1, 2))
    assert [r.ids for r in one.heldout] == [r.ids for r in other.heldout]
    assert len(one.heldout) == 5
    assert not {r.ids for r in one.heldout} & {r.ids for r in one.train}
    # Copies of held-out rows are skipped and counted.
    assert one.dropped >= 5
    assert len(one.train) + one.dropped == 75


def test_long_rows_are_cut_or_skipped_and_counted(encoder, tmp_path):
    long = {"instruction": "Say", "input": "", "output": "red ball " * 50}
    hopeless = {"instruction": "red ball " * 50, "input": "", "output": "Ann"}
    source = write_jsonl(tmp_path / "l.jsonl", [*instructions(30), long, hopeless])
    found = prepare(encoder, source, cutoff=64, holdout=1)
    assert found.cut >= 1
    assert found.dropped >= 1
    assert max(len(row.ids) for row in found.train) == 64


def test_packs_hold_every_row_once_and_are_full(encoder, texts):
    found = prepare(encoder, texts, cutoff=64)
    packs = batches.sequences(found.train, "packed", 64, 1)
    sizes = [sum(len(r.ids) for r in pack) for pack in packs]
    assert Counter(r for p in packs for r in p) == Counter(found.train)
    assert max(sizes) <= 64
    assert sum(sizes) / (64 * len(sizes)) > 0.85


def test_steps_take_every_sequence_once_an_epoch_whatever_the_micro_batch():
    lengths = [5 + i % 7 for i in range(24)]
    one = batches.StepPlan(lengths, 8, 2, seed=1)
    other = batches.StepPlan(lengths, 8, 8, seed=1)
    seen = Counter()
    for step in range(3):
        parts = one.step(step)
        assert len(parts) == 2
        assert sum(map(len, parts)) == 8
        assert sorted(i for p in parts for i in p) == sorted(i for p in other.step(step) for i in p)
        assert [lengths[i] for p in parts for i in p] == sorted(
            lengths[i] for i in one.indices(step)
        )
        seen.update(i for p in parts for i in p)
    assert seen == Counter(range(24))
    assert batches.StepPlan(lengths, 8, 2, seed=2).indices(0) != one.indices(0)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_micro_batches_have_the_smallest_largest_size(parts):
    """Compared with every way of splitting the ascending lengths into ``parts``."""
    rng = random.Random(parts)
    for _ in range(30):
        lengths = sorted(rng.choice([3, 9, rng.randint(2, 40)]) for _ in range(9))
        sizes = batches.split(lengths, parts)
        assert len(sizes) == parts
        assert sum(sizes) == 9
        assert min(sizes) > 0

        def padded(cuts, lengths=lengths):
            edges = [0, *cuts, 9]
            return max((b - a) * lengths[b - 1] for a, b in itertools.pairwise(edges))

        best = min(padded(cuts) for cuts in itertools.combinations(range(1, 9), parts - 1))
        assert padded(list(itertools.accumulate(sizes))[:-1]) == best


def test_exact_ids_are_used_as_they_are(encoder, tmp_path):
    given = [[1, 10 + i, 20, 30] for i in range(20)]
    source = write_jsonl(tmp_path / "i.jsonl", [{"input_ids": ids} for ids in given])
    found = prepare(encoder, source, holdout=2)
    assert sorted(list(r.ids) for r in found.train + found.heldout) == given


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (json.dumps({"prompt": "a", "answer": "b"}), {}, "no column 'text'"),
        (json.dumps({"instruction": "a", "answer": "b"}), {}, "missing columns: output"),
        (json.dumps({"instruction": "a", "output": "  "}), {}, "row 1 has an empty response"),
        (json.dumps({"input_ids": [1, 999]}) + "\n" + json.dumps({"input_ids": [1, 999]}), {},
         "token id 999, but the model has 320"),
        (json.dumps({"input_ids": ["a"]}), {}, "which is not a list of token ids"),
        ("", {}, "no text in"),
        (json.dumps({"text": "Ann"}), {"format": "instruction"}, "missing columns: instruction"),
        (json.dumps({"instruction": "a " * 90, "output": "b"}) + "\n"
         + json.dumps({"instruction": "c " * 90, "output": "b"}), {"cutoff": 16},
         "no usable rows to train on"),
    ],
)  # fmt: skip
def test_bad_data_gets_one_sentence(encoder, tmp_path, content, options, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=says) as caught:
        prepare(encoder, str(path), **options)
    assert caught.value.hint


def test_wrong_encoding_and_too_long_a_cutoff(encoder, tmp_path, texts):
    path = tmp_path / "latin.txt"
    path.write_bytes("Käse\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        prepare(encoder, str(path))
    with pytest.raises(OptionError, match="--cutoff 512 is longer than the model's context of 256"):
        prepare(encoder, texts, cutoff=512)
