"""The part that works at a place: ``python -m core.places.agent ACTION``, JSON in, JSON out.

It starts a run so that it outlives the connection, tells how far it is, and stops it. It is copied
there with the rest of the code, so both sides are of one version; it needs the standard library
only. SLURM's jobs are submitted and asked for here as well: this is the machine with sbatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.errors import DepthcutError, PlaceError
from core.places import array, slurm
from core.runs import elements, jobs, processes, workspace
from core.runs import status as statuses
from core.runs.workspace import BOOKKEEPING, FINAL_STATES, read_run

LOOK_S = 0.5
BREATH_S = 10.0
"""After this long without news a line is sent anyway, so that a broken connection shows."""
CHUNK = 256 * 1024
JOB = "job.json"
"""What is known of the run's latest job: noted before it is submitted, and after."""
CHECK_S = 240.0


def start(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Start a run as ``ask`` describes, or say that it is already going on.

    Keys: folder, command, words (after ``python -m core``), spec, python, env, modules, slurm
    (settings of the place, or None), shared, resumes, margin_s, attach (a job that was
    submitted for the same options is taken), fresh (nothing of an earlier job array is).
    """
    folder = Path(ask["folder"])
    book = folder / BOOKKEEPING
    now = read_run(folder)
    if now and now.is_live and not ask["shared"] and not now.status.get("continues"):
        return {"attached": True, "job": str(now.status.get("job") or "")}
    name = slurm.name_of(folder)
    attach = ask["attach"] and ask["slurm"] is not None
    if attach and (job := _submitted(book, name, _wish(ask))):
        return {"attached": True, "job": job}
    if ask["fresh"]:
        (book / elements.FILE).unlink(missing_ok=True)
    if not ask["shared"]:
        _announce(ask, folder)
    words = [ask["python"], "-m", "core", ask["command"], *ask["words"]]
    env = {str(k): str(v) for k, v in ask["env"].items()}
    if ask["slurm"] is None:
        _spawn(words, env, ask["modules"], folder)
        return {"attached": False, "job": ""}
    log = str(book / "log.txt")
    given = slurm.options(ask["slurm"], name, log, int(ask["margin_s"]))
    given += [f"--chdir={folder}"]
    text = slurm.script(
        words, env, ask["modules"], resumes=bool(ask["resumes"]), submitted=["sbatch", *given]
    )
    path = book / "job.sh"
    slurm.write_script(path, text)
    key = secrets.token_hex(8)
    noted = {"key": key, "wish": _wish(ask)}
    workspace.write_json(book / JOB, noted)
    job = slurm.submit(given, str(path), key)
    workspace.write_json(book / JOB, {**noted, "job": job})
    return {"attached": False, "job": job}


def _wish(ask: Mapping[str, Any]) -> str:
    """Return what tells the job that ``ask`` wants from others for the same folder."""
    same = [word for word in ask["words"] if word not in ("--resume", "--overwrite")]
    return hashlib.sha256(json.dumps([ask["command"], same]).encode()).hexdigest()[:16]


def _submitted(book: Path, name: str, wish: str) -> str:
    """Return the job that an earlier process has submitted for this run, if it is still going on.

    That process may have been killed before it could tell. Raises `PlaceError` if the job is for
    other options.
    """
    noted = workspace.read_json(book / JOB) or {}
    key, job = str(noted.get("key") or ""), str(noted.get("job") or "")
    job = job or (slurm.keyed(name, key) if key else "")
    if not job or not slurm.look(job).is_going:
        return ""
    if noted.get("wish") != wish:
        raise PlaceError(
            f"Job {job} of an earlier attempt with other options is still going on.",
            f"Wait for it, or end it: scancel {job}.",
        )
    return job


def _announce(ask: Mapping[str, Any], folder: Path) -> None:
    book = folder / BOOKKEEPING
    book.mkdir(parents=True, exist_ok=True)
    for name in ("cancel", "launch.json"):
        (book / name).unlink(missing_ok=True)
    before = statuses.cleaned(workspace.read_json(book / "status.json") or {})
    status = {"state": "starting", **statuses.born(book), "files": before.get("files") or []}
    workspace.write_json(book / "status.json", status)
    spec = {"command": ask["command"], "spec": ask["spec"], "argv": [], "cwd": str(folder)}
    workspace.write_json(book / "spec.json", spec)


def _spawn(words: list[str], env: Mapping[str, str], modules: list[str], folder: Path) -> None:
    """Start the process in its own session, so that it outlives the connection."""
    if modules:
        load = f'module load {shlex.join(modules)} || exit 1; exec "$@"'
        words = ["bash", "-lc", load, "bash", *words]
    book = folder / BOOKKEEPING
    with (book / "log.txt").open("ab") as log, Path(os.devnull).open("rb") as nothing:
        process = subprocess.Popen(
            words, stdin=nothing, stdout=log, stderr=log, env={**os.environ, **env}, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    started = processes.start_time(process.pid)
    workspace.write_json(book / "launch.json", {"pid": process.pid, "pid_started": started})


class Watch:
    """What a run writes, told in lines of JSON until it ends or the connection does."""

    def __init__(self, ask: Mapping[str, Any]) -> None:
        """Keys: folder, job, log_at, metrics_at (bytes already told), poll_s, shared."""
        self.folder, self.job = Path(ask["folder"]), str(ask["job"])
        self.book = self.folder / BOOKKEEPING
        self.at = {"log": int(ask["log_at"]), "metrics": int(ask["metrics_at"])}
        self.poll_s, self.shared = float(ask["poll_s"]), bool(ask["shared"])
        self.asked, self.found, self.trouble = -1e9, slurm.Job(self.job, "PENDING"), ""
        self.told: dict[str, Any] = {}
        self.spoke = -1e9

    def run(self, say: Callable[[dict[str, Any]], None]) -> None:
        """Tell what is new until the run has ended."""
        while True:
            line = self.look()
            ended = bool(line.get("ended"))
            text = {} if self.shared else self.text(rest=ended)
            state = {k: v for k, v in line.items() if k not in ("clock", "time")}
            if text or state != self.told or time.monotonic() - self.spoke > BREATH_S:
                say({**line, **text})
                self.told, self.spoke = state, time.monotonic()
            if ended and not any(text.values()):
                return
            time.sleep(0.05 if ended else LOOK_S)

    def look(self) -> dict[str, Any]:
        """Return the state, the status, the job and the clocks."""
        record = read_run(self.folder)
        if record is None:
            return {"ended": True, "state": "missing", "status": {}, "job": None}
        state = record.state
        job = self._job() if self.job else None
        handed_over = elements.pending(self.book) is not None
        if state not in FINAL_STATES and job is not None:
            continues = record.status.get("continues") is True or handed_over
            if job.is_waiting and not continues:
                state = "queued"
            elif job.is_alive:
                state = state if record.status.get("pid") else "starting"
                state = "running" if state == "lost" else state
            else:
                again = read_run(self.folder)  # it may have ended between the two looks
                state = again.state if again else "missing"
                record = again or record
                if state not in FINAL_STATES:
                    state = "continues" if continues else "lost"
        return {
            "ended": state in (*FINAL_STATES, "lost", "continues", "missing"),
            "state": state,
            "status": record.status,
            "host": record.status.get("host") or socket.gethostname(),
            "job": dataclasses.asdict(job) | {"waiting": job.waiting} if job else None,
            "trouble": self.trouble,
            "handed_over": handed_over,
            "clock": time.monotonic(),
            "time": time.time(),
            **({"how": job.ended} if job and not job.is_alive else {}),
        }

    def _job(self) -> slurm.Job:
        if time.monotonic() - self.asked > self.poll_s:
            self.asked = time.monotonic()
            try:
                self.found, self.trouble = slurm.look(self.job), ""
            except DepthcutError as error:  # the controller is away: the last answer stands
                self.trouble = str(error)
        return self.found

    def text(self, *, rest: bool) -> dict[str, Any]:
        """Return what the log and the metrics have grown by, up to the last whole line."""
        found: dict[str, Any] = {}
        for name, file in (("log", "log.txt"), ("metrics", "metrics.jsonl")):
            piece = self._piece(self.book / file, name, rest=rest)
            if piece:
                found[name] = piece.decode("utf-8", errors="replace")
                found[f"{name}_at"] = self.at[name]
        return found

    def _piece(self, path: Path, name: str, *, rest: bool) -> bytes:
        try:
            with path.open("rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                if size < self.at[name]:  # it was begun again
                    self.at[name] = 0
                handle.seek(self.at[name])
                data = handle.read(CHUNK)
        except OSError:
            return b""
        if not rest and len(data) < CHUNK:
            data = data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1]
        self.at[name] += len(data)
        return data


def cancel(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a run to stop; a job that has not started is taken out of the queue."""
    folder, job = Path(ask["folder"]), str(ask["job"])
    handed_over = elements.pending(folder / BOOKKEEPING)
    if job and not handed_over and slurm.look(job).is_waiting:
        slurm.cancel(job)
        return {"state": "cancelled"}
    with contextlib.suppress(OSError):
        (folder / BOOKKEEPING / "cancel").touch()
    return {"state": "asked"}


def kill(ask: Mapping[str, Any]) -> dict[str, Any]:
    """End a run at once."""
    if ask["job"]:
        slurm.cancel(str(ask["job"]), kill=True)
        if elements.pending(Path(ask["folder"]) / BOOKKEEPING):
            array.Array(ask).kill()
        return {"killed": True}
    record = read_run(Path(ask["folder"]))
    return {"killed": bool(record and record.is_live and jobs.LocalLauncher().kill(record))}


def make(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Create folders and return which of the runs at ``ask['runs']`` have ended well there."""
    for name in ask["folders"]:
        Path(name).mkdir(parents=True, exist_ok=True)
    ended = []
    for name in ask["runs"]:
        record = read_run(Path(name))
        if record and record.state == "done":
            ended.append(name)
    return {"done": ended}


def check(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Return what runs find there: versions, devices and disk space; a small product is computed.

    With SLURM settings, also what sbatch would do with them.
    """
    folder = Path(ask["root"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".check-{os.getpid()}").open("wb") as handle:
        handle.write(b"written")
    (folder / f".check-{os.getpid()}").unlink()
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "free_bytes": shutil.disk_usage(folder).free,
        "cpus": os.cpu_count() or 0,
    }
    found |= _libraries(ask)
    if ask["slurm"] is not None:
        version = slurm.ask(["sbatch", "--version"]).strip()
        given = slurm.options(ask["slurm"], "depthcut-test", os.devnull, 0)
        found |= {"slurm": version, "sbatch": slurm.try_options(given)}
    return found


def _libraries(ask: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a process like those of runs reports of its libraries and devices."""
    words = [ask["python"], "-c", PROBE]
    if ask["modules"]:
        load = f'module load {shlex.join(ask["modules"])} || exit 1; exec "$@"'
        words = ["bash", "-lc", load, "bash", *words]
    env = {**os.environ, **{str(k): str(v) for k, v in ask["env"].items()}}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=CHECK_S, check=False, env=env,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise PlaceError(
            f"Python there cannot compute: {lines[-1] if lines else 'it ended without a word'}.",
            "Install torch, transformers, peft and safetensors for it.",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


PROBE = """
import importlib.metadata as m, json, torch
names = ("torch", "transformers", "peft", "safetensors")
found = {"versions": {n: m.version(n) for n in names}}
device = "cuda" if torch.cuda.is_available() else "cpu"
a = torch.arange(6.0, device=device).reshape(2, 3)
assert (a @ a.T).tolist() == [[5.0, 14.0], [14.0, 50.0]], "a product of matrices is wrong"
found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps(found))
"""
ACTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "start": start, "cancel": cancel, "kill": kill, "make": make, "check": check,
}  # fmt: skip


def _say(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, default=str), flush=True)


def main() -> int:
    """Carry out one action; an expected error is an answer, not an exit status."""
    action = sys.argv[1]
    ask = json.loads(sys.stdin.read())
    os.environ.update(ask.pop("environment", {}))
    try:
        if action == "watch":
            Watch(ask).run(_say)
            return 0
        if action == "array":
            array.run(ask, _say)
            return 0
        _say(ACTIONS[action](ask))
    except BrokenPipeError:  # the connection ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except DepthcutError as error:
        kind = type(error).__name__
        _say({"error": error.message, "hint": error.hint, "kind": kind})
    except OSError as error:
        told = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        _say({"error": f"{told}.", "hint": "Check the folder there.", "kind": "PlaceError"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
