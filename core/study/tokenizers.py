"""Whether the tokenizers of several checkpoints are the same."""

from __future__ import annotations

from collections.abc import Iterable

from core.checkpoint.vocabulary import tokenizer_key
from core.study.kinds import Variant


def tokenizer_conflict(chosen: Iterable[Variant]) -> str:
    """Return a sentence if the variants have different tokenizers, otherwise an empty string.

    Perplexity is per token, so it is not comparable across tokenizers.
    """
    groups: dict[str, list[str]] = {}
    for variant in chosen:
        key = tokenizer_key(variant.folder) if variant.folder else ""
        if key:
            groups.setdefault(key, []).append(variant.label)
    if len(groups) < 2:
        return ""
    names = " and ".join(group[0] for group in list(groups.values())[:2])
    return (
        f"{names} have different tokenizers, so their perplexities are not comparable. "
        "Leave one of them out, or compare only latency, memory and task scores."
    )
