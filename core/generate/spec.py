"""The options of ``generate``. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from core.data.calibration import SOURCE_HELP
from core.retrain.spec import TEMPLATES
from core.runs.spec import DeviceOptions, option

CHECKS = ("answer", "length", "none")
KINDS = ("auto", "instruction", "messages", "text")
BATCH = {"cpu": 16, "cuda": 64, "mps": 16}
"""Prompts computed together; halved until they fit into memory."""


@dataclass(frozen=True, kw_only=True)
class GenerateSpec(DeviceOptions):
    """Let a model write training text: its own answers to the prompts of a dataset."""

    checkpoint: str = option(
        positional=True, help="Who writes, usually the dense model: folder, run, Hub id or demo."
    )
    prompts: str = option(help=f"Instructions, messages or text to answer: {SOURCE_HELP}")
    out: str = option(help="Run directory to write; it can be trained on as it is.")
    check: str = option(
        "answer",
        choices=CHECKS,
        help="When the model's answer is kept; otherwise the reference is. answer: its final "
        "answer is that of the reference, and if the reference has none, as length; length: it "
        "ended by itself, does not repeat itself, and is a quarter to four times as long as the "
        "reference; none: whenever it is not empty.",
    )
    temperature: float | None = option(
        None,
        low=0,
        high=10,
        help="0 takes the likeliest token each time; otherwise tokens are drawn. Default: 0 for "
        "instructions and messages, 1 for text.",
    )
    max_tokens: int = option(256, low=1, unit="tokens", help="Longest answer.")
    batch: int | None = option(
        None,
        low=1,
        help="Prompts computed together, of similar length. Default: "
        + ", ".join(f"{count} on {kind}" for kind, count in BATCH.items())
        + ".",
    )
    samples: int = option(1000, low=1, help="Prompts: the first ones that can be used.")
    prompt_tokens: int = option(
        32,
        low=0,
        unit="tokens",
        help="Of plain text, the tokens that the model continues; what follows is the reference. "
        "0: every row is a whole instruction, without a reference.",
    )
    format: str = option(
        "auto",
        choices=KINDS,
        help="Kind of the rows. auto: detect from the columns (demo: instructions).",
    )
    template: str = option(
        "auto",
        choices=TEMPLATES,
        help="How instructions and messages are put to the model, as in retraining. auto: by the "
        "tokenizer's chat template if it has one.",
    )
    seed: int = option(1234, low=0, help="Seed of the drawn tokens.")
    resume: bool = option(False, help="Continue an unfinished run in --out.")
    dry_run: bool = option(False, help="Show prompts, and estimate tokens and time.")


def temperature_of(spec: GenerateSpec, kind: str) -> float:
    """Return the temperature for rows of ``kind``."""
    if spec.temperature is not None:
        return spec.temperature
    return 1.0 if kind == "text" else 0.0
