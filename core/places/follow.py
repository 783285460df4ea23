"""``python -m core.places.follow FOLDER``: carry one run of this workspace out at another place.

This process copies what the run reads, starts it there, keeps the run's record here up to date,
passes on requests to stop, and copies the results back. It is the run's process as far as this
machine knows. A broken connection is waited out; if this process itself is killed, a restart of the
run finds what is going on there and follows it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from core import commands, outside
from core.errors import Cancelled, DepthcutError, PlaceError, RunError, Unreachable
from core.places import inputs, shell, slurm
from core.places import place as place_file
from core.places.place import Place
from core.places.shell import Ssh
from core.runs import elements, processes, workspace
from core.runs import status as statuses
from core.runs.failures import as_known
from core.runs.run import clear, refuse_link
from core.runs.spec import build, hints_of, to_arguments
from core.runs.workspace import BOOKKEEPING, FINAL_STATES

T = TypeVar("T")
KILL = "kill"
"""File in the bookkeeping that asks to end the run at once."""
FACTS = "place.json"
TICK_S = 0.2
SILENT_S = 40.0
"""A connection without a line for this long is broken."""
PAUSES_S = (1.0, 2.0, 5.0, 15.0, 30.0, 60.0)
TRIES = 4
"""Attempts at copying and starting before a run that has not begun fails."""
GIVE_UP_S = 10.0
"""How long the place is asked to end a run at once, before the run ends here alone."""
LIVE_EVERY_S = 15.0
LIVE_BYTES = "1m"
MOST_REWRITTEN = 1 << 20
LEAST_PYTHON = (3, 11)
_PROBE = (
    "import json,os,shutil,sys;d=os.path.expanduser(sys.argv[1]);"
    "print(json.dumps({'root':d,'version':list(sys.version_info[:3]),'python':sys.executable,"
    "'rsync':bool(shutil.which('rsync')),"
    "'code':os.path.exists(os.path.join(d,'code',sys.argv[2],'.whole'))}))"
)
_STATUS = ("state", "device", "waiting_for", "files")
_ERRORS = {"Unreachable": Unreachable, "PlaceError": PlaceError}


class Killed(Exception):
    """The run is to end at once."""


def code_key() -> str:
    """Return what changes whenever a file of our code does."""
    found = hashlib.sha256()
    for path in sorted((processes.PROJECT / "core").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found.update(path.relative_to(processes.PROJECT).as_posix().encode())
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Site:
    """A place that was reached: its folders, its Python, and the agent there."""

    def __init__(self, place: Place) -> None:
        """Look at ``place``; raises `PlaceError` or `Unreachable`."""
        self.place, self.shell = place, shell.of(place)
        self.python = place.python or ("python3" if place.is_remote else sys.executable)
        if not place.is_remote:
            self.python = os.path.expanduser(self.python)
        self.root, self.code = "", str(processes.PROJECT)
        if place.is_remote:
            self._look()

    def _look(self) -> None:
        key = code_key()
        words = self.loaded([self.python, "-c", _PROBE, self.place.root, key])
        try:
            found = json.loads(self.shell.ask(words).decode().strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise PlaceError(
                f"{self.place.name}: {self.python} did not answer as Python does.",
                "Its shell may print something at login, or python names another program.",
            ) from None
        except PlaceError as error:
            raise self._without_python(error) from None
        if tuple(found["version"]) < LEAST_PYTHON:
            version = ".".join(map(str, found["version"]))
            raise PlaceError(
                f"{self.place.name} has Python {version} as {self.python}; 3.11 is needed.",
                "Name another one as the place's python.",
            )
        if not found["rsync"]:
            raise PlaceError(f"rsync is not installed at {self.place.name}.", "Install it there.")
        self.root, self.code = found["root"], f"{found['root']}/code/{key}"
        if self.python.startswith("~/"):
            self.python = found["python"]
        if not found["code"]:
            self._send_code()

    def _without_python(self, error: PlaceError) -> PlaceError:
        signs = ("not found", "No such file", "Permission denied", "not executable")
        if self.place.host in error.message or not any(sign in error.message for sign in signs):
            return error
        return PlaceError(
            f"There is no Python at {self.place.name} as {self.python}.",
            "Name it as the place's python: the path of an environment with torch.",
        )

    def _send_code(self) -> None:
        assert isinstance(self.shell, Ssh)
        target = f"{self.code}/core"
        made = "import os,sys;os.makedirs(sys.argv[1],exist_ok=True)"
        self.shell.ask(self.loaded([self.python, "-c", made, target]))
        self.shell.push(processes.PROJECT / "core", target)
        mark = "open(__import__('sys').argv[1],'w')"
        self.shell.ask(self.loaded([self.python, "-c", mark, f"{self.code}/.whole"]))

    def agent(self, action: str) -> list[str]:
        """Return the words that run the agent there."""
        words = [f"PYTHONPATH={self.code}", self.python, "-m", "core.places.agent", action]
        return self.loaded(["env", *words])

    def loaded(self, words: list[str]) -> list[str]:
        """Return words that run with the place's modules: its Python may be one of them."""
        if not self.place.modules:
            return words
        first, *rest = words
        line = f"module load {shlex.join(self.place.modules)} || exit 1; exec "
        line += first if first.startswith("~/") else shlex.quote(first)
        return ["bash", "-lc", f'{line} "$@"', "bash", *rest]

    def given(self, values: Mapping[str, Any]) -> bytes:
        """Return the input of the agent: values and the environment, kept off command lines."""
        own = {k: v for k, v in self.place.environment.items() if k != "PYTHONPATH"}
        return json.dumps({**values, "environment": own}).encode()

    def ask(self, action: str, seconds: float = shell.ANSWER_S, **given: Any) -> dict[str, Any]:
        """Have the agent do something and return its answer; its errors are raised here."""
        told = self.shell.ask(self.agent(action), self.given(given), seconds)
        try:
            found = json.loads(told.decode().strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise PlaceError(f"{self.place.name} gave no answer to {action}.") from None
        if "error" in found:
            kind = _ERRORS.get(found["kind"], PlaceError)
            raise kind(f"{self.place.name}: {found['error']}", found["hint"])
        return found

    def surroundings(self, folder: str, root: str) -> dict[str, str]:
        """Return the environment of a run in ``folder``, whose workspace is ``root``."""
        own = dict(self.place.environment)
        path = os.pathsep.join(filter(None, (self.code, own.pop("PYTHONPATH", ""))))
        env = {
            **own,
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
            "DEPTHCUT_DETACHED": folder,
            "DEPTHCUT_WORKSPACE": root,
        }
        if self.place.is_slurm:
            env["DEPTHCUT_NO_DEVICE_LOCK"] = "1"
            env["DEPTHCUT_CONTINUES"] = str(self.place.requeue)
            if self.place.at_once != 1:
                env[elements.WANTED] = "1"
        return env


class Follower:
    """One run, carried out at a place."""

    def __init__(self, folder: Path) -> None:
        """Follow the run in ``folder``, as its spec.json and the places' file describe it."""
        self.dir, self.book = folder, folder / BOOKKEEPING
        saved = workspace.read_json(self.book / "spec.json") or {}
        self.command = commands.get(str(saved.get("command")))
        self.spec: dict[str, Any] = dict(saved.get("spec") or {})
        self.cwd = Path(str(saved.get("cwd") or "."))
        self.ask: dict[str, Any] = dict(saved.get("on") or {})
        self.home = workspace.default_root().absolute()
        self.facts: dict[str, Any] = workspace.read_json(self.book / FACTS) or {}
        self.again = self.was_lost = self.facts.pop("again", False) is True
        self.status = statuses.cleaned(workspace.read_json(self.book / "status.json") or {})
        self.inode = statuses.inode_of(self.book)
        self.asked_to_stop = 0.0
        self.passed_on = False
        self.site: Site | None = None
        self.place = Place(name=str(self.ask.get("place", "")))
        self.sent = inputs.Staged({}, ())
        self.pulled = 0.0

    # ---------------------------------------------------------------------------- the whole

    def run(self) -> None:
        """Carry the run out; whatever happens is recorded as the run's end."""
        try:
            refuse_link(self.dir)
            found = place_file.find(self.place.name, self.home)
            self.place = found.for_run(self.ask, self.spec)
            self.note(place=self.place.text, kind=self.place.kind, host=self.place.host)
            self.write(**processes.identity(), continues=False)
            self.carry_out()
        except Killed:
            self.end_at_once()
        except Cancelled as error:
            self.end("cancelled", error.message)
        except DepthcutError as error:
            self.log(f"Error: {error}")
            self.end("failed", error.message, error.hint)
        except BaseException as error:
            known = as_known(error, folder=self.dir)
            self.log(f"Error: {known}")
            self.end("failed", known.message, known.hint)
            if not isinstance(error, Exception):
                raise

    def carry_out(self) -> None:
        """Reach the place, start the run or find it, follow it, and fetch its results."""
        self.say("connecting")
        self.site = self.persist(lambda: Site(self.place), forever=self.again)
        self.sent = self.staged()
        if not (self.again and self.facts.get("started")):
            self.begin()
        while True:
            last = self.follow()
            if last["state"] == "continues" and last.get("handed_over"):
                last = self.follow("array")
                if last["state"] == "refused":
                    raise PlaceError(f"{self.place.name}: {last['error']}", last["hint"])
                if last["state"] == "continues":
                    self.log("The job array has ended; the recipe continues.")
                    self.begin(resume=True, continued=int(self.facts.get("continued", 0)))
                    continue
            elif last["state"] == "continues":
                self.log("The job stopped before its time limit; the next one continues.")
                self.used = int(self.facts.get("continued", 0)) + 1
                self.begin(resume=True, continued=self.used)
                continue
            if last["state"] in ("lost", "missing") and self.again:
                self.log(f"The run is not going on at {self.place.name} any more; it starts again.")
                self.again = False
                self.begin()
                continue
            break
        self.fetch(last)

    @property
    def shared(self) -> bool:
        """Whether the run works in this very folder, on a file system that both see."""
        return not self.place.is_remote

    @property
    def there(self) -> str:
        """The run's folder at the place."""
        if self.shared:
            return str(self.dir.absolute())
        assert self.site is not None
        path = self.dir.absolute()
        inner = path.relative_to(self.home) if path.is_relative_to(self.home) else None
        key = hashlib.sha256(str(path).encode()).hexdigest()[:10]
        return f"{self.site.root}/{inner.as_posix() if inner else f'{key}-{path.name}'}"

    def staged(self) -> inputs.Staged:
        """Return the options as they are at the place."""
        if self.shared:
            return inputs.Staged(self.spec | {"out": self.there}, ())
        assert self.site is not None
        return inputs.stage(
            self.command.name, self.spec, self.there, self.site.root, self.home, self.cwd
        )

    def begin(self, *, resume: bool = False, continued: int = 0) -> None:
        """Copy what the run reads, and start it."""
        self.check()
        site = self.site
        assert site is not None
        if not self.shared:
            self.send()
        spec_class = self.command.spec_class
        resumes = "resume" in hints_of(spec_class)
        values = self.sent.spec | ({"resume": True} if resume and resumes else {})
        spec = build(spec_class, values)
        words = to_arguments(spec)
        if "overwrite" not in hints_of(spec_class):  # whether it may be replaced was decided here
            words = ["--overwrite", *words]
        env = self.environment() | {
            "DEPTHCUT_CONTINUES": str(max(0, self.place.requeue - continued))
        }
        if not getattr(spec, "resume", False):
            self.forget()
        if self.place.is_slurm:
            self.write(state="queued", device="", waiting_for="", continues=False)
        asked: dict[str, Any] = {
            "folder": self.there,
            "command": self.command.name, "words": words,
            "spec": self.sent.spec, "python": site.python, "env": env,
            "modules": list(self.place.modules), "shared": self.shared, "resumes": resumes,
            "slurm": self.place.to_dict() if self.place.is_slurm else None,
            "margin_s": self.margin_s, "fresh": not resume,
        }  # fmt: skip
        self.check()
        tried = [self.was_lost]

        def start() -> dict[str, Any]:
            """Start it, or find what an attempt that was cut off has started."""
            attach, tried[0] = tried[0], True
            return site.ask("start", **asked, attach=attach)

        found = self.persist(start)
        self.note(started=True, job=found["job"], folder=self.there, continued=continued,
                  log_at=0 if not found["attached"] else self.facts.get("log_at", 0))  # fmt: skip
        what = f"Job {found['job']} was submitted" if found["job"] else "The run was started"
        self.log(f"{what} at {self.place.name}.")

    def environment(self) -> dict[str, str]:
        """Return the variables that the run's jobs there get."""
        assert self.site is not None
        env = self.site.surroundings(self.there, self.site.root or str(self.home))
        return {**env, "DEPTHCUT_ON": json.dumps(self.ask)}

    @property
    def margin_s(self) -> int:
        """The seconds before its job's time limit at which the run stops."""
        margin = max(self.place.signal_s, int(self.command.grace_s) + 15)
        limit = slurm.seconds(self.place.time)
        return min(margin, limit // 4) if limit else margin

    def array(self) -> dict[str, Any]:
        """Return what the agent needs to carry a recipe's independent steps out as a job array."""
        assert self.site is not None
        return {
            "python": self.site.python, "env": self.environment(), "owner": {},
            "modules": list(self.place.modules), "slurm": self.place.to_dict(),
            "margin_s": self.margin_s, "most": self.place.at_once, "requeue": self.place.requeue,
            **({"owner": processes.identity()} if self.shared else {}),
        }  # fmt: skip

    def forget(self) -> None:
        """Remove the results of an earlier attempt here, and what was heard of it."""
        if self.shared:
            return
        clear(self.dir, self.status)
        (self.book / "metrics.jsonl").unlink(missing_ok=True)
        self.write(files=[])

    # ------------------------------------------------------------------------------ copying

    def send(self) -> None:
        """Copy what the run reads; runs that ended well there are there."""
        site, needed = self.site, self.sent.inputs
        assert site is not None
        assert isinstance(site.shell, Ssh)
        far = site.shell
        folders = [self.there]
        folders += [i.there if i.here.is_dir() else os.path.dirname(i.there) for i in needed]
        made = self.persist(
            lambda: site.ask("make", folders=folders, runs=[i.run for i in needed if i.run])
        )
        for number, one in enumerate(needed):
            if one.run and one.run in made["done"]:
                continue
            self.say(f"copying {one.here.name} to {self.place.name}", number, len(needed))
            self.persist(functools.partial(far.push, one.here, one.there))

    def fetch(self, last: Mapping[str, Any]) -> None:
        """Copy the results here and record how the run ended."""
        status = last["status"]
        if not self.shared and last["state"] != "missing":
            self.say(f"copying results from {self.place.name}")
            self.persist(lambda: self.pull(whole=True), forever=True)
            self.translate()
        state = last["state"]
        if state in FINAL_STATES:
            if not self.shared or status.get("state") != state:
                error, hint = (self.local(str(status.get(k) or "")) for k in ("error", "hint"))
                self.end(state, error, hint, files=status.get("files") or [])
            return
        stopped = self.asked_to_stop or self.wants_stop()
        if stopped:
            self.end("cancelled", "Cancelled.")
            return
        how = last.get("how") or (
            f"The process at {self.place.name} exited without recording a result."
        )
        raise RunError(
            how, "It may have been killed or run out of memory: check its log, then restart it."
        )

    def pull(self, *, whole: bool) -> None:
        """Copy results here: all of them, or while the run goes on the small ones."""
        assert self.site is not None
        assert isinstance(self.site.shell, Ssh)
        own = [f"--exclude=/{BOOKKEEPING}/", "--exclude=.*.tmp", "--exclude=.run/lock"]
        few = [f"--max-size={LIVE_BYTES}", "--exclude=*/"]
        self.site.shell.pull(self.there, self.dir, more=own if whole else [*own, *few])
        self.pulled = time.monotonic()

    def paths(self) -> dict[str, str]:
        """Return path there -> path here of what the run reads and writes, longest first."""
        paths = {self.there: str(self.dir.absolute()), **self.sent.paths()}
        return dict(sorted(paths.items(), key=lambda item: -len(item[0])))

    def local(self, text: str) -> str:
        """Return a sentence from there with paths as they are here."""
        for there, here in self.paths().items():
            text = text.replace(there, here)
        return text

    def translate(self) -> None:
        """Let small results name files by their paths here instead of those there."""
        paths = self.paths()
        for path in self.dir.rglob("*"):
            named = path.suffix in (".json", ".md", ".csv", ".yaml", ".html")
            named = named and not path.is_relative_to(self.book)
            if not named or path.is_symlink() or not path.is_file():
                continue
            if path.stat().st_size > MOST_REWRITTEN:
                continue
            data = new = path.read_bytes()
            for there, here in paths.items():
                new = new.replace(json.dumps(there)[1:-1].encode(), json.dumps(here)[1:-1].encode())
            if new != data:
                times = path.stat()
                workspace.write_bytes(path, new, durable=False)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    # ---------------------------------------------------------------------------- following

    def follow(self, action: str = "watch") -> dict[str, Any]:
        """Keep the record up to date until the run has ended; return the last thing heard.

        With the action ``array``, until the job array of its independent steps has ended.
        """
        tries = 0
        while True:
            try:
                return self.listen(action)
            except (Unreachable, PlaceError) as error:
                pause = PAUSES_S[min(tries, len(PAUSES_S) - 1)]
                tries = tries + 1 if time.monotonic() - self.heard > 30 else 1
                self.trouble(error, pause)

    def listen(self, action: str) -> dict[str, Any]:
        """Follow the run over one connection; raises `Unreachable` if that breaks."""
        site = self.site
        assert site is not None
        self.heard = time.monotonic()
        metrics = self.book / "metrics.jsonl"
        asked = {
            "folder": self.there,
            "job": self.facts.get("job", ""),
            "log_at": self.facts.get("log_at", 0),
            "metrics_at": metrics.stat().st_size if metrics.exists() else 0,
            "poll_s": float(os.environ.get("DEPTHCUT_SLURM_POLL") or 5.0),
            "shared": self.shared,
            **(self.array() if action == "array" else {}),
        }
        with _Lines(site.shell.argv(site.agent(action)), site.given(asked)) as lines:
            while True:
                self.check(stop=False)
                line = lines.next(TICK_S)
                if line is None:
                    self.pass_on()
                    if time.monotonic() - self.heard > SILENT_S or lines.ended:
                        raise self.lost(lines)
                    continue
                self.heard = time.monotonic()
                self.take(line)
                if line.get("ended"):
                    if self.facts.get("trouble"):
                        self.note(trouble="")
                    return line
                self.pass_on()
                self.live_results()

    def lost(self, lines: _Lines) -> DepthcutError:
        """Return why a connection ended before the run did."""
        assert self.site is not None
        if lines.ended and lines.status not in (None, 0, 255):
            return self.site.shell.problem(lines.status or 1, lines.errors)
        if lines.errors.strip():
            return self.site.shell.problem(255, lines.errors)
        return Unreachable(f"The connection to {self.place.name} broke.")

    def take(self, line: Mapping[str, Any]) -> None:
        """Record one thing heard."""
        for name, file in (("log", "log.txt"), ("metrics", "metrics.jsonl")):
            if line.get(name):
                with (self.book / file).open("a", encoding="utf-8") as handle:
                    handle.write(line[name])
                    handle.flush()
        facts = {
            "job": (line.get("job") or {}).get("id") or self.facts.get("job", ""),
            "node": line.get("host", "") if line["status"].get("pid") else "",
            "nodes": (line.get("job") or {}).get("nodes", ""),
            "waiting": line.get("waiting")
            or ((line.get("job") or {}).get("waiting", "") if line["state"] == "queued" else ""),
            "trouble": line.get("trouble") or "",
            "log_at": line.get("log_at", self.facts.get("log_at", 0)),
        }
        self.note(**facts)
        if not line.get("ended") and (not self.shared or "array" in line):
            self.write(**self.mirrored(line))

    def mirrored(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the status there as this machine's clocks have them."""
        status = statuses.cleaned(line["status"])
        found: dict[str, Any] = {k: status[k] for k in _STATUS if k in status}
        found["state"] = line["state"]
        step = dict(status.get("progress") or {})
        clock, wall = time.monotonic() - line["clock"], time.time() - line["time"]
        for key, shift in (("since_clock", clock), ("at_clock", clock), ("since", wall),
                           ("at", wall)):  # fmt: skip
            if isinstance(step.get(key), int | float):
                step[key] += shift
        found["progress"] = step
        return found

    def live_results(self) -> None:
        """Copy small results now and then, so that pages can draw them while the run goes on."""
        if self.shared or time.monotonic() - self.pulled < LIVE_EVERY_S:
            return
        self.pulled = time.monotonic()
        with contextlib.suppress(DepthcutError):
            self.pull(whole=False)

    # ---------------------------------------------------------------------------- stopping

    def wants_stop(self) -> bool:
        """Whether someone asked the run to stop."""
        return (self.book / "cancel").exists()

    def check(self, *, stop: bool = True) -> None:
        """Raise if the run is to end at once, or (before it has started) to stop."""
        if (self.book / KILL).exists() or self.inode != statuses.inode_of(self.book):
            raise Killed
        if stop and self.wants_stop():
            raise Cancelled("Cancelled.")

    def pass_on(self) -> None:
        """Pass a request to stop on, once."""
        if self.passed_on or not self.wants_stop():
            return
        assert self.site is not None
        self.asked_to_stop = time.monotonic()
        if self.shared and not self.place.is_slurm:
            return
        self.site.ask("cancel", 30.0, folder=self.there, job=self.facts.get("job", ""))
        self.passed_on = True
        self.log(f"{self.place.name} was asked to stop the run.")

    def end_at_once(self) -> None:
        """End the run there at once, if the place can be reached, and here in any case."""
        deadline, problem = time.monotonic() + GIVE_UP_S, ""
        while self.facts.get("started"):
            try:
                site = self.site or Site(self.place)
                site.ask("kill", 8.0, folder=self.there, job=self.facts.get("job", ""))
                problem = ""
                break
            except DepthcutError as error:
                problem = str(error)
                if time.monotonic() > deadline:
                    break
                time.sleep(1.0)
        if problem:
            self.log(problem)
            self.end(
                "cancelled",
                f"Ended here alone: {self.place.name} could not be reached, so the run may still "
                "be going on there.",
            )
        else:
            self.end("cancelled", "Killed.")

    # --------------------------------------------------------------------------- recording

    def persist(self, do: Callable[[], T], *, forever: bool = False) -> T:
        """Return ``do()``, tried again while the place cannot be reached."""
        tries = 0
        while True:
            self.check(stop=not forever)
            try:
                return do()
            except Unreachable as error:
                tries += 1
                if not forever and (tries >= TRIES or not self.site):
                    raise
                self.trouble(error, PAUSES_S[min(tries - 1, len(PAUSES_S) - 1)])

    def trouble(self, error: DepthcutError, pause_s: float) -> None:
        """Log what is wrong with the connection, and wait before the next attempt."""
        if str(error) != self.facts.get("trouble"):
            self.log(str(error))
            self.note(trouble=str(error))
        until = time.monotonic() + pause_s
        while time.monotonic() < until:
            self.check(stop=False)
            self.beat()
            time.sleep(TICK_S)

    def say(self, message: str, done: int = 0, total: int = 0) -> None:
        """Show what is being done before the run itself reports."""
        self.log(message[:1].upper() + message[1:] + ".")
        self.write(progress={"message": message, "done": done, "total": total})

    def log(self, text: str) -> None:
        """Write a line to the run's log, which is this process's output."""
        with contextlib.suppress(OSError):
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def note(self, **facts: Any) -> None:
        """Record where the run is."""
        new = {**self.facts, **facts}
        if new != self.facts:
            self.facts = new
            if self.inode == statuses.inode_of(self.book):
                workspace.write_json(self.book / FACTS, new, durable=False, parents=False)

    def write(self, **changes: Any) -> None:
        """Update the run's status; in a shared folder only until the run writes its own."""
        self.beat()
        if self.shared:
            changes = {k: v for k, v in changes.items() if k not in ("pid", "pid_started")}
            now = statuses.cleaned(workspace.read_json(self.book / "status.json") or {})
            if now.get("pid"):
                return
            self.status = now
        new = {**self.status, **changes}
        if new != self.status and self.inode == statuses.inode_of(self.book):
            self.status = new
            workspace.write_json(self.book / "status.json", new, durable=False, parents=False)

    def beat(self) -> None:
        """Show other machines that this process lives; in a shared folder the run itself does."""
        if not self.shared:
            with contextlib.suppress(OSError):
                (self.book / "heartbeat").touch()

    def end(self, state: str, error: str = "", hint: str = "", **more: Any) -> None:
        """Record how the run ended."""
        if self.inode != statuses.inode_of(self.book):
            return
        if self.shared:
            now = workspace.read_json(self.book / "status.json") or {}
            self.status = statuses.cleaned(now)
            if self.status.get("state") in FINAL_STATES:
                return
        self.note(waiting="", trouble="")
        for name in ("cancel", KILL):
            (self.book / name).unlink(missing_ok=True)
        ended = statuses.ending(self.status, state, error, hint)
        workspace.write_json(
            self.book / "status.json", {**self.status, **more, **ended}, parents=False
        )

    heard = 0.0
    used = 0


class _Lines:
    """The lines of JSON that a process writes, read beside whatever else is done."""

    def __init__(self, words: list[str], given: bytes) -> None:
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._given, self._queue = given, queue.Queue[dict[str, Any] | None]()
        self.errors, self.ended = "", False

    def __enter__(self) -> _Lines:
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.write(self._given)
            self._process.stdin.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def status(self) -> int | None:
        """The exit status of the process, once it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1.0)
        return None

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(outside.Malformed):
                value = outside.loads(line, finite=False)
                if isinstance(value, dict) and "state" in value:
                    self._queue.put(value)
        self._queue.put(None)

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.errors = (self.errors + line.decode(errors="replace"))[-4000:]

    def next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line, or None if there is none within ``seconds``."""
        try:
            line = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            self.ended = True
        return line


def main() -> int:
    """Follow the run in the folder that is given; only one process does."""
    folder = Path(sys.argv[1])
    with (folder / BOOKKEEPING / "follow.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("This run is followed already.", file=sys.stderr)
            return 1
        except OSError:
            pass
        Follower(folder).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
