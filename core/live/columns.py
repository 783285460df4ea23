"""The columns of the playground: the models they can show, and their codes in the URL.

A column is ``dense``, ``skip:3,5;attention=7`` (the dense model without these blocks and parts of
blocks, nothing copied), or ``run:ID`` (a variant of the study: depth, width, retrained, quantized).
"""

from __future__ import annotations

import difflib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.checkpoint.chat import has_template
from core.checkpoint.drop import Removal
from core.checkpoint.locate import local_folder
from core.errors import DepthcutError
from core.live.protocol import model_values
from core.live.replies import Begun, Written
from core.prune import toggle
from core.runs.workspace import Workspace
from core.study import Variant, study
from core.words import block_ranges

MOST = 4
"""Maximum number of columns."""


@dataclass(frozen=True)
class Column:
    """One column: its code in the URL, its title, and its model."""

    code: str
    title: str
    checkpoint: str
    skip: Removal = Removal()

    @property
    def question(self) -> dict[str, Any]:
        """The fields of the live model's questions that name the model."""
        return model_values(self.checkpoint, self.skip)


def variants(where: Workspace, name: str) -> list[Variant]:
    """Return the study's loadable checkpoints, the dense one first."""
    try:
        found = study(where, name)
    except DepthcutError:
        return [Variant(name, "dense", "dense")]
    return [found.dense, *(v for v in found.variants[1:] if v.record and v.folder)]


def column(code: str, name: str, known: Sequence[Variant]) -> Column | None:
    """Return the column that ``code`` names for checkpoint ``name``; None if there is none.

    ``known`` comes from `variants`; ``skip:`` columns skip blocks of ``name`` itself.

    Raises `OptionError` for blocks that cannot be parsed.
    """
    if code == "dense":
        return Column(code, "dense", known[0].id or name)
    if code.startswith("skip:"):
        skip = toggle.removal_from_text(code.removeprefix("skip:"))
        title = f"without {skip.text}" if skip else "no blocks skipped"
        if skip and not skip.partial:
            title = f"without {block_ranges(skip.drop)}"
        return Column(code, title, name, skip)
    return of_runs(known).get(code)


def of_runs(known: Sequence[Variant]) -> dict[str, Column]:
    """Return the columns of variants, by their codes; ``known`` comes from `variants`."""
    made = ((v, v.record.id) for v in known[1:] if v.record)
    return {f"run:{run}": Column(f"run:{run}", label_of(v), run) for v, run in made}


def label_of(variant: Variant) -> str:
    """Return a variant's label in a list: its kind and its name."""
    return f"{variant.kind}: {variant.label}"


def from_address(text: str) -> list[str]:
    """Return the codes in ``?columns=``, which are joined by ``|``; up to four."""
    return [code for code in text.split("|") if code][:MOST]


def to_address(codes: Sequence[str]) -> str:
    """Return the codes in the form used in the URL."""
    return "|".join(codes)


def has_chat_template(name: str) -> bool:
    """Whether the checkpoint's tokenizer has a chat template, according to its files."""
    return has_template(local_folder(name))


def examples(name: str) -> dict[str, str]:
    """Return example prompts: title -> text; for the demo, stories of its own world."""
    if name != "demo":
        return {
            "A tower": "The Leaning Tower of Pisa is known for",
            "A story": "Once upon a time",
            "A fact": "The capital of France is",
        }
    from core.demo.questions import SKILLS, questions

    found = {"A story begins": "Tom has two red apples."}
    for skill in SKILLS[:5]:
        found[skill.capitalize()] = str(questions(skill, 1, 7)[0]["context"])
    return found


_PARTS = re.compile(r"\s+|\w+|[^\w\s]")


def marked(text: str, reference: str) -> str:
    """Return ``text`` as HTML with the words that differ from ``reference`` marked.

    The comparison is word by word, so that changing one word leaves the rest unmarked.
    """
    ours, theirs = _PARTS.findall(text), _PARTS.findall(reference)
    matcher = difflib.SequenceMatcher(None, theirs, ours, autojunk=False)
    pieces: list[str] = []
    for kind, _, _, first, last in matcher.get_opcodes():
        part = html.escape("".join(ours[first:last]))
        if part:
            pieces.append(part if kind == "equal" or not part.strip() else f"<mark>{part}</mark>")
    return "".join(pieces)


def figures(begun: Begun | None, result: Written | None) -> dict[str, str]:
    """Return a column's measurements: name -> value with its unit."""
    found: dict[str, str] = {}
    if begun:
        found["parameters"] = f"{begun.parameters:,}"
        found["blocks"] = f"{begun.blocks}"
        peak = result.peak_mib if result else None
        found["memory"] = (
            f"{peak:,.1f} MiB peak"
            if peak
            else f"{begun.weights_mib:,.1f} + {begun.cache_mib:,.1f} MiB cache"
        )
    if result:
        first, rate = result.first_token_s, result.tokens_per_s
        found["first token"] = f"{1000 * first:,.0f} ms" if first is not None else "none"
        found["speed"] = f"{rate:,.1f} tokens/s" if rate else "none"
        found["tokens"] = f"{result.tokens:,}" + (", ended" if result.ended else "")
    return found
