"""Hub ids, against a server on loopback that answers as the Hub does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, ROOT, TOKEN, Hub

from core.checkpoint import headers as checkpoint


@pytest.fixture
def hub(tmp_path):
    result = Hub(tmp_path / "hf")
    yield result
    result.server.shutdown()
    result.server.server_close()


def repository(tmp_path, source, name="repo"):
    folder = shutil.copytree(source, tmp_path / name)
    for unwanted in ("pytorch_model.bin", "modeling_evil.py", "training_args.bin", "README.md"):
        (folder / unwanted).write_bytes(b"never to be fetched")
    return folder


def test_prune_a_hub_checkpoint(hub, tmp_path, tiny_gqa):
    hub.repos["owner/tiny"] = repository(tmp_path, tiny_gqa)
    out = tmp_path / "out"
    done = hub.run("prune", "owner/tiny", "--drop", "1,2", "--out", out, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "Fetching owner/tiny" in done.stderr
    info = checkpoint.inspect(out)
    assert info.blocks == 3
    assert json.loads((out / "pruning.json").read_text())["base_model"] == "owner/tiny"
    assert hub.cached() == {p.name for p in tiny_gqa.iterdir()} - {"README.md"}
    assert not any("evil" in path or ".bin" in path for _, path, _ in hub.requests)
    # The token goes to the Hub alone: no file and no line of output has it.
    assert TOKEN not in done.stdout + done.stderr
    for folder in (out, hub.home):
        for path in folder.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    # A second run takes the weights from the cache.
    hub.sent.clear()
    assert hub.run("prune", "owner/tiny", "--drop", "1", "--out", tmp_path / "b").returncode == 0
    assert hub.sent.get("model.safetensors", 0) == 0
    # And with the Hub gone, or switched off, too.
    for way in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        target = tmp_path / next(iter(way))
        done = hub.run("prune", "owner/tiny", "--drop", "1", "--out", target, **way)
        assert done.returncode == 0, done.stderr
        assert checkpoint.inspect(target).blocks == 4


def test_download_reports_bytes(hub, tmp_path, tiny_gqa):
    hub.repos["owner/tiny"] = repository(tmp_path, tiny_gqa)
    out = tmp_path / "out"
    script = (
        "import sys; from core.checkpoint import hub; from core.runs.progress import Progress\n"
        "class Shown(Progress):\n"
        "    def step(self, done, total, message=''): print(done, total, message)\n"
        "print(hub.fetch('owner/tiny@main', Shown()))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server.server_port}",
        "HF_HOME": str(out),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("model.safetensors" in line for line in lines) >= 2
    assert Path(lines[-1]).name == COMMIT


def test_inspect_reads_headers_only(hub, tmp_path, tiny_dir):
    # Larger than the 100 kB that the library asks for first.
    for name, options in (("one", {}), ("many", {"shard_bytes": 400_000})):
        hub.sent.clear()
        source = tiny_dir("gqa", hidden_size=128, head_dim=32, **options)
        hub.repos[f"owner/{name}"] = repository(tmp_path, source, name)
        done = hub.run("inspect", f"owner/{name}")
        assert done.returncode == 0, done.stderr
        said, local = json.loads(done.stdout), checkpoint.inspect(source).to_dict()
        for key in ("parameters", "block_parameters", "disk_bytes", "dtype", "shards", "tokenizer"):
            assert said[key] == local[key], key
        assert any("Only the headers" in warning for warning in said["warnings"])
        sent = sum(n for file, n in hub.sent.items() if file.endswith(".safetensors"))
        assert sent < local["disk_bytes"]
        assert not [file for file in hub.cached() if file.endswith(".safetensors")]
        done = hub.run("prune", f"owner/{name}", "--drop", "1", "--out", "x", "--dry-run")
        assert json.loads(done.stdout)["blocks_after"] == 4
        assert not [file for file in hub.cached() if file.endswith(".safetensors")]


def test_shards_are_read_in_parallel_and_no_further_than_their_headers(hub, tmp_path, tiny_dir):
    source = tiny_dir("gqa", hidden_size=128, head_dim=32, shard_bytes=400_000)
    hub.repos["owner/many"] = repository(tmp_path, source)
    shards = {p.name: p.stat().st_size for p in source.glob("*.safetensors")}
    assert len(shards) >= 3
    hub.together = 3  # a client that reads one after the other waits in vain
    done = hub.run("inspect", "owner/many")
    assert done.returncode == 0, done.stderr
    assert hub.most_open >= 3
    asked = [(p.rpartition("/")[2], r) for m, p, r in hub.requests if m == "GET" and r]
    assert sorted(asked) == [(name, "bytes=0-100000") for name in sorted(shards)]
    for name, size in shards.items():
        assert hub.sent[name] == min(size, 100_001)
    assert sum(hub.sent[name] for name in shards) < 0.5 * sum(shards.values())
    assert "Parse safetensors" not in done.stderr  # the library's bar is not ours


def test_a_header_longer_than_the_first_request_is_read_to_its_end(hub, tmp_path, tiny_dir):
    source = tiny_dir("gqa", hidden_size=128, head_dim=32)
    folder = repository(tmp_path, source)
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    header = json.dumps({**table, "__metadata__": {"note": "x" * 150_000}}).encode()
    data = len(header).to_bytes(8, "little") + header + whole[8 + length :]
    (folder / "model.safetensors").write_bytes(data)
    hub.repos["owner/long"] = folder
    done = hub.run("inspect", "owner/long")
    assert done.returncode == 0, done.stderr
    found, local = json.loads(done.stdout), checkpoint.inspect(folder).to_dict()
    for key in ("parameters", "block_parameters", "disk_bytes", "dtype", "shards"):
        assert found[key] == local[key], key
    assert hub.sent["model.safetensors"] == 100_001 + len(header)


def damaged(content, header=None, *, length=None, cut=0):
    """Return a safetensors file with another header, another length of it, or its end cut off."""
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size] if header is None else header
    size = len(header) if length is None else length
    content = size.to_bytes(8, "little") + header + content[8 + len(header) :]
    return content[: len(content) - cut]


def test_damaged_weights_are_named_with_the_reason(hub, tmp_path, tiny_gqa):
    good = (tiny_gqa / "model.safetensors").read_bytes()
    table = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])
    name = next(n for n in table if n != "__metadata__")
    wrong = json.dumps({**table, name: {**table[name], "shape": [3, 3]}}).encode()
    gap = json.dumps({n: v for n, v in table.items() if n != name}).encode()
    cases = {
        "cut-header": (good[:500], "model.safetensors is truncated: its header takes"),
        "short": (b"1234", "too small"),
        "huge": (damaged(good, length=1 << 40), "too big"),
        "a-list": (damaged(good, b"[1, 2]"), "it is not a JSON object"),
        "no-table": (damaged(good, b'{"a": 1}'), "'a' is not a JSON object"),
        "no-offsets": (
            damaged(good, b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}'),
            "its header cannot be read",
        ),
        "wrong-shape": (damaged(good, wrong), "does not match its shape [3, 3]"),
        "gap": (damaged(good, gap), "is damaged: "),
        "cut-end": (damaged(good, cut=64), "model.safetensors is truncated: it has"),
    }
    for case, (content, _) in cases.items():
        hub.repos[f"owner/{case}"] = repository(tmp_path, tiny_gqa, case)
        (tmp_path / case / "model.safetensors").write_bytes(content)
    script = (
        "import sys; from core.checkpoint import hub; from core.errors import CheckpointError\n"
        "for name in sys.argv[1:]:\n"
        "    try: hub.inspect('owner/' + name)\n"
        "    except CheckpointError as error: print(name, error)\n"
    )
    done = hub.python("-c", script, *cases)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == set(cases)
    for case, (_, reason) in cases.items():
        assert reason in lines[case], (case, lines[case])
        assert "another revision" in lines[case], lines[case]


def test_an_index_must_fit_the_files_on_the_hub(hub, tmp_path, tiny_dir):
    source = tiny_dir("gqa", hidden_size=128, head_dim=32, shard_bytes=400_000)
    folders = {n: repository(tmp_path, source, n) for n in ("lost", "outside", "unlisted", "moved")}
    hub.repos |= {f"owner/{name}": folder for name, folder in folders.items()}
    names = sorted(p.name for p in source.glob("*.safetensors"))
    (folders["lost"] / names[0]).unlink()
    (folders["unlisted"] / checkpoint.INDEX).unlink()
    for case, change in (("outside", "../config.json"), ("moved", names[1])):
        path = folders[case] / checkpoint.INDEX
        index = json.loads(path.read_text())
        tensor = next(n for n, file in index["weight_map"].items() if file == names[0])
        index["weight_map"][tensor] = change
        path.write_text(json.dumps(index))
    expected = {
        "lost": f"1 of {len(names)} weight files are missing in owner/lost: {names[0]}",
        "outside": "lists '../config.json', which is not a file next to it",
        "unlisted": f"has safetensors shards but no {checkpoint.INDEX}",
        "moved": f"in {names[1]}, but it is not there",
    }
    for case, reason in expected.items():
        done = hub.run("inspect", f"owner/{case}")
        assert done.returncode == 2, done.stderr
        assert reason in done.stderr


def test_without_the_hub_only_a_whole_copy_is_inspected(hub, tmp_path, tiny_gqa):
    hub.repos["owner/tiny"] = repository(tmp_path, tiny_gqa)
    assert hub.run("inspect", "owner/tiny").returncode == 0  # leaves config and tokenizer
    for way, why in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the Hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "the Hub is switched off (HF_HUB_OFFLINE)"),
    ):
        done = hub.run("inspect", "owner/tiny", **way)
        assert done.returncode == 2, done.stdout
        assert f"{why}; the checkpoint is only partly in the Hub's cache" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "prune"])
def test_refusals_are_explained(hub, tmp_path, tiny_gqa, command):
    hub.repos["owner/gated"] = repository(tmp_path, tiny_gqa, "gated")
    hub.gated.add("owner/gated")
    pickles = repository(tmp_path, tiny_gqa, "pickles")
    (pickles / "model.safetensors").unlink()
    hub.repos["owner/pickles"] = pickles
    rest = ["--drop", "1", "--out"] if command == "prune" else []

    def refused(name, **environment):
        target = [tmp_path / f"out-{len(hub.requests)}"] if rest else []
        done = hub.run(command, name, *rest, *target, **environment)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert TOKEN not in done.stderr
        return done.stderr

    said = refused("owner/gated")
    assert "is gated" in said
    assert "HF_TOKEN" in said
    assert "no such repository" in refused("owner/absent", HF_TOKEN=TOKEN)
    assert "no revision 'v9'" in refused("owner/pickles@v9")
    assert "pickles" in refused("owner/pickles")
    assert "cannot be reached" in refused("owner/gated", HF_ENDPOINT="http://127.0.0.1:9")
    assert "HF_HUB_OFFLINE" in refused("owner/gated", HF_HUB_OFFLINE="1")


def test_token_opens_a_gated_one(hub, tmp_path, tiny_gqa):
    hub.repos["owner/gated"] = repository(tmp_path, tiny_gqa)
    hub.gated.add("owner/gated")
    done = hub.run("inspect", "owner/gated", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks"] == 5
