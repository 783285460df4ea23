"""Pruning compared with a plain file copy: bytes per second and peak memory, in one run.

    python bench/prune.py [--gib 2] [--repeats 3] [--folder DIR]

Writes a LLaMA-shaped checkpoint of random bytes, then alternates between copying its weight files
(shutil.copyfile, like `cp`) and dropping every fourth block. Each runs in a separate process; a
prune reports the growth of its own peak memory. Rates are bytes written per second, the median of
the repeats, with a warm page cache, both without waiting for the disk (fsync).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from core.checkpoint import families

CHILD = """
import json, resource, sys, time
from core.prune import depth
if sys.argv[4] == "plain":
    import os
    del os.copy_file_range
usage = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = usage(), time.perf_counter()
depth.prune(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])
seconds, peak = time.perf_counter() - start, usage()
print(json.dumps({"s": seconds, "peak_mib": peak, "grown": peak - before}))
"""


COPY = """
import json, pathlib, shutil, sys, time
source, target = map(pathlib.Path, sys.argv[1:])
start = time.perf_counter()
target.mkdir()
for path in source.glob("*.safetensors"):
    shutil.copyfile(path, target / path.name)
print(json.dumps({"s": time.perf_counter() - start}))
"""


def make(folder: Path, gib: float) -> int:
    """Write a two-shard checkpoint of about `gib` GiB in bfloat16; return its blocks."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_attention_heads": 16,
        "vocab_size": 32000,
    }
    one = sum(map(families.count, families.block_shapes(config).values())) * 2
    config["num_hidden_layers"] = blocks = max(4, round((gib * 2**30 - 262_144_000) / one))
    (folder / "config.json").write_text(json.dumps(config))
    items = list(families.expected_shapes(config).items())
    weight_map = {}
    for number, part in enumerate((items[: len(items) // 2], items[len(items) // 2 :]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        table, offset = {}, 0
        for name, shape in part:
            end = offset + families.count(shape) * 2
            table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        header = json.dumps(table).encode()
        noise = os.urandom(1 << 24)
        with (folder / file).open("wb") as handle:
            handle.write(len(header).to_bytes(8, "little") + header)
            for at in range(0, offset, len(noise)):
                handle.write(noise[: min(len(noise), offset - at)])
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return blocks


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def child(code: str, *arguments: object) -> dict[str, float]:
    """Run code in a separate process; return the JSON it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        source = root / "source"
        source.mkdir()
        blocks = make(source, options.gib)
        drop = list(range(2, blocks, 4))
        rates: dict[str, list[float]] = {"copy": [], "prune": [], "prune without kernel copy": []}
        peak = grown = 0.0
        for turn in range(options.repeats + 1):
            out = root / "out"
            seconds = child(COPY, source, out)["s"]
            rates["copy"].append(weight_bytes(out) / seconds / 2**30)
            shutil.rmtree(out)
            for way, label in (("kernel", "prune"), ("plain", "prune without kernel copy")):
                cost = child(CHILD, source, json.dumps(drop), out, way)
                rates[label].append(weight_bytes(out) / cost["s"] / 2**30)
                peak, grown = max(peak, cost["peak_mib"]), max(grown, cost["grown"])
                shutil.rmtree(out)
            if turn == 0:  # the first turn warms the page cache
                rates = {label: [] for label in rates}
        median = {label: statistics.median(values) for label, values in rates.items()}
        print(f"{weight_bytes(source) / 2**30:.2f} GiB, {blocks} blocks, {len(drop)} dropped")
        for label, value in median.items():
            print(
                f"{label:<28}{value:6.2f} GiB/s   {value / median['copy']:5.2f} x the copy's rate"
            )
        print(f"peak memory of the pruning process {peak:.0f} MiB, {grown:.0f} MiB above its start")


if __name__ == "__main__":
    main()
