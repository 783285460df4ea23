"""What the installed torch was built for, and which GPUs it can therefore use; torch-free."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from core.runs.nvml import Gpu, Listing

EVER, FROM_13, UNTIL_12_6 = (5, 0), (7, 5), (9, 0)
"""Compute capabilities: builds for CUDA 13 start at 7.5 (no Volta, no Pascal), those for CUDA 12.6
cover 5.0 to 9.0. torch 2.13 is built for CUDA 12.6, 13.0 and 13.2; PyPI's is for CUDA 13."""
DRIVERS = {12: 525, 13: 580}
"""The oldest driver for each CUDA generation (NVIDIA's table of minor-version compatibility)."""


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for."""

    version: str = ""
    """As in ``2.13.0+cu130``; empty without torch."""
    kind: str = ""
    """cuda, hip, or empty for the CPU alone."""
    cuda: tuple[int, int] | None = None


def installed() -> TorchBuild:
    """Read what the installed torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return TorchBuild()
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return TorchBuild()
    pattern = r"""^(__version__|cuda|hip)\b[^=\n]*=\s*(?:['\"]([^'\"]*)['\"]|None)"""
    values = dict(re.findall(pattern, text, re.MULTILINE))
    kind = next((kind for kind in ("cuda", "hip") if values.get(kind)), "")
    number = re.match(r"(\d+)\.(\d+)", values.get("cuda", ""))
    cuda = (int(number[1]), int(number[2])) if number else None
    return TorchBuild(values.get("__version__", ""), kind, cuda)


def why_not(build: TorchBuild, found: Listing, gpu: Gpu) -> str | None:
    """Return why this torch cannot use a GPU that the driver lists; None if it should."""
    if build.cuda is None:
        return f"the installed torch {build.version} is built for the CPU only"
    needs = f"{build.cuda[0]}.{build.cuda[1]}"
    if found.cuda and found.cuda[0] < build.cuda[0]:
        least = DRIVERS.get(build.cuda[0])
        return (
            f"torch {build.version} is built for CUDA {needs}"
            + (f", which needs driver {least} or newer" if least else "")
            + f", but the driver is {found.driver} (CUDA {found.cuda[0]}.{found.cuda[1]})"
        )
    if gpu.capability is None:
        return None
    has = f"its compute capability is {gpu.capability[0]}.{gpu.capability[1]}"
    what = f"torch {build.version}, built for CUDA {needs},"
    if build.cuda[0] >= 13 and gpu.capability < FROM_13:
        return f"{has}, and {what} starts at {FROM_13[0]}.{FROM_13[1]}"
    if re.search(r"\+cu\d+$", build.version):  # other builds choose their own architectures
        if gpu.capability < EVER:
            return f"{has}, and {what} starts at {EVER[0]}.{EVER[1]}"
        if build.cuda < (12, 8) and gpu.capability[0] > UNTIL_12_6[0]:
            return f"{has}, and {what} ends at {UNTIL_12_6[0]}.{UNTIL_12_6[1]}"
    return None


def fix(build: TorchBuild, found: Listing, gpu: Gpu) -> str:
    """Return how to get a torch that can use ``gpu``, in sentences."""
    capability = gpu.capability or FROM_13
    generation = found.cuda[0] if found.cuda else 13
    legacy, newest = (install_command(name, build.version) for name in ("cu126", "cu130"))
    if capability < EVER:
        return "No current build of torch supports it: use --device cpu."
    if capability < FROM_13:
        if generation < 12:
            return f"Update the driver to {DRIVERS[12]} or newer, then run: {legacy}"
        return f"Install a build that fits: {legacy}"
    if generation >= 13:
        return f"Install a build that fits: {newest}"
    update = f"Update the driver to {DRIVERS[13]} or newer"
    if capability[0] > UNTIL_12_6[0] or generation < 12:
        built = build.cuda is not None and build.cuda[0] >= 13
        return f"{update}." if built else f"{update}, then run: {newest}"
    return f"{update}, or install a build that fits this driver: {legacy}"


def install_command(build: str, version: str = "") -> str:
    """Return the command that installs a build of torch, e.g. cpu or cu126."""
    number = version.partition("+")[0]
    wanted = f"torch=={number}" if number else "torch"
    index = f"https://download.pytorch.org/whl/{build}"
    return f"python -m pip install --force-reinstall {wanted} --index-url {index}"
