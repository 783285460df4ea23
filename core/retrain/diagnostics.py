"""Problems of a retraining, recognised from its numbers and reported with advice. No torch.

These are the problems that the pruning papers report: training that does not converge, pruning
too severe for adapters, and too little memory. The thresholds are rules of thumb.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from core import words
from core.errors import DepthcutError
from core.retrain.recovery import BEYOND, is_adaptation

WINDOW = 20
"""Steps in a moving average; a run of fewer than two windows is not assessed."""
FLAT_NAT = 0.005
"""A loss that fell by less than this over the run so far is flat."""
FLAT_HEADROOM_NAT = 0.3
"""A flat loss matters only if the held-out loss is this far above the dense model's."""
RISING_NAT = 0.5
"""A smoothed loss this far above its best value is rising."""
EXPLODING = 50.0
"""A gradient norm this many times its median ..."""
EXPLODING_STEPS = 3
"""... for this many steps in a row is exploding."""
HARD_GAP_NAT = 2.0
"""Above this gap adapters rarely suffice (a perplexity 7 times the dense model's)."""
HARD_LEFT_NAT = 0.75
"""LoRA was not enough if this much of the gap remains and less than half was recovered."""

STILL_FALLING = 0.25
"""The loss is still falling if the second half of the training brought this share of its fall; a
learning rate that ends at zero leaves less to a training that has converged."""


@dataclass(frozen=True)
class Finding:
    """One problem, and what to try."""

    kind: str
    """nan, exploding, rising, flat, pruned-too-hard, too-short, beyond-dense, not-merged or
    out-of-memory."""
    message: str
    hint: str
    stop: bool = False
    step: int | None = None

    def __str__(self) -> str:
        """Return message and hint in one string."""
        return f"{self.message} {self.hint}"


def not_finite(
    step: int, loss: float, grad_norm: float, computed: str = "bfloat16"
) -> Finding | None:
    """Detect NaN or infinity before the step is taken; ``computed`` is the step's format."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return None
    what = "loss" if not math.isfinite(loss) else "gradient norm"
    return Finding(
        "nan",
        f"The {what} became {loss if what == 'loss' else grad_norm} at step {step}; that step was "
        "not taken.",
        "Try a smaller --lr or a longer --warmup."
        if computed == "float32"
        else "Try a smaller --lr, a longer --warmup, or --dtype float32.",
        stop=True,
        step=step,
    )


class Watch:
    """Checks the loss and gradient norm of every step; reports each kind of problem once."""

    def __init__(self, dense_loss: float | None = None) -> None:
        """``dense_loss``: the dense model's held-out loss, to distinguish flat from finished."""
        self._dense = dense_loss
        self._losses: list[float] = []
        self._first: float | None = None
        self._best = math.inf
        self._norms: list[float] = []
        self._high = 0
        self._steps = 0
        self._said: set[str] = set()
        self._held: list[tuple[int, float]] = []
        """Step and held-out loss of every evaluation."""

    def is_falling(self) -> bool:
        """Whether the held-out loss was still falling when the training ended."""
        if len(self._held) < 3:
            return False
        (begin, first), (end, last) = self._held[0], self._held[-1]
        half = (begin + end) / 2
        middle = min(self._held, key=lambda held: abs(held[0] - half))[1]
        return first > last and middle - last >= STILL_FALLING * (first - last)

    def feed(self, step: int, loss: float, grad_norm: float) -> list[Finding]:
        """Check one finished step; return new findings."""
        self._steps += 1
        found = [self._exploding(step, grad_norm), self._rising(step, loss)]
        return self._once([f for f in found if f])

    def evaluated(self, step: int, before: float, loss: float) -> list[Finding]:
        """Check an evaluation: the held-out loss ``before`` training and now."""
        self._held.append((step, loss))
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
                    f"The loss has not fallen in {self._steps} steps: it was {self._first:.3f} and "
                    f"is now {recent:.3f} (held-out loss: {before:.3f}, now {loss:.3f}).",
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
    method: str,
    gap: float | None,
    recovered: float | None = None,
    *,
    falling: bool = False,
    steps: int = 0,
) -> Finding | None:
    """Detect a gap too large for LoRA: by its size before training, by the rest afterwards.

    After a training of ``steps`` steps whose loss was still ``falling``, the advice is to train
    longer: how much LoRA can recover is then not known yet.
    """
    if method != "lora" or gap is None:
        return None
    hint = "Try --method continued (and LoRA on its result), or remove fewer blocks."
    if recovered is None and gap > HARD_GAP_NAT:
        return Finding(
            "pruned-too-hard",
            f"Severe pruning: the held-out loss is {gap:.2f} nats above the dense model's, and "
            f"LoRA rarely recovers more than {HARD_GAP_NAT:g} nats.",
            hint,
        )
    if recovered is not None and recovered < 0.5 and falling:
        return Finding(
            "too-short",
            f"LoRA recovered {words.percent(recovered)} of the {gap:.2f}-nat gap in {steps:,} "
            "steps, and the loss was still falling.",
            f"Train longer: --steps {4 * steps}, or a larger --lr.",
        )
    if recovered is not None and recovered < 0.5 and gap * (1 - recovered) > HARD_LEFT_NAT:
        return Finding(
            "pruned-too-hard",
            f"LoRA recovered {words.percent(recovered)} of the {gap:.2f}-nat gap; "
            f"{gap * (1 - recovered):.2f} nats remain.",
            hint,
        )
    return None


