"""The cost of removing each single block on every task, with one loaded model.

The requests are lm-eval's. Their log-likelihoods are computed for the dense model and for the
model without each block in one pass over the weights, as in `core.importance`: N(N+1)/2 block
passes instead of N(N-1), and choices of one token share their context's pass. lm-eval then scores
the stored answers once per variant. `tests/evaluate` compares the results with lm-eval on
checkpoints from which the block has actually been cut.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from core.errors import OutOfMemoryError
from core.evaluate.estimate import STATE_MIB
from core.evaluate.results import USUAL, BlockCost, Prompting
from core.evaluate.suites import Place
from core.evaluate.zero_shot import TaskResult, ask, harness_model
from core.importance.branches import make_batch, states_without
from core.model.blocks import BlockView
from core.model.memory import out_of_memory_explained
from core.runs.devices import MIB
from core.runs.progress import SILENT, Progress

LOGITS = 2**24

Request = tuple[Any, list[int], list[int]]
"""A request of lm-eval: (texts, tokens of the context, tokens of the continuation)."""
Answer = tuple[float, bool]
"""Log-likelihood of the continuation, and whether greedy decoding produces it."""


def ask_without_each_block(
    model: Any,
    tokenizer: Any,
    place: Place,
    loaded: Any,
    limit: int | None,
    batch: int,
    progress: Progress = SILENT,
    prompting: Prompting = USUAL,
) -> list[TaskResult]:
    """Return the task's result for the dense model, then without block 0, 1, ..."""  # fmt: skip
    view = BlockView(model)
    lm = _every_variant(harness_model(model, tokenizer, batch, progress), view, progress)
    results = []
    for variant in range(len(view) + 1):
        lm.variant = variant
        results.append(ask(lm, place, loaded, limit, progress, prompting))
        progress.step(variant + 1, len(view) + 1, f"{place.name}: scored")
    return results


def _every_variant(lm: Any, view: BlockView, progress: Progress) -> Any:
    """Return lm-eval's model, changed to answer for one variant at a time."""
    sets = [frozenset[int](), *(frozenset([block]) for block in range(len(view)))]
    known: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Answer]] = {}

    class EveryVariant(type(lm)):  # type: ignore[misc]
        """Answers for the selected variant; one pass gives the log-likelihoods of all."""

        variant = 0

        def _loglikelihood_tokens(
            self, requests: list[Request], disable_tqdm: bool = False, override_bs: Any = None
        ) -> list[Answer]:
            self.check_fit(requests)
            keys = [(tuple(context), tuple(ending)) for _, context, ending in requests]
            new = list(dict.fromkeys(key for key in keys if key not in known))
            if new:
                answers = loglikelihoods(view, new, sets, self.max_length, progress, self.label)
                known.update(zip(new, answers, strict=True))
            return [known[key][self.variant] for key in keys]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with view.skip(sets[self.variant]):
                return super().generate_until(requests, disable_tqdm)

    lm.__class__ = EveryVariant
    return lm


def loglikelihoods(
    view: BlockView,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    sets: Sequence[frozenset[int]],
    context: int,
    progress: Progress = SILENT,
    label: str = "Requests",
) -> list[list[Answer]]:
    """Return, for every (context, continuation), the answer of the model without each set.

    Requests that differ only in the last token share a row. Requests longer than the model's
    ``context`` are truncated on the left, as in lm-eval.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (before, ending) in enumerate(requests):
        tokens = (*before, *ending)[-(context + 1) : -1]
        rows.setdefault(tokens, []).append(number)
    order = sorted(rows, key=len, reverse=True)
    answers: list[list[Answer]] = [[] for _ in requests]
    width = len(sets) * view.hidden_size * torch.finfo(view.dtype).bits // 8
    room = int(MIB * STATE_MIB.get(view.device.type, STATE_MIB["cpu"]))
    size = max(1, room // (width * len(order[0])))
    done = 0
    while done < len(order):
        piece = order[done : done + size]
        try:
            with out_of_memory_explained(f"asking {label}"):
                _answer(view, piece, rows, requests, sets, answers, progress)
        except OutOfMemoryError:
            if size == 1:
                raise
            size //= 2
            continue
        done += len(piece)
        progress.step(done, len(order), f"{label}: all variants")
    return answers


class _Check(Progress):
    """Makes a pass cancellable without reporting its progress."""

    def __init__(self, outer: Progress) -> None:
        self.check_cancel = outer.check_cancel  # type: ignore[method-assign]


def _answer(
    view: BlockView,
    piece: Sequence[tuple[int, ...]],
    rows: dict[tuple[int, ...], list[int]],
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    sets: Sequence[frozenset[int]],
    answers: list[list[Answer]],
    progress: Progress,
) -> None:
    """Fill in ``answers`` for the requests that belong to the rows of ``piece``."""
    padded = [tokens if len(tokens) > 1 else (*tokens, tokens[-1]) for tokens in piece]
    states = states_without(view, make_batch(padded, view), sets, _Check(progress))
    asked = [(row, number) for row, tokens in enumerate(piece) for number in rows[tokens]]
    at, wanted, ends = [], [], []
    for row, number in asked:
        ending, length = requests[number][1], len(piece[row])
        at += [(row, length - len(ending) + place) for place in range(len(ending))]
        wanted += list(ending)
        ends.append(len(wanted))
    where = torch.tensor(at, device=view.device)
    targets = torch.tensor(wanted, device=view.device)
    found: list[list[Answer]] = [[] for _ in asked]
    for state in states:
        likely, greedy = _scores(view, state[where[:, 0], where[:, 1]], targets)
        start = 0
        for place, end in enumerate(ends):
            found[place].append((math.fsum(likely[start:end]), all(greedy[start:end])))
            start = end
    for (_, number), answer in zip(asked, found, strict=True):
        answers[number] = answer


@torch.inference_mode()
def _scores(
    view: BlockView, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each target [n] after ``hidden`` [n, hidden].

    Also return whether each target is the most likely token.
    """
    likely: list[float] = []
    greedy: list[bool] = []
    step = max(1, LOGITS // view.head_weight.shape[0])
    for part, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logits = view.finish(part.to(view.dtype)).float().log_softmax(-1)
        likely += logits.gather(1, wanted[:, None])[:, 0].tolist()
        greedy += (logits.argmax(-1) == wanted).tolist()
    return likely, greedy


def costs(results: Sequence[TaskResult]) -> list[BlockCost]:
    """Return what each block costs on every score; block -1 is dense.

    ``delta`` is the value without the block minus the dense one; its standard error is that of the
    paired differences, question by question, if the metric is a mean over questions.
    """
    dense = results[0]
    rows = []
    for block, found in enumerate(results, -1):
        for score, before in zip(found.scores, dense.scores, strict=True):
            error = _paired_error(dense, found, score.task, score.metric)
            rows.append(
                BlockCost(block, score.task, score.metric, score.value, score.stderr,
                          score.value - before.value, None if block < 0 else error)
            )  # fmt: skip
    return rows


def _paired_error(dense: TaskResult, found: TaskResult, task: str, metric: str) -> float | None:
    pairs = zip(dense.samples, found.samples, strict=True)
    values = [(a.value(metric), b.value(metric)) for a, b in pairs if a.task == task]
    gaps = [b - a for a, b in values if a is not None and b is not None]
    if len(gaps) < 2 or len(gaps) < len(values):
        return None
    return statistics.stdev(gaps) / math.sqrt(len(gaps))
