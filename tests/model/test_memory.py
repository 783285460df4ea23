"""Which exceptions mean that memory ran out: the texts of every library under torch."""

from __future__ import annotations

import pytest
import torch

from core.errors import OutOfMemoryError
from core.model import memory


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM`",
        "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
        "curand: CURAND_STATUS_ALLOCATION_FAILED",
        "HIP out of memory. Tried to allocate 2.00 GiB.",
        "HIP error: hipErrorOutOfMemory",
        "hipBLAS error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "miopenStatusAllocFailed",
        "MPS backend out of memory (MPS allocated: 17.71 GiB, max allowed: 18.13 GiB)",
        "Failed to allocate private MTLBuffer for size 8589934592",
        "Invalid buffer size: 31.25 GiB",
        "Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_every_library_says_it_in_its_own_words(text):
    with (
        pytest.raises(OutOfMemoryError, match="Out of memory while multiplying"),
        memory.out_of_memory_explained("multiplying"),
    ):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Out of memory while multiplying."),
        (RuntimeError("CUDA out of memory.\nMore"),
         "Out of memory while multiplying: CUDA out of memory."),
    ],
)  # fmt: skip
def test_the_message_is_one_sentence(error, message):
    with pytest.raises(OutOfMemoryError) as caught, memory.out_of_memory_explained("multiplying"):
        raise error
    assert caught.value.message == message


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`",
        "CUDA error: device-side assert triggered",
        "CUDA error: invalid configuration argument",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    ],
)
def test_other_errors_keep_their_own_words(text):
    with pytest.raises(RuntimeError, match="CUDA error|mat1"), memory.out_of_memory_explained("x"):
        raise RuntimeError(text)


def test_the_peak_is_reset_in_a_process_that_has_not_used_the_gpu_yet(monkeypatch):
    """As on CUDA: the statistics of a device are only there once CUDA has been initialised."""
    ready = []

    def reset(device):
        if not ready:
            raise RuntimeError("Invalid device argument")

    monkeypatch.setattr(torch.cuda, "init", lambda: ready.append(True))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    memory.reset_peak_memory(torch.device("cuda", 0))
    assert ready
