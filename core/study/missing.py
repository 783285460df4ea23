"""Which variants of a study have not been evaluated in a given way yet."""

from __future__ import annotations

from collections.abc import Sequence

from core.evaluate import suites
from core.study.kinds import Quality, Study, Task, Variant
from core.study.settings import same_text


def unevaluated(
    study: Study,
    *,
    texts: Sequence[str] = (),
    windows: Sequence[int] = (),
    bos: str = "once",
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    prompting: str = "",
) -> tuple[Variant, ...]:
    """Return the checkpoints of a study that lack one of these perplexities or tasks.

    The options are those of ``evaluate``, with ``auto`` replaced; ``prompting`` in words. A result
    on more of a text, or on more questions, does not count: it does not compare.
    """
    names = suites.expand(tasks)
    read: dict[str, list[Quality]] = {}
    for row in study.quality:
        read.setdefault(row.variant, []).append(row)
    asked: dict[str, list[Task]] = {}
    for score in study.tasks:
        asked.setdefault(score.variant, []).append(score)
    return tuple(
        variant
        for variant in study.variants
        if variant.folder
        and not (
            all(
                any(_is_on(q, text, window, bos, max_tokens) for q in read.get(variant.id, ()))
                for text in texts
                for window in windows
            )
            and all(
                any(_asks(t, name, limit, prompting) for t in asked.get(variant.id, ()))
                for name in names
            )
        )
    )


def _is_on(row: Quality, text: str, window: int, bos: str, max_tokens: int | None) -> bool:
    found = row.protocol
    part = "" if max_tokens is None else f"first {max(1, max_tokens // window):,} windows"
    same = found.source == text or same_text(found.source, text)
    return same and (found.window, found.bos, found.detail) == (window, bos, part)


def _asks(row: Task, name: str, limit: int | None, prompting: str) -> bool:
    enough = limit is None or row.samples is None or row.samples <= limit
    return row.task == name and row.prompting == prompting and enough
