"""Run directories: atomic files, states told from each other, names, deletion."""

from __future__ import annotations

import csv
import errno
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.errors import InputError, OutputError
from core.runs import processes, workspace
from core.runs.workspace import Workspace, disk_bytes, read_run


def make(where, state="done", command="prune", spec=None, **status):
    folder = where.new_dir(command)
    workspace.write_json(
        folder / ".run/spec.json", {"command": command, "spec": spec or {}, "argv": []}
    )
    status = {"state": state, "created": time.time(), "host": socket.gethostname(), **status}
    workspace.write_json(folder / ".run/status.json", status)
    return folder


@pytest.fixture
def where(tmp_path):
    return Workspace(tmp_path / "runs")


def test_files_say_what_was_written(tmp_path):
    workspace.write_json(tmp_path / "deep/er/a.json", {"x": 1.5})
    assert json.loads((tmp_path / "deep/er/a.json").read_text()) == {"schema": 1, "x": 1.5}
    workspace.write_csv(tmp_path / "a.csv", ("n", "v"), [("a,b", 0.1 + 0.2), ("c", None)])
    assert (tmp_path / "a.csv").read_text() == 'n,v\n"a,b",0.30000000000000004\nc,\n'
    with (tmp_path / "a.csv").open(newline="") as handle:
        assert float(next(csv.DictReader(handle))["v"]) == 0.1 + 0.2


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    workspace.write_json(path, {"x": 1})
    before = path.read_text()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left on device") as caught:
            workspace.write_json(path, {"x": 2})
    assert str(path) in caught.value.message
    assert caught.value.exit_status == 2

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workspace.write_json(path, {"x": 2})
    with pytest.raises(UnicodeEncodeError):
        workspace.write_text(path, "\ud800")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Cannot write .*file/a.json"):
        workspace.write_json(tmp_path / "file/a.json", {})
    with pytest.raises(OutputError, match="Cannot create a run directory"):
        Workspace(tmp_path / "file").new_dir("prune")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"a": 1'])
def test_damaged_json_reads_as_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert workspace.read_json(tmp_path / "a.json") is None
    assert workspace.read_json(tmp_path / "absent.json") is None


@pytest.mark.parametrize(
    "status",
    ["", "[]", '{"state": 3, "created": "x", "progress": [1], "finished": {}, "pid": "12"}'],
)
@pytest.mark.parametrize("spec", ["{}", '{"command": 7, "spec": [1], "argv": 3}'])
def test_one_damaged_run_harms_no_list(where, status, spec):
    folder = make(where)
    (folder / ".run/status.json").write_text(status)
    (folder / ".run/spec.json").write_text(spec)
    good = make(where)
    assert {r.path for r in where.runs()} == {good, folder}
    record = read_run(folder)
    assert (record.progress, record.eta_s, record.finished) == ((0, 0, ""), None, None)
    assert record.started == 0.0
    assert where.children(record) == []


def test_live_runs_are_told_from_lost_ones(where):
    me = processes.identity()
    live = make(where, "running", **me)
    reused = make(where, "running", pid=me["pid"], pid_started=me["pid_started"] - 5000)
    gone = make(where, "queued", pid=2**22 + 1, pid_started=5.0)
    done = make(where, "done", pid=2**22 + 1, pid_started=5.0)
    assert read_run(live).state == "running"
    assert read_run(reused).state == "lost"
    assert read_run(gone).state == "lost"
    assert read_run(done).state == "done"
    assert "process exited without reporting" in read_run(gone).error
    assert "restart" in read_run(gone).hint
    assert read_run(done).error == ""


def test_a_zombie_is_not_alive():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    deadline = time.time() + 5
    while processes.start_time(pid) is not None and time.time() < deadline:
        time.sleep(0.01)
    assert not processes.is_alive(pid, None)
    os.waitpid(pid, 0)


def test_a_run_that_never_started_is_lost_after_a_while(where):
    assert read_run(make(where, "starting")).state == "starting"
    assert read_run(make(where, "starting", created=time.time() - 60)).state == "lost"
    launched = make(where, "starting", created=time.time() - 60)
    workspace.write_json(launched / ".run/launch.json", processes.identity())
    assert read_run(launched).state == "starting"


