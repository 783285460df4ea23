"""Fixtures shared by all tests: tiny checkpoints, written once a session, and the real inputs."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

# No test may go out to the Hub; those that need one start a server of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and tests run beside each other on few cores.
# Set before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import tiny

# A shell's background job, or nohup, hands on that these are ignored; tests send them.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test waits for a run outside the tests, nor for one of another worker.
_LOCKS = tempfile.TemporaryDirectory(prefix="depthcut-test-locks-")
os.environ["DEPTHCUT_LOCK_DIR"] = _LOCKS.name

ROOT = Path(__file__).parents[1]

gc.disable()


LONGEST = (
    *("browser/test_compare.py", "browser/test_sessions.py", "doctor/test_doctor.py"),
    *("browser/test_prune_by_clicking.py", "browser/test_retrain.py", "browser/test_live.py"),
    *("benchmark/test_command.py", "browser/test_live_killed.py", "test_real_path.py"),
    *("checkpoint/test_families.py", "benchmark/test_gpu_bench.py", "evaluate/test_tasks.py"),
    *("recipes/test_calibration.py", "width/test_cut.py", "live/test_server.py"),
)
"""Files that take longest. They begin first, so that no worker is left alone with one of them."""


def pytest_collection_modifyitems(items):
    """Sort the longest files to the front; workers take files in this order."""
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish():
    """Spare what repeats: a search of Streamlit's, and garbage collection of the libraries.

    The imported libraries are more than a million objects that stay until the end. Every full
    collection, and the code under test asks for many, would look at each of them again.
    """
    if "streamlit" in sys.modules:
        # Every page of a test would look for components in all installed packages, for 0.3 s.
        from streamlit.components.v2 import manifest_scanner

        manifest_scanner.scan_component_manifests = functools.cache(
            manifest_scanner.scan_component_manifests
        )
    if "torch" in sys.modules:
        import transformers.models.llama.modeling_llama  # noqa: F401  # almost all tests need it
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_prepared():
    """Pages drawn in this process prepare nothing; a test that launches runs asks for it."""
    from core.runs import warm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "later", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def template():
    """A process that has imported the computing libraries, from which others are forked."""
    from core.runs import warm

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "FREE", (*warm.FREE, "PYTEST_CURRENT_TEST"))
        with warm.template("cpu", lambda: None) as made:
            yield made


@pytest.fixture
def prepared_runs(template, monkeypatch):
    """Runs that this test launches start at once, as on a page."""
    from core.runs import warm

    monkeypatch.setattr(warm, "_kept", template)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    """A function from a variant (and options of tiny.write) to its folder, each written once."""
    root = tmp_path_factory.mktemp("tiny")
    written = {}

    def get(variant="gqa", **options):
        key = (variant, *sorted(options.items()))
        if key not in written:
            written[key] = tiny.write(root / str(len(written)) / variant, variant, **options)
        return written[key]

    return get


@pytest.fixture(scope="session")
def tiny_llama(tiny_dir):
    """A LLaMA with as many key/value heads as query heads, untied: 5 blocks, hidden 32."""
    return tiny_dir("mha")


@pytest.fixture(scope="session")
def tiny_gqa(tiny_dir):
    """A LLaMA with grouped-query attention: 4 query and 2 key/value heads."""
    return tiny_dir("gqa")


@pytest.fixture(scope="session")
def tiny_families(tiny_dir):
    """One checkpoint of each family: name -> folder."""
    return {tiny.VARIANTS[variant][0]: tiny_dir(variant) for variant in tiny.FAMILIES}


@pytest.fixture(scope="session")
def real_dir():
    """The folder of real inputs beside the project; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip("the real inputs are not on this machine")
    return folder


@pytest.fixture
def header_reads(monkeypatch):
    """How often the headers of each checkpoint folder are read from now on: folder -> times."""
    from core.checkpoint import headers, locate

    counts = Counter()
    inspect = headers.inspect

    def counted(path, **options):
        counts[str(path)] += 1
        return inspect(path, **options)

    locate._read.cache_clear()
    monkeypatch.setattr(headers, "inspect", counted)
    return counts


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened from now on, through whatever function: a list of paths."""
    import builtins
    import io

    found = []
    opener = io.open

    def counted(file, *arguments, **options):
        found.append(str(file))
        return opener(file, *arguments, **options)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A workspace and a lock folder of the test's own, where every process knows ``wait``.

    Returns the `core.runs.workspace.Workspace`; runs that still live at the end are killed.
    """
    from core import commands
    from core.runs import jobs
    from core.runs.workspace import Workspace

    machinery = Path(__file__).parent / "machinery"
    monkeypatch.syspath_prepend(str(machinery))
    import slow_commands

    for name, command in slow_commands.REGISTRY.items():
        monkeypatch.setitem(commands.COMMANDS, name, command)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(machinery), str(ROOT))))
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    monkeypatch.delenv("DEPTHCUT_DETACHED", raising=False)
    where = Workspace()
    yield where
    for record in where.runs():
        if record.is_live:
            jobs.LocalLauncher().kill(record)
