"""A recipe's independent steps as one job array, on the machine that submits jobs.

The recipe wrote which steps they are to ``.run/array.json`` (`core.runs.elements`). What is done
about them is noted there before and after it is done, so this process may be killed at any moment:
the next one finds the array that was submitted instead of submitting another. Each element is an
ordinary run in the step's folder. One that fails or is cancelled does not end the others; one that
stops before its time limit continues in the next array. Standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.errors import DepthcutError, PlaceError, Unreachable
from core.places import slurm
from core.runs import elements, workspace
from core.runs import status as statuses
from core.runs.elements import Element
from core.runs.workspace import BOOKKEEPING, FINAL_STATES, RunRecord, read_run

LOOK_S = 0.5
BREATH_S = 10.0
IN_FLIGHT_S = 3.0
"""How long after a submission that was cut off its job may still appear."""
LATE_S = 3.0
"""How much later than SLURM a file system may tell that an element has ended."""
KILL = "kill"
Say = Callable[[dict[str, Any]], None]


class Array:
    """The job array of one recipe."""

    def __init__(self, ask: Mapping[str, Any]) -> None:
        """Keys: folder, python, env, modules, slurm, margin_s, most, requeue, poll_s, owner."""
        self.ask = ask
        self.folder = Path(ask["folder"])
        self.book = self.folder / BOOKKEEPING
        found = elements.read(self.book)
        if found is None:
            raise PlaceError(f"{self.book / elements.FILE} cannot be read.", "Restart the recipe.")
        self.plan = found
        self.jobs: dict[int, slurm.Job] = {}
        self.asked, self.trouble, self.stopped = -1e9, "", False
        self.doubted: dict[int, float] = {}
        """When SLURM first called an element ended whose record did not say so yet."""

    @property
    def name(self) -> str:
        """The array's name in SLURM."""
        return slurm.name_of(self.folder)

    @property
    def wants_stop(self) -> bool:
        """Whether someone asked the recipe to stop."""
        return (self.book / "cancel").exists()

    # ------------------------------------------------------------------------- the whole

    def run(self, say: Say) -> None:
        """Submit the array, or find it, and tell how far it is until all elements have ended."""
        told: dict[str, Any] = {}
        spoke = -1e9

        def now(line: dict[str, Any]) -> None:
            say({**line, "clock": time.monotonic(), "time": time.time()})

        with self._alone(now):
            while True:
                line = self.step()
                if line != told or time.monotonic() - spoke > BREATH_S:
                    now(line)
                    told, spoke = line, time.monotonic()
                if line["ended"]:
                    return
                time.sleep(LOOK_S)

    @contextlib.contextmanager
    def _alone(self, say: Say) -> Iterator[None]:
        """Wait until no other process looks after this array: its connection may have broken."""
        with (self.book / "array.lock").open("a") as handle:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    say({"ended": False, **self._line("queued", "")})
                    time.sleep(LOOK_S)
                except OSError:  # a file system without locks
                    break
            self.plan = elements.read(self.book) or self.plan
            yield

    def step(self) -> dict[str, Any]:
        """Do what is to be done now and return how far the array is."""
        try:
            if self.plan.ended:
                return self._over()
            if not self.plan.job and not self._adopt():
                if self.wants_stop:
                    return self._end()
                self._submit()
            self._look()
        except Unreachable as error:  # the controller is away: tried again at the next look
            self.trouble = str(error)
            return self._told()
        self.trouble = ""
        if self.wants_stop and not self.stopped:
            self._stop()
        left = [i for i in self.plan.indices if not self._has_ended(i)]
        if left:
            return self._told()
        again = [i for i in self.plan.indices if self._continues(i)]
        if again and not self.wants_stop:
            self.plan = self.plan.noted(self.book, indices=tuple(again), key="", job="")
            self.jobs, self.doubted = {}, {}
            return self._told()
        return self._end()

    # ------------------------------------------------------------------------- submitting

    def _adopt(self) -> bool:
        """Find the array that an earlier process submitted without noting its number."""
        if not self.plan.key:
            return False
        deadline = time.monotonic() + IN_FLIGHT_S
        while True:
            if number := slurm.keyed(self.name, self.plan.key):
                self._note(number)
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)

    def _submit(self) -> None:
        """Announce the elements as runs, and submit them as one array."""
        chosen = self.plan.indices or tuple(range(len(self.plan.elements)))
        ask, most = self.ask, int(self.ask["most"])
        limit = f"%{most}" if most else ""
        given = slurm.options(
            ask["slurm"], self.name, str(self.book / "log.txt"), int(ask["margin_s"])
        )
        numbers = ",".join(map(str, chosen))
        given += [f"--chdir={self.folder}", f"--array={numbers}{limit}"]
        more = max(0, int(ask["requeue"]) - self.plan.rounds)
        env = {str(k): str(v) for k, v in ask["env"].items()} | {"DEPTHCUT_CONTINUES": str(more)}
        parts = {index: self._part(index) for index in chosen}
        text = slurm.array_script(parts, env, ask["modules"], ["sbatch", *given])
        path = self.book / "array.sh"
        slurm.write_script(path, text)
        key = secrets.token_hex(8)
        self.plan = self.plan.noted(self.book, indices=chosen, key=key)
        for index in chosen:
            self._announce(index)
        try:
            job = slurm.submit(given, str(path), key)
        except PlaceError as error:
            for index in chosen:
                self._record(index, "failed", error.message, error.hint)
            raise
        self._note(job)

    def _note(self, job: str) -> None:
        self.plan = self.plan.noted(self.book, job=job, rounds=self.plan.rounds + 1)
        self.jobs, self.asked = {}, -1e9

    def _part(self, index: int) -> slurm.Part:
        element, folder = self.plan.elements[index], self._dir(index)
        resumes = "resume" in element.spec
        again = ["--resume"] if resumes and self.plan.rounds else []
        if "overwrite" not in element.spec:
            again.append("--overwrite")
        words = [self.ask["python"], "-m", "core", element.command, *again, *element.words]
        return slurm.Part(words, str(folder), str(folder / BOOKKEEPING / "log.txt"), resumes)

    def _announce(self, index: int) -> None:
        """Record that an element waits, so that it is seen, and can be cancelled, like any run."""
        element, book = self.plan.elements[index], self._dir(index) / BOOKKEEPING
        book.mkdir(parents=True, exist_ok=True)
        workspace.unlink_links(book)
        for name in ("cancel", KILL, "launch.json", "place.json"):
            (book / name).unlink(missing_ok=True)
        before = statuses.cleaned(workspace.read_json(book / "status.json") or {})
        status = {"state": "queued", **statuses.born(book), "files": before.get("files") or []}
        workspace.write_json(book / "status.json", status)
        workspace.write_json(book / "spec.json", self._spec(element))
        if self.ask["owner"]:
            workspace.write_json(book / "launch.json", self.ask["owner"])

    def _spec(self, element: Element) -> dict[str, Any]:
        argv = ["python", "-m", "core", element.command, *element.words]
        value = {"command": element.command, "spec": dict(element.spec), "argv": argv}
        on = self.ask["env"].get("DEPTHCUT_ON")
        return {**value, "cwd": str(self.folder), **({"on": json.loads(on)} if on else {})}

    # ------------------------------------------------------------------------- looking

    def _dir(self, index: int) -> Path:
        return self.folder / self.plan.elements[index].name

    def _read(self, index: int) -> RunRecord | None:
        return read_run(self._dir(index))

    def _look(self) -> None:
        """Ask SLURM now and then, and note in each element's record what it waits for."""
        if time.monotonic() - self.asked < float(self.ask["poll_s"]):
            return
        self.asked = time.monotonic()
        self.jobs = slurm.elements(self.plan.job)
        for index in self.plan.indices:
            job = self.jobs.get(index)
            if job is None or not job.is_alive:
                continue
            book = self._dir(index) / BOOKKEEPING
            self._refresh(index, book)
            facts = {"job": job.id, "nodes": job.nodes}
            facts["waiting"] = job.waiting if job.is_waiting else ""
            if workspace.read_json(book / "place.json") != {"schema": workspace.SCHEMA, **facts}:
                workspace.write_json(book / "place.json", facts, durable=False)
            unwanted = job.is_waiting and (book / "cancel").exists()
            if unwanted or (book / KILL).exists():
                slurm.cancel(job.id, kill=not job.is_waiting)

    def _refresh(self, index: int, book: Path) -> None:
        """Show that an element which waits is looked after by the process that asks now."""
        owner = self.ask["owner"]
        status = workspace.read_json(book / "status.json") or {}
        if not status.get("pid") and owner:
            known = workspace.read_json(book / "launch.json") or {}
            if any(known.get(key) != value for key, value in owner.items()):
                workspace.write_json(book / "launch.json", owner)
        if not status.get("pid"):
            with contextlib.suppress(OSError):
                (book / "heartbeat").touch()

    def _has_ended(self, index: int) -> bool:
        """Whether an element has ended or stopped; what SLURM ended without a record gets one."""
        job = self.jobs.get(index)
        if job is not None and job.is_alive:
            return False
        record = self._read(index)
        if record and (record.state in FINAL_STATES or self._continues(index)):
            return True
        first = self.doubted.setdefault(index, time.monotonic())
        if time.monotonic() - first < LATE_S:  # its last words may be on their way
            return False
        job = job or slurm.look(f"{self.plan.job}_{index}")
        if job.is_alive:
            return False
        book = self._dir(index) / BOOKKEEPING
        asked = (book / "cancel").exists() or (book / KILL).exists() or self.wants_stop
        if asked:
            self._record(index, "cancelled", "Cancelled.")
        else:
            hint = "Its log may say more. Restart the recipe: finished steps are kept."
            self._record(index, "failed", job.ended, hint)
        return True

    def _continues(self, index: int) -> bool:
        """Whether an element stopped before its time limit and is to continue."""
        status = workspace.read_json(self._dir(index) / BOOKKEEPING / "status.json") or {}
        return status.get("continues") is True and not status.get("pid")

    def _record(self, index: int, state: str, error: str, hint: str = "") -> None:
        """Write the end of an element that could not write it."""
        book = self._dir(index) / BOOKKEEPING
        status = statuses.cleaned(workspace.read_json(book / "status.json") or {})
        if status.get("state") in FINAL_STATES:
            return
        status = {**status, "continues": False, **statuses.ending(status, state, error, hint)}
        workspace.write_json(book / "status.json", status)
        for name in ("cancel", KILL):
            (book / name).unlink(missing_ok=True)

    # ------------------------------------------------------------------------- stopping

    def _stop(self) -> None:
        """Take what waits out of the queue, and ask what runs to stop at its next step."""
        slurm.cancel(self.plan.job, waiting=True)
        for index in self.plan.indices:
            record = self._read(index)
            if record and record.state not in FINAL_STATES:
                with contextlib.suppress(OSError):
                    (self._dir(index) / BOOKKEEPING / "cancel").touch()
        self.stopped, self.asked = True, -1e9

    def kill(self) -> None:
        """End all elements at once."""
        number = self.plan.job or (self.plan.key and slurm.keyed(self.name, self.plan.key))
        if number:
            slurm.cancel(number, kill=True)
        for index in self.plan.indices:
            self._record(index, "cancelled", "Killed.")
        self.plan = self.plan.noted(self.book, ended=True)

    def _end(self) -> dict[str, Any]:
        for index in self.plan.indices:
            if self._continues(index):
                self._record(index, "cancelled", "Cancelled.")
        if not self.wants_stop:
            self.plan = self.plan.noted(self.book, ended=True)
        return self._over()

    # ------------------------------------------------------------------------- telling

    def _over(self) -> dict[str, Any]:
        state = "cancelled" if self.wants_stop else "continues"
        line = self._line(state, self._counted()[0])
        line["status"]["error"] = "Cancelled." if self.wants_stop else ""
        return {"ended": True, **line}

    def _told(self) -> dict[str, Any]:
        text, runs = self._counted()
        line = self._line("running" if runs else "queued", text)
        waits = [job for job in self.jobs.values() if job.is_waiting]
        if waits and not runs:
            line["waiting"] = f"{text}. {waits[0].waiting}"
        return {"ended": False, **line}

    def _states(self) -> list[str]:
        found = [self._read(index) for index in range(len(self.plan.elements))]
        return [record.state if record else "queued" for record in found]

    def _counted(self) -> tuple[str, bool]:
        """Return how many steps have ended, run and wait; and whether any has begun."""
        states = self._states()
        done = states.count("done")
        bad = states.count("failed") + states.count("cancelled")
        waits = sum(job.is_waiting for job in self.jobs.values())
        runs = sum(job.is_going and not job.is_waiting for job in self.jobs.values())
        text = f"{done} of {len(states)} steps done"
        for number, what in ((bad, "failed"), (runs, "running"), (waits, "waiting")):
            text += f", {number} {what}" if number else ""
        return text, bool(runs or done or bad)

    def _line(self, state: str, message: str) -> dict[str, Any]:
        states = self._states()
        progress = {
            "message": message, "done": states.count("done"), "total": len(states),
            "left_s": statuses.UNKNOWN_S,
        }  # fmt: skip
        return {
            "state": state, "status": {"progress": progress}, "job": None, "waiting": "",
            "array": self.plan.job, "trouble": self.trouble,
        }  # fmt: skip


def run(ask: Mapping[str, Any], say: Say) -> None:
    """Carry an array out; what SLURM refuses is the last line."""
    try:
        Array(ask).run(say)
    except DepthcutError as error:
        say({
            "ended": True, "state": "refused", "status": {}, "job": None,
            "error": error.message, "hint": error.hint,
        })  # fmt: skip
