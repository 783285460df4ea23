import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.checkpoint import headers
from core.errors import Cancelled, OutputError, PlanError
from core.prune import depth
from core.prune.results import Pruning
from core.runs.progress import Progress

torch.set_num_threads(1)
CASES = [(variant, None) for variant in tiny.VARIANTS] + [("gqa", 40_000), ("tied", 40_000)]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def skipping(model, drop):
    """Make the blocks of `drop` identities; no block is removed or renumbered."""
    for block in drop:
        layer = model.model.layers[block]
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model


@pytest.mark.parametrize(("variant", "shard_bytes"), CASES)
@pytest.mark.parametrize("drop", [(2,), (0, 3)])
def test_result_equals_the_original_with_blocks_skipped(
    tiny_dir, tmp_path, variant, shard_bytes, drop
):
    source = tiny_dir(variant, shard_bytes=shard_bytes)
    record = depth.prune(source, drop, tmp_path / "out")
    pruned = load(tmp_path / "out")
    # Longer than the sliding window of 16, so that the kind of each kept layer shows.
    ids = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = skipping(load(source), drop)(ids, use_cache=False).logits
        dense = load(source)(ids, use_cache=False).logits
        got = pruned(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - dense).abs().max() > 0.1
    assert sum(p.numel() for p in pruned.parameters()) == record.parameters_after


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_generates_with_its_cache(tiny_dir, tmp_path, variant):
    depth.prune(tiny_dir(variant), (1, 3), tmp_path / "out")
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("Ann sees the red ball in the garden.", return_tensors="pt").input_ids
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **options)
        plain = model.generate(ids, use_cache=False, **options)
    assert cached.shape[1] == ids.shape[1] + 24
    assert torch.equal(cached, plain)


def test_bytes_names_and_shards(tiny_dir, tmp_path):
    source = tiny_dir("gqa", shard_bytes=40_000, dtype="bfloat16", num_hidden_layers=12)
    out = tmp_path / "out"
    depth.prune(source, (0, 4, 5), out)
    keep = [1, 2, 3, 6, 7, 8, 9, 10, 11]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    size = 0
    for new in range(len(keep)):
        prefix = f"model.layers.{new}."
        names = [name for name in index["weight_map"] if name.startswith(prefix)]
        assert len(names) == 9
        for name in names:
            old = name.replace(prefix, f"model.layers.{keep[new]}.")
            with safe_open(out / index["weight_map"][name], "pt") as got:
                tensor = got.get_tensor(name)
            assert torch.equal(tensor, original(source, old))
    for tensor in headers.TensorIndex.read(out).entries.values():
        size += tensor.parameters * 2
    assert index["metadata"]["total_size"] == size


def original(folder, name):
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / weight_map[name], "pt") as handle:
        return handle.get_tensor(name)


def test_per_block_config_fields(tiny_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_dir("qwen2"), source)
    config = json.loads((source / "config.json").read_text())
    config["eos_token_id"] = [2, 3, 4, 5, 6]  # as long as there are blocks, but not one a block
    config["rope_parameters"]["short_factor"] = [1.0] * 5
    config["per_layer"] = {"widths": [10, 11, 12, 13, 14]}
    (source / "config.json").write_text(json.dumps(config))
    depth.prune(source, (1, 4), tmp_path / "out")
    got = json.loads((tmp_path / "out" / "config.json").read_text())
    assert got["num_hidden_layers"] == 3
    assert got["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert got["max_window_layers"] == 2
    assert got["eos_token_id"] == [2, 3, 4, 5, 6]
    assert got["rope_parameters"]["short_factor"] == [1.0] * 5
    assert got["per_layer"] == {"widths": [10, 12, 13]}


def test_a_variant_of_a_variant_knows_its_line(tiny_gqa, tmp_path):
    depth.prune(tiny_gqa, (1,), tmp_path / "a", name="owner/base", criterion="ppl")
    record = depth.prune(tmp_path / "a", (0, 2), tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "pruning.json").read_text())
    assert saved == record.to_dict()
    assert Pruning.read(tmp_path / "b") == record
    assert saved["base_model"] == "owner/base"
    assert saved["dropped_original"] == [0, 3]
    assert saved["original_blocks"] == [2, 4]
    assert saved["lineage"] == [
        {
            "method": "depth",
            "source": "owner/base",
            "criterion": "ppl",
            "dropped": [1],
            "attention": [],
            "mlp": [],
            "healed": "",
        }
    ]
    card = (tmp_path / "b" / "README.md").read_text()
    assert "base_model: owner/base" in card
    assert "# owner/base without 2 blocks" in card
    assert "| made from | a |" in card
    assert str(tmp_path) not in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = skipping(load(tiny_gqa), (0, 1, 3))(ids, use_cache=False).logits
        torch.testing.assert_close(load(tmp_path / "b")(ids).logits, expected)


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ((), "No blocks"),
        ((0, 1, 2, 3, 4), "All 5"),
        ((5,), "Block 5 does not exist"),
        ((-1,), "Block -1 does not exist"),
        ((1, 1), "twice"),
    ],
)
def test_refuses(tiny_gqa, tmp_path, drop, says):
    with pytest.raises(PlanError, match=says):
        depth.prune(tiny_gqa, drop, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class CancelAt(Progress):
    def step(self, done, total, message=""):
        raise Cancelled("Cancelled on request.")


@pytest.mark.parametrize("in_run_directory", [False, True])
def test_cancel_and_full_disk_leave_nothing(tiny_gqa, tmp_path, monkeypatch, in_run_directory):
    out = tmp_path / "out"
    if in_run_directory:
        (out / ".run").mkdir(parents=True)
    with pytest.raises(Cancelled):
        depth.prune(tiny_gqa, (1,), out, progress=CancelAt())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OutputError, match="No space left"):
        depth.prune(tiny_gqa, (1,), out)
    left = [p.name for p in (out if in_run_directory else tmp_path).iterdir()]
    assert left == ([".run"] if in_run_directory else [])


