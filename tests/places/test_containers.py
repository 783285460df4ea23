"""The Containerfiles: their stages up to the code are built where a builder works.

The base image is made of Debian's packages, so no registry of images is asked; the libraries, which
take gigabytes, are not installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = "depthcut-test-base"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that runs buildah in storage of the tests' own, with a base image in it."""
    missing = [name for name in ("buildah", "mmdebstrap") if not shutil.which(name)]
    if missing:
        pytest.skip(f"Containerfiles are NOT built: {', '.join(missing)} missing")
    folder = tmp_path_factory.mktemp("containers")
    env = {**os.environ, "BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs",
           "TMPDIR": str(folder)}  # fmt: skip
    store = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]

    def run(*words, check=True):
        done = subprocess.run(
            ["buildah", *store, *words], capture_output=True, text=True, env=env, cwd=ROOT
        )
        assert not check or done.returncode == 0, done.stderr[-2000:]
        return done

    tree = folder / "base.tar"
    words = ["mmdebstrap", "--variant=apt", "--include=python3,python3-venv,ca-certificates",
             "bookworm", str(tree)]  # fmt: skip
    made = subprocess.run(words, capture_output=True, text=True, env=env)
    if made.returncode:
        pytest.skip(f"Containerfiles are NOT built: no base image ({made.stderr.strip()[-200:]})")
    first = run("from", "scratch", check=False)
    if first.returncode:
        pytest.skip(f"Containerfiles are NOT built: buildah does not work ({first.stderr[-200:]})")
    working = first.stdout.strip()
    run("add", "-q", working, str(tree), "/")
    tree.unlink()
    run("commit", "-q", working, NAME)
    yield run
    run("rmi", "--all", "--force", check=False)


def test_a_containerfile_builds_up_to_the_libraries(build):
    build("build", "-q", "--build-arg", f"BASE=localhost/{NAME}", "--pull-never",
          "--target", "code", "-t", "depthcut-code", "-f", "containers/cpu.Containerfile",
          ".")  # fmt: skip
    working = build("from", "localhost/depthcut-code").stdout.strip()
    told = build("run", working, "--", "sh", "-c",
                 "cd /opt/depthcut && python3 -m core --version && which rsync ssh")  # fmt: skip
    assert told.stdout.split() == ["0.1.0", "/usr/bin/rsync", "/usr/bin/ssh"]


def test_the_two_differ_only_in_what_the_gpu_needs():
    one, other = (
        (ROOT / "containers" / f"{name}.Containerfile").read_text().splitlines()
        for name in ("cpu", "cuda")
    )
    steps = [[line for line in lines if line[:1] != "#"] for lines in (one, other)]
    only = set(steps[0]) ^ set(steps[1])
    assert {line.split("=")[0].split()[-1] for line in only} == {
        "TORCH_INDEX", "NVIDIA_VISIBLE_DEVICES"
    }  # fmt: skip
