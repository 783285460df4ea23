"""What ten calibration rows of a large source cost, against reading everything.

    python -m bench.data [--megabytes 200] [--out FOLDER]

The same text is stored as JSON lines, JSON array, CSV, gzip, Parquet and a saved dataset. In a
separate process each, ten rows of 128 tokens are drawn as importance draws them, and all rows are
read into a list, as they once were for every run. Reported are the CPU seconds and the growth of
the process's peak memory, and whether all files gave the same rows. Writes
docs/results/data_bench.md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = ("ten rows", "all rows")
MIB = 1 << 20


class Words:
    """A tokenizer that costs nothing: one token per word."""

    bos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the length of every word."""
        return [len(word) for word in text.split()]


def make(folder: Path, megabytes: int) -> list[Path]:
    """Write the same rows in every layout; return the files."""
    kinds = ("jsonl", "jsonl.gz", "json", "csv", "parquet")
    paths = [*(folder / f"rows.{kind}" for kind in kinds), folder / "saved"]
    if all(path.exists() for path in paths):
        return paths
    from core.data import english

    words = " ".join(english.documents("calibration")).split()
    twice = words * 2
    draw = random.Random(0)
    texts, size = [], 0
    while size < megabytes * 1_000_000:
        at = draw.randrange(len(words))
        texts.append(" ".join(twice[at : at + draw.randint(60, 600)]))
        size += len(texts[-1])
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "rows.jsonl"
    with lines.open("w") as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    with gzip.open(folder / "rows.jsonl.gz", "wt", compresslevel=3) as file:
        file.writelines(json.dumps({"text": text, "url": "x"}) + "\n" for text in texts)
    (folder / "rows.json").write_text(json.dumps([{"text": text} for text in texts]))
    with (folder / "rows.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("text", "url"), *((text, "x") for text in texts)])
    import datasets

    datasets.disable_progress_bars()
    found = datasets.Dataset.from_dict({"text": texts})
    found.to_parquet(str(folder / "rows.parquet"))
    found.save_to_disk(str(folder / "saved"))
    return paths


def peak_mib() -> float:
    """Return this process's peak memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(source: str, way: str) -> dict[str, Any]:
    """Do one thing in this process; return seconds of CPU, MiB of memory and a hash of the rows."""
    from core.data import calibration, sources

    if Path(source).is_dir():
        import datasets  # noqa: F401  the library itself is not what is measured
    if source.endswith(".parquet"):
        import pyarrow.parquet  # noqa: F401
    before = peak_mib()
    began = time.process_time()
    if way == "all rows":
        found: Any = len(sources.rows_of(source))
    else:
        found = calibration.sample(source, Words(), 10, 128, 1234).rows
    return {
        "seconds": time.process_time() - began,
        "mib": peak_mib() - before,
        "rows": hash(json.dumps(found)) if way == "all rows" else json.dumps(found),
    }


def main() -> int:
    """Make the files, measure each in a separate process, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--out", default="/tmp/depthcut-data")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(*asked.one)))
        return 0
    lines = [
        "| stored as | size (MiB) | ten rows: CPU s | MiB of memory | all rows: CPU s | MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    drawn = set()
    for path in make(Path(asked.out), asked.megabytes):
        cells = [path.name, f"{_size(path) / MIB:.0f}"]
        for way in WAYS:
            call = [sys.executable, "-m", "bench.data", "--one", str(path), way]
            done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT)
            found = json.loads(done.stdout.splitlines()[-1])
            cells += [f"{found['seconds']:.2f}", f"{found['mib']:.0f}"]
            if way == WAYS[0]:
                drawn.add(found["rows"])
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    same = "All of them gave the same ten rows." if len(drawn) == 1 else "THE ROWS DIFFER."
    page = ROOT / "docs/results/data_bench.md"
    page.write_text(PAGE.format(megabytes=asked.megabytes, table="\n".join(lines), same=same))
    return 0 if len(drawn) == 1 else 1


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in files)


PAGE = """# Ten calibration rows of a large source

`python -m bench.data`: {megabytes} MB of text, stored in six ways; ten rows of 128 tokens drawn
with a seed, against reading all rows, as every run did before. Measured: CPU seconds, and growth of
the process's peak memory. A tokenizer that splits at spaces stands in for a real one, which costs
the same for both.

{table}

{same} Of a large source the first 100,000 rows or 16 million characters are shuffled with the seed,
whichever comes first; the rest is not read. That depends on the rows alone and not on how they are
stored. A smaller source is shuffled as a whole.
"""

if __name__ == "__main__":
    sys.exit(main())
