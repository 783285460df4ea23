"""Sources of text: the grammar, the sampling, and one clear sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core.data import sources
from core.data.calibration import calibration_rows
from core.data.evaluation import evaluation_stream, evaluation_windows
from core.errors import DataError


class Bytes:
    """A tokenizer of bytes, so that every number can be counted by hand."""

    bos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return ([1] if add_special_tokens else []) + list(text.encode())


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_rows_are_crops_of_texts_that_are_long_enough(tmp_path: Path) -> None:
    lines = [f"{n:03d}" + "abcdefghij" * (1 + n % 4) for n in range(40)]
    source = write(tmp_path / "a.txt", "\n\n".join(lines))
    rows = calibration_rows(source, Bytes(), 6, 20, 1234)
    assert [len(r) for r in rows] == [20] * 6
    joined = ["\x01" + line for line in lines if len(line) + 1 >= 20]
    for row in rows:
        assert any("".join(map(chr, row)) in line for line in joined)
    assert rows == calibration_rows(source, Bytes(), 6, 20, 1234)
    assert rows != calibration_rows(source, Bytes(), 6, 20, 1235)


def test_too_little_text_says_how_much_is_missing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "x" * 50 + "\nshort\n" + "y" * 60)
    with pytest.raises(
        DataError, match=r"only 2 rows have at least 40 tokens, but 5 are needed \(3 short"
    ):
        calibration_rows(source, Bytes(), 5, 40, 0)


def test_exact_input_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"input_ids": [n, n + 1, n + 2, n + 3]}) for n in range(3))
    source = write(tmp_path / "a.jsonl", lines)
    assert calibration_rows(source, Bytes(), 2, 3, 99) == [[0, 1, 2], [1, 2, 3]]
    with pytest.raises(DataError, match=r"but 4 are needed \(1 short\)"):
        calibration_rows(source, Bytes(), 4, 3, 99)
    csv_source = write(tmp_path / "a.csv", 'input_ids\n"[5, 6, 7]"\n')
    assert calibration_rows(csv_source, Bytes(), 1, 3, 0) == [[5, 6, 7]]


def test_the_same_rows_from_every_file_kind(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    texts = ['one, "two"', "three\nfour", "f\u2028ive"]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": t}) for t in texts))
    quoted = ['"' + t.replace('"', '""') + '"' for t in texts]
    table = write(tmp_path / "a.csv", "text\n" + "\n".join(quoted) + "\n")
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet")
    for source in (jsonl, table, str(tmp_path / "a.parquet")):
        assert sources.text_rows(source) == texts
        assert evaluation_stream(source) == "\n\n".join(texts)


def test_evaluation_takes_a_text_file_as_it_is(tmp_path: Path) -> None:
    text = " = Title = \n \n Some words .\n"
    assert evaluation_stream(write(tmp_path / "a.txt", text)) == text


def test_both_window_protocols() -> None:
    ids = list(range(10, 20))
    assert evaluation_windows(ids, 4, "once", 1) == [[1, 10, 11, 12], [13, 14, 15, 16]]
    assert evaluation_windows(ids, 4, "window", 1) == [
        [1, 10, 11, 12],
        [1, 13, 14, 15],
        [1, 16, 17, 18],
    ]
    assert evaluation_windows(ids, 5, "once", None) == [ids[:5], ids[5:]]
    with pytest.raises(DataError, match="short of one window of 64"):
        evaluation_windows(ids, 64, "once", 1)


def test_instructions(tmp_path: Path) -> None:
    row = {"instruction": "Count.", "input": "", "output": "One."}
    source = write(tmp_path / "a.jsonl", json.dumps(row))
    assert sources.instruction_rows(source) == [row]
    empty = write(tmp_path / "b.jsonl", json.dumps({**row, "output": " "}))
    with pytest.raises(DataError, match="it has one row; row 1 has an empty response"):
        sources.instruction_rows(empty)
    lacking = write(tmp_path / "c.jsonl", json.dumps({"instruction": "x"}))
    with pytest.raises(DataError, match="missing columns: output"):
        sources.instruction_rows(lacking)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n\n", "There is no text in"),
        ("a.txt", b"caf\xe9 x", "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{oops', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"body": "a"}', "no column 'text'"),
        ("a.parquet", b"nothing", "Cannot read a.parquet as Parquet"),
        ("a.docx", b"x", "files ending in '.docx' are not supported"),
    ],
)
def test_bad_files_get_one_sentence(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        sources.text_rows(str(tmp_path / name))
    assert caught.value.hint


def test_unknown_sources() -> None:
    with pytest.raises(DataError, match="no such file"):
        sources.text_rows("nowhere.txt")
    with pytest.raises(DataError, match="ptb"):
        sources.text_rows("ptb")


def test_a_hub_source_goes_through_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    lines = "\n".join(json.dumps({"story": f"story {n}"}) for n in range(3))
    (folder / "train.jsonl").write_text(lines)
    assert sources.text_rows(f"hub:{folder}:train:story") == ["story 0", "story 1", "story 2"]
    with pytest.raises(DataError, match="no field 'text'"):
        sources.text_rows(f"hub:{folder}:train:text")


def test_a_hub_source_that_cannot_be_reached() -> None:
    with pytest.raises(DataError, match="Cannot load the dataset"):
        sources.text_rows("hub:nobody/no-such-set:train:text")


def test_the_demo_source_keeps_its_uses_apart() -> None:
    calibration, held = sources.text_rows("demo"), sources.text_rows("demo", "heldout")
    assert len(calibration) > 100
    assert not set(calibration) & set(held)
    assert calibration == sources.text_rows("demo")