def test_runs_of_other_machines_go_by_their_heartbeat(where):
    far = make(where, "running", pid=1, pid_started=0.0, host="elsewhere")
    beat = far / ".run/heartbeat"
    assert read_run(far).state == "lost"
    beat.touch()
    assert read_run(far).state == "running"
    os.utime(beat, (time.time() - 600,) * 2)
    assert read_run(far).state == "lost"


def test_eta_follows_the_pace(where):
    now = time.time()
    step = {"done": 30, "total": 50, "message": "m", "since": now - 40, "first": 10, "at": now}
    record = read_run(make(where, "running", progress=step, **processes.identity()))
    assert record.progress == (30, 50, "m")
    # 20 steps took 40 s, 20 are left; less what has passed since.
    assert 30.0 < record.eta_s <= 40.0
    fresh = {**step, "done": 10}
    assert read_run(make(where, "running", progress=fresh, **processes.identity())).eta_s is None
    assert read_run(make(where, "done", progress=step)).eta_s is None


def test_log_tail_and_metrics(where):
    folder = make(where)
    log = folder / ".run/log.txt"
    log.write_bytes(b"".join(b"line %d\n" % i for i in range(30000)) + b"\r10%\r55%\r99%\rnext\n")
    record = read_run(folder)
    assert record.log_tail(3).splitlines() == ["line 29998", "line 29999", "next"]
    assert record.log_tail(10**6).splitlines()[0].startswith("line ")
    assert read_run(make(where)).log_tail() == ""
    (folder / ".run/metrics.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert record.metrics() == [{"a": 1}, {"a": 2}]


def test_runs_are_listed_newest_first_and_found(where, tmp_path, monkeypatch):
    old = make(where, created=100.0)
    new = make(where, command="importance", created=200.0)
    (where.root / "stranger").mkdir()
    (where.root / "note.txt").write_text("x")
    assert [r.path for r in where.runs()] == [new, old]
    assert [r.path for r in where.runs("prune")] == [old]
    assert where.find(old.name).path == old
    assert where.find(str(old)).path == old
    where.rename(read_run(old), "  my   run ")
    assert where.find("my run").id == old.name
    with pytest.raises(InputError, match="already named 'my run'"):
        where.rename(read_run(new), "my run")
    where.rename(read_run(old), "")
    assert read_run(old).name == old.name
    with pytest.raises(InputError, match="No run 'nothing'"):
        where.find("nothing")
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "other"))
    assert Workspace().root == tmp_path / "other"
    assert Workspace().runs() == []


def test_deleting_is_refused_while_others_build_on_it(where, tmp_path, monkeypatch):
    base = make(where)
    by_path = make(where, spec={"checkpoint": str(base), "out": "x"})
    below = make(where, spec={"checkpoints": ["demo", str(base / "merged")]})
    by_id = make(where, spec={"options": {"dense": base.name}})
    other = make(where, spec={"checkpoint": str(base) + "-2"})
    link = tmp_path / "link"
    link.symlink_to(where.root)
    linked = make(where, spec={"checkpoint": str(link / base.name)})
    found = {r.path for r in where.children(read_run(base))}
    assert found == {by_path, below, by_id, linked}
    with pytest.raises(InputError, match="used by 4 other"):
        where.delete(read_run(base))
    assert (base / ".run/spec.json").is_file()
    monkeypatch.chdir(where.root.parent)
    relative = Workspace(where.root.name)
    assert {r.id for r in relative.children(relative.find(base.name))} == {p.name for p in found}
    for folder in (*found, other):
        where.delete(read_run(folder))
    where.delete(read_run(base))
    assert list(where.root.iterdir()) == []


def test_deleting_a_live_run_is_refused(where):
    folder = make(where, "running", **processes.identity())
    with pytest.raises(InputError, match="is running. Cancel it first"):
        where.delete(read_run(folder))
    assert folder.is_dir()


