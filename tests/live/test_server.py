"""The live process over its socket: many clients, bad ones, its death, and giving way."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
import threading
import time

import pytest
import tiny
from live_helpers import ask, naive_perplexity, texts, until, windows_of

from core.errors import InputError
from core.live import client, protocol
from core.live.protocol import LiveGone
from core.live.replies import Measured, Part, Token, Waiting
from core.prune import depth
from core.runs import jobs
from core.runs.device_lock import DeviceLock
from core.runs.workspace import Workspace, read_run


def generation(folder, **values):
    start = {"checkpoint": str(folder), "prompt": "Ann sees", "temperature": 0.0, "max_tokens": 24}
    return {**start, **values}


def endless(tmp_path):
    """A checkpoint, and a question that keeps it writing for minutes."""
    folder = tiny.write(tmp_path / "long", "gqa", max_position_embeddings=8192)
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = None
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder, generation(folder, max_tokens=8000, batch=4)


def test_answers_equal_pruned_checkpoints_each_after_a_different_one(
    live, tiny_dir, tmp_path, text
):
    folder = tiny_dir("gqa")
    windows = windows_of(folder, text, 24, "once")
    asked = {"source": str(text), "window": 24}
    for number, drop in enumerate([(3, 1), (), (0,), (4, 2)]):
        where = folder
        if drop:
            depth.prune(folder, drop, tmp_path / str(number))
            where = tmp_path / str(number)
        wanted = pytest.approx(naive_perplexity(where, windows), rel=1e-5)
        found = ask(live, folder, skip=drop, **asked)
        assert found.ppl == wanted
        assert ask(live, folder, skip=drop, fresh=True, **asked).ppl == wanted
        assert ask(live, where, **asked).ppl == wanted
        assert (found.windows, found.of) == (len(windows), len(windows))
    part = ask(live, folder, tokens=100, **asked)
    assert (part.windows, part.of) == (4, len(windows))
    assert part.ppl == pytest.approx(naive_perplexity(folder, windows[:4]), rel=1e-5)


def test_several_clients_each_get_their_own_stream(live, tiny_dir):
    folder = tiny_dir("gqa")
    sets = [(), (1,), (2, 3), (0,)]
    alone = [texts(client.events(live, "generate", generation(folder, skip=list(s)))) for s in sets]
    found: dict[int, str] = {}

    def one(number):
        asked = generation(folder, skip=list(sets[number]))
        found[number] = texts(client.events(live, "generate", asked))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[n] for n in range(4)] == alone
    assert len(set(alone)) == 4


def test_a_client_that_goes_away_stops_its_generation(live, tmp_path):
    folder, asked = endless(tmp_path)
    stream = client.events(live, "generate", asked)
    while not isinstance(next(stream), Token):
        pass
    stream.close()
    began = time.monotonic()
    short = client.answer(live, "generate", generation(folder, max_tokens=2))
    assert short.tokens == 2
    assert time.monotonic() - began < 10  # 8000 tokens would take minutes


def test_the_contact_file_is_the_owners_and_a_wrong_secret_is_refused(live):
    path = live.path / ".run" / "live.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    contact = protocol.read_contact(live.path)
    assert contact.host == "127.0.0.1"
    for line in (b'{"secret": "x", "ask": "stop"}\n', b"GET / HTTP/1.1\n", b'["a"]\n'):
        with socket.create_connection((contact.host, contact.port), 5) as connection:
            connection.sendall(line)
            reply = next(protocol.lines(connection))
        assert reply["event"] == "error"
        assert reply["message"] == "Wrong secret for the live model."
    assert client.status(live).budget_mib > 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"skip": [0, 1, 2, 3, 4]},
            "All 5 blocks are selected. Leave at least one block in the model.",
        ),
        (
            {"skip": [7]},
            "Block 7 does not exist: the checkpoint has 5 blocks. Blocks are numbered from 0 to 4.",
        ),
        ({"skip": ["a"]}, "--skip: invalid value 'a'. Expected a whole number."),
        ({"window": 300}, "--window: 300 tokens are more than the model's context of 256."),
        ({"source": "nowhere.txt"}, "No text source 'nowhere.txt': there is no such file."),
        ({"checkpoint": "no/such/folder"}, "no/such/folder"),
        ({"colour": 1}, "Unknown option: colour."),
    ],
)
def test_bad_questions_get_one_sentence_and_harm_nothing(live, tiny_dir, text, values, sentence):
    question = {"checkpoint": str(tiny_dir("gqa")), "source": str(text), "window": 24, **values}
    with pytest.raises(InputError) as caught:
        client.answer(live, "perplexity", question)
    assert sentence in str(caught.value)
    assert read_run(live.path).state == "running"
    assert ask(live, tiny_dir("gqa"), source=str(text), window=24).ppl > 1


def test_unload_frees_the_models_and_they_come_back(live, tiny_dir, text):
    question = {"source": str(text), "window": 24}
    before = ask(live, tiny_dir("gqa"), **question).ppl
    assert client.status(live).models
    assert client.answer(live, "unload").models == ()
    assert client.status(live).memory_mib == 0
    assert ask(live, tiny_dir("gqa"), **question).ppl == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident now")
def test_unload_returns_the_memory_to_the_system(live, tmp_path, text):
    folder = tiny.write(tmp_path / "large", "gqa", hidden_size=512, intermediate_size=4096)
    weights = (folder / "model.safetensors").stat().st_size / 2**20
    assert weights > 100
    client.answer(live, "unload")
    before = client.status(live).process_mib
    ask(live, folder, source=str(text), window=24)
    held = client.status(live)
    assert held.memory_mib > weights
    assert held.process_mib > before + 0.9 * weights
    after = client.answer(live, "unload").process_mib
    assert after < before + 0.2 * weights


def test_it_gives_the_device_to_a_queued_run_and_takes_it_again(live, tiny_dir, text):
    question = {"source": str(text), "window": 24}
    before = ask(live, tiny_dir("gqa"), **question).ppl
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DEPTHCUT_LOCK_DIR", str(live.path.parent.parent / "locks"))
        lock = DeviceLock("cpu", {"run": "importance-1"})
    assert lock.holder()["run"] == str(live.path)
    lock.acquire()  # as a queued run does; it would wait for ever
    until(lambda: not client.status(live).held)
    assert client.status(live).models == ()
    said, answers = [], []

    def later():
        for event in client.events(
            live, "perplexity", {"checkpoint": str(tiny_dir("gqa")), **question}
        ):
            (said if isinstance(event, Waiting) else answers).append(event)

    thread = threading.Thread(target=later)
    thread.start()
    until(lambda: any("behind importance-1" in e.why for e in said))
    assert not answers
    until(lambda: read_run(live.path).state == "queued")
    lock.release()
    thread.join(60)
    assert answers[-1].ppl == before
    assert client.status(live).held
    assert read_run(live.path).state == "running"


@pytest.mark.usefixtures("prepared_runs")
def test_death_idleness_and_stop(place, tiny_dir, text, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tiny_dir("gqa")
    question = {"source": str(text), "window": 24}
    record = client.ensure(place, {"device": "cpu"})
    assert client.ensure(place).path == record.path
    stream = client.events(record, "generate", endless(tmp_path)[1])
    next(stream)
    os.kill(read_run(record.path).status["pid"], signal.SIGKILL)
    with pytest.raises(LiveGone, match="killed, or ran out of memory. Try again"):
        list(stream)
    until(lambda: read_run(record.path).state == "lost")
    with pytest.raises(LiveGone):
        ask(record, folder, **question)
    again = client.ensure(place, {"device": "cpu", "idle": 4})
    assert again.path != record.path
    assert ask(again, folder, **question).ppl > 1
    until(lambda: read_run(again.path).state == "done")
    assert "no request for 4 s" in again.log_tail()
    assert protocol.read_contact(again.path) is None
    assert client.running(Workspace()) is None


def test_two_starters_share_one_process(place, monkeypatch):
    launched = []
    real = jobs.launch

    def launch(*arguments):
        time.sleep(0.2)
        launched.append(real("wait", {"pause": 30.0, "steps": 1}, place))
        path = launched[-1].path / ".run" / "spec.json"
        # The run writes its own spec before its work begins.
        until(lambda: "work begins" in read_run(launched[-1].path).log_tail())
        path.write_text(path.read_text().replace('"command": "wait"', '"command": "live"'))
        return read_run(launched[-1].path)

    monkeypatch.setattr(jobs, "launch", launch)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(client._one(place, None))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) == 1
    assert {r.path for r in found} == {launched[0].path}


def test_a_quick_question_goes_first_and_what_gave_way_is_answered_too(live, tmp_path):
    """The long one takes a minute; it is asked again from where it was."""
    folder = tiny.write(tmp_path / "slow", "gqa", hidden_size=256, intermediate_size=2048)
    path = tmp_path / "long.txt"
    path.write_text(tiny.text(1200, seed=4))
    question = {"checkpoint": str(folder), "source": str(path), "window": 64, "spread": True}
    client.answer(live, "perplexity", {**question, "tokens": 64})  # loads it
    parts: list[float] = []
    whole: list = []

    def long():
        for event in client.events(live, "perplexity", {**question, "skip": [1], "tokens": 10**7}):
            (whole if isinstance(event, Measured) else parts).append(event)

    thread = threading.Thread(target=long)
    thread.start()
    until(lambda: any(isinstance(p, Part) for p in parts))
    quick = client.answer(live, "perplexity", {**question, "skip": [2], "quick": True})
    assert quick.ppl > 1
    assert not whole
    thread.join(120)
    alone = ask(live, folder, **{**question, "skip": [1], "tokens": 10**7, "fresh": True})
    assert whole[0].ppl == pytest.approx(alone.ppl, rel=1e-6)
    assert whole[0].windows == whole[0].of


def test_a_question_that_is_given_up_ends_at_once(live, tmp_path):
    folder, asked = endless(tmp_path)
    stop = threading.Event()
    stream = client.events(live, "generate", asked, stop=stop)
    while not isinstance(next(stream), Token):
        pass
    stop.set()
    began = time.monotonic()
    assert all(isinstance(event, Token) for event in stream)
    assert time.monotonic() - began < 5  # all tokens would take minutes
    assert client.answer(live, "generate", generation(folder, max_tokens=2)).tokens == 2


def test_paired_perplexity_has_the_dense_models_on_the_same_windows(live, tiny_dir, text):
    folder = tiny_dir("gqa")
    question = {"source": str(text), "window": 24, "paired": True, "fresh": True}
    found = ask(live, folder, skip=(1, 3), **question)
    windows = windows_of(folder, text, 24, "once")
    assert found.dense_ppl == pytest.approx(naive_perplexity(folder, windows), rel=1e-5)
    assert 0 < found.stderr < 1
    assert found.tokens_per_s > 0
