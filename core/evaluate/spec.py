"""What an evaluation is asked for, and whether a checkpoint can be asked that; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.data.evaluation import BOS_PROTOCOLS
from core.errors import OptionError
from core.runs.spec import DeviceOptions, option

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(DeviceOptions):
    """Measure a checkpoint: perplexity of texts, accuracy on tasks."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, or demo.")
    out: str = option(help="Run directory to write.")
    perplexity: tuple[str, ...] = option(
        (),
        repeat=True,
        help="Text to judge by: demo, wikitext2, a .txt/.jsonl/.csv/.parquet file, or hub:NAME. "
        "Can be given several times.",
    )
    window: tuple[int, ...] = option(
        (128,), help="Tokens in a window, as 128 or 128,2048.", low=2, high=1048576, unit="tokens"
    )
    bos: str = option(
        "once",
        help="BOS once before the text, or in every window.",
        choices=BOS_PROTOCOLS,
    )
    tasks: tuple[str, ...] = option(
        (),
        help="Tasks of lm-eval, with commas, or presets: paper (the seven of Shortened LLaMA and "
        "their mean), demo, reasoning, domains.",
    )
    task_dir: str = option("", help="Folder of your own tasks, as lm-eval's YAML files.")
    limit: int | None = option(None, help="Questions of each task. All of them.", low=1)
    each_block: bool = option(
        False, help="Also what removing each single block costs on every task."
    )
    fresh: bool = option(False, help="Measure again what an earlier run has measured.")
    dry_run: bool = option(False, help="Say what it will take, and do nothing.")


def check_model(spec: EvaluateSpec, info: CheckpointInfo) -> None:
    """Raise `OptionError` where options contradict each other, or the checkpoint."""
    if not spec.perplexity and not spec.tasks:
        raise OptionError(
            "Nothing to measure.", "Give --perplexity SOURCE, as demo or a file, or --tasks."
        )
    if spec.each_block and not spec.tasks:
        raise OptionError("--each-block asks tasks without each block.", "Give --tasks.")
    if not spec.window:
        raise OptionError("--window: none given.", "Give for instance 128 or 128,2048.")
    if info.context and max(spec.window) > info.context:
        raise OptionError(
            f"--window: {max(spec.window)} tokens are more than the model's context of "
            f"{info.context}.",
            f"Give {info.context} or fewer.",
        )
