"""A training shown in an experiment tracker, through the integrations of transformers' Trainer.

The run's own metrics.jsonl is complete without it. A tracker is set up by its own environment
variables; only what it would otherwise name after other software has a default here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.errors import OptionError
from core.retrain.results import Evaluation, Step

PROJECT = "depthcut"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Packages of which a tracker needs one, unless it is the one of its name."""


def is_installed(name: str) -> bool:
    """Whether a package that the tracker needs is there."""
    return any(map(importlib.util.find_spec, PACKAGES.get(name, (name,))))


def check(names: Sequence[str]) -> None:
    """Raise `OptionError` for the first tracker whose package is not installed."""
    for name in names:
        if not is_installed(name):
            raise OptionError(
                f"--report-to: the package {name} is not installed.",
                f"Install it with: pip install {name}",
            )


def prepare(names: Sequence[str], out: Path) -> None:
    """Set the environment variables that a tracker reads and the user has not set."""
    defaults = {
        "tensorboard": {"TENSORBOARD_LOGGING_DIR": str(out / "tensorboard")},
        "wandb": {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(out)},
        "mlflow": {"MLFLOW_EXPERIMENT_NAME": PROJECT},
    }
    for name in names:
        for variable, value in defaults.get(name, {}).items():
            os.environ.setdefault(variable, value)


@contextlib.contextmanager
def explained(names: Sequence[str]) -> Iterator[None]:
    """Turn an error that a tracker raises, e.g. for want of a login, into an `OptionError`."""
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in names:
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OptionError(
            f"--report-to: {package} could not be used: {reason}.",
            "Set it up as its documentation says, or leave it out.",
        ) from error


def of_step(step: Step) -> dict[str, Any]:
    """Return a step as Trainer logs one: its own names, to which trackers add ``train/``."""
    return {
        "loss": step.loss,
        "learning_rate": step.lr,
        "tokens": step.tokens,
        "tokens_per_s": step.tokens_per_s,
        **({} if step.grad_norm is None else {"grad_norm": step.grad_norm}),
    }


def of_evaluation(found: Evaluation) -> dict[str, Any]:
    """Return an evaluation as Trainer logs one: trackers show ``eval_`` under ``eval/``."""
    figures = {"eval_loss": found.heldout_loss, "eval_recovered": found.recovered}
    figures |= {"eval_kl": found.heldout_kl, "eval_recovered_kl": found.recovered_kl}
    return {name: value for name, value in figures.items() if value is not None}
