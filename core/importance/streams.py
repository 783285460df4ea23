"""Hidden states of many rows that go through the blocks: in memory, or in files on the disk.

Rows go through a block in chunks (`core.importance.forward.chunk_rows`). Of a stream in a file, one
chunk is in memory. Every block still takes all rows, in the same chunks, so that each weight is
read once, and the numbers are those of streams in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from core.importance.forward import chunk_rows
from core.model.blocks import BlockView
from core.model.streaming import return_large_memory
from core.runs.scratch_file import ScratchFile


class Stream(Protocol):
    """Hidden states [rows, tokens, hidden]."""

    @property
    def dtype(self) -> torch.dtype:
        """The format of the states."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield the states of rows ``first`` to ``last`` in chunks; each holds until the next.

        They are not to be changed.
        """

    def apply(self, function: Callable[[Tensor], None]) -> None:
        """Apply what changes a chunk in place to all of them."""

    def copy(self, first: int = 0) -> Stream:
        """Return a copy of the rows from ``first`` on."""

    def close(self) -> None:
        """Give back what holds the states."""


class InMemory:
    """A stream in the device's memory."""

    def __init__(self, states: Tensor) -> None:
        """Hold ``states`` [rows, tokens, hidden], without a copy."""
        self.states = states

    @property
    def dtype(self) -> torch.dtype:
        """The format of the states."""
        return self.states.dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.states)

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield the states of rows ``first`` to ``last`` in chunks."""
        yield from self.states[first:last].split(
            chunk_rows(self.states.device, self.states.shape[1])
        )

    def apply(self, function: Callable[[Tensor], None]) -> None:
        """Apply what changes a chunk in place to all of them."""
        for chunk in self.chunks():
            function(chunk)

    def copy(self, first: int = 0) -> Stream:
        """Return a copy of the rows from ``first`` on."""
        return InMemory(self.states[first:].clone())

    def close(self) -> None:
        """Do nothing: the memory goes with the object."""


class OnDisk:
    """A stream in a file; one chunk is in memory."""

    def __init__(self, files: Files, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Open a file for states of ``shape`` [rows, tokens, hidden]; `write` fills it."""
        self.shape, self._dtype, self._files = shape, dtype, files
        rows, tokens, hidden = shape
        self.step = min(chunk_rows(files.device, tokens), max(1, rows))
        """Rows of a chunk."""
        self._row = tokens * hidden * dtype.itemsize
        self._memory = bytearray(self.step * self._row)
        self._file = files.open()
        self._filled = 0

    @property
    def dtype(self) -> torch.dtype:
        """The format of the states."""
        return self._dtype

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def chunks(self, first: int = 0, last: int | None = None) -> Iterator[Tensor]:
        """Yield the states of rows ``first`` to ``last`` in chunks."""
        for at, size in self._steps(first, last):
            yield self._read(at, size).to(self._files.device)

    def apply(self, function: Callable[[Tensor], None]) -> None:
        """Apply what changes a chunk in place to all of them."""
        for at, size in self._steps(0, None):
            states = self._read(at, size).to(self._files.device)
            function(states)
            self.write(at, states)

    def copy(self, first: int = 0) -> Stream:
        """Return a copy of the rows from ``first`` on."""
        other = OnDisk(self._files, (self.shape[0] - first, *self.shape[1:]), self.dtype)
        for at, size in self._steps(first, None):
            data = memoryview(self._memory)[: size * self._row]
            self._file.read(at * self._row, data)
            other._file.write((at - first) * self._row, data)
        return other

    def write(self, at: int, states: Tensor) -> None:
        """Write ``states`` as the rows from ``at`` on."""
        for part in states.split(self.step):
            stored = self._view(len(part))
            if stored.data_ptr() != part.data_ptr():
                stored.copy_(part)
            self._file.write(at * self._row, memoryview(self._memory)[: len(part) * self._row])
            at += len(part)

    def append(self, states: Tensor) -> None:
        """Write ``states`` as the rows behind those that were appended before."""
        self.write(self._filled, states)
        self._filled += len(states)

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield the states ``size`` rows at a time, in memory of their own, as a tensor does."""
        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            found = torch.empty(last - first, *self.shape[1:], dtype=self.dtype)
            found = found.to(self._files.device)
            for chunk, part in zip(self.chunks(first, last), found.split(self.step), strict=True):
                part.copy_(chunk)
            yield found

    def close(self) -> None:
        """Delete the file."""
        self._files.close(self._file)

    def _steps(self, first: int, last: int | None) -> Iterator[tuple[int, int]]:
        """Yield (first row, number of rows) of the chunks."""
        end = self.shape[0] if last is None else last
        for at in range(first, end, self.step):
            yield at, min(self.step, end - at)

    def _view(self, size: int) -> Tensor:
        _, tokens, hidden = self.shape
        count = size * tokens * hidden
        return torch.frombuffer(self._memory, dtype=self._dtype, count=count).view(
            -1, tokens, hidden
        )

    def _read(self, at: int, size: int) -> Tensor:
        self._file.read(at * self._row, memoryview(self._memory)[: size * self._row])
        return self._view(size)


class Files:
    """Where streams on disk have their files."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Open files on the disk of ``folder``, for states that compute on ``device``."""
        return_large_memory()  # chunks that come and go would leave holes
        self.folder, self.device = folder, device
        self._opened: list[ScratchFile] = []

    def open(self) -> ScratchFile:
        """Return a new file."""
        self._opened.append(ScratchFile(self.folder, "hidden states"))
        return self._opened[-1]

    def close(self, file: ScratchFile | None = None) -> None:
        """Close one file, or all."""
        for one in [file] if file else self._opened:
            one.close()
        self._opened = [one for one in self._opened if file and one is not file]


def embedded(view: BlockView, ids: Tensor, dtype: torch.dtype, files: Files | None) -> Stream:
    """Return the stream that enters block 0, for token ``ids`` [rows, tokens].

    It is in ``files``; None: in memory.
    """
    if files is None:
        return InMemory(view.embed(ids).to(dtype))
    embed, stream = view.embedder(ids), OnDisk(files, (*ids.shape, view.hidden_size), dtype)
    for at in range(0, len(ids), stream.step):
        stream.write(at, embed(ids[at : at + stream.step]).to(dtype))
    return stream
