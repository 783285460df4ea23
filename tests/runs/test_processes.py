import subprocess
import sys

import pytest

from core.runs import processes

SHOW = """
import os, sys
from core import __main__
__main__.main(["nonsense"])
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "PASSIVE"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ({"GOMP_SPINCOUNT": "1000"}, None),
    ],
)
def test_idle_threads_sleep_unless_the_user_has_decided(monkeypatch, given, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert processes.environment().get("OMP_WAIT_POLICY") == expected


def test_the_command_line_decides_before_torch_reads_it(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    env = processes.environment()
    del env["OMP_WAIT_POLICY"]
    found = subprocess.run(
        [sys.executable, "-c", SHOW], env=env, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["PASSIVE", "False"]