def test_too_little_space_is_told_before_writing(tiny_gqa, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match="has only 1,000 B free"):
        depth.prune(tiny_gqa, (1,), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_copy_without_help_from_the_kernel(tiny_gqa, tmp_path, monkeypatch):
    depth.prune(tiny_gqa, (1,), tmp_path / "a")

    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    depth.prune(tiny_gqa, (1,), tmp_path / "b")
    monkeypatch.delattr(os, "copy_file_range")
    depth.prune(tiny_gqa, (1,), tmp_path / "c")
    first = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == first
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == first


def test_existing_output_is_kept_unless_asked(tiny_gqa, tiny_dir, tmp_path):
    out = tmp_path / "out"
    sharded = tiny_dir("gqa", shard_bytes=40_000)
    depth.prune(sharded, (1,), out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        depth.prune(tiny_gqa, (2,), out)
    with pytest.raises(OutputError, match="itself"):
        depth.prune(out, (1,), out, overwrite=True)
    depth.prune(tiny_gqa, (2, 3), out, overwrite=True)
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert headers.inspect(out).blocks == 3
    assert (out / "notes.txt").read_text() == "mine"


def test_killed_while_writing_never_looks_finished(tiny_gqa, tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys, time; from core.prune import depth, staging\n"
        "real = staging.publish\n"
        "def slow(partial, target):\n"
        "    print('written', flush=True); time.sleep(60)\n"
        "staging.publish = slow\n"
        "depth.prune(sys.argv[1], (1,), sys.argv[2])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tiny_gqa, out], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "written\n"
    with pytest.raises(OutputError, match="Another process"):
        depth.prune(tiny_gqa, (1,), out)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    depth.prune(tiny_gqa, (1,), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_memory_stays_flat(tmp_path):
    """256 MiB of weights in a process that may not grow by more than 64 MiB."""
    config = {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 256,
        "num_hidden_layers": 10, "num_attention_heads": 8, "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
    }  # fmt: skip
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    from core.checkpoint import families

    tensors, offset = {}, 0
    for name, shape in families.expected_shapes(config).items():
        end = offset + families.count(shape) * 2
        tensors[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(tensors).encode()
    with (source / "model.safetensors").open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.truncate(8 + len(header) + offset)
    script = (
        "import os, resource, sys\nfrom core.checkpoint import headers\n"
        "from core.prune import depth\n"
        "if sys.argv[3] == 'plain': del os.copy_file_range\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "depth.prune(sys.argv[1], (3, 4), sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    assert offset > 200 << 20
    for way in ("kernel", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", script, source, tmp_path / way, way],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(done.stdout) < 64 * 1024


def test_command_line(tiny_gqa, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"drop": [3, 1], "blocks": 5, "criterion": "taylor"}))
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_gqa), "--plan", str(plan), "--out", str(out)]
    assert main([*arguments, "--dry-run"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert not out.exists()
    start = time.time()
    assert main(arguments) == 0
    saved = json.loads((out / "pruning.json").read_text())
    assert saved["dropped"] == said["dropped"] == [3, 1]
    assert saved["parameters_after"] == said["parameters_after"]
    assert saved["criterion"] == "taylor"
    assert (out / "config.json").stat().st_mtime >= start - 1
    assert main(arguments) == 2
    assert main([*arguments, "--drop", "1"]) == 2
    assert main(["prune", str(tiny_gqa), "--drop", "7", "--out", str(tmp_path / "x")]) == 2
    assert "Block 7 does not exist" in capsys.readouterr().err
    plan.write_text(json.dumps({"drop": [1], "blocks": 9}))
    assert main(["prune", str(tiny_gqa), "--plan", str(plan), "--out", str(tmp_path / "y")]) == 2
    assert "9 blocks" in capsys.readouterr().err


def test_dry_run_of_a_config_imports_no_torch(tiny_gqa, tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(tiny_gqa / "config.json", folder)
    script = (
        "import sys; from core.__main__ import main\n"
        f"assert main(['prune', {str(folder)!r}, '--drop', '1', '--out', 'x', '--dry-run']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blocks_after"] == 4
