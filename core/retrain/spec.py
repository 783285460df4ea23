"""The options of a retraining, and the settings that follow from them for given data. No torch.

Defaults follow Shortened LLaMA (arXiv 2402.02834): version 1 for LoRA, version 2 for continued
pretraining, with batches sized for one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from core.data.calibration import SOURCE_HELP
from core.errors import OptionError
from core.runs.spec import ProcessOptions, option

Number = TypeVar("Number", int, float)

METHODS = ("lora", "continued", "full", "partial")
WHOLE = ("continued", "full")
"""Methods that train all weights."""
DDP, FSDP = "ddp", "fsdp"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY, SMALL = 100_000_000, 1_000_000_000
"""Models with fewer parameters than these get larger learning rates, and smaller batches."""
RATES = {
    "tiny": {"lora": 3e-3, "continued": 1e-3, "full": 1e-3, "partial": 1e-3},
    "small": {"lora": 3e-3, "continued": 3e-4, "full": 3e-4, "partial": 3e-4},
    "large": {"lora": 1e-4, "continued": 1e-4, "full": 2e-5, "partial": 1e-4},
}
"""Learning rates by size and method. Tiny: tuned on the demo (2 M parameters). Small: measured on
SmolLM2 with 113 M parameters (docs/results/retrain_defaults.md), where the paper's 1e-4 brings back
next to nothing in a short training. Large: from the paper, partial a guess between LoRA and full.
"""


def rate_of(method: str, parameters: int) -> float:
    """Return the learning rate for a model of this size."""
    size = "tiny" if parameters < TINY else "small" if parameters < SMALL else "large"
    return RATES[size][method]


def paper(method: str) -> dict[str, str | float | int]:
    """Return the paper's choices for a method by option, where the defaults here are others.

    Empty for partial fine-tuning, which the paper does not have.
    """
    if method == "partial":
        return {}
    batch = 512 if method == "continued" else 64
    return {"loss": "ce", "lr": RATES["large"][method], "batch": batch}


def suggested_loss(method: str, *, has_teacher: bool) -> str:
    """Return the loss that the page and the recipe ``restore`` start with.

    With adapters and a dense model to learn from, KL: it brought back more of the dense model's
    behaviour on text that was not trained on, where cross entropy lost some
    (docs/results/recovering.md). Otherwise the paper's cross entropy.
    """
    return "kl" if method == "lora" and has_teacher else "ce"


RANGES = {
    "lora": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "weights": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
}
"""Learning rates that --lr-range-test tries: for adapters, and for the model's own weights."""
RANGE_STEPS, RANGE_SEQUENCES, RANGE_ROWS = 12, 8, 24
"""Most steps and sequences a step of each rate, and most held-out rows that it is measured on."""
LOSSES = ("ce", "kl", "both")
NF4 = "nf4"
BASES = ("none", "int8", "int4", NF4)
TEMPLATES = ("auto", "chat", "alpaca", "plain")
LABELS = {
    "lora": "LoRA",
    "continued": "Continued pretraining",
    "full": "Full fine-tuning",
    "partial": "Partial fine-tuning",
}


TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""Experiment trackers that transformers' Trainer can report to."""


