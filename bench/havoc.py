"""Random actions against a workspace of demo runs: ``python -m bench.havoc --minutes 30 [--save]``.

Launches here, at another machine (an sshd on loopback) and at a SLURM cluster (slurmctld and two
slurmd on loopback), doubles a launch, queues, cancels, kills (SIGKILL) runs, single processes of
runs that have several, the live model's process, the dashboard, slurmd and sshd, deletes, renames,
restarts, asks the live model and turns pages in a real browser, all in random order (``--seed``).
Then the dust settles: every run that was killed, cancelled or lost is restarted and must end well,
and nothing may be left over: no process, no ticket in the device's queue, no temporary file or
folder, no job in SLURM's queue, no lost run, no page that broke. What cannot be started here
(``apt-get install openssh-server munge slurmctld slurmd slurm-client``) is left out, and the tally
says so. With ``--save`` it goes to docs/results/havoc.md. The exit status is 1 if anything was
wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import getpass
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench.dashboard import ROOT, answers, chromium, settled, start, workspace
from core.checkpoint import locate
from core.errors import DepthcutError
from core.live import client
from core.places import place as place_file
from core.runs import device_lock, jobs, processes
from core.runs.workspace import MAKERS, RunRecord, Workspace, read_run

T = TypeVar("T")
MARK = "DEPTHCUT_HAVOC"
"""Environment variable that every process of ours carries, so that leaked ones can be found."""
PAGES = ("", "importance", "prune", "width", "retrain", "evaluate", "benchmark", "compare", "jobs")
MOST_LIVE = 5
"""Runs at once; one computes, the others queue."""
MOST_RUNS = 60
SETTLE_S = 1800.0
AT_ONCE = 4
"""Runs that are restarted together at the end."""
SHARED = ("importance", "retrain")
"""Commands that are sometimes carried out by two processes (`--processes`)."""
RANK_S = 120.0
"""Within this time a run must have ended of which a rank was killed, on a loaded machine."""
TIMEOUT_S = 240.0
"""For a page on a loaded machine."""
SMALL: dict[str, Any] = {"samples": 4, "length": 32}
ENDED = ("done", "failed", "cancelled", "lost")


class Nothing(Exception):
    """There is nothing to which this action could be done now."""


@dataclass
class Servers:
    """The other machine and the cluster, both on loopback; None if they cannot be started."""

    sshd: Any = None
    cluster: Any = None
    absent: list[str] = field(default_factory=list)

    def begin(self, base: Path, where: Workspace, env: dict[str, str]) -> None:
        """Start what can be started here, and describe it as the places ``box`` and ``farm``."""
        sys.path.insert(0, str(ROOT / "tests"))
        import slurm_cluster
        import ssh_server

        found: dict[str, place_file.Place] = {}
        program, missing = ssh_server.find()
        folder = base / "sshd"
        folder.mkdir(mode=0o700)
        try:
            if missing:
                raise RuntimeError(f"{', '.join(missing)} missing")
            server = ssh_server.Sshd(folder, program)
            server.start()
            self.sshd = server
            found["box"] = server.place("box", base / "there", environment=env)
        except RuntimeError as error:
            self.absent.append(f"another machine over SSH ({error})")
        folder = base / "slurm"
        folder.mkdir()
        try:
            if problem := slurm_cluster.missing():
                raise RuntimeError(problem)
            cluster = slurm_cluster.Cluster(folder)
            cluster.start()
            self.cluster = cluster
            os.environ.update(cluster.env)
            values = {"kind": "slurm", "python": sys.executable, "requeue": 2, "at_once": 2,
                      "environment": env, "partition": "wide"}  # fmt: skip
            found["farm"] = place_file.from_dict("farm", values)
        except RuntimeError as error:
            self.absent.append(f"a SLURM cluster ({error})")
        place_file.save(found, where.root)

    def names(self) -> list[str]:
        """Return the names of the places."""
        return ["box"] * bool(self.sshd) + ["farm"] * bool(self.cluster)

    def kill_sshd(self) -> None:
        """Kill sshd and its connections, and start it again."""
        for pid in self.sshd.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.sshd.process.kill()
        self.sshd.process.wait()
        self.sshd.start()

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node, and start it again."""
        name = f"slurmd {node}"
        process = self.cluster.processes.pop(name)
        process.kill()
        process.wait()
        self.cluster.spawn(name, "-D", "-N", node, "-f", str(self.cluster.config))

    def left(self) -> str:
        """Return the jobs that are still in SLURM's queue."""
        if not self.cluster:
            return ""
        for _ in range(60):
            told = str(self.cluster.ask("squeue", "-h", "-o", "%i %j %T"))
            if not told:
                break
            time.sleep(0.5)
        return told

    def end(self) -> None:
        """End both."""
        if self.cluster:
            self.cluster.ask("scancel", "-f", f"--user={getpass.getuser()}")
            self.cluster.stop()
        if self.sshd:
            self.sshd.stop()


