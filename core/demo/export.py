"""Write the text files shipped with the demo: ``python -m core.demo.export [--out DIR]``.

They are the generator's output for fixed seeds, stored as files for tools that read files:
`heldout.txt`, `calibration.txt` and `train_sample.txt` (one story per line), `instructions.jsonl`
and `instructions_heldout.jsonl` (``instruction``, ``input``, ``output``), and
`questions_SKILL.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from core.demo import DATA
from core.demo.questions import SKILLS, questions
from core.demo.world import instructions, stories

SEED = 0


def as_jsonl(rows: Iterable[Mapping[str, object]]) -> str:
    """Format rows as one JSON object per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def files() -> dict[str, str]:
    """Return the name and the text of every shipped file."""
    texts = {
        "heldout.txt": "\n".join(stories(200, SEED, "heldout")) + "\n",
        "calibration.txt": "\n".join(stories(100, SEED, "calibration")) + "\n",
        "train_sample.txt": "\n".join(stories(300, SEED, "train")) + "\n",
        "instructions.jsonl": as_jsonl(instructions(400, SEED, "train")),
        "instructions_heldout.jsonl": as_jsonl(instructions(100, SEED, "heldout")),
    }
    for skill in SKILLS:
        texts[f"questions_{skill}.jsonl"] = as_jsonl(questions(skill, 200, SEED))
    return texts


def main(arguments: list[str] | None = None) -> None:
    """Write the files from the command line."""
    parser = argparse.ArgumentParser(prog="python -m core.demo.export", description=__doc__)
    parser.add_argument("--out", type=Path, default=DATA, help="folder for the files")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
