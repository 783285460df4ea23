"""Weights, gradients and optimiser states split among the processes of a training (FSDP2).

`split` gives every process an equal part of each tensor, by rows. A block's weights are gathered
just before it computes, forward and backward, and released afterwards; its gradients are added up
over the processes and each keeps its part (torch.distributed.fsdp.fully_shard, arXiv 2304.11277).
Numbers are those of replicas, up to rounding.

All processes must run a split model together, and from its root: through `within`. It is loaded and
written a tensor at a time (`core.retrain.split_files`), so that no process ever has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from core import errors
from core.errors import Cancelled, DepthcutError
from core.runs.progress import Progress
from core.runs.ranks import Ranks

T = TypeVar("T")


def split(model: Any, ranks: Ranks, device: torch.device) -> None:
    """Split a model of transformers among the processes, in place; it may have shapes only.

    Its blocks and the rest (embedding, last norm, output matrix) are gathered one at a time.
    """
    import torch.distributed as dist
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(ranks.gpus or dist.group.WORLD, device.type)
    narrow = next(model.parameters()).dtype.itemsize < 4
    policy = fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    for module in (*model.model.layers, model):
        if next(module.parameters(), None) is not None:
            fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in _parts(model):
        part.set_force_sum_reduction_for_comms(True)  # a loss is divided by all tokens already
        part.set_gradient_divide_factor(1.0)
    model.within = _called
    fsdp.register_fsdp_forward_method(model, "within")


def _called(work: Callable[[], T]) -> T:
    return work()


def is_split(model: Any) -> bool:
    """Whether `split` has split this model."""
    return hasattr(model, "within")


def within(model: Any, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, which calls parts of ``model`` in an order of its own.

    FSDP gathers and releases weights only for what is called from the root; a model that is not
    split does not care.
    """
    if is_split(model):
        found: T = model.within(work)
        return found
    return work()


def release(model: Any) -> None:
    """Release gathered weights that an evaluation has left, for which no backward pass follows."""
    for part in _parts(model) if is_split(model) else ():
        part.reshard()


def free(model: Any) -> None:
    """Free this process's part of a split model, which cannot be used afterwards; no other model.

    FSDP refers to the parts as well, in cycles, so that dropping the model is not enough.
    """
    if is_split(model):
        release(model)
        for weight in model.parameters():
            local(weight.detach()).untyped_storage().resize_(0)


def _parts(model: Any) -> Iterator[Any]:
    """Yield the root and the blocks of a split model."""
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _is_part(tensor: Any) -> bool:
    """Whether a tensor is this process's part of a whole one (torch's DTensor)."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, which shares its memory."""
    return tensor.to_local() if _is_part(tensor) else tensor


def held_bytes(tensors: Iterable[Any]) -> int:
    """Return the bytes that this process holds of some tensors."""
    return sum(local(t).numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def rows_of(tensor: Tensor) -> slice | None:
    """Return which rows of a whole tensor this process holds; None if all, also of no split one."""
    if not _is_part(tensor):
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    each = -(-tensor.shape[0] // mesh.size())  # like torch.chunk
    first = min(mesh.get_local_rank() * each, tensor.shape[0])
    return slice(first, min(first + each, tensor.shape[0]))


def whole(tensor: Any) -> Any:
    """Return a whole tensor from the parts of all processes; anything else as it is."""
    return tensor.full_tensor() if _is_part(tensor) else tensor


def made_part(own: Tensor, weight: Any) -> Any:
    """Return a tensor split like ``weight``, of which this process holds ``own``."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def clip_(weights: Iterable[Any], most: float, ranks: Ranks) -> float:
    """Scale the gradients so that the norm of all, of all processes, is at most ``most``.

    Returns the norm before, the same to every process.
    """
    gradients = [local(weight.grad) for weight in weights if weight.grad is not None]
    own = float(torch.nn.utils.get_total_norm(gradients))
    norm = math.sqrt(sum(part**2 for part in ranks.gather(own)))
    scale = most / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    if scale < 1:
        torch._foreach_mul_(gradients, scale)
    return norm


def agreed(ranks: Ranks, work: Callable[[], T]) -> T:
    """Return what ``work`` returns; if it fails in one process, all raise that one's error.

    So none waits for one that has given up, and each says what is wrong.
    """
    found, failed = None, None
    try:
        found = work()
    except DepthcutError as error:
        failed = error
    own = failed and (type(failed).__name__, failed.message, failed.hint)
    told = [one for one in ranks.gather(own) if one]
    if failed is not None:
        raise failed
    if told:
        kind, message, hint = told[0]
        raise getattr(errors, kind)(message, hint)
    return found  # type: ignore[return-value]


class Together(Progress):
    """A progress whose cancel request reaches all processes that compute together at one place."""

    def __init__(self, progress: Progress, ranks: Ranks) -> None:
        """Ask ``progress``, that of the first process, for all."""
        self.progress, self.ranks = progress, ranks

    def check_cancel(self) -> None:
        """Raise `Cancelled` in every process if the first one was asked to stop."""
        asked = False
        try:
            self.progress.check_cancel()
        except Cancelled:
            asked = True
        if self.ranks.first(asked):
            raise Cancelled("Cancelled.")
