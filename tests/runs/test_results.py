"""Result files as dataclasses: the same bytes as before, and tolerant reading."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

from core.runs import results, workspace
from core.runs.results import CsvRow, JsonResult, from_dict


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary(JsonResult):
    blocks: int = 0
    ppl: float | None = None
    text: str = ""
    drop: tuple[int, ...] = ()
    pair: tuple[str, float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    part: Part | None = None
    extra: Any = None


@dataclass(frozen=True)
class Point(CsvRow):
    FILE: ClassVar[str] = "points.csv"
    block: int
    ppl: float | None = None
    name: str = ""
    oom: bool | None = None


class Folder:
    """What `Run` does with result files, without a run."""

    def __init__(self, path):
        self.path = path

    def write_json(self, name, value):
        workspace.write_json(self.path / name, value)

    def write_csv(self, name, columns, rows):
        workspace.write_csv(self.path / name, columns, rows)


def test_an_object_comes_back_as_it_was_written(tmp_path):
    given = Summary(
        blocks=3, ppl=1.5, text="demo", drop=(2, 0), pair=("a", 1.0), seconds={"sweep": 0.5},
        parts=(Part("a", 1), Part("b")), part=Part("c"), extra={"x": [1]},
    )  # fmt: skip
    given.write(Folder(tmp_path))
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert list(stored)[:3] == ["schema", "blocks", "ppl"]
    assert stored["parts"] == [{"name": "a", "size": 1}, {"name": "b", "size": 0}]
    assert Summary.read(tmp_path) == given


def test_a_table_comes_back_as_it_was_written(tmp_path):
    rows = (Point(0, 0.1 + 0.2, "a,b", True), Point(1, None, "", False), Point(2, float("inf")))
    Point.write(Folder(tmp_path), rows)
    text = (tmp_path / "points.csv").read_text()
    assert text == 'block,ppl,name,oom\n0,0.30000000000000004,"a,b",true\n1,,,false\n2,inf,,\n'
    assert Point.read(tmp_path) == rows


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Summary()),
        ({"unknown": 1, "blocks": 2}, Summary(blocks=2)),
        ({"blocks": "2", "ppl": "x", "text": 3, "drop": 5}, Summary()),
        ({"blocks": True, "ppl": True}, Summary()),
        ({"blocks": None, "text": None, "drop": None, "seconds": None}, Summary()),
        ({"drop": [1, "2"], "seconds": {"a": "b"}, "pair": ["a"]}, Summary()),
        ({"ppl": 2, "blocks": 4.0}, Summary(ppl=2.0, blocks=4)),
        ({"parts": [{"name": "a"}, {"size": 1}], "part": {"size": 1}}, Summary()),
        ({"part": {"name": "a", "size": "?"}}, Summary(part=Part("a"))),
    ],
)
def test_what_is_missing_unknown_or_of_another_type_takes_the_default(tmp_path, values, expected):
    (tmp_path / "summary.json").write_text(json.dumps(values))
    assert Summary.read(tmp_path) == expected


def test_files_that_are_absent_or_damaged_read_as_nothing(tmp_path):
    assert Summary.read(tmp_path) is None
    assert Point.read(tmp_path) == ()
    for text in ("", "{", "[1]", "\x00"):
        (tmp_path / "summary.json").write_text(text)
        assert Summary.read(tmp_path) is None
    (tmp_path / "summary.json").unlink()
    (tmp_path / "summary.json").mkdir()
    assert Summary.read(tmp_path) is None
    (tmp_path / "points.csv").write_bytes(b"block,ppl\n\xff,1\n")
    assert Point.read(tmp_path) == ()


def test_rows_without_a_required_cell_are_left_out(tmp_path):
    (tmp_path / "points.csv").write_text("ppl,block,other\n1.5,0,x\n2.5,,x\n3,two,x\nno,3.0\n4\n")
    assert Point.read(tmp_path) == (Point(0, 1.5), Point(3, None))


def test_a_missing_required_field_makes_the_object_unreadable():
    assert from_dict(Part, {"size": 1}) is None
    assert from_dict(Part, {"name": "a", "size": None}) == Part("a")


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    reads = []
    real = workspace.read_json
    monkeypatch.setattr(
        results.workspace, "read_json", lambda path: reads.append(path) or real(path)
    )
    Summary(blocks=1).write(Folder(tmp_path))
    assert [Summary.read(tmp_path).blocks for _ in range(3)] == [1, 1, 1]
    assert len(reads) == 1
    Summary(blocks=2).write(Folder(tmp_path))
    assert Summary.read(tmp_path).blocks == 2
    stat = os.stat(tmp_path / "summary.json")
    os.utime(tmp_path / "summary.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert Summary.read(tmp_path).blocks == 2
    assert len(reads) == 3