def test_a_listed_run_shows_every_change_of_its_files(where):
    status = make(where, "failed", error="disk full") / ".run/status.json"
    assert where.runs()[0] is where.runs()[0], "a finished run is read once"
    before = status.stat()
    workspace.write_json(status, {**json.loads(status.read_text()), "error": "disk FULL"})
    os.utime(status, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the file is another one
    assert status.stat().st_mtime_ns == before.st_mtime_ns
    assert [r.error for r in where.runs()] == ["disk FULL"]
    workspace.write_json(status, {"state": "queued", **processes.identity()})
    assert [r.state for r in where.runs()] == ["queued"]
    workspace.write_json(status, {"state": "done"})
    assert [r.state for r in where.runs()] == ["done"]
    where.rename(where.runs()[0], "a name")
    assert where.runs()[0].name == "a name"
    where.delete(where.runs()[0])
    assert where.runs() == []


def test_a_live_run_is_read_every_time(where):
    status = make(where, "running", **processes.identity()) / ".run/status.json"
    for done in (1, 2):
        known = json.loads(status.read_text())
        workspace.write_json(status, {**known, "progress": {"done": done, "total": 2}})
        assert where.runs()[0].progress[0] == done


def test_unchanged_runs_are_listed_without_opening_a_file(where, opened):
    for state in ("done", "failed", "running", "queued", "starting"):
        record = read_run(make(where, state, **processes.identity()))
    where.rename(record, "a name")
    before = where.runs()
    opened.clear()
    assert [(r.id, r.name, r.state) for r in where.runs()] == [
        (r.id, r.name, r.state) for r in before
    ]
    inside = [path for path in opened if path.startswith(str(where.root))]
    assert inside == []
    status = before[1].path / ".run/status.json"
    workspace.write_json(status, {**before[1].status, "state": "failed", "error": "full"})
    opened.clear()
    assert where.runs()[1].error == "full"
    assert {p for p in opened if p.startswith(str(where.root))} == {
        str(before[1].path / ".run" / name) for name in ("spec.json", "status.json")
    }


def test_a_run_whose_process_ends_is_lost_at_the_next_look(where, monkeypatch):
    make(where, "running", **processes.identity())
    assert [r.state for r in where.runs()] == ["running"]
    monkeypatch.setattr(processes, "is_alive", lambda *_: False)
    assert [r.state for r in where.runs()] == ["lost"]


def test_threads_that_ask_at_once_share_a_look(where, monkeypatch):
    make(where)
    looks, waiting = [], threading.Barrier(8)
    look = workspace._runs_in

    def slowly(folder):
        looks.append(folder)
        time.sleep(0.05)
        return look(folder)

    def ask(_):
        waiting.wait()
        return where.runs()

    monkeypatch.setattr(workspace, "_runs_in", slowly)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert {r[0].id for r in found} == {where.runs()[0].id}
    assert len(looks) <= 4  # the first one's, one for all who waited, and this test's own


def test_one_draw_takes_one_look_and_sees_what_it_writes(where, monkeypatch):
    folder = make(where)
    looks = []
    look = workspace._runs_in
    monkeypatch.setattr(workspace, "_runs_in", lambda path: looks.append(path) or look(path))

    def draw():
        workspace.begin_draw()
        assert [r.name for _ in range(5) for r in where.runs()] == [folder.name] * 5
        assert len(looks) == 1
        where.rename(read_run(folder), "a name")
        assert [r.name for r in where.runs()] == ["a name"]
        (folder / ".run/status.json").write_text('{"state": "failed", "error": "by another"}')
        assert [r.state for r in where.runs()] == ["done"]  # still of the same draw
        workspace.begin_draw()
        assert [r.error for r in where.runs()] == ["by another"]
        (folder / ".run/status.json").write_text('{"state": "done", "created": 5.0}')
        monkeypatch.setattr(workspace, "DRAW_S", 0.0)
        assert [r.started for r in where.runs()] == [5.0]
        monkeypatch.setattr(workspace, "DRAW_S", 60.0)
        workspace.begin_draw()
        where.delete(where.runs()[0])
        return where.runs()

    with ThreadPoolExecutor(1) as pool:  # a draw is a thread's own
        assert pool.submit(draw).result() == []


def test_a_look_that_took_an_earlier_one_is_no_newer_than_that(monkeypatch):
    inner, outer = workspace.Looks(1), workspace.Looks(1)
    disk, seen = ["before"], []

    def whole():
        found = inner.take("list", lambda: disk[0])
        seen.append(found)
        return f"study of {found}"

    def ask():
        return outer.take("study", whole)

    with ThreadPoolExecutor(1) as early, ThreadPoolExecutor(1) as late:
        early.submit(workspace.begin_draw).result()
        early.submit(inner.take, "list", lambda: disk[0]).result()
        disk[0] = "after"
        late.submit(workspace.begin_draw).result()
        assert early.submit(ask).result() == "study of before"  # one look a draw
        assert late.submit(ask).result() == "study of after"  # began after the change
        assert early.submit(ask).result() == "study of after"  # a newer one is there
        assert late.submit(ask).result() == "study of after"
    assert seen == ["before", "after"]
    disk[0] = "now"
    assert ask() == "study of now"  # a thread that draws nothing always looks


def test_who_looks_at_something_else_does_not_wait():
    looks, entered, leave = workspace.Looks(2), threading.Event(), threading.Event()

    def slowly():
        entered.set()
        assert leave.wait(10)
        return "slow"

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(looks.take, "one", slowly)
        assert entered.wait(10)
        assert looks.take("other", lambda: "quick") == "quick"
        leave.set()
        assert slow.result() == "slow"


def test_a_look_that_fails_is_not_kept():
    looks = workspace.Looks(1)

    def fail():
        raise InputError("No.", "Try again.")

    with pytest.raises(InputError):
        looks.take("x", fail)
    assert looks.take("x", lambda: 1) == 1


def test_a_draw_that_takes_long_looks_again(where, monkeypatch):
    folder = make(where)

    def draw():
        workspace.begin_draw()
        before = where.runs()[0].started
        (folder / ".run/status.json").write_text('{"state": "done", "created": 5.0}')
        assert where.runs()[0].started == before
        monkeypatch.setattr(workspace, "LONGEST_S", 0.0)
        return where.runs()[0].started

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(draw).result() == 5.0


def test_runs_of_one_command_are_listed_alone(where):
    for command in ("prune", "evaluate", "prune"):
        make(where, command=command)
    assert [r.command for r in where.runs("prune")] == ["prune", "prune"]
    assert [r.id for r in where.runs("prune")] == [
        r.id for r in where.runs() if r.command == "prune"
    ]
    where.runs("prune").clear()  # a list of one's own
    assert len(where.runs("prune")) == 2
    assert where.runs("width") == []


def test_five_hundred_runs_are_listed_quickly(where):
    for _ in range(500):
        make_fast(where)
    best, plain = (min(timed(call) for _ in range(5)) for call in (where.runs, reading(where)))
    assert len(where.runs()) == 500
    assert best < 1.5 * plain  # pages ask several times a draw; 0.3 x, and 4 x if all were read


def make_fast(where):
    folder = where.new_dir("prune")
    (folder / ".run/spec.json").write_text('{"command": "prune", "spec": {"a": 1}, "argv": []}')
    (folder / ".run/status.json").write_text('{"state": "done", "created": 5}')


def reading(where):
    """What cannot be done without: reading two small files a run."""
    files = [f for folder in where.root.iterdir() for f in (folder / ".run").iterdir()]
    return lambda: [json.loads(file.read_text()) for file in files]


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_disk_use_is_the_sum_of_the_files(where):
    folder = make(where)
    before = disk_bytes(folder)
    (folder / "x.bin").write_bytes(b"0" * 5000)
    assert disk_bytes(folder) - before == 5000


def test_json_is_strict_where_a_number_is_not_finite(tmp_path):
    value = {"loss": float("nan"), "ppl": [1.5, float("inf")], "name": "NaN", "path": tmp_path}
    workspace.write_json(tmp_path / "x.json", value)

    def refuse(word):
        raise AssertionError(word)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert read["loss"] is None
    assert read["ppl"] == [1.5, None]
    assert (read["name"], read["path"]) == ("NaN", str(tmp_path))


def test_below_what_is_not_a_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y.gguf"):
        with pytest.raises((FileExistsError, NotADirectoryError)) as caught:
            path.parent.mkdir(parents=True, exist_ok=True)
        found = workspace.cannot_write(path, caught.value)
        assert found.message == f"Cannot write {path}: {tmp_path / 'file'} is not a folder."
        assert "disk space" not in found.hint
    full = workspace.cannot_write(tmp_path / "x", OSError(errno.ENOSPC, "No space left on device"))
    assert full.message == f"Cannot write {tmp_path / 'x'}: No space left on device."
    assert full.hint.startswith("Free up disk space")
    closed = workspace.cannot_write(tmp_path / "x", OSError(errno.EACCES, "Permission denied"))
    assert closed.hint == "Give a writable --out folder."
