"""A real sshd on loopback, for tests and `bench.havoc` of runs at another machine."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from core.places import place as place_file
from core.places.place import Place

MACHINERY = Path(__file__).parent / "machinery"
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
LogLevel ERROR
"""


class Sshd:
    """An SSH server that lets the user of the tests in, with a key of its own."""

    def __init__(self, folder: Path, program: str) -> None:
        self.folder, self.program = folder, program
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        for name in ("host_key", "user_key"):
            self.make_key(name)
        (folder / "config").write_text(CONFIG.format(port=self.port, folder=folder))
        self.known = folder / "known_hosts"
        self.know()
        self.process: subprocess.Popen[bytes] | None = None

    def make_key(self, name: str) -> None:
        path = self.folder / name
        for old in (path, Path(f"{path}.pub")):
            old.unlink(missing_ok=True)
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(words, check=True)

    def know(self) -> None:
        key = (self.folder / "host_key.pub").read_text()
        self.known.write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self) -> None:
        words = [self.program, "-D", "-e", "-f", str(self.folder / "config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise RuntimeError(
            "sshd does not start here: " + (self.folder / "sshd.log").read_text()[-300:]
        )

    def stop(self) -> None:
        """Stop listening; connections that are open go on."""
        if self.process:
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def drop(self) -> None:
        """Break the connections that are open."""
        assert self.process
        for pid in self.children():
            os.kill(pid, signal.SIGKILL)

    def children(self) -> list[int]:
        assert self.process
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text().split()]

    def place(self, name: str, folder: Path, **more: object) -> Place:
        values = {
            "kind": "ssh",
            "host": "127.0.0.1",
            "user": getpass.getuser(),
            "port": self.port,
            "identity": str(self.folder / "user_key"),
            "known_hosts": str(self.known),
            "folder": str(folder),
            "python": sys.executable,
            "environment": {
                "PYTHONPATH": str(MACHINERY),
                "DEPTHCUT_LOCK_DIR": os.environ["DEPTHCUT_LOCK_DIR"],
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        }
        return place_file.checked(Place(name=name, **{**values, **more}))


def find() -> tuple[str, list[str]]:
    """Return the path of sshd, and the names of programs that are missing."""
    found = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or ""
    missing = [name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name)]
    if found and os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    return found, (["sshd"] if not found else []) + missing
