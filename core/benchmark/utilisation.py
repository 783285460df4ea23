"""Utilisation of the device, sampled by a thread while runs are timed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EVERY_S = 0.5
"""Seconds between samples; NVML's own sample period is between 1/6 s and 1 s."""


class UtilisationSampler:
    """Samples in per cent between `start` and `stop`; empty if the device does not report any.

    CUDA: NVML's share of time with a kernel running on this device. CPU: the busy share of all
    cores, including other processes. METHODS section 4.
    """

    def __init__(self, device: torch.device, every_s: float = EVERY_S) -> None:
        """Prepare for ``device``; nothing runs yet."""
        self.every_s = every_s
        self.samples: list[float] = []
        self._make = _nvml_reader if device.type == "cuda" else _cpu_reader
        self._device = device
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling."""
        self._stop.clear()
        read = self._make(self._device)
        if read is None:
            return
        self._thread = threading.Thread(target=self._sample, args=(read,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and stop."""
        self._stop.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def _sample(self, read: Callable[[], float | None]) -> None:
        done = False
        while not done:
            done = self._stop.wait(self.every_s)
            value = read()
            if value is not None:
                self.samples.append(value)


def _cpu_times() -> tuple[int, int] | None:
    """Return (busy, total) ticks of all cores since the machine started; None without /proc."""
    try:
        fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def _cpu_reader(device: torch.device) -> Callable[[], float | None] | None:
    last = _cpu_times()
    if last is None or device.type != "cpu":
        return None
    state = [last]

    def read() -> float | None:
        now = _cpu_times()
        if now is None or now[1] <= state[0][1]:
            return None
        share = 100.0 * (now[0] - state[0][0]) / (now[1] - state[0][1])
        state[0] = now
        return share

    return read


class _Rates(ctypes.Structure):
    _fields_ = [("gpu", ctypes.c_uint), ("memory", ctypes.c_uint)]


def _nvml_reader(device: torch.device) -> Callable[[], float | None] | None:
    """Return a reader of NVML's utilisation, found by the device's UUID; None without NVML."""
    with contextlib.suppress(OSError, AttributeError):
        import torch

        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        uuid: Any = getattr(torch.cuda.get_device_properties(device), "uuid", "")
        name = str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(
            name.encode(), ctypes.byref(handle)
        ):
            return None

        def read() -> float | None:
            rates = _Rates()
            if library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates)):
                return None
            return float(rates.gpu)

        return read
    return None
