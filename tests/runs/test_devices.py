"""GPUs as the driver, CUDA and torch number them, and why one cannot be used; all emulated."""

from __future__ import annotations

import ctypes

import pytest

from core import __main__
from core.errors import OptionError
from core.model import precision
from core.runs import devices, nvml, torch_build
from core.runs.device_lock import DeviceLock
from core.runs.nvml import Gpu, Listing
from core.runs.torch_build import TorchBuild

CPU_BUILD = TorchBuild("2.13.0+cpu")
CUDA_12 = TorchBuild("2.13.0+cu126", "cuda", (12, 6))
CUDA_13 = TorchBuild("2.13.0+cu130", "cuda", (13, 0))
NEW, OLD, OLDEST = ("580.65.06", (13, 0)), ("535.183.01", (12, 2)), ("470.82.01", (11, 4))
WHEELS = "https://download.pytorch.org/whl"
INSTALL = "python -m pip install --force-reinstall torch==2.13.0 --index-url"


def gpu(letter: str = "a", name: str = "NVIDIA H100", capability=(9, 0), **more) -> Gpu:
    return Gpu(f"GPU-{letter * 8}", name, 70 * 2**30, 80 * 2**30, capability, **more)


@pytest.fixture
def machine(monkeypatch):
    """Emulate a machine: its torch, its driver and its GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def emulate(build, driver=NEW, *gpus, cuda_order=()):
        found = Listing(*driver, gpus)
        monkeypatch.setattr(torch_build, "installed", lambda: build)
        monkeypatch.setattr(nvml, "listing", lambda: found)
        monkeypatch.setattr(nvml, "_order_of_cuda", lambda: cuda_order)
        monkeypatch.setattr(devices, "_on_the_bus", lambda: ())
        devices.cuda_capability.cache_clear()

    yield emulate
    devices.cuda_capability.cache_clear()


@pytest.mark.parametrize(
    ("build", "driver", "name", "capability", "why", "fix"),
    [
        (CPU_BUILD, NEW, "H100", (9, 0), "built for the CPU only",
         f"Install a build that fits: {INSTALL} {WHEELS}/cu130"),
        (CPU_BUILD, OLD, "A100", (8, 0), "built for the CPU only",
         f"Update the driver to 580 or newer, or install a build that fits this driver: "
         f"{INSTALL} {WHEELS}/cu126"),
        (CUDA_13, OLD, "A100", (8, 0),
         "torch 2.13.0+cu130 is built for CUDA 13.0, which needs driver 580 or newer, but the "
         "driver is 535.183.01 (CUDA 12.2)",
         f"Update the driver to 580 or newer, or install a build that fits this driver: "
         f"{INSTALL} {WHEELS}/cu126"),
        (CUDA_13, NEW, "Tesla V100", (7, 0),
         "its compute capability is 7.0, and torch 2.13.0+cu130, built for CUDA 13.0, starts at "
         "7.5", f"Install a build that fits: {INSTALL} {WHEELS}/cu126"),
        (CUDA_13, OLDEST, "GTX 1080", (6, 1), "which needs driver 580 or newer",
         f"Update the driver to 525 or newer, then run: {INSTALL} {WHEELS}/cu126"),
        (CUDA_13, OLDEST, "A100", (8, 0), "which needs driver 580 or newer",
         "Update the driver to 580 or newer."),
        (CUDA_12, NEW, "B200", (10, 0), "ends at 9.0",
         f"Install a build that fits: {INSTALL} {WHEELS}/cu130"),
        (CUDA_12, NEW, "K80", (3, 7), "starts at 5.0",
         "No current build of torch supports it: use --device cpu."),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_says_why_and_what_to_install(
    machine, build, driver, name, capability, why, fix
):
    machine(build, driver, gpu(name=name, capability=capability))
    (found,) = devices.unusable()
    assert found.gpu == name
    assert why in found.why
    assert found.fix == fix
    assert str(found) == f"{name} is present but cannot be used: {found.why}. {fix}"
    assert devices.resolve("auto") == "cpu"
    assert [device.name for device in devices.devices()] == ["cpu"]


@pytest.mark.parametrize(
    ("build", "driver", "capability"),
    [
        (CUDA_13, NEW, (9, 0)),
        (CUDA_13, NEW, (12, 0)),
        (CUDA_12, OLD, (7, 0)),
        (CUDA_12, NEW, (8, 6)),
        (TorchBuild("2.13.0a0+git1234", "cuda", (12, 6)), NEW, (10, 0)),
        (CUDA_13, ("580.65.06", None), None),
    ],
)
def test_a_usable_gpu_is_used(machine, build, driver, capability):
    machine(build, driver, gpu(capability=capability))
    assert devices.unusable(hidden=True) == ()
    assert devices.resolve("auto") == "cuda:0"
    assert [(d.name, d.label) for d in devices.devices()][0] == ("cuda:0", "NVIDIA H100")


def test_auto_passes_over_a_card_that_torch_cannot_use(machine):
    old, new = gpu("a", "TITAN V", (7, 0)), gpu("b", "RTX 4090", (8, 9))
    machine(CUDA_13, NEW, old, new, cuda_order=(old.uuid, new.uuid))
    assert devices.resolve("auto") == "cuda:1"
    assert [found.gpu for found in devices.unusable()] == ["TITAN V"]
    assert [d.name for d in devices.devices()] == ["cuda:1", "cpu"]


def test_a_hidden_gpu_is_reported_when_asked(machine, monkeypatch):
    machine(CUDA_13, NEW, gpu())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.resolve("auto") == "cpu"
    assert devices.unusable() == ()
    (found,) = devices.unusable(hidden=True)
    assert str(found) == (
        "NVIDIA H100 is present but cannot be used: CUDA_VISIBLE_DEVICES is ''. "
        "Unset it to use the GPU."
    )


def test_a_gpu_without_a_driver_is_reported(machine, monkeypatch):
    machine(CPU_BUILD)
    monkeypatch.setattr(nvml, "listing", lambda: Listing(error=nvml._ERRORS[18]))
    monkeypatch.setattr(devices, "_on_the_bus", lambda: ("PCI 0000:65:00.0",))
    (found,) = devices.unusable()
    assert found.gpu == "An NVIDIA GPU (PCI 0000:65:00.0)"
    assert found.why == "driver and library versions differ"
    assert "580 or newer" in found.fix


A, B, C = gpu("a", "A100"), gpu("b", "H100"), gpu("c", "A100")
MIG = gpu("d", instances=(Gpu("MIG-1", "H100 MIG 1g"), Gpu("MIG-2", "H100 MIG 1g")))


@pytest.mark.parametrize(
    ("gpus", "visible", "order", "expected"),
    [
        ((A, C), None, "", [A, C]),
        ((A, C), "1", "", [C]),
        ((A, C), "1,0", "", [C, A]),
        ((A, C), "", "", []),
        ((A, C), "-1", "", []),
        ((A, C), "0,7,1", "", [A]),
        ((A, C), "0,0", "", [A]),
        ((A, C), "GPU-cc", "", [C]),
        ((A, C), "GPU-none,GPU-cc", "", []),
        ((A, B), None, "", [B, A]),  # CUDA lists the fastest first
        ((A, B), "0", "", [B]),
        ((A, B), None, "PCI_BUS_ID", [A, B]),
        ((A, B), "0", "PCI_BUS_ID", [A]),
        ((MIG,), None, "", [MIG.instances[0]]),
        ((MIG,), "MIG-2", "", [MIG.instances[1]]),
    ],
)
def test_gpus_are_numbered_as_torch_numbers_them(
    machine, monkeypatch, gpus, visible, order, expected
):
    machine(CUDA_13, NEW, *gpus, cuda_order=(B.uuid, A.uuid))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    assert list(nvml.visible(nvml.listing())) == expected


def test_memory_capability_and_lock_belong_to_the_same_card(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path))
    small = Gpu("GPU-small", "T4", 15 * 2**30, 16 * 2**30, (7, 5))
    large = Gpu("GPU-large", "H100", 70 * 2**30, 80 * 2**30, (9, 0))
    machine(CUDA_13, NEW, small, large, cuda_order=(large.uuid, small.uuid))
    assert devices.free_bytes("auto") == ("cuda:0", large.free_bytes)
    assert devices.cuda_capability(1) == (7, 5)
    assert devices.lock_name("cuda:0") == "GPU-large"
    assert devices.lock_name("cuda:7") == "cuda-7"
    assert devices.lock_name("cpu") == "cpu"
    held = DeviceLock("cuda:1")
    held.acquire()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-small")
    assert DeviceLock("cuda:0").holder() is not None  # the same card by another number
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-large")
    assert DeviceLock("cuda:0").holder() is None
    held.release()


class FakeNvml:
    """NVML's functions for one partitioned card."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def __getattr__(self, name):
        if name.startswith("nvmlInit"):
            return lambda: self.code
        if name == "nvmlShutdown":
            return lambda: 0
        return lambda *asked: self.answer(name, *asked)

    def answer(self, name, *asked):
        numbers = {
            "nvmlSystemGetCudaDriverVersion_v2": (12080,),
            "nvmlDeviceGetCount_v2": (1,),
            "nvmlDeviceGetCudaComputeCapability": (8, 6),
            "nvmlDeviceGetMaxMigDeviceCount": (2,),
        }
        texts = {"nvmlSystemGetDriverVersion": b"570.1", "nvmlDeviceGetName": b"A30"}
        if name in texts:
            asked[-2].value = texts[name]
        elif name == "nvmlDeviceGetUUID":
            asked[-2].value = b"MIG-7" if asked[0].value == 7 else b"GPU-5"
        elif name == "nvmlDeviceGetHandleByIndex_v2":
            asked[1]._obj.value = 5
        elif name == "nvmlDeviceGetMigMode":
            asked[1]._obj.value = asked[0].value == 5
        elif name == "nvmlDeviceGetMigDeviceHandleByIndex":
            asked[2]._obj.value = 7
            return 0 if asked[1] == 0 else 6
        elif name == "nvmlDeviceGetMemoryInfo":
            asked[1]._obj.total, asked[1]._obj.free = 24 * 2**30, 20 * 2**30
        else:
            for place, value in zip(asked[-len(numbers[name]) :], numbers[name], strict=True):
                place._obj.value = value
        return 0


