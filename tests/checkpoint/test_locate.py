"""One way to open a checkpoint: headers are read once, and again when a file changes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import study_helpers as made

from core.checkpoint import headers, locate
from core.errors import CheckpointError


@pytest.fixture
def mine(tiny_gqa, tmp_path):
    return shutil.copytree(tiny_gqa, tmp_path / "mine")


def test_headers_are_read_once_by_whatever_name(mine, header_reads, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(mine.parent))
    first = locate.open(str(mine))
    assert first.info == headers.inspect(mine)
    assert first.config == json.loads((mine / "config.json").read_text())
    header_reads.clear()
    again = locate.open(mine, need="headers", need_tokenizer=False)
    by_id = locate.open("mine", need="config")
    assert (again, by_id) == (first, first)
    assert again.info is by_id.info is locate.at(mine).info
    assert not header_reads


def test_a_changed_checkpoint_is_seen(mine, header_reads):
    first = locate.open(mine)
    made.checkpoint(mine, blocks=3)
    for weights in mine.glob("*.safetensors*"):
        weights.unlink()
    second = locate.open(mine, need="headers")
    assert (first.info.blocks, second.info.blocks) == (5, 3)
    assert (first.info.has_weights, second.info.has_weights) == (True, False)
    assert first.state != second.state
    assert header_reads == {str(mine): 2}


def test_what_is_missing_is_not_remembered(mine, header_reads):
    tokenizer = (mine / "tokenizer.json").rename(mine.parent / "tokenizer.json")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no tokenizer"):
            locate.open(mine)
    assert locate.open(mine, need_tokenizer=False).info.tokenizer is None
    tokenizer.rename(mine / "tokenizer.json")
    assert locate.open(mine).info.tokenizer
    assert header_reads == {str(mine): 2}


def test_weights_are_asked_for_each_time(tmp_path, header_reads):
    folder = made.checkpoint(tmp_path / "config_only")
    assert not locate.open(folder, need="config").info.has_weights
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no weights"):
            locate.open(folder)
    with pytest.raises(CheckpointError, match="no weights"):
        locate.at(folder, need_weights=True)


def test_the_name_to_record(mine, monkeypatch):
    assert locate.open("demo", need="config").name == "demo"
    monkeypatch.chdir(mine.parent)
    assert (locate.open("mine").name, locate.open(mine).name) == ("mine", str(mine))
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(mine.parent))
    monkeypatch.chdir(mine)
    assert locate.open("mine").name == str(mine)


def test_many_threads_see_one_checkpoint(mine):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(locate.open, [mine] * 64))
    assert all(checkpoint == found[0] for checkpoint in found)