@dataclass
class Havoc:
    """What has been done to a workspace, and what went wrong."""

    where: Workspace
    random: random.Random
    page: Any
    servers: Servers
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    killed: set[str] = field(default_factory=set)
    """Runs of which something was killed: they may have failed, until they are restarted."""
    dashboard: Any = None
    url: str = ""

    # -- what is there ---------------------------------------------------------------------------

    def runs(self, *states: str) -> list[RunRecord]:
        """Return runs of the workspace; live ones without states, but not the live model."""
        found = [r for r in self.where.runs() if not r.parent and r.command != "live"]
        return (
            [r for r in found if r.state in states] if states else [r for r in found if r.is_live]
        )

    def made(self, *commands: str) -> list[RunRecord]:
        """Return finished runs of these commands."""
        return [r for r in self.runs("done") if r.command in commands]

    def one(self, among: Sequence[T]) -> T:
        """Return one of these at random."""
        if not among:
            raise Nothing
        return self.random.choice(among)

    def fault(self, what: str) -> None:
        """Note something that must not happen."""
        self.wrong.append(what)
        print(f"WRONG: {what}", flush=True)

    # -- actions ---------------------------------------------------------------------------------

    def wish(self) -> tuple[str, dict[str, Any]]:
        """Return a random command with its options."""
        pick, seed = self.random, self.random.randrange(10**6)
        drop = tuple(sorted(pick.sample(range(1, 7), pick.randint(1, 3))))
        cuts = [r.id for r in self.made("prune")]
        scores = [r.id for r in self.made("importance")]
        wishes: list[tuple[str, dict[str, Any]]] = [
            ("importance", {"checkpoint": "demo", "seed": seed, **SMALL}),
            ("search", {"checkpoint": "demo", "counts": (1, 2), "seed": seed, **SMALL}),
            ("prune", {"checkpoint": "demo", "drop": drop}),
            ("prune", {"checkpoint": "demo", "drop": drop, "heal": "scale", "seed": seed}),
            ("width", {"checkpoint": "demo", "method": "magnitude", "ratio": 0.2}),
            ("evaluate", {"checkpoint": "demo", "perplexity": ("demo",), "max_tokens": 512}),
        ]
        if scores:
            named = {"checkpoint": "demo", "scores": pick.choice(scores), "counts": (1, 2)}
            wishes.append(("curve", named))
        if cuts:
            cut = pick.choice(cuts)
            few = {"steps": 6, "batch": 4, "holdout": 16, "seed": seed, "merge": True}
            wishes += [
                ("retrain", {"checkpoint": cut, "data": "demo", **few}),
                ("evaluate", {"checkpoint": cut, "tasks": ("demo",), "limit": 20}),
                ("quantize", {"checkpoint": cut, "bits": 8}),
            ]
        return pick.choice(wishes)

    def is_full(self) -> bool:
        """Whether no further run is to be started now."""
        return len(self.runs()) >= MOST_LIVE or len(self.where.runs()) >= MOST_RUNS

    def launch(self) -> None:
        """Start a run; it queues behind the one that computes."""
        if self.is_full():
            raise Nothing
        command, values = self.wish()
        if command in SHARED and self.random.random() < 0.4:
            values = self.shared(command, values)
        self.known.add(jobs.launch(command, values, self.where).id)

    def launch_elsewhere(self) -> None:
        """Start a run at the other machine, or a job, sometimes an array or of two nodes."""
        if self.is_full() or not self.servers.names():
            raise Nothing
        name = self.random.choice(self.servers.names())
        command, values = self.wish()
        if name == "farm" and self.random.random() < 0.3:
            grid = ("lr=1e-3,3e-3",)
            command = "recipe"
            values = {"name": "sweep", "checkpoint": "demo", "steps": 2, "grid": grid}
        on: dict[str, Any] = {"place": name}
        if name == "farm" and command in SHARED and self.random.random() < 0.5:
            on, values = {**on, "nodes": 2}, self.shared(command, values)
        self.known.add(jobs.launch(command, values, self.where, on=on).id)

    def shared(self, command: str, values: dict[str, Any]) -> dict[str, Any]:
        """Return the options with two processes, which sometimes split the weights they train."""
        split = command == "retrain" and self.random.random() < 0.5
        more = {"method": "full", "sharding": "fsdp"} if split else {}
        return {**values, **more, "processes": 2}

    def launch_twice(self) -> None:
        """Wish the same from two threads at one moment: one run must start."""
        if self.is_full():
            raise Nothing
        command, values = self.wish()
        before = {r.id for r in self.where.runs()}
        found: list[str] = []

        def click() -> None:
            found.append(jobs.launch_once(command, values, self.where).id)

        clicks = [threading.Thread(target=click) for _ in range(2)]
        for one in clicks:
            one.start()
        for one in clicks:
            one.join()
        self.known |= set(found)
        new = {r.id for r in self.where.runs()} - before
        if len(set(found)) != 1 or len(new) > 1:
            self.fault(f"two clicks on {command} gave {sorted(found)}")

    def cancel(self) -> None:
        """Ask a run to stop."""
        jobs.request_cancel(self.one(self.runs()))

    def kill(self) -> None:
        """Kill a run's process; a moment later it must count as ended."""
        record = self.one(self.runs())
        self.killed.add(record.id)
        if jobs.LocalLauncher().kill(record):
            now = read_run(record.path)
            if now is None or now.is_live:
                self.fault(f"{record.id} still counts as {now and now.state} after SIGKILL")

    def kill_now(self) -> None:
        """End a run at once, as the page's button does."""
        jobs.kill_now(self.one(self.runs()))

    def kill_rank(self) -> None:
        """Kill one process of a run that computes in several; the run must not stay live."""
        many = [r for r in self.runs() if r.spec.get("processes", 1) > 1 and r.status.get("pid")]
        record = self.one(many)
        with contextlib.suppress(psutil.NoSuchProcess):
            rank = self.one(psutil.Process(record.status["pid"]).children(recursive=True))
            self.killed.add(record.id)
            rank.kill()
            until = time.monotonic() + RANK_S
            while (now := read_run(record.path)) and now.is_live:
                if time.monotonic() > until:
                    self.fault(f"{record.id} is still {now.state} after a rank was killed")
                    break
                time.sleep(0.5)

    def kill_step(self) -> None:
        """Kill a step of a recipe: an element of a job array."""
        steps = [r for r in self.where.runs() if r.parent and r.is_live and r.status.get("pid")]
        record = self.one(steps)
        self.killed.add(record.parent)
        jobs.LocalLauncher().kill(record)

    def kill_sshd(self) -> None:
        """Kill sshd and all its connections; it comes back."""
        if not self.servers.sshd:
            raise Nothing
        self.servers.kill_sshd()

    def kill_slurmd(self) -> None:
        """Kill the daemon of one of the cluster's nodes; it comes back."""
        if not self.servers.cluster:
            raise Nothing
        self.servers.kill_slurmd(self.random.choice(("n1", "n2")))

    def restart(self) -> None:
        """Restart a run that has not ended well."""
        ended = self.runs("lost", "cancelled", "failed")
        if len(self.runs()) >= MOST_LIVE:
            raise Nothing
        jobs.restart(self.one(ended))

    def delete(self) -> None:
        """Delete a finished run that nothing builds on, once there are many."""
        ended = [r for r in self.runs(*ENDED) if not (r.is_elsewhere and r.state == "lost")]
        if len(ended) < 12:
            raise Nothing
        record = self.random.choice(ended)
        self.where.delete(record)
        self.deleted.add(record.id)
        if record.path.exists():
            self.fault(f"{record.id} is still there after it was deleted")

    def rename(self) -> None:
        """Give a run a name of its own."""
        record, name = self.one(self.runs(*ENDED)[:5]), f"run {self.random.randrange(1000)}"
        if self.where.rename(record, name).name != name:
            self.fault(f"{record.id} was not renamed")

    def ask_live(self) -> None:
        """Ask the live model for a perplexity; it may have been killed a moment ago."""
        if self.runs():
            raise Nothing  # the live model would wait for the device
        record = client.ensure(self.where, {"checkpoint": "demo"})
        self.known.add(record.id)
        skip = sorted(self.random.sample(range(1, 7), 2))
        asked = {"checkpoint": "demo", "skip": skip, "source": "demo", "window": 32}
        with contextlib.suppress(client.LiveGone):
            found = client.answer(record, "perplexity", asked)
            if not getattr(found, "ppl", 0) > 1:
                self.fault(f"the live model answered {found}")

    def kill_live(self) -> None:
        """Kill the live model's process."""
        if (record := client.running(self.where)) is None:
            raise Nothing
        jobs.LocalLauncher().kill(record)

    def kill_dashboard(self) -> None:
        """Kill the dashboard and start it again at the same address."""
        os.kill(self.dashboard.pid, signal.SIGKILL)
        self.dashboard.wait()
        self.open(int(self.url.rpartition(":")[2]))

    def turn_page(self) -> None:
        """Open a random page in the browser; nothing on it may be broken."""
        name = self.random.choice(PAGES)
        self.page.goto(f"{self.url}/{name}", timeout=TIMEOUT_S * 1000)
        self.page.get_by_test_id("stMain").wait_for(timeout=TIMEOUT_S * 1000)
        settled(self.page)
        for broken in self.page.get_by_test_id("stException").all():
            self.fault(f"page {name or 'home'}: {broken.inner_text()[:200]}")

    def reload(self) -> None:
        """Open the page again while it may still be drawn, twice.

        Playwright's own reload fails now and then while a page is being replaced, static ones too.
        """
        if not self.page.url.startswith(self.url):  # none has been opened
            raise Nothing
        self.page.goto(self.page.url, timeout=TIMEOUT_S * 1000, wait_until="commit")
        self.page.goto(self.page.url, timeout=TIMEOUT_S * 1000)

    # -- the whole -------------------------------------------------------------------------------

    def open(self, port: int | None = None) -> None:
        """Start the dashboard."""
        self.dashboard, self.url = start(ROOT, port)
        answers(f"{self.url}/_stcore/health")

    def go(self, minutes: float) -> None:
        """Perform random actions for a while."""
        weights: dict[Callable[[], None], int] = {
            self.launch: 12, self.launch_twice: 4, self.launch_elsewhere: 8, self.cancel: 4,
            self.kill: 5, self.kill_now: 1, self.kill_rank: 2, self.kill_step: 2, self.restart: 5,
            self.delete: 3, self.rename: 1, self.ask_live: 4, self.kill_live: 2,
            self.kill_sshd: 2, self.kill_slurmd: 2, self.kill_dashboard: 1,
            self.turn_page: 6, self.reload: 2,
        }  # fmt: skip
        said = time.monotonic()
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            (act,) = self.random.choices(list(weights), list(weights.values()))
            name = act.__name__.replace("_", " ")
            try:
                act()
                self.done[name] += 1
            except Nothing:
                continue
            except DepthcutError as error:  # a refusal in one sentence is a right answer
                self.done["refused"] += 1
                print(f"{name}: {error}", flush=True)
            except (Exception, SystemExit) as error:  # the latter: the dashboard did not start
                self.fault(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            if time.monotonic() - said > 60:
                said = time.monotonic()
                left = (until - said) / 60
                print(f"{sum(self.done.values())} actions, {left:.0f} minutes left", flush=True)
            time.sleep(self.random.uniform(0, 2))

    def settle(self) -> None:
        """Stop the live model, let all runs end, restart what has not ended well."""
        for record in self.where.runs("live"):
            if record.is_live:
                client.stop(record)
        self.await_all()
        for _ in range(2):  # steps that were killed fail a recipe that was lost until now
            excused = [r for r in self.runs("failed") if r.id in self.killed]
            again = [*self.runs("lost", "cancelled"), *excused]
            for first in range(0, len(again), AT_ONCE):
                for record in again[first : first + AT_ONCE]:
                    with self.noting(f"restarting {record.id}"):
                        jobs.restart(record)
                        self.done["restarted at the end"] += 1
                self.await_all()
        for record in self.runs(*ENDED):
            if record.state != "done":
                self.fault(f"{record.id} ended as {record.state}: {record.error}")

    def await_all(self) -> None:
        """Wait until no run is live."""
        until = time.monotonic() + SETTLE_S
        while live := self.runs():
            if time.monotonic() > until:
                self.fault(f"still live: {', '.join(r.id for r in live)}")
                return
            time.sleep(0.5)

    def look(self, temporary: Path) -> None:
        """Look for anything that is left over or missing."""
        records = {r.id: r for r in self.where.runs() if not r.parent}
        for lost in sorted(self.known - self.deleted - set(records)):
            self.fault(f"run {lost} is not listed any more")
        for record in records.values():
            if record.state == "done" and record.command in MAKERS:
                with self.noting(f"the checkpoint of {record.id}"):
                    locate.open(str(record.path), need="weights", quantized=True)
        for path in sorted(self.where.root.rglob(".*")):
            if path.name.endswith(".tmp") or path.name.startswith(".deleted-"):
                self.fault(f"left over: {path.relative_to(self.where.root)}")
        lock = device_lock.DeviceLock("cpu")
        if (holder := lock.holder()) or lock.waiting():
            self.fault(f"the device is still held by {holder}, waiting: {lock.waiting()}")
        for left in sorted(temporary.iterdir()):
            if not left.name.startswith("torchinductor_"):  # torch's own cache, always there
                self.fault(f"temporary: {left.name}")

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """Note an error in the block as a fault."""
        try:
            yield
        except Exception as error:
            self.fault(f"{what}: {error}")


OURS = (b"core", b"slurm", b"sshd", b"munged")


def ours() -> list[int]:
    """Return the processes, other than this one and its browser's, that carry our mark."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                names = (folder / "cmdline").read_bytes()
                if mark in environ and any(name in names for name in OURS):
                    found.append(int(folder.name))
    return [pid for pid in found if processes.is_alive(pid, None)]


def words(havoc: Havoc, minutes: float, seed: int) -> str:
    """Return the page for docs/results."""
    acts = sum(v for k, v in havoc.done.items() if k not in ("refused", "restarted at the end"))
    where = [name for name, there in (("at another machine over SSH", havoc.servers.sshd),
                                      ("at a SLURM cluster of two nodes", havoc.servers.cluster))
             if there]  # fmt: skip
    lines = [
        "# Random actions",
        "",
        f"`python -m bench.havoc --minutes {minutes:g} --seed {seed} --save`: {acts} random actions"
        f" on a workspace of demo runs within {minutes:g} minutes, on {os.cpu_count()} cores"
        f" without a GPU; runs here{''.join(f', {one}' for one in where)} (all on loopback). What "
        "is killed is killed with SIGKILL.",
        "",
        "| action | times |",
        "| --- | ---: |",
        *(f"| {name} | {times} |" for name, times in havoc.done.most_common()),
        "",
    ]
    states = collections.Counter(r.state for r in havoc.runs(*ENDED))
    ends = ", ".join(f"{n} {state}" for state, n in states.most_common())
    lines.append(f"Runs at the end: {ends}; {len(havoc.deleted)} deleted on the way.")
    if havoc.servers.absent:
        lines += ["", f"Left out here: {'; '.join(havoc.servers.absent)}."]
    if havoc.wrong:
        lines += ["", "What was wrong:", "", *(f"- {one}" for one in havoc.wrong)]
    else:
        lines += [
            "",
            "Nothing was wrong: every run that was killed or cancelled ended well after a restart,"
            " no run was lost from the list, no page broke, and nothing was left over: no process,"
            " no ticket in the device's queue, no job in SLURM's, no temporary file or folder.",
        ]
    return "\n".join(lines) + "\n"


def clean_up(havoc: Havoc) -> None:
    """Wait for the end of every process that carries our mark; kill and report what stays."""
    for _ in range(120):  # a template ends once it notices that its dashboard has gone
        if not (left := ours()):
            return
        time.sleep(0.5)
    for pid in left:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            havoc.fault(f"process {pid} is left: {command}")
            os.kill(pid, signal.SIGKILL)


def stop(_number: int, _frame: object) -> None:
    """End as after Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt


def main() -> int:
    """Run for a while and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    os.environ[MARK] = f"{os.getpid()}-{time.monotonic_ns()}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        base = Path(name)
        temporary, locks = base / "tmp", base / "locks"
        temporary.mkdir()
        locks.mkdir(mode=0o700)
        own = {MARK: os.environ[MARK], "DEPTHCUT_LOCK_DIR": str(locks), "TMPDIR": str(temporary)}
        own |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        os.environ |= {"DEPTHCUT_LOCK_DIR": str(locks), "DEPTHCUT_SLURM_POLL": "1"}
        with workspace(f"{base}/workspace") as folder, chromium() as browser:
            os.environ["TMPDIR"] = str(temporary)
            tempfile.tempdir = None
            where = Workspace(folder)
            where.root.mkdir(parents=True, exist_ok=True)
            servers = Servers()
            havoc = Havoc(where, random.Random(given.seed), browser.new_page(), servers)
            try:
                servers.begin(base, where, own)
                havoc.open()
                havoc.go(given.minutes)
                havoc.settle()
                if told := servers.left():
                    havoc.fault(f"still in SLURM's queue: {told}")
            finally:
                if havoc.dashboard:
                    havoc.dashboard.terminate()
                    havoc.dashboard.wait()
                servers.end()
                clean_up(havoc)
            havoc.look(temporary)
            text = words(havoc, given.minutes, given.seed)
    if base.exists():
        shutil.rmtree(base, ignore_errors=True)
        havoc.fault(f"{base} could not be removed at once")
        text += f"\nWhat was wrong at the end: {havoc.wrong[-1]}.\n"
    print(text)
    if given.save:
        (ROOT / "docs" / "results" / "havoc.md").write_text(text, encoding="utf-8")
    return 1 if havoc.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
