"""Wording that reads as translated must not come back: in strings, docstrings, comments and docs.

Run this file as a script for every place with its line: ``python tests/test_wording.py [FOLDER]``.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STORIES = ("core/demo/world.py", "core/demo/lexicon.py", "core/demo/questions.py")
"""What the demo's stories are made of; its sentences are data."""

PATTERNS = {
    r"\bwhere (it|there|they|none|that|nothing|not|no|one|any|all|this|these|neither|only)\b": (
        "'if' or 'when' for a condition; 'where' is for places"
    ),
    r"(?<![Tt]here )\b(is|are|was|were|be) no (?!longer|\w+ than|larger|faster)[a-z]": (
        "'is not a ...'"
    ),
    r"\bmend(s|ed|ing)?\b": "'fix'",
    r"\banew\b": "'again'",
    r"\bso (many|long a|few)\b|\b(after|for|than|until|by|most|least|of|to) so (much|long)\b": (
        "'so far', 'up to N', 'this long'"
    ),
    r"\bjudg(?!ed_on\b|ed\.csv\b)\w*": "'evaluate', 'evaluation'",  # (earlier files)
    r"\bdata sets?\b": "'dataset'",
    r"\bin all\b(?! \w+s\b)": "'in total', or nothing",
    r"[a-z]\(s\)": "a real plural",
    r"[\d}%] nat\b": "'nats' after a number",
    r"\b[Hh]ow (\w+ ){1,4}(is|are) called\b|\b[Hh]ow (\w+ )*call it\b": "'Label of ...'",
    r"\b[Aa]t (the )?most, \w": "'max ...'",
    r"\bis called like\b|\bthat there (is|are)\b": "say it directly",
    r"\b(is|are) wanted\b": "'needed', 'requested'",
    r"\bgone without\b|\bleft out, as\b|\bas near as\b": "say it directly",
    r"\bto be had\b|\bcan be had\b|\btakes? as long as\b": "say it directly",
    r"\bbe told\b|\bcannot be told\b|\bhas said why\b": "programs report; they do not tell",
    r"\b([Nn]one|[Nn]othing|empty|`) where\b|\b[Rr]aises .{1,40} where\b": "'if' for a condition",
    r"\b[Ss]ay (whether|what|which|how|who)\b": "'report', 'return', 'print'",
    r"\b(process|thread) of its own\b": "'a separate process'",
    r"\bgo(es)? on (where|with|by|from)\b": "'continue', 'resume'",
    r"\bif need be\b": "'if necessary'",
    r"\bin the median\b": "'median N'",
}
NAMES = re.compile(r"judg|mended|anew", re.IGNORECASE)


def texts(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of a file's prose: strings and comments of code, all of a .md."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return list(enumerate(source.splitlines(), 1))
    found = []
    kinds = (tokenize.STRING, tokenize.COMMENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            lines = token.string.splitlines()
            found += [(token.start[0] + i, line) for i, line in enumerate(lines)]
        elif token.type == tokenize.NAME and NAMES.search(token.string):
            found.append((token.start[0], token.string))
    return found


def files() -> list[Path]:
    """Return the files whose words people read."""
    code = [p for d in ("core", "pages", "bench") for p in (ROOT / d).rglob("*.py")]
    docs = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    every = [*code, ROOT / "app.py", *docs]
    return sorted(p for p in every if str(p.relative_to(ROOT)) not in STORIES)


def places(path: Path) -> list[str]:
    """Return every place of a file with a pattern that must not come back."""
    name = path.relative_to(ROOT)
    found = []
    for line, text in texts(path):
        for pattern, better in PATTERNS.items():
            if match := re.search(pattern, text):
                found.append(f"{name}:{line}: '{match[0]}' -> {better}")
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_finds_what_it_is_for(pattern):
    examples = (
        "None where there is none", "it is no run", "mend it", "begun anew", "so many rows",
        "text to judge by", "a data set", "5 blocks in all", "column(s)", "0.1 nat",
        "How X is called", "At most, GiB", "memory that there is", "S are wanted",
        "gone without a word", "more than can be had", "cannot be told",
        "None where it has no head", "say what it takes", "in a process of its own",
        "goes on with it", "started if need be", "2 % in the median",
    )  # fmt: skip
    assert any(re.search(pattern, text) for text in examples)


def test_no_translated_wording():
    found = [place for path in files() for place in places(path)]
    assert not found, f"{len(found)} places:\n" + "\n".join(found[:40])


if __name__ == "__main__":
    wanted = tuple(sys.argv[1:]) or ("",)
    rows = [r for p in files() for r in places(p) if r.startswith(wanted)]
    print(*rows, f"{len(rows)} places", sep="\n")
