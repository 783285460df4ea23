"""The longer demonstrations: ``make proof``. Each writes its command and output to docs/results.

The whole path on the demo checkpoint, and on a real one where ../shared/real is there: inspect,
importance, plan, prune, and the smaller checkpoint continued by stock transformers.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
REAL = ROOT.parent / "shared" / "real"
CONTINUE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=60, do_sample=False, pad_token_id=0)
print(tokenizer.decode(out[0], skip_special_tokens=True))
"""


class Record:
    """Commands and what they printed, as Markdown."""

    def __init__(self, title: str, folder: str) -> None:
        self.lines = [f"# {title}", "", "Written by `make proof`.", ""]
        self.folder = folder

    def run(self, *argv: str, shown: str = "") -> str:
        """Run a command, keep what it printed (the temporary folder shown as DIR)."""
        done = subprocess.run(
            [sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{shlex.join(argv)} failed:\n{done.stderr}")
        command = shown or "python " + shlex.join(argv)
        self.block(f"$ {command}\n{done.stdout.strip() or done.stderr.strip()}")
        return done.stdout

    def block(self, text: str) -> None:
        clean = text.replace(self.folder, "DIR").replace(str(ROOT) + "/", "")
        self.lines += ["```", clean.replace(str(REAL), "../shared/real"), "```", ""]

    def file(self, path: Path) -> None:
        self.lines += [f"{path.name}:", ""]
        self.block(path.read_text().strip())

    def save(self, name: str) -> None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / name).write_text("\n".join(self.lines))
        print(f"docs/results/{name}")


def whole_path(checkpoint: str, text: str, prompt: str, count: int, title: str, name: str) -> None:
    """Inspect, score, plan, measure the curve, prune, and load the result elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEPTHCUT_WORKSPACE"] = folder
        record = Record(title, folder)
        record.run("-m", "core", "importance", checkpoint, "--calibration", text,
                   "--out", f"{folder}/scores")  # fmt: skip
        record.file(Path(folder) / "scores" / "blocks.csv")
        record.file(Path(folder) / "scores" / "summary.json")
        plan = record.run("-m", "core", "plan", f"{folder}/scores", "--criterion", "ppl",
                          "--count", str(count), "--checkpoint", checkpoint)  # fmt: skip
        Path(folder, "plan.json").write_text(plan)
        record.run("-m", "core", "curve", checkpoint, "--scores", f"{folder}/scores",
                   "--out", f"{folder}/curve")  # fmt: skip
        record.file(Path(folder) / "curve" / "curve.csv")
        record.run("-m", "core", "prune", checkpoint, "--plan", f"{folder}/plan.json",
                   "--out", f"{folder}/smaller")  # fmt: skip
        for which in (checkpoint, f"{folder}/smaller"):
            path = str(ROOT / "core/demo/checkpoint") if which == "demo" else which
            shown = f"stock transformers, greedy, {which}"
            record.run("-c", CONTINUE, path, prompt, shown=shown)
        record.save(name)


def main() -> None:
    whole_path(
        "demo",
        "demo",
        "Once upon a time there was",
        3,
        "The whole path on the demo",
        "proof_demo.md",
    )
    if REAL.is_dir():
        text = str(REAL / "wikitext2_test.txt")
        whole_path(str(REAL / "stories260k"), text, "Once upon a time", 1,
                   "The whole path on stories260K", "proof_stories260k.md")  # fmt: skip


if __name__ == "__main__":
    main()
