"""The files of an evaluate run as dataclasses: the only module that knows their keys and columns.

summary.json is a `Summary` with an entry for each text, task and task without single blocks;
perplexity.csv has a `TextRow`, windows.csv a `WindowRow`, tasks.csv a `Score` and skills.csv a
`BlockCost` per row; samples.jsonl has a `Sample` per line. No torch here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from core import outside
from core.data.facts import TextFacts
from core.runs import workspace
from core.runs.results import CsvRow, JsonResult, from_dict

if TYPE_CHECKING:
    from core.runs.run import Run

SAMPLES = "samples.jsonl"
CHOICES_ONLY = ("choices", "loglikelihoods", "generated")
"""Keys of samples.jsonl that only multiple choice has."""

ScoreCells = tuple[str, str, float | None, float | None, int | None]
"""A score as summary.json holds it: task, metric, value, standard error, questions."""


@dataclass(frozen=True, kw_only=True)
class TextRow(CsvRow):
    """One row of perplexity.csv: the perplexity of one text under one protocol."""

    FILE: ClassVar[str] = "perplexity.csv"

    source: str
    window: int | None = None
    """Tokens per window."""
    bos: str = ""
    """once: before the text; window: in every window."""
    tokens: int | None = None
    """Predictions; the first token of every window is not predicted."""
    ppl: float


@dataclass(frozen=True)
class WindowRow(CsvRow):
    """One row of windows.csv: the loss of one window."""

    FILE: ClassVar[str] = "windows.csv"

    source: str
    window: int
    bos: str
    index: int
    """Number of the window in the text, from 0."""
    nll: float
    """Mean over the window's predictions, in nats."""


@dataclass(frozen=True)
class Score(CsvRow):
    """One row of tasks.csv: one metric of a task, of a group of tasks, or the mean of a preset."""

    FILE: ClassVar[str] = "tasks.csv"

    task: str
    metric: str
    value: float
    stderr: float | None = None
    samples: int | None = None
    """Number of questions."""


@dataclass(frozen=True)
class BlockCost(CsvRow):
    """One row of skills.csv: a metric of a task without one block."""

    FILE: ClassVar[str] = "skills.csv"

    block: int
    """The removed block; -1 for the dense model."""
    task: str
    metric: str
    value: float
    stderr: float | None
    delta: float
    """``value`` minus that of the dense model."""
    delta_stderr: float | None = None
    """Standard error over paired questions; None if the metric is not a mean over questions."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One line of samples.jsonl: a question, the answer, and its own metrics."""

    task: str
    index: int
    """Number of the question in the task."""
    filter: str = ""
    content: str = ""
    """Hash of the question; only equal ones pair."""
    metrics: dict[str, Any]
    """The question's own values by metric."""
    target: Any = None
    """The correct answer; an index for multiple choice."""
    question: str = ""
    choices: tuple[str, ...] | None = None
    """None if it is not multiple choice."""
    loglikelihoods: tuple[float, ...] | None = None
    """Log-likelihood of each choice."""
    answer: Any = None
    """The model's answer; the index of the likeliest choice for multiple choice."""
    generated: tuple[str, ...] | None = None
    """Text that was generated, before the task's filters; None if none was."""

    def value(self, metric: str) -> float | None:
        """Return the question's own value of a metric; None if it is not a number.

        The metric may name its filter, as ``exact_match,strict-match`` does.
        """
        found = self.metrics.get(metric.partition(",")[0])
        return found if isinstance(found, (int, float)) else None


@dataclass(frozen=True, kw_only=True)
class Text:
    """An entry of the summary's ``perplexity``: one text under one protocol."""

    source: str
    window: int
    bos: str = ""
    tokens: int
    """Predictions; the first token of every window is not predicted."""
    ppl: float | None = None
    """None if it was not finite."""
    stderr: float | None = None
    """Of the perplexity, over windows; None in runs of earlier versions, and of one window."""
    windows: int = 0
    content: str = ""
    """Identifies the text: a hash of the file, or how it was generated."""
    text: TextFacts = TextFacts()
    """How the windows were obtained."""
    max_tokens: int | None = None
    """Only the first windows were evaluated, of this many tokens at most; None for all."""
    key: str = ""
    """Hash of everything that the result depends on (`core.evaluate.known`)."""
    batch: int | None = None
    """Windows computed together."""
    seconds: float = 0.0
    reused_from: str | None = None
    """The earlier run that measured it; None if this one did."""


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """How questions are put to the model; the options are lm-eval's own."""

    fewshot: int | None = None
    """Examples before each question, except in tasks that fix it at 0; None: the task's own."""
    chat_template: bool = False
    """Whether questions are messages in the tokenizer's chat template."""
    multiturn: bool = False
    """Whether examples are turns of the conversation, not parts of one message."""
    system_instruction: str = ""

    @property
    def label(self) -> str:
        """The options in words; empty if all are the tasks' own."""
        parts = [] if self.fewshot is None else [f"{self.fewshot}-shot"]
        if self.chat_template:
            one = self.fewshot and not self.multiturn
            parts.append("chat template" + (", examples in one message" if one else ""))
        if self.system_instruction:
            parts.append(f"system instruction '{outside.brief(self.system_instruction, 30)}'")
        return ", ".join(parts)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of lm-eval's ``evaluate``."""
        return {
            "apply_chat_template": self.chat_template,
            "fewshot_as_multiturn": self.multiturn,
            "system_instruction": self.system_instruction or None,
        }


