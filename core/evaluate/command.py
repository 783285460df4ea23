"""``python -m core evaluate CHECKPOINT --out DIR``: perplexity and zero-shot tasks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from core import checkpoint, data
from core.errors import OptionError
from core.evaluate import estimate as work
from core.evaluate import known, suites
from core.spec import DeviceOptions, option

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from core.checkpoint import CheckpointInfo
    from core.run import Run


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
        choices=data.BOS_PROTOCOLS,
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


def _check(spec: EvaluateSpec, info: CheckpointInfo) -> None:
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


def dry_run(spec: EvaluateSpec) -> dict[str, Any]:
    """Return the estimated operations, memory and time; null where data must be fetched first."""
    folder = checkpoint.resolve(spec.checkpoint, allow_config_only=True)
    info = checkpoint.inspect(folder)
    _check(spec, info)
    tasks = suites.expand(spec.tasks)
    suites.find(tasks, spec.task_dir)
    texts: list[dict[str, Any]] = []
    for source in spec.perplexity:
        data.describe(source)
        tokens = work.text_tokens(source, folder)
        for window in spec.window:
            flops = None if tokens is None else work.perplexity_flops(info, tokens, window)
            texts.append({"source": source, "window": window, "tokens": tokens, "flops": flops})
    asked: list[dict[str, Any]] = [
        {
            "task": t,
            "flops": work.task_flops(info, t, spec.limit, folder, each_block=spec.each_block),
        }
        for t in tasks
    ]
    parts = [part["flops"] for part in (*texts, *asked)]
    flops = None if None in parts else sum(parts)
    pace = work.rate(spec.device)
    dtype = info.dtype if spec.dtype == "auto" else spec.dtype
    memory = work.memory_mib(info, dtype, spec.device, each_block=spec.each_block)
    return {
        "checkpoint": spec.checkpoint,
        "perplexity": texts,
        "tasks": asked,
        "bos": spec.bos,
        "limit": spec.limit,
        "flops": flops,
        "memory_mib": round(memory, 1),
        "seconds": flops / pace if flops and pace else None,
        "kind": "estimated",
        "seconds_from": "the rate of the last run in this workspace" if flops and pace else None,
    }


class Session:
    """One checkpoint under judgement; the model is loaded when something must be measured."""

    def __init__(self, spec: EvaluateSpec, run: Run) -> None:
        """Resolve the checkpoint, and check the options against it."""
        from core import model as models

        self.spec, self.run = spec, run
        self.folder: Path = checkpoint.resolve(spec.checkpoint, run.progress)
        self.info = checkpoint.inspect(self.folder, allow_config_only=False)
        _check(spec, self.info)
        self.places = suites.find(suites.expand(spec.tasks), spec.task_dir) if spec.tasks else ()
        self.content = known.checkpoint_content(self.folder)
        self.earlier = None if spec.fresh else known.Earlier()
        self.tokenizer = models.load_tokenizer(self.folder)
        self.device = models.resolve_device(spec.device)
        self.dtype = _dtype(spec.dtype, self.device, self.info.dtype)
        self._model: Any = None
        models.reset_peak_memory(self.device)

    @property
    def model(self) -> Any:
        """The loaded model."""
        from core import model as models

        if self._model is None:
            where = f"{self.device} as {models.dtype_name(self.dtype)}"
            self.run.progress.log(f"Loading {self.spec.checkpoint} to {where}.")
            self._model = models.load_model(self.folder, self.device, self.dtype)
        return self._model

    def key(self, *libraries: str, **protocol: Any) -> str:
        """Return the key of a result under ``protocol``; versions of ``libraries`` count too."""
        return known.digest(
            {
                "checkpoint": self.content,
                "device": self.device.type,
                "dtype": str(self.dtype),
                "versions": known.versions(*libraries),
                **protocol,
            }
        )

    def known(self, key: str, what: str) -> tuple[Any, dict[str, Any]] | None:
        """Return the earlier run with this result and its entry, and say so."""
        found = self.earlier.find(key) if self.earlier else None
        if found:
            self.run.progress.log(f"{what}: measured before, in {found[0].id}.")
        return found


def _dtype(name: str, device: torch.device, declared: str) -> torch.dtype:
    """Return the dtype of weights and arithmetic.

    ``auto`` keeps the checkpoint's, but widens it on a CPU that cannot compute in it, as
    importance and curve do; widening is exact.
    """
    from core import model as models
    from core.importance.forward import compute_dtype

    dtype = models.resolve_dtype(name, device, {"dtype": declared})
    return compute_dtype(device, dtype) if name == "auto" else dtype


def _rate(session: Session, measured: list[Any]) -> float | None:
    """Return operations a second over the texts that were measured here."""
    own = [text for text in measured if text.reused_from is None]
    flops = sum(work.forward_flops(session.info, t.windows, t.window) for t in own)
    spent = sum(text.seconds for text in own)
    return flops / spent if flops and spent else None


def run(spec: EvaluateSpec, run: Run) -> None:
    """Measure what is asked for and write the files of the contract."""
    from core import model as models
    from core.evaluate import questions, texts

    began = time.perf_counter()
    session = Session(spec, run)
    loaded = questions.load(session)  # before any work: what is missing is said at once
    measured = [
        texts.measure(session, source, window)
        for source in spec.perplexity
        for window in spec.window
    ]
    texts.write(run, measured)
    asked = questions.measure(session, loaded)
    questions.write(run, asked)
    skills = questions.measure_blocks(session, loaded) if spec.each_block else []
    questions.write_blocks(run, skills)
    run.write_json(
        "summary.json",
        {
            "checkpoint": spec.checkpoint,
            "checkpoint_key": session.info.key,
            "content": session.content,
            "family": session.info.family,
            "blocks": session.info.blocks,
            "parameters": session.info.parameters,
            "perplexity": [text.summary() for text in measured],
            "tasks": [task.summary() for task in asked],
            "skills": [task.summary() for task in skills],
            "limit": spec.limit,
            "flops_per_s": _rate(session, measured),
            "seconds": round(time.perf_counter() - began, 3),
            "device": str(session.device),
            "dtype": models.dtype_name(session.dtype),
            "peak_memory_mib": round(models.peak_memory_mib(session.device), 1),
            "versions": known.versions(*(questions.LIBRARIES if asked else ())),
        },
    )
