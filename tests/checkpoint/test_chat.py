"""Chat templates: the text of transformers, the answers in it, and bounds for foreign code."""

import json

import pytest
import tiny
from chat_templates import CHATML, CHATML_MARKED, ENDS, LLAMA_3, MISTRAL, NAMES, QWEN3, SPECIAL

from core.checkpoint import chat, chat_sandbox
from core.errors import CheckpointError, DataError

TALK = [
    {"role": "user", "content": "Who sees the red ball?"},
    {"role": "assistant", "content": "Ann sees it."},
    {"role": "user", "content": "And the boat? "},
    {"role": "assistant", "content": "Ben, by the river."},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return made


def with_template(tokenizer, source):
    tokenizer.chat_template = source
    return chat.of_tokenizer(tokenizer)


@pytest.mark.parametrize("source", ENDS, ids=NAMES)
@pytest.mark.parametrize("talk", [TALK, SYSTEM, TALK[:1]], ids=["two turns", "system", "question"])
@pytest.mark.parametrize("prompt", [False, True], ids=["", "prompt"])
def test_the_text_is_that_of_transformers(tokenizer, source, talk, prompt):
    ours = with_template(tokenizer, source).render(talk, prompt=prompt)
    theirs = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
    assert ours == theirs


@pytest.mark.parametrize("source", ENDS, ids=NAMES)
@pytest.mark.parametrize("talk", [TALK, SYSTEM, TALK[:2]], ids=["two turns", "system", "one turn"])
def test_answers_are_found_with_the_token_that_ends_them(tokenizer, source, talk):
    template = with_template(tokenizer, source)
    found = template.answers(talk)
    texts = [found.text[first:end] for first, end in found.answers]
    said = [turn["content"] for turn in talk if turn["role"] == "assistant"]
    space = " " if source is MISTRAL else ""  # which the model writes after [/INST]
    assert texts == [space + one + ENDS[source] for one in said]
    assert template.answers_by_difference(talk) == found


def test_marked_answers_are_those_of_transformers(tokenizer):
    """Both ways give the token mask of transformers for a template that marks the answers."""
    template = with_template(tokenizer, CHATML_MARKED)
    theirs = tokenizer.apply_chat_template(SYSTEM, return_assistant_tokens_mask=True)
    for found in (template.answers(SYSTEM), template.answers_by_difference(SYSTEM)):
        given = tokenizer(found.text, add_special_tokens=False, return_offsets_mapping=True)
        mask = [
            int(any(a < last and b > first for first, last in found.answers))
            for a, b in given["offset_mapping"]
        ]
        assert (given["input_ids"], mask) == (theirs["input_ids"], theirs["assistant_masks"])
    assert template.marked
    assert not with_template(tokenizer, CHATML).marked


def test_thinking_belongs_to_an_answer_that_has_it(tokenizer):
    """The template drops it from earlier turns, and adds an empty block to answers without."""
    thought = "<think>\nIt is red.\n</think>\n\nAnn sees it."
    talk = [TALK[0], {"role": "assistant", "content": thought}]
    template = with_template(tokenizer, QWEN3)
    found = template.answers([*talk, *TALK[2:]])
    assert [found.text[a:b] for a, b in found.answers] == [
        "Ann sees it.<|im_end|>", "Ben, by the river.<|im_end|>",
    ]  # fmt: skip
    found = template.answers(talk)
    assert [found.text[a:b] for a, b in found.answers] == [thought + "<|im_end|>"]


def test_content_that_a_template_strips_is_found_stripped(tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "\n Ann sees it. \n"}]
    found = with_template(tokenizer, LLAMA_3).answers(talk)
    assert [found.text[a:b] for a, b in found.answers] == ["Ann sees it.<|eot_id|>"]


def test_the_plain_layout_is_the_documented_one():
    found = chat.plain({"eos_token": "</s>"}).answers(TALK)
    assert found.text == (
        "User: Who sees the red ball?\nAssistant: Ann sees it.</s>\n"
        "User: And the boat? \nAssistant: Ben, by the river.</s>\n"
    )
    assert [found.text[a:b] for a, b in found.answers] == [
        "Ann sees it.</s>", "Ben, by the river.</s>",
    ]  # fmt: skip


def test_a_template_is_read_as_transformers_reads_it(tokenizer, tmp_path):
    assert chat.read(tmp_path) is None
    with_template(tokenizer, MISTRAL)
    tokenizer.save_pretrained(tmp_path)
    read = chat.read(tmp_path)
    assert read.source == MISTRAL
    assert read.render(TALK) == tokenizer.apply_chat_template(TALK, tokenize=False)
    (tmp_path / chat.FILE).unlink()
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    settings = {"eos_token": {"content": "</s>"}, "chat_template": several}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat.read(tmp_path).source == CHATML
    assert chat.special_tokens(tmp_path)["eos_token"] == "</s>"


def test_a_refusal_passes_on_the_templates_reason(tokenizer):
    template = with_template(tokenizer, MISTRAL)
    with pytest.raises(DataError, match="roles must alternate user/assistant"):
        template.answers([TALK[0], TALK[0]])
    with pytest.raises(CheckpointError, match="cannot be read: .*end of statement"):
        chat.ChatTemplate("{% if %}", {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "longer"),
        ("{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
         "{% endfor %}", "characters"),
        ("{{ 'a' * 9 ** 9 }}", "characters"),
        ("{{ 'a'.ljust(9999999999) }}", "number above"),
        ("{{ '%9999999999d' % 1 }}", "width"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(__class__=1) %}", "underscore|stores the name"),
    ],
)  # fmt: skip
def test_foreign_code_is_bounded(source, reason, monkeypatch):
    # short only if the time is what ends it: a busy machine must not end the others
    monkeypatch.setattr(chat_sandbox, "RENDER_S", 0.2 if reason == "longer" else 20.0)
    with pytest.raises(DataError, match=reason):
        chat.ChatTemplate(source, {}).render(TALK)
