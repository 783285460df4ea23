"""The options of an evaluation, and their check against a checkpoint; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from core.checkpoint import chat
from core.checkpoint.vocabulary import text_of
from core.data.calibration import JOINS, SOURCE_HELP
from core.data.evaluation import BOS_PROTOCOLS
from core.errors import OptionError
from core.evaluate.results import Prompting
from core.runs.spec import MemoryOptions, ProcessOptions, option

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(MemoryOptions, ProcessOptions):
    """Measure a checkpoint: perplexity of texts, accuracy on tasks."""

    checkpoint: str = option(positional=True, help="Folder, run, Hub id, smollm2, or demo.")
    out: str = option(help="Run directory to write.")
    perplexity: tuple[str, ...] = option(
        (),
        repeat=True,
        help=f"Text to evaluate on: {SOURCE_HELP} Can be repeated.",
    )
    window: tuple[int, ...] = option(
        (128,), help="Tokens per window, e.g. 128 or 128,2048.", low=2, high=1048576, unit="tokens"
    )
    bos: str = option(
        "once",
        help="BOS once before the text, as the first token of every window, or extra: in front of "
        "every window, which then has one token more, as in the authors' code.",
        choices=BOS_PROTOCOLS,
    )
    join: str = option(
        "auto",
        help="auto, on: one stream of all rows with a blank line between, as published; off: no "
        "window crosses rows, and rows shorter than a window are left out.",
        choices=JOINS,
    )
    max_tokens: int | None = option(
        None,
        low=2,
        unit="tokens",
        help="Evaluate on only the first windows of each text, this many tokens at most. "
        "Default: the whole text.",
    )
    token_view: int = option(
        192,
        low=0,
        high=2048,
        unit="tokens",
        help="Keep the loss of each of the first tokens of every text, and the five likeliest "
        "tokens in its place; 0: none.",
    )
    tasks: tuple[str, ...] = option(
        (),
        help="lm-eval tasks, separated by commas, or presets: paper (the seven of Shortened LLaMA "
        "and their mean), demo, reasoning, domains.",
    )
    task_dir: str = option("", help="Folder with your own tasks as lm-eval YAML files.")
    allow_task_code: bool = option(
        False, help="Let the tasks of --task-dir run the Python code that their YAML files name."
    )
    limit: int | None = option(None, help="Questions per task. Default: all.", low=1)
    fewshot: int | None = option(
        None,
        help="Examples before each question, as lm-eval's --num_fewshot. Default: the task's own.",
        low=0,
        high=1000,
    )
    chat_template: bool = option(
        False,
        help="Put questions to the model as messages in the tokenizer's chat template, as "
        "lm-eval's --apply_chat_template.",
    )
    fewshot_turns: str = option(
        "auto",
        help="Whether examples are turns of the conversation (lm-eval's --fewshot_as_multiturn). "
        "auto: with --chat-template.",
        choices=("auto", "on", "off"),
    )
    system_instruction: str = option(
        "", help="Text before each question; with --chat-template the system message."
    )
    each_block: bool = option(
        False, help="Also measure the cost of removing each single block on every task."
    )
    fresh: bool = option(False, help="Measure again instead of reusing an earlier run's results.")
    dry_run: bool = option(False, help="Estimate time and memory without running anything.")

    @property
    def prompting(self) -> Prompting:
        """How tasks are asked."""
        return Prompting(
            fewshot=self.fewshot,
            chat_template=self.chat_template,
            multiturn=self.chat_template and self.fewshot_turns != "off",
            system_instruction=self.system_instruction,
        )


def with_texts(spec: EvaluateSpec, folder: Path) -> EvaluateSpec:
    """Return the spec with ``auto`` replaced by the default text of the checkpoint in a folder."""
    texts = dict.fromkeys(text_of(source, folder) for source in spec.perplexity)
    return replace(spec, perplexity=tuple(texts))


def check_template(spec: EvaluateSpec, folder: Path) -> None:
    """Raise `OptionError` if the chat template is asked for and the tokenizer has none."""
    if spec.chat_template and not chat.source_of(folder):
        raise OptionError(
            f"--chat-template: the tokenizer of {spec.checkpoint} has no chat template.",
            "Leave it out, or give a checkpoint whose tokenizer has one.",
        )


def check_model(spec: EvaluateSpec, info: CheckpointInfo) -> None:
    """Raise `OptionError` if options contradict each other or the checkpoint."""
    if not spec.perplexity and not spec.tasks:
        raise OptionError(
            "Nothing to measure.", "Give --perplexity SOURCE (e.g. auto or a file) or --tasks."
        )
    if spec.each_block and not spec.tasks:
        raise OptionError("--each-block runs tasks without each block.", "Give --tasks.")
    if spec.each_block and spec.processes > 1:
        raise OptionError(
            f"--processes {spec.processes}: tasks without each block are asked by one process.",
            "Leave out --processes or --each-block.",
        )
    if spec.prompting != Prompting() and not spec.tasks:
        raise OptionError(
            "--fewshot, --chat-template and --system-instruction are about tasks.", "Give --tasks."
        )
    if spec.fewshot_turns == "on" and not spec.chat_template:
        raise OptionError(
            "--fewshot-turns on: without a chat template a conversation has no turns.",
            "Add --chat-template.",
        )
    if not spec.window:
        raise OptionError("--window is empty.", "Use e.g. 128 or 128,2048.")
    longest = max(spec.window) + (spec.bos == "extra")
    if spec.perplexity and info.context and longest > info.context:
        raise OptionError(
            f"--window: {longest} tokens exceed the model's context of {info.context}.",
            f"Use {info.context - (spec.bos == 'extra')} or fewer.",
        )
