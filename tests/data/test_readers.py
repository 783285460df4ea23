"""Data as people have it: every layout of a file becomes the same rows, or one clear sentence."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from core.data import calibration, files, readers, sources
from core.data.calibration import sample
from core.errors import DataError

TEXTS = ["One, two.", 'She said "no";\nhe left.', "Third\t| row", "Café €5"]
CASES = Path(__file__).parents[3] / "shared" / "cases" / "make_cases.py"
ASKED = {"role": "user", "content": "Why?"}
ANSWERED = {"role": "assistant", "content": "Because."}
SAID_BY = {
    "human": {"from": "human", "value": "Why?"},
    "gpt": {"from": "gpt", "value": "Because."},
}


class Bytes:
    bos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def write(path: Path, content: Any) -> str:
    if not isinstance(content, (str, bytes)):
        content = "\n".join(json.dumps(row) for row in content)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def table(delimiter: str) -> str:
    quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
    return f"id{delimiter}text\n" + "".join(f"{n}{delimiter}{t}\n" for n, t in enumerate(quoted))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", [{"text": t, "url": "x"} for t in TEXTS]),
        ("a.json", [{"text": t} for t in TEXTS]),
        ("a.json", json.dumps([{"text": t} for t in TEXTS], indent=1)),
        ("a.jsonl.gz", json.dumps([{"text": t} for t in TEXTS])),
        ("a.json", json.dumps({"version": 1, "data": [{"text": t} for t in TEXTS]}, indent=1)),
        ("shard.json.gz", [{"text": t} for t in TEXTS]),
        ("a.csv", table(",")),
        ("a.csv", table(";").replace("\n", "\r\n")),
        ("a.csv", "\ufeff" + table("|")),
        ("a.tsv", table("\t")),
        ("a.tsv.gz", table("\t")),
    ],
)
def test_every_file_gives_the_same_rows(tmp_path: Path, name: str, content: Any) -> None:
    source = write(tmp_path / name, content)
    assert sources.text_rows(source) == TEXTS
    assert sources.text_rows(source + "::text") == TEXTS
    assert sources.kind_of(source) == "text"


def test_text_and_parquet_gzipped_and_not(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    assert sources.text_rows(write(tmp_path / "a.txt.gz", "one\n\n two \n")) == ["one", "two"]
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    packed = write(tmp_path / "b.parquet.gz", (tmp_path / "a.parquet").read_bytes())
    assert sources.text_rows(str(tmp_path / "a.parquet")) == sources.text_rows(packed) == TEXTS


def test_a_long_array_is_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", 7)
    rows = [{"text": "é" * n, "n": [n, {"a": None}]} for n in range(1, 40)]
    source = write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))
    assert list(readers.file_rows(Path(source))) == rows
    crlf = write(tmp_path / "b.txt", "a\r\nbé\rc\nlast".encode())
    assert list(files.lines(Path(crlf))) == ["a", "bé", "c", "last"]


def test_saved_datasets(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_dict({"text": TEXTS, "note": ["n"] * 4})
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"test": one.select([0]), "validation": one.select([1, 2])})
    both.save_to_disk(str(tmp_path / "both"))
    assert sources.text_rows(str(tmp_path / "one")) == TEXTS
    assert sources.text_rows(f"{tmp_path}/one::note") == ["n"] * 4
    assert sources.text_rows(f"{tmp_path}/both/validation") == TEXTS[1:3]
    assert sources.describe(str(tmp_path / "one"))["content"].startswith("sha256:")
    with pytest.raises(DataError, match=r"several splits: test, validation\. Name one"):
        sources.text_rows(str(tmp_path / "both"))
    with pytest.raises(DataError, match="not one written by save_to_disk"):
        sources.text_rows(str(tmp_path))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"conversations": [SAID_BY["human"], SAID_BY["gpt"]]},
        {"conversations": [ASKED, ANSWERED, {"role": "user", "content": "And?"}]},
        {"prompt": "Why?", "completion": "Because."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"messages": [ASKED, ANSWERED | {"content": [{"type": "text", "text": "Because."}]}]},
        {"instruction": "Why?", "output": "Because."},
    ],
)  # fmt: skip
def test_every_chat_layout_gives_the_same_messages(tmp_path: Path, row: dict[str, Any]) -> None:
    source = write(tmp_path / "a.jsonl", [row])
    assert sources.chat_rows(source) == [{"messages": [ASKED, ANSWERED]}]
    assert sources.kind_of(source) == ("instruction" if "output" in row else "messages")
    asked = [{"instruction": "Why?", "input": "", "output": "Because."}]
    assert sources.instruction_rows(source) == asked
    assert sources.text_rows(source) == ["Why?\nBecause."]


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    texts = [{"text": "a"}, {"text": None}, {"text": " "}, {}, {"text": 3}, {"text": "b"}]
    rows = sources.open_rows(write(tmp_path / "a.jsonl", texts))
    assert [row["text"] for row in rows] == ["a", "b"]
    assert (rows.skipped, rows.reason) == (4, "row 2 has no text")
    lone = {"messages": [ASKED]}
    chats = sources.open_rows(write(tmp_path / "b.jsonl", [lone, {"messages": [ASKED, ANSWERED]}]))
    assert (len(list(chats)), chats.skipped) == (1, 1)
    with pytest.raises(DataError, match=r"none of its 2 rows .* row 1 has no assistant turn"):
        sources.chat_rows(write(tmp_path / "c.jsonl", [lone, lone]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "id,text\n1,a\n2,b, c\n", r"line 3 has 3 cells, but the header has 2 columns"),
        ("a.csv", 'id,text\n1,"a\nb"\n2\n', r"line 4 has 1 cell, but"),
        ("a.csv", 'id;text\n1;"a\n', "line 2: unexpected end"),
        ("a.tsv", "id\ttext\n1\ta\tb\n", "line 2 has 3 cells"),
        ("a.txt", "caf\xe9".encode("latin-1"), r"not UTF-8 text \(byte 3, line 1\)\. Save it"),
        ("a.txt", "caf\xe9".encode("utf-16"), "It is UTF-16"),
        ("a.json", '[{"text": "a"}, {"text": "b"', "item 2 of the array is not valid JSON"),
        ("a.json", '[{"text": "a"}', "item 1 of the array is the last: it is cut off"),
        ("a.json", '[{"text": "a"} 3]', "item 1 of the array is not followed by a comma"),
        ("a.json", "[3]", "item 1 of the array is not a JSON object"),
        ("a.json", '{"a": [1], "b"', "line 1 is not a JSON object"),
        ("a.jsonl::body", [{"text": "a", "n": 1}], r"no field 'body'\. Its fields: text, n\."),
        ("a.jsonl", [{"body": "a", "n": 1}], r"its columns: body, n\)\. Name .*a\.jsonl::body"),
        ("a.jsonl", [{"messages": [{"role": "cat", "content": ""}]}], "'cat', which is not"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_is_wrong(
    tmp_path: Path, name: str, content: Any, says: str
) -> None:
    file, _, field = name.partition("::")
    source = write(tmp_path / file, content) + (f"::{field}" if field else "")
    with pytest.raises(DataError, match=says):
        list(sources.open_rows(source))


def test_gzip_is_bounded_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "a.txt.gz", "word " * 1000)
    (tmp_path / "b.txt.gz").write_bytes(Path(source).read_bytes()[:-9])
    (tmp_path / "c.txt.gz").write_bytes(b"plain text")
    for name in ("b", "c"):
        with pytest.raises(DataError, match=f"Cannot read {name}.txt.gz as gzip"):
            sources.text_rows(f"{tmp_path}/{name}.txt.gz")
    monkeypatch.setattr(files, "INFLATED_BYTES", 100)
    monkeypatch.setattr(files, "INFLATED_GROWTH", 2)
    with pytest.raises(DataError, match="but holds more than"):
        sources.text_rows(source)


def test_a_large_source_is_sampled_from_its_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{n:02d}" + "x" * 20} for n in range(50)]
    source = write(tmp_path / "a.jsonl", rows)
    whole = sample(source, Bytes(), 5, 10, 7)
    assert whole.facts.pool is None
    monkeypatch.setattr(calibration, "POOL_ROWS", 20)
    read = []
    real = sources.file_rows
    monkeypatch.setattr(sources, "PEEK", 4)
    monkeypatch.setattr(sources, "file_rows", lambda p: map(lambda r: read.append(r) or r, real(p)))
    part = sample(source, Bytes(), 5, 10, 7)
    assert part.facts.pool == 20
    assert len(read) == 21
    first = write(tmp_path / "b.csv", "text\n" + "\n".join(row["text"] for row in rows[:20]))
    assert part.rows == sample(first, Bytes(), 5, 10, 7).rows != whole.rows
    monkeypatch.setattr(calibration, "POOL_CHARACTERS", 100)
    assert sample(source, Bytes(), 2, 10, 7).facts.pool == 5


def test_short_rows_are_joined_if_needed(tmp_path: Path) -> None:
    lines = [f"line {n:02d}" for n in range(30)]
    source = write(tmp_path / "a.txt", "\n".join(lines))
    found = sample(source, Bytes(), 3, 24, 1)
    assert found.facts.joined
    whole = "\n\n".join(lines)
    rows = [bytes(row).decode() for row in found.rows]
    assert all(len(row) == 24 and row in whole for row in rows)
    numbers = [set(row.split()) & {f"{n:02d}" for n in range(30)} for row in rows]
    assert not any(a & b for a, b in itertools.combinations(numbers, 2))  # no text is used twice
    with pytest.raises(DataError, match=r"longest row has 7 tokens\)\. .*--join on"):
        sample(source, Bytes(), 3, 24, 1, join="off")
    short = sample(source, Bytes(), 3, 5, 1)
    assert not short.facts.joined
    assert sample(source, Bytes(), 3, 5, 1, join="on").facts.joined
    with pytest.raises(DataError, match="even if short rows are joined"):
        sample(source, Bytes(), 9, 60, 1)


def test_english_has_two_parts_without_a_common_passage() -> None:
    from core.data import english

    first, second = english.documents("calibration"), english.documents("heldout")
    assert (len(first), len(second)) == (39, 21)
    paragraphs = [
        {p for d in part for p in d.split("\n\n") if len(p) > 60} for part in (first, second)
    ]
    assert not paragraphs[0] & paragraphs[1]
    rows = sources.text_rows("english")
    assert min(map(len, rows)) >= english.PASSAGE
    assert "\n\n".join(rows) == "\n\n".join(first)
    assert sources.text_rows("english", "heldout") == list(second)


@pytest.mark.skipif(not CASES.is_file(), reason="../shared/cases is not there")
def test_the_shared_cases(tmp_path: Path) -> None:
    import runpy
    import sys

    argv, sys.argv = sys.argv, ["make_cases.py", str(tmp_path / "made")]
    try:
        runpy.run_path(str(CASES), run_name="__main__")
    finally:
        sys.argv = argv
    folder = tmp_path / "made" / "text"
    found = {}
    for path in folder.iterdir():
        try:
            rows = sources.open_rows(f"{path}::content" if path.stem == "content" else str(path))
            found[path.name] = (rows.kind, len(list(rows)), rows.skipped)
        except DataError as error:
            found[path.name] = str(error)
    assert found.pop("unquoted.csv").startswith("unquoted.csv: line 2 has 19 cells")
    assert found.pop("sentences.txt")[0] == "text"
    text, chat = ("text", 120, 0), ("messages", 120, 0)
    assert found == {
        "quoted.csv": text, "semicolon.csv": text, "shard.json": text, "shard.json.gz": text,
        "content.jsonl": text, "one_null.jsonl": ("text", 119, 1),
        "messages.jsonl": chat, "sharegpt.jsonl": chat, "prompt_completion.jsonl": chat,
        "array.json": ("instruction", 120, 0), "one_empty.jsonl": ("instruction", 119, 1),
    }  # fmt: skip
    assert sample(str(folder / "sentences.txt"), Bytes(), 10, 400, 0).facts.joined


class Marks:
    """A chat template that puts a mark around each message and refuses a second question."""

    def render(self, messages: Any) -> str:
        if [turn["role"] for turn in messages].count("user") > 1:
            raise DataError("The chat template says no.")
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in messages)


class Starting(Bytes):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([1] if add_special_tokens else []) + list(text.encode())


def test_chat_rows_are_calibrated_on_as_the_template_writes_them(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, ANSWERED]}, {"messages": [ASKED, ASKED, ANSWERED]}]
    source = write(tmp_path / "chat.jsonl", rows)
    text = b"<user>Why?<assistant>Because."
    found = sample(source, Starting(), 1, len(text), 0, join="off", chat=Marks())
    assert found.rows == [list(text)]  # no start token: the template writes its own
    assert (found.facts.chat_template, found.facts.refused) == (True, 1)
    assert "1 row is skipped. The chat template says no." in found.facts.notes
    one = write(tmp_path / "one.jsonl", rows[:1])
    off = sample(one, Starting(), 1, 14, 0)
    assert off.rows == [[1, *b"Why?\nBecause."]]
    assert not off.facts.chat_template
    asked = write(tmp_path / "asked.jsonl", [{"instruction": "Why?", "output": "Because."}])
    assert sample(asked, Starting(), 1, len(text), 0, chat=Marks()).rows == [list(text)]
    plain = write(tmp_path / "plain.txt", "Why? Because.")
    found = sample(plain, Starting(), 1, 14, 0, chat=Marks())
    assert found.rows == [[1, *b"Why? Because."]]
    assert not found.facts.chat_template
    with pytest.raises(DataError, match="no row can be used. The chat template says no"):
        sample(write(tmp_path / "no.jsonl", rows[1:]), Starting(), 1, 4, 0, chat=Marks())