@dataclass(frozen=True, kw_only=True)
class RetrainSpec(ProcessOptions):
    """Restore the quality of a pruned checkpoint, and measure how much came back."""

    checkpoint: str = option(positional=True, help="Pruned checkpoint: folder, run or Hub id.")
    method: str = option(
        "lora",
        choices=METHODS,
        help="lora: train small adapters; continued: train all weights on packed text; full: train "
        "all weights on the rows as they are; partial: train only the last blocks and the output "
        "matrix (if it is not the embedding).",
    )
    data: str = option(help=f"Text or instructions to train on: {SOURCE_HELP}")
    out: str = option(help="Run directory to write.")
    dense: str | None = option(
        None,
        help="Dense checkpoint to compare with. Default: the source named in pruning.json, if it "
        "still exists.",
    )
    format: str = option(
        "auto",
        choices=("auto", "instruction", "messages", "text", "input_ids"),
        group="data",
        help="Kind of the rows. The loss covers only the response of an instruction, and only the "
        "assistant's turns of messages. auto: detect from the columns (demo: stories; with "
        "'instruction': questions).",
    )
    template: str = option(
        "auto",
        choices=TEMPLATES,
        group="data",
        help="How instructions and messages are written. chat: by the tokenizer's own chat "
        "template; alpaca: the prompt of Alpaca; plain: on lines of their own (messages: "
        "'User: ...', 'Assistant: ...'). auto: chat if the tokenizer has a chat template, "
        "otherwise alpaca, but plain for messages and for the demo, whose context is short.",
    )
    cutoff: int = option(256, low=4, group="data", unit="tokens", help="Longest training row.")
    holdout: int = option(
        200,
        low=1,
        group="data",
        help="Rows held out for evaluation, at most 10% of the file (paper: 2000).",
    )
    holdout_data: str | None = option(
        None, group="data", help="Evaluate on rows of this source instead of held-out rows."
    )
    layout: str = option(
        "auto",
        choices=("auto", "packed", "grouped"),
        group="data",
        help="packed: fill each sequence with several rows (attention does not cross rows); "
        "grouped: batch rows of similar length. auto: packed for continued, else grouped.",
    )
    steps: int | None = option(None, low=1, group="training", help="Optimiser steps.")
    epochs: float | None = option(
        None, low=0.001, group="training", help="Passes over the data. Default: 2 for lora, else 1."
    )
    lr: float | None = option(
        None,
        low=0,
        group="training",
        help="Peak learning rate. Default: the paper's 1e-4 (full: 2e-5); below 1e9 parameters "
        "3e-3 for lora, else 3e-4, below 1e8 1e-3 (measured, docs/results/retrain_defaults.md).",
    )
    batch: int | None = option(
        None,
        low=1,
        group="training",
        help="Sequences per optimiser step. Default: the paper's 64 (it uses 512 for continued "
        "pretraining); below 1e9 parameters 16.",
    )
    micro_batch: int | None = option(
        None,
        low=1,
        group="training",
        help="Sequences computed at once. Default: on a GPU as many as fit; on a CPU up to 4, "
        "below 1e9 parameters up to 8, and fewer if memory is short.",
    )
    warmup: int | None = option(
        None,
        low=0,
        group="training",
        help="Warm-up steps. Default: 100, or 10% of all steps if that is less.",
    )
    schedule: str = option(
        "linear",
        choices=("linear", "cosine", "constant"),
        group="training",
        help="Schedule of the learning rate after the warm-up.",
    )
    weight_decay: float | None = option(
        None, low=0, group="training", help="Default: 0.1 for continued, else 0."
    )
    clip: float = option(1.0, low=0, group="training", help="Maximum gradient norm; 0: unlimited.")
    rank: int = option(8, low=1, group="LoRA", help="Rank of the adapters.")
    alpha: float = option(16.0, low=0, group="LoRA", help="Scale of the adapters: alpha / rank.")
    dropout: float = option(
        0.05, low=0, high=0.99, group="LoRA", help="Dropout on the input of adapters."
    )
    targets: tuple[str, ...] = option(
        PROJECTIONS, group="LoRA", help="Projections that get an adapter."
    )
    quantized_base: str = option(
        "none",
        choices=BASES,
        group="LoRA",
        help="Hold the frozen weights of the blocks in 8 or 4 bits while the adapters train "
        "(QLoRA), for less memory. int8 and int4 are torchao's, and both take one byte here; nf4 "
        "takes half a byte and needs bitsandbytes. Merging adds the adapters to the weights as "
        "they were before.",
    )
    last: int = option(3, low=1, group="partial", help="Blocks at the end that are trained.")
    seams: bool = option(
        False,
        group="partial",
        help="Also train the block before each place where blocks were removed.",
    )
    keep_states: str = option(
        "auto",
        choices=("auto", "off"),
        group="partial",
        help="auto: if rows are read more than once, what the blocks below the first trained one "
        "make of them is kept on disk, so that later epochs compute only the blocks above; at most "
        "a quarter of the free space is used. off: compute all blocks at every step.",
    )
    loss: str = option(
        "ce",
        choices=LOSSES,
        group="distillation",
        help="ce: cross entropy on the text; kl: KL(dense || trained) alone, so that the model "
        "learns the dense model's distributions instead of the text; both: their sum.",
    )
    teacher_top_k: int = option(
        128,
        low=0,
        unit="tokens",
        group="distillation",
        help="For kl and both: how many of the dense model's likeliest next tokens are kept on "
        "disk, for all runs on the same training rows, which it reads once; 0: it stays in memory "
        "and gives whole distributions at every step.",
    )
    distil: bool = option(
        False,
        group="distillation",
        help="The same as --loss both --teacher-top-k 0.",
    )
    kl_weight: float = option(
        1.0, low=0, group="distillation", help="Weight of KL(dense || trained) in the loss 'both'."
    )
    gradient_checkpointing: str = option(
        "auto",
        choices=("auto", "on", "off"),
        group="memory",
        help="Recompute activations to save memory. auto: on if training would not fit otherwise "
        "by its estimate; where free memory is not known, above 1e9 parameters.",
    )
    fused: str = option(
        "auto",
        choices=("auto", "off"),
        group="memory",
        help="Hand-written decoder layers, which are faster and take less memory. auto: use them "
        "if the model is supported and activations are not recomputed; off: use the layers of "
        "transformers and peft.",
    )
    sharding: str = option(
        "auto",
        choices=("auto", DDP, FSDP),
        group="memory",
        help="What each of several processes holds if all weights are trained. ddp: weights, "
        "gradients and optimiser states, whole; fsdp: a part of each (FSDP2), also while loading "
        "and writing, for models that do not fit otherwise; auto: on GPUs fsdp if ddp does not fit "
        "by its estimate, else ddp.",
    )
    retry: bool = option(
        False,
        group="memory",
        help="After running out of memory, continue with the largest micro-batch that fits.",
    )
    eval_every: int | None = option(
        None,
        low=1,
        help="Steps between evaluations, each with a checkpoint. Default: 10% of all steps, with "
        "as few evaluations as keep them below a tenth of the training time.",
    )
    retention: bool = option(
        False,
        group="evaluation",
        help="Measure KL(dense || model) of next tokens on held-out rows, before and after.",
    )
    also: tuple[str, ...] = option(
        (),
        repeat=True,
        group="evaluation",
        help="Another source to evaluate the dense, the pruned and the retrained model on (loss "
        "and KL); can be given several times.",
    )
    questions: int = option(
        0,
        low=0,
        high=1000,
        group="evaluation",
        help="Questions per skill of the demo world, answered by all three models.",
    )
    seed: int = option(1234, low=0, help="Seed of adapters, dropout and the order of rows.")
    merge: bool = option(
        False,
        help="Also write a whole checkpoint with the adapter merged in, which all other commands "
        "take; with --resume also after a finished run.",
    )
    merge_dtype: str = option(
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="Precision of the written checkpoint; auto keeps the pruned one's.",
    )
    report_to: tuple[str, ...] = option(
        (),
        choices=TRACKERS,
        help="Also show the training in these experiment trackers, whose packages must be "
        "installed.",
    )
    lr_range_test: bool = option(
        False,
        help="Instead of training, take up to 12 steps of up to 8 sequences at each of five "
        "learning rates, all from the same start, and suggest one.",
    )
    resume: bool = option(False, help="Continue from the last checkpoint in --out.")
    dry_run: bool = option(False, help="Estimate memory, tokens and time without training.")


