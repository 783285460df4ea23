"""Servers that answer wrongly, slowly or not at all: one sentence, in bounded time."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8,
          "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 16}  # fmt: skip
SLOW_S = 0.5


def listing(**sizes):
    files = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    return {"id": "a/b", "sha": COMMIT, "siblings": files}


FILES = {"config.json": len(json.dumps(CONFIG)), "model.safetensors": 4096}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the repository's name says: ``hostile/NAME`` at the stage where it goes wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.close_connection = True
        parts = self.path.split("?")[0].split("/")
        kind = parts[4] if parts[1] == "api" else parts[2]
        if parts[1] == "api":
            getattr(self, f"list_{kind.replace('-', '_')}", self.whole_listing)()
        elif self.path.endswith("config.json"):
            getattr(self, f"config_{kind.replace('-', '_')}", self.whole_config)()
        else:
            getattr(self, f"weights_{kind.replace('-', '_')}")()

    def send(self, data, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT, "ETag": '"e1"'} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def drip(self, data, length):
        self.send(b"", length=length)
        try:
            for byte in data * 100:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            self.server.hung_up.set()

    def whole_listing(self):
        self.send(json.dumps(listing(**FILES)).encode())

    def whole_config(self):
        self.send(json.dumps(CONFIG).encode())

    # the listing of files
    def list_loop(self):
        self.send(b"", 307, Location=self.path)

    def list_html(self):
        self.send(b"<html>Welcome to the hotel</html>")

    def list_list(self):
        self.send(b"[1, 2]")

    def list_deep(self):
        self.send(b"[" * 100_000)

    def list_types(self):
        self.send(json.dumps({"sha": 1, "siblings": {}}).encode())

    def list_nameless(self):
        self.send(json.dumps({"sha": COMMIT, "siblings": [{"size": "9"}]}).encode())

    def list_closed(self):
        self.connection.close()

    def list_truncated(self):
        self.send(b'{"sha": ', length=1000)

    def list_endless(self):
        self.send(b"", length=1 << 40)
        with __import__("contextlib").suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))

    def list_silent(self):
        time.sleep(4 * SLOW_S)

    def list_dripping(self):
        self.drip(b'{"sha": "', 1 << 20)

    def list_busy(self):
        self.send(b"{}", 429, Retry_After=3600)

    def list_patient(self):
        self.server.asked.append(time.monotonic())
        if len(self.server.asked) == 1:
            self.send(b"{}", 429, Retry_After=1)
        else:
            self.send(b"[]")

    # config.json
    def config_config_html(self):
        self.send(b"<html>".ljust(FILES["config.json"]))

    def config_config_short(self):
        self.send(b"{}", length=FILES["config.json"])

    def config_config_dripping(self):
        self.drip(b" ", FILES["config.json"]) if self.command == "GET" else self.whole_config()

    def config_config_busy(self):
        self.send(b"{}", 429, Retry_After=3600)

    # the header of the weights
    def weights_zeroed(self):
        self.send(bytes(4096), 206)

    def weights_huge(self):
        self.send((1 << 60).to_bytes(8, "little") + bytes(100), 206)

    def weights_weights_dripping(self):
        self.drip(b"\x00", 4096)

    def weights_weights_closed(self):
        self.connection.close()

    def weights_weights_html(self):
        self.send(b"<html><body>Welcome to the hotel")


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.daemon_threads = True
    found.asked, found.hung_up = [], threading.Event()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def environment(server, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {k: v for k, v in env.items() if "proxy" not in k.lower()}
    return env | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DEPTHCUT_HUB_TIMEOUT": str(SLOW_S),
        "DEPTHCUT_WORKSPACE": str(tmp_path / "workspace"),
    }


CASES = {
    "loop": "it redirects in circles",
    "html": "it is not JSON",
    "list": "it is not a JSON object",
    "deep": "nested deeper than 64",
    "types": "does not list a commit and files",
    "nameless": "a file without a name or a size",
    "closed": "the Hub cannot be reached",
    "truncated": "the Hub cannot be reached",
    "endless": "it is longer than 33,554,432 bytes",
    "silent": "the Hub did not finish answering within 0.5 s",
    "dripping": "the Hub did not finish answering within 0.5 s",
    "busy": "asks to wait 3,600 s (Retry-After). Try again in 3,600 s",
    "patient": "it is not a JSON object",
    "config-html": "config.json is not valid JSON",
    "config-short": "did not finish answering",  # the library asks again for a minute
    "config-dripping": "did not finish answering for hostile/config-dripping within 0.5 s",
    "config-busy": "asks to wait 3,600 s (Retry-After)",
    "zeroed": "does not begin with the length of its header",
    "huge": "is too big: 1,152,921,504,606,846,976 bytes",
    "weights-dripping": "did not finish answering for hostile/weights-dripping within 0.5 s",
    "weights-closed": "cannot be reached",
    "weights-html": "is too big",
}


def test_every_wrong_answer_is_one_sentence(server, tmp_path):
    script = (
        "import sys, time\n"
        "from core.checkpoint import hub\n"
        "from core.errors import CheckpointError\n"
        "for name in sys.argv[1:]:\n"
        "    began = time.monotonic()\n"
        "    try: hub.inspect('hostile/' + name)\n"
        "    except CheckpointError as error: print(name, round(time.monotonic() - began), error)\n"
        "    except Exception as error: print(name, 0, repr(error))\n"
    )
    slow = [name for name, sentence in CASES.items() if "did not finish" in sentence]
    rest = [name for name in CASES if name not in slow]
    assert slow
    assert rest
    found = {}
    # A busy machine may take longer than SLOW_S for an answer that comes at once.
    for names, limit in ((slow, SLOW_S), (rest, 20)):
        done = subprocess.run(
            [sys.executable, "-c", script, *names],
            cwd=ROOT,
            env=environment(server, tmp_path) | {"DEPTHCUT_HUB_TIMEOUT": str(limit)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        found |= {line.split()[0]: line.split(" ", 2)[1:] for line in done.stdout.splitlines()}
    for name, sentence in CASES.items():
        took, said = found[name]
        assert sentence in said, (name, said)
        assert int(took) <= 8, (name, took)
    assert server.asked[1] - server.asked[0] >= 1  # it waited as long as the server asked


def test_ctrl_c_ends_at_once(server, tmp_path):
    env = environment(server, tmp_path) | {"DEPTHCUT_HUB_TIMEOUT": "300"}
    command = [sys.executable, "-m", "core", "inspect", "hostile/weights-dripping"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    time.sleep(0.1)
    deadline = time.monotonic() + 20
    while "Fetching" not in process.stderr.readline():
        assert time.monotonic() < deadline
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - began < 5
    assert "Cancelled" in process.stderr.read()
