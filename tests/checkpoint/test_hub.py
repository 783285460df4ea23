"""Hub ids, against a server on loopback that answers as the Hub does."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.checkpoint import headers as checkpoint

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "s3cretTokenOfTheTest"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of /api/models/ID[/revision/REV] and /ID/resolve/REV/FILE, with ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server.hub
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        api = re.match(r"^/api/models/([^/]+/[^/?]+)(?:/revision/([^/?]+))?(?:\?.*)?$", self.path)
        file = re.match(r"^/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)", self.path)
        match = api or file
        if not match or match[1] not in hub.repos:
            return self.refuse(401, "RepoNotFound", body)
        if match[1] in hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(403, "GatedRepo", body)
        if (match[2] or "main") not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", body)
        folder = hub.repos[match[1]]
        if api:
            siblings = [
                {"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())
            ]
            value = {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": siblings}
            return self.send(200, json.dumps(value).encode(), body)
        path = folder / file[3]
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", body)
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        hub.sent[path.name] = hub.sent.get(path.name, 0) + (len(data) if body else 0)
        return self.send(status, data, body, headers)

    def refuse(self, status, code, body):
        self.send(status, b"{}", body, {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status, data, body, headers=None):
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


class Hub:
    """A running server, and the command line pointed at it."""

    def __init__(self, home):
        self.home, self.repos, self.gated = home, {}, set()
        self.requests, self.sent = [], {}
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def run(self, *arguments, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env = {k: v for k, v in env.items() if "proxy" not in k.lower()}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DEPTHCUT_WORKSPACE": str(self.home / "workspace"),
        }
        return subprocess.run(
            [sys.executable, "-m", "core", *map(str, arguments)],
            cwd=ROOT,
            env=env | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def cached(self):
        return {p.name for p in self.home.glob("hub/models--*/snapshots/*/*")}


@pytest.fixture
def hub(tmp_path):
    result = Hub(tmp_path / "hf")
    yield result
    result.server.shutdown()
    result.server.server_close()


def repository(tmp_path, source, name="repo"):
    folder = shutil.copytree(source, tmp_path / name)
    for unwanted in ("pytorch_model.bin", "modeling_evil.py", "training_args.bin", "README.md"):
        (folder / unwanted).write_bytes(b"never to be fetched")
    return folder


def test_prune_a_hub_checkpoint(hub, tmp_path, tiny_gqa):
    hub.repos["owner/tiny"] = repository(tmp_path, tiny_gqa)
    out = tmp_path / "out"
    done = hub.run("prune", "owner/tiny", "--drop", "1,2", "--out", out, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "Fetching owner/tiny" in done.stderr
    info = checkpoint.inspect(out)
    assert info.blocks == 3
    assert json.loads((out / "pruning.json").read_text())["base_model"] == "owner/tiny"
    assert hub.cached() == {p.name for p in tiny_gqa.iterdir()} - {"README.md"}
    assert not any("evil" in path or ".bin" in path for _, path, _ in hub.requests)
    # The token goes to the Hub alone: no file and no line of output has it.
    assert TOKEN not in done.stdout + done.stderr
    for folder in (out, hub.home):
        for path in folder.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    # A second run takes the weights from the cache.
    hub.sent.clear()
    assert hub.run("prune", "owner/tiny", "--drop", "1", "--out", tmp_path / "b").returncode == 0
    assert hub.sent.get("model.safetensors", 0) == 0
    # And with the Hub gone, or switched off, too.
    for way in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        target = tmp_path / next(iter(way))
        done = hub.run("prune", "owner/tiny", "--drop", "1", "--out", target, **way)
        assert done.returncode == 0, done.stderr
        assert checkpoint.inspect(target).blocks == 4


def test_download_reports_bytes(hub, tmp_path, tiny_gqa):
    hub.repos["owner/tiny"] = repository(tmp_path, tiny_gqa)
    out = tmp_path / "out"
    script = (
        "import sys; from core.checkpoint import hub; from core.runs.progress import Progress\n"
        "class Shown(Progress):\n"
        "    def step(self, done, total, message=''): print(done, total, message)\n"
        "print(hub.fetch('owner/tiny@main', Shown()))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}",
        "HF_HOME": str(out),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("model.safetensors" in line for line in lines) >= 2
    assert Path(lines[-1]).name == COMMIT


def test_inspect_reads_headers_only(hub, tmp_path, tiny_dir):
    # Larger than the 100 kB that the library asks for first.
    for name, options in (("one", {}), ("many", {"shard_bytes": 400_000})):
        hub.sent.clear()
        source = tiny_dir("gqa", hidden_size=128, head_dim=32, **options)
        hub.repos[f"owner/{name}"] = repository(tmp_path, source, name)
        done = hub.run("inspect", f"owner/{name}")
        assert done.returncode == 0, done.stderr
        said, local = json.loads(done.stdout), checkpoint.inspect(source).to_dict()
        for key in ("parameters", "block_parameters", "disk_bytes", "dtype", "shards", "tokenizer"):
            assert said[key] == local[key], key
        assert any("Only the headers" in warning for warning in said["warnings"])
        sent = sum(n for file, n in hub.sent.items() if file.endswith(".safetensors"))
        assert sent < local["disk_bytes"]
        assert not [file for file in hub.cached() if file.endswith(".safetensors")]
        done = hub.run("prune", f"owner/{name}", "--drop", "1", "--out", "x", "--dry-run")
        assert json.loads(done.stdout)["blocks_after"] == 4
        assert not [file for file in hub.cached() if file.endswith(".safetensors")]


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_refusals_are_explained(hub, tmp_path, tiny_gqa, command):
    hub.repos["owner/gated"] = repository(tmp_path, tiny_gqa, "gated")
    hub.gated.add("owner/gated")
    pickles = repository(tmp_path, tiny_gqa, "pickles")
    (pickles / "model.safetensors").unlink()
    hub.repos["owner/pickles"] = pickles
    rest = ["--drop", "1", "--out"] if command == "prune" else []

    def refused(name, **environment):
        target = [tmp_path / f"out-{len(hub.requests)}"] if rest else []
        done = hub.run(command, name, *rest, *target, **environment)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr
        return done.stderr

    said = refused("owner/gated")
    assert "is gated" in said
    assert "HF_TOKEN" in said
    assert "no such repository" in refused("owner/absent", HF_TOKEN=TOKEN)
    assert "no revision 'v9'" in refused("owner/pickles@v9")
    assert "pickles" in refused("owner/pickles")
    assert "cannot be reached" in refused("owner/gated", HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_HUB_OFFLINE" in refused("owner/gated", HF_HUB_OFFLINE="1")


def test_token_opens_a_gated_one(hub, tmp_path, tiny_gqa):
    hub.repos["owner/gated"] = repository(tmp_path, tiny_gqa)
    hub.gated.add("owner/gated")
    done = hub.run("inspect", "owner/gated", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"] == 5
