"""Whether a model's own answer is kept: same final answer, length and repetition. No torch."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from core.data.diversity import loops, repetition

SHORTEST, LONGEST = 0.25, 4.0
"""Times the reference's characters that an answer may have. Chosen."""
LONG = 40
"""Characters from which a reference's length says something about that of an answer."""
MOST_REPEATED = 0.5
"""Share of an answer's 4-grams of tokens that may have occurred before. Chosen."""
SHORT_ANSWER = 5
"""Words up to which a whole reference is its final answer."""

REASONS = {
    "empty": "empty",
    "endless": "did not end",
    "repeats": "repeats itself",
    "short": "much shorter than the reference",
    "long": "much longer than the reference",
    "other": "another final answer",
}
"""Why an answer is not kept, in words."""

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_MARKED = (
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{([^{}]+)\}"),
    re.compile(r"\b(?:[Aa]nswer is|[Aa]nswer:)\s*([^\n]+)"),
)
"""What marks a final answer: GSM8K's, MATH's, and in words."""
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def problem(
    own: str, ids: Sequence[int], why: str, reference: str, check: str, *, open_ended: bool
) -> str:
    """Return why an answer is not kept, a key of `REASONS`; empty if it is.

    Args:
        own: the model's answer.
        ids: its tokens.
        why: why it ended, as in `core.model.decode.Written`.
        reference: the dataset's answer; empty if there is none.
        check: ``answer``, ``length`` or ``none``.
        open_ended: it continues a text, so it need not end by itself.
    """
    if not own.strip():
        return "empty"
    if check == "none":
        return ""
    if why == "loop" or loops(ids) or (repetition(ids) or 0.0) > MOST_REPEATED:
        return "repeats"
    if why == "limit" and not open_ended:
        return "endless"
    if check == "answer" and not open_ended and (wanted := final_answer(reference)):
        return "" if answers(own, wanted) else "other"
    if len(reference) >= LONG:
        times = len(own) / len(reference)
        return "short" if times < SHORTEST else "long" if times > LONGEST else ""
    return ""


def final_answer(text: str) -> str:
    """Return a reference's final answer: what is marked as one, or a whole short text."""
    for pattern in _MARKED:
        if found := pattern.findall(text):
            return normal(found[-1])
    return normal(text) if 0 < len(text.split()) <= SHORT_ANSWER else ""


def answers(own: str, wanted: str) -> bool:
    """Whether an answer's final answer is ``wanted``, as `final_answer` returns it.

    It is what the answer marks, its last number if the reference is one, or else its last sentence.
    """
    if any(pattern.search(own) for pattern in _MARKED):
        marked = final_answer(own)
        if marked == wanted or (_is_number(wanted) and _last_number(marked) == wanted):
            return True
    if _is_number(wanted):
        return _last_number(own) == wanted
    last = re.split(r"(?<=[.!?])\s+|\n+", own.strip())[-1]
    return f" {wanted} " in f" {normal(last)} "


def normal(text: str) -> str:
    """Return text in lower case without articles and punctuation; numbers as plain numbers."""
    text = text.strip().rstrip(".")
    if found := _NUMBER.fullmatch(text):
        return _plain(found[0])
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _plain(number: str) -> str:
    whole = number.replace(",", "").replace("$", "")
    if "." in whole:
        whole = whole.rstrip("0").rstrip(".")
    return whole


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _last_number(text: str) -> str:
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else ""