def beyond_dense(gap: float | None, recovered: float | None) -> Finding | None:
    """Detect a loss below the dense model's, which does not measure recovery from pruning."""
    if gap is None or recovered is None or recovered <= BEYOND:
        return None
    return Finding(
        "beyond-dense",
        f"The held-out loss is now {gap * (recovered - 1):.2f} nats below the dense model's, so "
        "training added new knowledge, and the recovered share no longer measures recovery from "
        "pruning.",
        "Evaluate also on text that the dense model is good at (--also), with --retention, or on "
        "tasks (evaluate).",
    )


def adapted(recovered: float | None, by_kl: float | None) -> Finding | None:
    """Detect a gain that is adaptation: the loss came back, the dense model's behaviour did not."""
    if recovered is None or by_kl is None or not is_adaptation(recovered, by_kl):
        return None
    other = (
        f"but only {words.percent(by_kl)} of the divergence from the dense model"
        if by_kl >= 0
        else f"while the divergence from the dense model grew by {words.percent(-by_kl)}"
    )
    return Finding(
        "adaptation",
        f"{words.percent(recovered)} of the loss came back, {other}: part of the gain is "
        "adaptation to the training text.",
        "Training on the dense model's distributions (--loss kl) recovers more of its behaviour.",
    )


def largest_that_fits(below: int, fits: Callable[[int], bool]) -> int:
    """Return the largest micro-batch below ``below`` for which ``fits`` is true, 0 if none.

    ``fits`` is called at most log2(below) + 1 times and is assumed to be monotone.
    """
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def not_merged(error: Exception) -> Finding:
    """Return the finding on an adapter that is whole but could not be merged."""
    why = error.message if isinstance(error, DepthcutError) else f"{type(error).__name__}: {error}"
    return Finding(
        "not-merged",
        f"The adapter was trained and saved, but not merged: {why.rstrip('.')}.",
        "Free memory or disk space, then merge it with --resume --merge, or with Merge on the "
        "Retrain page.",
    )


def out_of_memory(micro_batch: int, cutoff: int, fitting: int) -> Finding:
    """Return the finding that names what does not fit, and what does."""
    message = f"Out of memory with a micro-batch of {micro_batch} rows of up to {cutoff} tokens."
    if fitting:
        hint = (
            f"The largest that fits is --micro-batch {fitting}; --retry continues with it "
            "automatically."
        )
    else:
        hint = "Not even one row fits: try --gradient-checkpointing on, a shorter --cutoff, LoRA."
    return Finding("out-of-memory", message, hint, stop=True)
