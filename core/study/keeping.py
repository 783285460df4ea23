"""What follows from a study alone is kept for as long as the study is."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from core.study.kinds import Study

P = ParamSpec("P")
T = TypeVar("T")
KEPT = 16
"""Results of each function: those of some sessions, which look at one or two studies."""


def kept(
    work_out: Callable[Concatenate[Study, P], T],
) -> Callable[Concatenate[Study, P], T]:
    """Return a function that keeps what ``work_out`` returned last, for the same study.

    A study is the same object until something of it changes; other arguments are compared by their
    values. The results are shared by all sessions, so never changed in place.
    """
    results: deque[tuple[Study, tuple[Any, ...], dict[str, Any], T]] = deque(maxlen=KEPT)

    @functools.wraps(work_out)
    def once(study: Study, *args: P.args, **kwargs: P.kwargs) -> T:
        for known, positional, named, result in tuple(results):  # others may add one meanwhile
            if known is study and (positional, named) == (args, kwargs):
                return result
        result = work_out(study, *args, **kwargs)
        results.append((study, args, kwargs, result))
        return result

    return once
