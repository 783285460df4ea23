"""What an exception of another library means: out of memory, a full disk, or unexpected."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from core.errors import DepthcutError, OutOfMemoryError, RunError
from core.runs import workspace
from core.runs.devices import GIB, MIB
from core.runs.memory_guard import limit_bytes

_MEMORY = (
    "out of memory",  # CUDA, HIP and MPS allocators, and their drivers
    "erroroutofmemory",  # hipErrorOutOfMemory, kIOGPUCommandBufferCallbackErrorOutOfMemory
    "error_out_of_memory",  # CUDA_ERROR_OUT_OF_MEMORY
    "status_alloc_failed",  # cuBLAS, cuDNN, cuSPARSE, cuSOLVER, hipBLAS
    "status_allocation_failed",  # cuRAND
    "status_insufficient_resources",  # cuSPARSE
    "statusallocfailed",  # miopenStatusAllocFailed
    "rocblas_status_memory_error",
    "cufft_alloc_failed",
    "failed to allocate private mtlbuffer",
    "invalid buffer size",  # MPS, for a tensor larger than the device's memory
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "failed to map segment from shared object",
    "can't start new thread",
)
_NOT_MEMORY = "static tls block"  # glibc: too many libraries of one kind, however much is free
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_WRITES = ("pytorchstreamwriter failed writing", "inline_container.cc")
"""torch.save does not say why a write failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the device or of the process."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return any(sign in text for sign in _MEMORY) and _NOT_MEMORY not in text


def disk_problem(error: BaseException, folder: Path | None = None) -> OSError | None:
    """Return why the disk took no more bytes, if that is what an exception means; else None.

    Libraries written in Rust and C++ raise exceptions of their own, with the system's reason in
    the text or, in the case of torch, without one: then ``folder`` is looked at.
    """
    if isinstance(error, OSError):
        return error if error.errno in _DISK else None
    text = str(error)
    for code in _DISK:
        numbered = re.search(rf"\b(?:os error|code:) {code}\b", text)
        if numbered or os.strerror(code).lower() in text.lower():
            return OSError(code, os.strerror(code))
    if folder and any(sign in text.lower() for sign in _TORCH_WRITES):
        existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
        if shutil.disk_usage(existing).free < MIB:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def as_known(
    error: BaseException,
    hint: str = "See the log for the traceback.",
    folder: Path | None = None,
) -> DepthcutError:
    """Turn an unexpected exception into one sentence and a hint; ``folder`` is the run's."""
    name = type(error).__name__
    text = (str(error).splitlines() or [""])[0][:300]
    if name == "OutOfMemoryError" or is_out_of_memory(error):
        return OutOfMemoryError(
            f"Out of memory: {text or name}.",
            "Use a smaller dtype, fewer samples or shorter rows, or another device." + _limit(),
        )
    problem = disk_problem(error, folder)
    if problem is not None:
        named = getattr(error, "filename", None)
        where = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else folder or Path()
        return workspace.cannot_write(where, problem)
    return RunError(f"Unexpected {name}: {text or 'no message'}.", hint)


def _limit() -> str:
    """Return a sentence on the process's own memory limit, if it has one."""
    limit = limit_bytes()
    if limit is None:
        return ""
    return f" This process may use {limit / GIB:.1f} GiB of address space (ulimit -v)."
