"""Load the demo world's questions for lm-eval: the shipped files, from wherever it is called."""

import json
from pathlib import Path
from typing import Any

import datasets

DATA = Path(__file__).parents[1] / "data"


def load(skill: str, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the questions of one skill as the split ``test``."""
    lines = (DATA / f"questions_{skill}.jsonl").read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
