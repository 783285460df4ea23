"""Pushing to the Hub, against a server on loopback that takes uploads as the Hub does."""

import json

import pytest
from hub_server import TOKEN, Hub

from core.__main__ import main
from core.prune import depth


@pytest.fixture
def hub(tmp_path):
    result = Hub(tmp_path / "hf")
    yield result
    result.server.shutdown()
    result.server.server_close()


def push(hub, folder, *more, **environment):
    env = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "PYTHONHASHSEED": "0"} | environment
    argv = ("export", folder, "--format", "hub", "--repo", "someone/smaller")
    ended = hub.run(*argv, "--out", hub.home / "run", *more, **env)
    assert TOKEN not in ended.stdout + ended.stderr
    return ended


@pytest.fixture
def pruned(tiny_gqa, tmp_path):
    folder = tmp_path / "pruned"
    depth.prune(tiny_gqa, [1, 3], folder)
    (folder / "notes.txt").write_text("not part of a checkpoint")
    return folder


def test_a_push_is_one_commit_with_card(hub, pruned, tiny_gqa):
    hub.faults += ["hang up"]
    ended = push(hub, pruned)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["url"].endswith("/someone/smaller")
    assert told["private"] is True
    assert hub.created["someone/smaller"]["visibility"] == "private"
    assert len(hub.commits) == 1
    repo, files = hub.commits[0]
    assert repo == "someone/smaller"
    assert files.pop("") == "3 blocks, 43,744 parameters"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert files[name] == (pruned / name).read_bytes()
    assert b"without 2 blocks" in files["README.md"]
    assert json.loads(files["pruning.json"])["kept"] == [0, 2, 4]
    assert "notes.txt" not in files
    assert not [name for name, data in files.items() if str(tiny_gqa).encode() in data]
    record = json.loads((hub.home / "run" / "export.json").read_text())
    assert record["url"] == told["url"]


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "needs a login. Log in with `hf auth login`"),
        ("hf_other", "does not let this login write to someone/smaller (401)."),
    ],
)
def test_the_login_must_be_allowed_to(hub, pruned, token, words):
    ended = push(hub, pruned, HF_TOKEN=token)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
    assert hub.commits == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--format", "hub"], "--format hub needs --repo, which is missing."),
        (["--format", "hub", "--repo", "no owner"], "is not a repository. Write OWNER/NAME."),
        (["--format", "hub", "--repo", "a/b", "--type", "f32"], "--type is for --format gguf"),
        (["--format", "gguf", "--public"], "--public is for --format hub, not gguf."),
    ],
)
def test_options_that_do_not_fit(tiny_gqa, tmp_path, capsys, argv, words):
    assert main(["export", str(tiny_gqa), *argv, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err
