"""A server on loopback that answers as the Hub does: downloads with ranges, and uploads."""

import base64
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "s3cretTokenOfTheTest"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """GET and HEAD of /api/models/ID[/revision/REV] and /ID/resolve/REV/FILE, with ranges.

    With ``hub.together`` set, a GET of a shard waits until that many are being answered at once.
    POST and PUT take uploads: create a repository, ask for the way of each file, store large
    files, commit. ``hub.faults`` lists statuses that the next uploading requests get instead.
    """

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
        if body and path.suffix == ".safetensors":
            with hub.change:
                hub.open += 1
                hub.most_open = max(hub.most_open, hub.open)
                hub.change.notify_all()
                hub.change.wait_for(lambda: hub.most_open >= hub.together, timeout=10)
                hub.open -= 1
        hub.sent[path.name] = hub.sent.get(path.name, 0) + (len(data) if body else 0)
        return self.send(status, data, body, headers)

    def do_POST(self):
        hub, sent = self.server.hub, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, self.path, None))
        if hub.faults and (fault := hub.faults.pop(0)):
            if fault == "hang up":
                self.close_connection = True
                return self.connection.close()
            return self.refuse(fault, "", True)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", True)
        return self.send(200, json.dumps(self.stored(hub, sent)).encode(), True)

    def stored(self, hub, sent):
        """Carry out a step of an upload and return the answer."""
        if self.path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        repo = re.match(r"^/(?:api/models/)?([^/]+/[^/.]+)", self.path)[1]
        if self.path == "/api/repos/create":
            wish = json.loads(sent)
            name = (
                f"{wish['organization']}/{wish['name']}" if "organization" in wish else wish["name"]
            )
            hub.created[name] = wish
            return {"url": f"http://127.0.0.1:{hub.server.server_port}/{name}", "id": name}
        if "/preupload/" in self.path:
            large = [".safetensors" in file["path"] for file in json.loads(sent)["files"]]
            return {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if big else "regular",
                        "shouldIgnore": False,
                    }
                    for f, big in zip(json.loads(sent)["files"], large, strict=True)
                ]
            }
        if self.path.endswith("/info/lfs/objects/batch"):
            address = f"http://127.0.0.1:{hub.server.server_port}/store/"
            return {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": address + item["oid"]}}}
                    if item["oid"] not in hub.large
                    else item
                    for item in json.loads(sent)["objects"]
                ],
            }
        lines = [json.loads(line) for line in sent.decode().splitlines()]
        commit = {"": lines[0]["value"]["summary"]}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                commit[value["path"]] = hub.large[value["oid"]]
            else:
                commit[value["path"]] = base64.b64decode(value["content"])
        hub.commits.append((repo, commit))
        url = f"http://127.0.0.1:{hub.server.server_port}/{repo}/commit/{COMMIT}"
        return {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}

    def do_PUT(self):
        hub, sent = self.server.hub, self.rfile.read(int(self.headers["Content-Length"]))
        hub.large[hashlib.sha256(sent).hexdigest()] = sent
        self.send(200, b"", True)

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
        self.created, self.large, self.commits, self.faults = {}, {}, [], []
        self.together, self.open, self.most_open = 1, 0, 0
        self.change = threading.Condition()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def run(self, *arguments, **environment):
        return self.python("-m", "core", *map(str, arguments), **environment)

    def python(self, *arguments, **environment):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env = {k: v for k, v in env.items() if "proxy" not in k.lower()}
        env |= {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DEPTHCUT_WORKSPACE": str(self.home / "workspace"),
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def cached(self):
        return {p.name for p in self.home.glob("hub/models--*/snapshots/*/*")}