USUAL = Prompting()
"""The tasks' own way."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An entry of the summary's ``tasks``: one task or group of tasks."""

    task: str
    scores: tuple[ScoreCells, ...] = ()
    """Scores of the task, or of a group and every task in it."""
    content: str = ""
    """Identifies the task: a hash of a local task's files, or lm-eval's version."""
    task_versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    shots: dict[str, int] = dataclasses.field(default_factory=dict)
    output_types: dict[str, str] = dataclasses.field(default_factory=dict)
    """lm-eval's, by task: multiple_choice, loglikelihood or generate_until, ..."""
    limit: int | None = None
    """Maximum questions per task; None for all."""
    prompting: Prompting = Prompting()
    key: str = ""
    batch: int = 0
    seconds: float = 0.0
    reused_from: str | None = None

    @property
    def rows(self) -> tuple[Score, ...]:
        """The scores that have a value."""
        return tuple(
            Score(task, metric, value, stderr, samples)
            for task, metric, value, stderr, samples in self.scores
            if value is not None
        )


@dataclass(frozen=True, kw_only=True)
class Skills:
    """An entry of the summary's ``skills``: one task without each single block."""

    task: str
    content: str = ""
    limit: int | None = None
    prompting: Prompting = Prompting()
    key: str = ""
    seconds: float = 0.0
    reused_from: str | None = None
    names: tuple[str, ...] = ()
    """Tasks of the rows in skills.csv; several for a group."""


Entry = Text | Asked | Skills


@dataclass(frozen=True, kw_only=True)
class Summary(JsonResult):
    """summary.json of an evaluate run."""

    checkpoint: str = ""
    """The checkpoint's name as the user gave it."""
    checkpoint_key: str = ""
    """Identifies the weights, as `core.checkpoint.headers` does."""
    content: str = ""
    """Identifies weights, configuration and tokenizer, as `core.evaluate.known` does."""
    family: str = ""
    blocks: int | None = None
    parameters: int | None = None
    perplexity: tuple[Text, ...] = ()
    tasks: tuple[Asked, ...] = ()
    skills: tuple[Skills, ...] = ()
    limit: int | None = None
    flops_per_s: float | None = None
    """Rate over the texts that this run measured; None if all were reused."""
    seconds: float | None = None
    device: str = ""
    dtype: str = ""
    peak_memory_mib: float | None = None
    processes: int = 1
    """Those that shared the windows and questions; ``peak_memory_mib`` is the first one's."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All results, of every kind."""
        return (*self.perplexity, *self.tasks, *self.skills)


def write_samples(run: Run, samples: Iterable[Sample]) -> None:
    """Write samples.jsonl; no file without samples."""
    lines = [json.dumps(_plain(sample), ensure_ascii=False) for sample in samples]
    if lines:
        run.write_text(SAMPLES, "\n".join(lines) + "\n")


def _plain(sample: Sample) -> dict[str, Any]:
    values = dataclasses.asdict(sample)
    return {k: v for k, v in values.items() if v is not None or k not in CHOICES_ONLY}


def read_samples(folder: Path) -> tuple[Sample, ...]:
    """Return a run's samples; empty if it has none. Cached until the file changes."""
    path = folder / SAMPLES
    return _samples(path, path.stat().st_mtime_ns) if path.is_file() else ()


@functools.lru_cache(maxsize=16)
def _samples(path: Path, _: int) -> tuple[Sample, ...]:
    found = (from_dict(Sample, line) for line in workspace.json_lines(path))
    return tuple(sample for sample in found if sample is not None)


def read_windows(folder: Path, source: str, window: int, bos: str) -> tuple[float, ...]:
    """Return a run's window losses for one text and protocol; empty if it has none."""
    wanted = (source, window, bos)
    rows = WindowRow.read(folder)
    return tuple(row.nll for row in rows if (row.source, row.window, row.bos) == wanted)
