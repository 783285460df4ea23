"""The processes of one run that share its work: what each takes, and how results come together.

Every process runs the same code on a part of the rows and gathers what it needs from the others
(`Ranks`); the first one is the run itself, and alone writes. With one process, which is usual,
nothing is split and nothing is sent. `core.runs.rank_start` starts the others,
`core.runs.rank_process` is what they run. torch is imported only when something is sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from core.errors import DataError, OptionError
from core.runs import devices

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


NODES = "DEPTHCUT_NODES"
"""Variable with the names of the machines of a run's job, first that of its first process."""
BUCKET = 2**24
"""Elements that are sent together: 64 MiB in float32. Chosen, not measured."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    `gather`, `joined`, `in_turns`, `first` and `sum_` return the same to every process, to the last
    bit: sums are taken in the order of the processes.
    """

    rank: int = 0
    size: int = 1
    gpus: Any = field(default=None, repr=False, compare=False)
    """torch's group that exchanges tensors between GPUs; None on a CPU."""

    @property
    def is_first(self) -> bool:
        """Whether this process is the run itself, which writes the results."""
        return self.rank == 0

    def share(self, count: int, step: int = 1) -> slice:
        """Return which of ``count`` things this process takes: neighbours, in rank order.

        Whole multiples of ``step`` if there are enough of them.
        """
        steps = -(-count // step)
        if steps < self.size:
            step, steps = 1, count
        first, end = (steps * rank // self.size * step for rank in (self.rank, self.rank + 1))
        return slice(first, min(end, count))

    def gather(self, own: T) -> list[T]:
        """Return what every process has, in rank order."""
        if self.size == 1:
            return [own]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        return found

    def joined(self, own: Sequence[T]) -> list[T]:
        """Return the lists of all processes as one, in rank order."""
        return list(own) if self.size == 1 else [one for part in self.gather(own) for one in part]

    def in_turns(self, own: Sequence[T]) -> list[T]:
        """Return what all processes have of things that they took in turns, in that order."""
        if self.size == 1:
            return list(own)
        found = self.gather(own)
        most_ = max(map(len, found))
        return [part[turn] for turn in range(most_) for part in found if turn < len(part)]

    def first(self, own: T) -> T:
        """Return what the first process has."""
        if self.size == 1:
            return own
        import torch.distributed as dist

        found = [own]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add the tensors of all processes, which have the same shape, in place; return it.

        Each process adds up one piece of all tensors, in rank order, and sends it to the others:
        what a ring sends, and the same result each time. Memory: two copies of the tensor.
        """
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        flat = tensor.detach().reshape(-1)
        piece = -(-flat.numel() // self.size)
        sent = flat.new_zeros(piece * self.size)
        sent[: flat.numel()] = flat
        found = sent.new_empty(sent.shape)
        dist.all_to_all_single(found, sent, group=self.gpus)
        parts = found.view(self.size, piece)
        total = parts[0].float() if parts.dtype.itemsize < 4 else parts[0]
        for part in parts[1:]:
            total = total + part
        pieces = list(sent.view(self.size, piece))
        dist.all_gather(pieces, total.to(sent.dtype).contiguous(), group=self.gpus)
        tensor.detach().copy_(sent[: flat.numel()].view(tensor.shape))
        return tensor

    def sum_all_(self, tensors: Iterable[Tensor]) -> None:
        """Do `sum_` for many tensors on one device, which are sent in few pieces."""
        if self.size == 1:
            return
        import torch

        for some in _buckets(tensors):
            flat = self.sum_(torch.cat([one.detach().reshape(-1) for one in some]))
            for one, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                one.detach().copy_(part.view(one.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield neighbours of one dtype in lists of about `BUCKET` elements."""
    held: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if held and (size + tensor.numel() > BUCKET or tensor.dtype != held[0].dtype):
            yield held
            held, size = [], 0
        held.append(tensor)
        size += tensor.numel()
    if held:
        yield held


ALONE = Ranks()
"""The only process of a run."""


def most(count: int, size: int) -> int:
    """Return the most of ``count`` things that one of ``size`` processes takes."""
    return -(-count // size)


def facts(size: int, rows: int) -> dict[str, Any]:
    """Return what a dry run says of processes that share ``rows`` rows; nothing of a single one.

    Raises `DataError` as the run would. Devices are left out: the run may go to another machine.
    """
    if size == 1:
        return {}
    check_rows(rows, size)
    shares = [Ranks(rank, size).share(rows) for rank in range(size)]
    return {"processes": size, "rows_of_each": [part.stop - part.start for part in shares]}


def shared_seconds(seconds: float | None, device: str, size: int) -> float | None:
    """Return the time of work that takes one process ``seconds``: on GPUs a part of it."""
    if seconds is None or devices.meant(device) == "cpu":
        return seconds
    return seconds / size


def check_rows(rows: int, size: int, what: str = "rows of text") -> None:
    """Raise `DataError` if there are fewer rows than processes."""
    if rows < size:
        raise DataError(
            f"--processes: {size} processes cannot share {rows} {what}.",
            f"Use {max(1, rows)} or fewer, or a longer text.",
        )


def nodes() -> tuple[str, ...]:
    """Return the names of the machines that this process's job has; ``("",)``: this one alone."""
    return tuple(os.environ.get(NODES, "").split()) or ("",)


def check_nodes(size: int, count: int, command: str, *, splits: bool) -> None:
    """Raise `OptionError` unless ``size`` processes of a run fill ``count`` nodes evenly.

    ``splits`` says whether the command has an option for the number of processes.
    """
    if count < 2:
        return
    if not splits:
        raise OptionError(
            f"--nodes {count}: {command} runs in one process, so it uses one node.",
            "Leave out --nodes.",
        )
    if size % count:
        more = "process uses" if size == 1 else "processes do not fill"
        raise OptionError(
            f"--nodes {count}: {size} {more} {'one node' if size == 1 else 'the nodes evenly'}.",
            f"Set --processes to {count}, or a multiple of it.",
        )


def places(device: str, size: int) -> tuple[str, ...]:
    """Return the device of each of ``size`` processes, in rank order.

    With more than one: one GPU each, the first of those that runs can use; on a CPU all share its
    cores. The nodes of a job have the same devices. Raises `OptionError` if there are too few GPUs,
    for a device that cannot be shared, and for processes that do not fill the nodes evenly.
    """
    count = len(nodes())
    if size > 1 and count > 1:
        check_nodes(size, count, "this run", splits=True)
        return _places(device, size // count) * count
    return _places(device, size)


def _places(device: str, size: int) -> tuple[str, ...]:
    """Return the device of each of ``size`` processes on this machine."""
    found = devices.resolve(device)
    if size == 1 or found == "cpu":
        return (found,) * size
    if found == "mps":
        raise OptionError(
            f"--processes {size} needs as many GPUs, but this machine has one Apple GPU.",
            "Use --processes 1.",
        )
    if device.startswith("cuda:"):
        raise OptionError(
            f"--device {device} names one GPU, but --processes {size} takes one for each process.",
            "Use --device cuda; CUDA_VISIBLE_DEVICES chooses which GPUs a run sees.",
        )
    known = devices.gpu_names()
    if known is None:  # torch will tell
        return tuple(f"cuda:{rank}" for rank in range(size))
    if len(known) < size:
        there = "1 GPU is" if len(known) == 1 else f"{len(known) or 'no'} GPUs are"
        raise OptionError(
            f"--processes {size} needs as many GPUs, but {there} available.",
            f"Use --processes {max(1, len(known))}, or --device cpu.",
        )
    return known[:size]
