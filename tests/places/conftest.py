"""A real sshd, and a real SLURM, on loopback, for tests of runs at other places."""

from __future__ import annotations

import getpass
import sys
import time

import pytest
import ssh_server
from ssh_server import MACHINERY

from core.places import place as place_file


@pytest.fixture(scope="session")
def sshd_program() -> str:
    found, missing = ssh_server.find()
    if missing:
        pytest.skip(f"runs over SSH are NOT tested: {', '.join(missing)} missing (apt-get install "
                    "openssh-server openssh-client rsync)")  # fmt: skip
    return found


@pytest.fixture
def sshd(sshd_program, tmp_path):
    folder = tmp_path / "sshd"
    folder.mkdir(mode=0o700)
    server = ssh_server.Sshd(folder, sshd_program)
    try:
        server.start()
    except RuntimeError as error:
        pytest.skip(str(error))
    yield server
    server.stop()


@pytest.fixture
def box(place, sshd, tmp_path):
    """The workspace ``place`` knows one other machine, ``box``: this one over SSH."""
    there = tmp_path / "there"
    place_file.save({"box": sshd.place("box", there)}, place.root)
    return sshd.place("box", there)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real SLURM of two nodes on loopback."""
    import slurm_cluster as loopback

    if problem := loopback.missing():
        pytest.skip(f"runs through SLURM are NOT tested: {problem}")
    found = loopback.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
    except RuntimeError as error:
        pytest.skip(f"runs through SLURM are NOT tested: {error}")
    yield found
    found.stop()


@pytest.fixture
def slurm(place, cluster, monkeypatch):
    """The workspace ``place`` knows this cluster as ``farm``; all its jobs are gone at the end."""
    monkeypatch.setenv("DEPTHCUT_SLURM_POLL", "0.3")
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    values = {"kind": "slurm", "python": sys.executable, "requeue": 2,
              "environment": {"PYTHONPATH": str(MACHINERY)}}  # fmt: skip
    farm = place_file.from_dict("farm", values)
    place_file.save({"farm": farm}, place.root)
    yield cluster
    cluster.ask("scancel", "-f", "--user=" + getpass.getuser())
    deadline = time.monotonic() + 20
    while cluster.ask("squeue", "-h") and time.monotonic() < deadline:
        time.sleep(0.1)