def test_the_driver_is_read_through_its_own_library(monkeypatch):
    monkeypatch.setattr(nvml, "_library", FakeNvml)
    memory = (20 * 2**30, 24 * 2**30)
    instance = Gpu("MIG-7", "A30", *memory, (8, 6))
    assert nvml.listing() == Listing(
        "570.1", (12, 8), (Gpu("GPU-5", "A30", *memory, (8, 6), (instance,)),)
    )
    monkeypatch.setattr(nvml, "_library", lambda: FakeNvml(18))
    assert nvml.listing() == Listing(error="driver and library versions differ")
    monkeypatch.setattr(nvml, "_library", lambda: ctypes.CDLL("libnone-such.so"))
    assert nvml.listing() == Listing()


def test_the_build_is_read_from_torch_itself(tmp_path, monkeypatch):
    import importlib.util
    from types import SimpleNamespace

    (tmp_path / "version.py").write_text(
        "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
    )
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert torch_build.installed() == CUDA_13


def test_a_dry_run_names_the_device_and_the_gpu_it_cannot_use(machine, capsys):
    import json

    machine(CUDA_13, OLD, gpu())
    assert __main__.main(["importance", "demo", "--out", "x", "--dry-run"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["device"] == "cpu"
    assert "needs driver 580 or newer" in found["unusable_gpus"][0]
    assert "needs driver 580 or newer" in printed.err


def test_asking_for_a_gpu_that_cannot_be_used_says_why(machine, monkeypatch):
    machine(CUDA_13, OLD, gpu())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match="NVIDIA H100 is present, but torch 2.13.0.cu130 is") as e:
        precision.resolve_device("cuda")
    assert f"{INSTALL} {WHEELS}/cu126" in e.value.hint


def test_auto_says_when_torch_cannot_use_the_gpu_after_all(machine, monkeypatch, capsys):
    machine(CUDA_13, NEW, gpu())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def init():
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr("torch.cuda.init", init)
    assert str(precision.resolve_device("auto")) == "cpu"
    said = capsys.readouterr().err
    assert said == ("Computing on the CPU: cuda:0 cannot be used: No CUDA GPUs are available.\n")