@dataclass(frozen=True)
class Goal:
    """What a step minimises: cross entropy, KL(dense || trained), or both."""

    entropy: bool
    kl_weight: float
    """0 without the dense model."""
    top_k: int
    """Tokens of the dense model's distributions that are kept; 0: it runs at every step."""

    @property
    def is_live(self) -> bool:
        """Whether the dense model stays in memory for the training."""
        return self.kl_weight > 0 and self.top_k == 0

    @property
    def is_kept(self) -> bool:
        """Whether the dense model's distributions are read from disk."""
        return self.kl_weight > 0 and self.top_k > 0


def base_bits(spec: RetrainSpec) -> int | None:
    """Return the bits that the frozen weights are held in; None if they are not quantized."""
    return {"int8": 8, "int4": 4, NF4: 4}.get(spec.quantized_base)


def goal_of(spec: RetrainSpec) -> Goal:
    """Return what the options say is minimised.

    Raises `OptionError` if they contradict each other.
    """
    if spec.distil and spec.loss == "kl":
        raise OptionError(
            "--distil adds cross entropy to the divergence, --loss kl leaves it out.",
            "Give only one of them.",
        )
    if spec.distil:
        return Goal(True, spec.kl_weight, 0)
    if spec.loss == "ce":
        return Goal(True, 0.0, 0)
    if spec.loss == "kl":
        return Goal(False, 1.0, spec.teacher_top_k)
    return Goal(True, spec.kl_weight, spec.teacher_top_k)


