"""Which text a recipe calibrates and trains on, and which it evaluates on. No torch here.

``--data`` is one SOURCE, part of which is held out for evaluation, or ``TRAIN,EVAL``. The bundled
texts and WikiText-2 have evaluation text of their own.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from core.checkpoint import locate
from core.checkpoint.vocabulary import AUTO, text_of
from core.data import sources
from core.errors import InputError, OptionError
from core.recipes.chain import Chain
from core.recipes.spec import RecipeSpec
from core.runs import workspace

WIKITEXT2 = ("hub:Salesforce/wikitext/wikitext-2-raw-v1:train:text", "wikitext2")
"""Its training split, and its test split for evaluation."""
REAL = ("english", "wikitext2")
"""Two texts to compare on a real model."""
INSTRUCTIONS, STORIES = "demo-instructions", "demo-stories"
"""What `split` takes besides SOURCEs: the questions of the demo world, and its text."""
HELD = 200
"""Maximum number of rows held out of a source; a tenth of the source if that is fewer."""
SPLIT_SEED = 402


def data_of(spec: RecipeSpec) -> str:
    """Return ``--data``, by default the text that fits the checkpoint: demo or english."""
    folder = locate.local_folder(spec.checkpoint) or Path(spec.checkpoint)
    return text_of(spec.data, folder)


def given_apart(spec: RecipeSpec) -> tuple[str, str] | None:
    """Return the SOURCEs to work on and to evaluate on; None if a single one is to be split.

    Raises `OptionError` if ``--data`` names more than two.
    """
    data = data_of(spec)
    if data in sources.BUNDLED:
        return data, data  # its calibration and evaluation rows are disjoint
    if spec.data == "wikitext2":
        return WIKITEXT2
    return two_sources(spec, "source", "TRAIN.jsonl,EVAL.txt") if "," in spec.data else None


def apart(chain: Chain) -> tuple[str, str]:
    """Return the SOURCEs to work on and to evaluate on; splits a single one."""
    return given_apart(chain.spec) or split(chain, chain.spec.data, "text")


def two_sources(spec: RecipeSpec, what: str, example: str) -> tuple[str, str] | None:
    """Return the two of ``--data A,B``, or None for the demo's two.

    By default `REAL` for checkpoints that do not have the demo's vocabulary. Raises `OptionError`
    if ``--data`` does not name two.
    """
    if data_of(spec) == "demo":
        return None
    if spec.data in ("", AUTO):
        return REAL
    found = [part.strip() for part in spec.data.split(",") if part.strip()]
    if len(found) != 2:
        raise OptionError(
            f"--data '{spec.data}': this recipe takes two {what}s, got {len(found)}.",
            f"Use --data {example}.",
        )
    return found[0], found[1]


def split(chain: Chain, source: str, name: str) -> tuple[str, str]:
    """Write the training and evaluation rows of a SOURCE; return the paths of both files.

    `INSTRUCTIONS` and `STORIES` are the demo's.
    """
    train, held = (chain.folder / "data" / f"{name}-{use}.jsonl" for use in ("train", "heldout"))
    if not (train.is_file() and held.is_file()):
        rows, heldout = _rows(source)
        for path, found in ((train, rows), (held, heldout)):
            lines = (json.dumps(row, default=str) + "\n" for row in found)
            workspace.write_text(path, "".join(lines))
    return str(train), str(held)


def _rows(source: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if source == INSTRUCTIONS:
        found, heldout = (list(sources.instruction_rows("demo", u)) for u in ("train", "heldout"))
        return found, heldout[:HELD]
    if source == STORIES:
        stories = (sources.text_rows("demo", use) for use in ("train", "heldout"))
        found, heldout = ([{"text": text} for text in texts] for texts in stories)
        return found, heldout[:HELD]
    if source == "english":
        return sources.rows_of(source, "train"), sources.rows_of(source, "heldout")
    rows = sources.rows_of(source, "train")
    if len(rows) < 2:
        raise InputError(
            f"{source} has too few rows ({len(rows)}): at least 2 are needed, as some are held out "
            "for evaluation.",
            "Use a text with several lines, or two sources: --data TRAIN,EVAL.",
        )
    random.Random(SPLIT_SEED).shuffle(rows)
    count = min(HELD, max(1, len(rows) // 10))
    return rows[count:], rows[:count]
