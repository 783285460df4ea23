"""What goes wrong in retraining, recognised from numbers and said in words. No torch.

The signatures are those that the pruning papers report: training that does not converge, cuts too
deep for adapters, and too little memory. Thresholds are rules of thumb, named here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from core.retrain.recovery import BEYOND

WINDOW = 20
"""Steps that are averaged; at least two such windows are needed."""
FLAT_NAT = 0.005
"""Fallen by less than this over the run so far: flat."""
FLAT_HEADROOM_NAT = 0.3
"""Flat matters only if the held-out loss is still so far above the dense model's."""
RISING_NAT = 0.5
"""Smoothed loss so far above its best: rising."""
EXPLODING = 50.0
"""Gradient norm so many times its median ..."""
EXPLODING_STEPS = 3
"""... for so many steps in a row."""
HARD_GAP_NAT = 2.0
"""Gap above which adapters rarely suffice (a perplexity 7 times the dense model's)."""
HARD_LEFT_NAT = 0.75
"""After LoRA: so much of the gap left, and less than half of it recovered."""


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed, and what to try."""

    kind: str
    """nan, exploding, rising, flat, pruned-too-hard, beyond-dense or out-of-memory."""
    message: str
    hint: str
    stop: bool = False
    step: int | None = None

    def __str__(self) -> str:
        """Return message and hint as one text."""
        return f"{self.message} {self.hint}"


def not_finite(step: int, loss: float, grad_norm: float) -> Finding | None:
    """Recognise NaN or infinity before the step is taken."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    return Finding(
        "nan",
        f"The {what} became {loss if what == 'loss' else grad_norm} at step {step}; that step was "
        "not taken.",
        "Try a smaller --lr, a longer --warmup, or --dtype float32.",
        stop=True,
        step=step,
    )


class Watch:
    """Looks at every step's loss and gradient norm; each kind is reported once."""

    def __init__(self, dense_loss: float | None = None) -> None:
        """``dense_loss``: the dense model's held-out loss, to tell flat from finished."""
        self._dense = dense_loss
        self._losses: list[float] = []
        self._first: float | None = None
        self._best = math.inf
        self._norms: list[float] = []
        self._high = 0
        self._steps = 0
        self._said: set[str] = set()

    def feed(self, step: int, loss: float, grad_norm: float) -> list[Finding]:
        """Take in one finished step."""
        self._steps += 1
        found = [self._exploding(step, grad_norm), self._rising(step, loss)]
        return self._once([f for f in found if f])

    def evaluated(self, step: int, before: float, loss: float) -> list[Finding]:
        """Take in an evaluation: held-out loss ``before`` training and now."""
        if self._steps < 2 * WINDOW or self._first is None:
            return []
        recent = sum(self._losses) / len(self._losses)
        headroom = math.inf if self._dense is None else loss - self._dense
        if (
            headroom < FLAT_HEADROOM_NAT
            or before - loss > FLAT_NAT
            or self._first - recent > FLAT_NAT
        ):
            return []
        return self._once(
            [
                Finding(
                    "flat",
                    f"The loss has not fallen in {self._steps} steps: {self._first:.3f} at first, "
                    f"{recent:.3f} now (held out {before:.3f}, now {loss:.3f}).",
                    "Try a larger --lr, a larger --rank, or data closer to the model's own.",
                    step=step,
                )
            ]
        )

    def _once(self, found: list[Finding]) -> list[Finding]:
        new = [f for f in found if f.kind not in self._said]
        self._said.update(f.kind for f in new)
        return new

    def _exploding(self, step: int, grad_norm: float) -> Finding | None:
        usual = median(self._norms) if len(self._norms) >= WINDOW else math.inf
        high = grad_norm > EXPLODING * usual
        self._high = self._high + 1 if high else 0
        if not high:
            self._norms = [*self._norms, grad_norm][-100:]
        if self._high < EXPLODING_STEPS:
            return None
        return Finding(
            "exploding",
            f"The gradient norm exploded: {grad_norm:.3g} at step {step}, usually {usual:.3g}.",
            "Try a smaller --lr, a longer --warmup, or a smaller --clip.",
            stop=True,
            step=step,
        )

    def _rising(self, step: int, loss: float) -> Finding | None:
        self._losses = [*self._losses, loss][-WINDOW:]
        if len(self._losses) < WINDOW:
            return None
        now = sum(self._losses) / WINDOW
        self._first = now if self._first is None else self._first
        self._best = min(self._best, now)
        if now < self._best + RISING_NAT:
            return None
        return Finding(
            "rising",
            f"The loss is rising: {now:.3f} over the last {WINDOW} steps, {self._best:.3f} at "
            "best.",
            "Try a smaller --lr or a longer --warmup.",
            stop=True,
            step=step,
        )


def pruned_too_hard(
    method: str, gap: float | None, recovered: float | None = None
) -> Finding | None:
    """Recognise a gap too large for LoRA: before training by its size, after it by what is left."""
    if method != "lora" or gap is None:
        return None
    hint = "Try --method continued (then LoRA on its result), or drop fewer blocks."
    if recovered is None and gap > HARD_GAP_NAT:
        return Finding(
            "pruned-too-hard",
            f"Pruned hard: the held-out loss is {gap:.2f} nat above the dense model's, and LoRA "
            f"rarely makes up more than {HARD_GAP_NAT:g}.",
            hint,
        )
    if recovered is not None and recovered < 0.5 and gap * (1 - recovered) > HARD_LEFT_NAT:
        return Finding(
            "pruned-too-hard",
            f"LoRA closed {recovered:.0%} of a gap of {gap:.2f} nat; "
            f"{gap * (1 - recovered):.2f} nat are left.",
            hint,
        )
    return None


def beyond_dense(gap: float | None, recovered: float | None) -> Finding | None:
    """Recognise a share that does not tell of what pruning took: the data was new to all models."""
    if gap is None or recovered is None or recovered <= BEYOND:
        return None
    return Finding(
        "beyond-dense",
        f"The held-out loss is now {gap * (recovered - 1):.2f} nat below the dense model's, so "
        "the training taught what that never knew, and the recovered share tells nothing of what "
        "pruning took.",
        "Evaluate also on text that the dense model is good at (--also), with --retention, or on "
        "tasks (evaluate).",
    )


def largest_that_fits(below: int, fits: Callable[[int], bool]) -> int:
    """Return the largest micro-batch under ``below`` for which ``fits`` says yes, 0 if none.

    ``fits`` is tried at most log2(below) + 1 times and is taken to be monotone.
    """
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def out_of_memory(micro_batch: int, cutoff: int, fitting: int) -> Finding:
    """Say what does not fit, and what does."""
    message = f"Out of memory with a micro-batch of {micro_batch} rows of up to {cutoff} tokens."
    if fitting:
        hint = (
            f"The largest that fits is --micro-batch {fitting}; --retry goes on with it by itself."
        )
    else:
        hint = "Not even one row fits: try --gradient-checkpointing on, a shorter --cutoff, LoRA."
    return Finding("out-of-memory", message, hint, stop=True)
