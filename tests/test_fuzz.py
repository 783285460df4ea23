"""Mutated files for every reader: only a `DepthcutError` comes out, within time and memory.

The longer run of the same readers is ``python -m bench.fuzz``.
"""

from __future__ import annotations

import collections

import pytest

from bench import fuzz

SEEDS = 12
READERS = fuzz.readers()


@pytest.fixture(autouse=True)
def nothing_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files(reader, tmp_path):
    for seed in range(SEEDS):
        found = fuzz.trial(reader, seed, tmp_path / "fuzz")
        assert isinstance(found, str), found


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_whole_files_are_read(reader, tmp_path):
    """What is mutated is valid to begin with, so mutations reach what lies behind the parser."""
    for number, data in enumerate(reader.seeds):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in (*reader.beside, (reader.file, data)):
            (folder / name).write_bytes(content)
        reader.read(folder)


def test_a_reader_that_fails_is_found(tmp_path):
    def wrong(folder):
        return {}[(folder / "a").read_bytes()]

    def greedy(_):
        return bytes(fuzz.MOST_BYTES + 1)

    bad = fuzz.Reader("a", "a", (b"x",), wrong)
    assert fuzz.trial(bad, 0, tmp_path / "a").what.startswith("KeyError")
    big = fuzz.Reader("a", "a", (b"x",), greedy)
    assert "MiB" in fuzz.trial(big, 0, tmp_path / "a").what


def test_mutations_differ_and_repeat():
    import random

    seed = b'{"a": [1, 2.5], "b": {"c": "x"}}'
    found = [fuzz.mutated(seed, random.Random(n)) for n in range(200)]
    assert found == [fuzz.mutated(seed, random.Random(n)) for n in range(200)]
    assert collections.Counter(found).most_common(1)[0][1] < 20


def test_a_record_that_names_nobodys_home(tmp_path):
    """Found by the longer run."""
    (reader,) = (one for one in READERS if one.name == "spec.json")
    assert fuzz.trial(reader, 50198, tmp_path / "fuzz") == "read"
