"""Hidden states on the disk are those in memory, chunk by chunk."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace

import pytest
import torch

from core.errors import OutputError, RunError
from core.importance import forward
from core.importance.capacity import Capacity
from core.importance.streams import Files, InMemory, OnDisk, embedded
from core.model.blocks import BlockView
from core.model.loading import load_model
from core.model.streaming import StreamedView

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(forward, "CPU_TOKENS", 12)  # three rows of four tokens


@pytest.fixture
def files(tmp_path):
    found = Files(tmp_path, CPU)
    yield found
    found.close()


def stored(files, states):
    stream = OnDisk(files, tuple(states.shape), states.dtype)
    for part in states.split(4):
        stream.append(part)
    return stream


def read(stream, *rows):
    return [chunk.clone() for chunk in stream.chunks(*rows)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_on_disk_is_that_in_memory(files, tmp_path, dtype):
    states = torch.randn(10, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = InMemory(states.clone()), stored(files, states)
    assert (len(there), there.dtype) == (10, dtype)
    assert not list(tmp_path.iterdir())  # the file has no name

    def double(chunk):
        chunk.mul_(2).add_(len(chunk))

    for stream in (here, there):
        upper = stream.copy(4)
        stream.apply(double)
        assert torch.cat(read(stream))[:9].equal(2 * states[:9] + 3)
        assert torch.cat(read(stream))[9].equal(2 * states[9] + 1)  # the last chunk is of one row
        assert torch.cat(read(upper)).equal(states[4:])
    assert torch.cat(list(there.split(6))).equal(torch.cat(read(here)))
    assert [len(part) for part in there.split(6)] == [6, 4]
    for rows in ((), (2,), (2, 9), (0, 5)):
        for one, other in zip(read(here, *rows), read(there, *rows), strict=True):
            assert one.shape == other.shape
            assert one.equal(other)


def test_a_full_disk_and_a_disk_without_room_are_one_sentence(files, tmp_path):
    states = torch.zeros(3, 4, 5)
    stream = stored(files, states)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    stream._file.close()
    stream._file._file = SimpleNamespace(seek=lambda *_: 0, write=full, close=lambda: None)
    with pytest.raises(RunError, match="Cannot keep hidden states in .*: No space left"):
        stream.write(0, states)
    (tmp_path / ".run").mkdir()
    room = Capacity("fits", 1, 1, 1, 1, 10, 1, disk_bytes=1 << 60)
    with pytest.raises(OutputError, match="states of the calibration rows need .* has only"):
        room.folder_of_states(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_of_a_streamed_model_are_read_once(tiny_dir, tmp_path, files, tied):
    folder = tiny_dir("gqa", tie_word_embeddings=tied)
    ids = torch.randint(3, 320, (10, 4), generator=torch.Generator().manual_seed(1))
    plain = BlockView(load_model(folder, CPU, torch.float32))
    streamed = StreamedView(folder, torch.float32, CPU)
    expected = plain.model.get_input_embeddings().weight.detach()[ids]
    before = streamed.source.bytes_read
    for view in (plain, streamed):
        for kept in (None, files):
            assert torch.cat(read(embedded(view, ids, torch.float32, kept))).equal(expected)
    table = streamed.source.entry("model.embed_tokens.weight")
    assert streamed.source.bytes_read - before == 2 * (table.end - table.start)
    streamed.close()
