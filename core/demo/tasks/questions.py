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


SKILLS = ("possession", "counting", "location", "colour", "order", "cause", "opposite", "compare")


def load_open(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the questions of all skills in turn, to be answered in the model's own words."""
    by_skill = [load(skill)["test"].to_list() for skill in SKILLS]
    rows = [row for together in zip(*by_skill, strict=False) for row in together]
    return {"test": datasets.Dataset.from_list(rows)}


def open_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether what the model wrote begins with the answer, and whether it contains it."""
    words = [word.strip(".,!?\"'").lower() for word in results[0].split()]
    wanted = doc["choices"][doc["answer"]].lower().split()
    places = range(len(words) - len(wanted) + 1)
    return {
        "exact_match": float(words[: len(wanted)] == wanted),
        "flexible_match": float(any(words[at : at + len(wanted)] == wanted for at in places)),
    }