@dataclass(frozen=True)
class Sharding:
    """Whether several processes split weights, gradients and optimiser states, and why."""

    on: bool
    why: str

    @property
    def option(self) -> str:
        """The value of --sharding that means it."""
        return FSDP if self.on else DDP

    @property
    def sentence(self) -> str:
        """What the processes hold, for the log and pages."""
        if self.on:
            what = "Weights, gradients and optimiser states are split among the processes (FSDP2)"
        else:
            what = "Each process holds all weights, gradients and optimiser states"
        return f"{what}: {self.why}."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a retraining for given data, with every default filled in."""

    steps: int
    epochs: float
    batch: int
    micro_batch: int
    accumulation: int
    lr: float
    warmup: int
    weight_decay: float
    beta2: float
    eval_every: int
    """Steps between checkpoints, and between evaluations."""
    sparing: bool
    """Whether evaluations are left out that would take more than their share of the time."""
    layout: str


def split(batch: int, micro: int, processes: int = 1) -> tuple[int, int]:
    """Return how many sequences are computed at once, about ``micro``, and how often in a step.

    Every process takes the same number of micro-batches.
    """
    each = min(-(-batch // (micro * processes)), batch // processes)
    accumulation = each * processes
    return max(micro, -(-batch // accumulation)), accumulation


def layout_of(spec: RetrainSpec) -> str:
    """Return ``packed`` or ``grouped``."""
    if spec.layout != "auto":
        return spec.layout
    return "packed" if spec.method == "continued" else "grouped"


def settings_of(spec: RetrainSpec, sequences: int, parameters: int = SMALL) -> Settings:
    """Fill in the defaults for ``sequences`` training sequences of a model of some size.

    Raises `OptionError` if options contradict each other.
    """
    if spec.steps is not None and spec.epochs is not None:
        raise OptionError("Both --steps and --epochs are given.", "Give only one of them.")
    if spec.method == "lora":
        unknown = [name for name in spec.targets if name not in PROJECTIONS]
        if unknown or not spec.targets:
            what = f"'{unknown[0]}' is not a projection" if unknown else "none is given"
            raise OptionError(f"--targets: {what}.", f"Choose from: {', '.join(PROJECTIONS)}.")
    if spec.quantized_base != "none" and spec.method != "lora":
        raise OptionError(
            f"--quantized-base needs frozen weights, but --method {spec.method} trains them.",
            "Use --method lora.",
        )
    goal_of(spec)
    small = parameters < SMALL
    batch = _given(spec.batch, 16 if small else 64)
    if spec.micro_batch is not None and spec.micro_batch > batch:
        raise OptionError(
            f"--micro-batch {spec.micro_batch} is larger than --batch {batch}.",
            "A micro-batch is the part of a batch that is computed at once.",
        )
    continued = spec.method == "continued"
    epochs = _given(spec.epochs, 2.0 if spec.method == "lora" else 1.0)
    steps = _given(spec.steps, max(1, round(epochs * sequences / batch)))
    micro = _given(spec.micro_batch, min(8 if small else 4, batch))
    if spec.processes > 1 and spec.lr_range_test:
        raise OptionError("--lr-range-test runs in one process.", "Leave out --processes.")
    if batch < spec.processes:
        raise OptionError(
            f"--processes: {spec.processes} processes cannot share a batch of {batch} sequences.",
            f"Use {batch} or fewer, or a larger --batch.",
        )
    _check_sharding(spec)
    micro, accumulation = split(batch, micro, spec.processes)
    return Settings(
        steps=steps,
        epochs=steps * batch / sequences,
        batch=batch,
        micro_batch=micro,
        accumulation=accumulation,
        lr=_given(spec.lr, rate_of(spec.method, parameters)),
        warmup=_given(spec.warmup, min(100, steps // 10)),
        weight_decay=_given(spec.weight_decay, 0.1 if continued else 0.0),
        beta2=0.95 if continued else 0.999,
        eval_every=_given(spec.eval_every, max(1, steps // 10)),
        sparing=spec.eval_every is None,
        layout=layout_of(spec),
    )


def _check_sharding(spec: RetrainSpec) -> None:
    """Raise `OptionError` if the weights of this training cannot be split among processes."""
    if spec.sharding != FSDP:
        return
    if spec.method not in WHOLE:
        trained = "adapters" if spec.method == "lora" else "only some blocks"
        raise OptionError(
            f"--sharding fsdp is for training all weights, but --method {spec.method} trains "
            f"{trained}.",
            "Leave out --sharding, or use --method full.",
        )
    if spec.processes == 1:
        raise OptionError(
            "--sharding fsdp splits the weights among processes, but --processes is 1.",
            "Use more processes, or leave out --sharding.",
        )
    if spec.dtype == "float16":
        raise OptionError(
            "--sharding fsdp does not train in float16, which needs its loss scaled.",
            "Use --dtype auto or bfloat16.",
        )


def _given(value: Number | None, default: Number) -> Number:
    """Return an option's value, or the default if it was not given."""
    return default if value is None else value
