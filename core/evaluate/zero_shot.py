"""Tasks of the LM Evaluation Harness, through its own Python interface on a model in memory.

The figures are the harness's own: its task definitions, requests, metrics and standard errors;
`tests/evaluate` compares them with its command line. Only this module, `core.evaluate.bootstrap`
and `core.evaluate.block_tasks` import lm-eval; tasks with local data do not contact the Hub.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import DataError, DepthcutError, OutOfMemoryError
from core.evaluate import shared_prefix
from core.evaluate.bootstrap import in_this_process
from core.evaluate.estimate import QUESTIONS_AT_ONCE
from core.evaluate.results import USUAL, Prompting, Sample, Score
from core.evaluate.suites import PAPER, Place
from core.evaluate.task_code import is_trusted
from core.model.memory import out_of_memory_explained
from core.model.tokens import check_ids, embedded, pad_id
from core.runs import failures
from core.runs.progress import SILENT, Progress
from core.runs.ranks import ALONE, Ranks

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
SEEDS = (0, 1234, 1234, 1234)
"""lm-eval's own seeds: Python, NumPy, torch, few-shot examples."""
_ORIGINAL: list[Any] = []
"""lm-eval's own way to import a function and to render a template, once `_guard` was called."""


@dataclass(frozen=True)
class TaskResult:
    """The scores (for a group, also those of its tasks) and samples of one task."""

    scores: tuple[Score, ...]
    samples: tuple[Sample, ...] = field(repr=False)
    """One entry per question; see `sample`."""
    versions: dict[str, Any]
    """Version of every task definition."""
    shots: dict[str, int]
    output_types: dict[str, str]
    seconds: float
    batch: int


def manager(places: Sequence[Place], *, allow_code: bool = False) -> Any:
    """Return lm-eval's task manager for only the folders of ``places``.

    Without ``allow_code``, from here on lm-eval imports functions only for its own tasks and the
    demo's, and renders templates in jinja's sandbox; `core.evaluate.task_code` finds such tasks
    before.
    Indexing all of lm-eval's tasks takes long; usually the tasks' own folders are enough.
    """
    _quiet()
    from lm_eval.tasks import TaskManager

    _guard(allow_code or not any(p.local and not is_trusted(p.folder) for p in places))
    folders = list(dict.fromkeys(str(place.folder) for place in places))
    return TaskManager(include_path=folders, include_defaults=False)


def _guard(allowed: bool) -> None:
    """Let lm-eval run code that task files name, or only its own tasks' and the demo's."""
    import lm_eval.utils as harness
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.tasks import _yaml_loader

    if not _ORIGINAL:
        _ORIGINAL.extend((_yaml_loader._import_func_in_yml, harness.env))
    import_function, environment = _ORIGINAL

    def guarded(name: str, folder: Path) -> Any:
        if not is_trusted(Path(folder)):
            raise PermissionError(f"'{name}' in {folder} is Python code; --allow-task-code allows")
        return import_function(name, folder)

    sandbox = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    sandbox.filters.update(environment.filters)
    _yaml_loader._import_func_in_yml = import_function if allowed else guarded
    harness.env = environment if allowed else sandbox


def load(found: Any, place: Place, fewshot: int | None = None) -> Any:
    """Return the tasks of ``place`` (and groups, if it is one) with their data.

    ``fewshot`` replaces the tasks' own numbers of examples, except a 0, as in lm-eval.

    Raises:
        DataError: The data is not on this machine and cannot be downloaded, or lm-eval cannot read
            the task's file.
    """
    from lm_eval.tasks import TaskManager

    try:
        try:
            loaded = found.load([place.name])
        except KeyError:  # it refers to tasks in other folders
            if place.local:
                raise
            loaded = TaskManager().load([place.name])
    except Exception as error:
        raise _not_loaded(place, error) from error
    for task in loaded["tasks"].values():  # as lm-eval's `simple_evaluate` does
        own = task.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
    return loaded


def _not_loaded(place: Place, error: Exception) -> DepthcutError:
    """Return the error for a task that could not be loaded."""
    if failures.is_out_of_memory(error):
        return failures.as_known(error)
    name = type(error).__name__
    text = f"{name}: {(str(error).splitlines() or [''])[0][:160]}"
    remote = ("Connect", "Offline", "HTTP", "Timeout", "LocalEntryNotFound", "DatasetNotFound")
    if any(word in text for word in remote) or "couldn't find" in text.lower():
        return DataError(
            f"The data of task '{place.name}' is not in this machine's cache, and the Hub cannot "
            f"be reached ({name}).",
            "Connect to the Internet once, copy the cache (HF_HOME) here, or use local tasks with "
            "--task-dir.",
        )
    return DataError(f"Cannot load task '{place.name}': {text}.", "Fix its YAML file or its data.")


def _quiet() -> None:
    """Keep progress bars and warnings of lm-eval and datasets out of our logs, but not errors."""
    import datasets
    import lm_eval.api.task as harness
    from tqdm import tqdm

    datasets.disable_progress_bars()
    harness.tqdm = functools.partial(tqdm, disable=True)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def harness_model(
    model: Any,
    tokenizer: Any,
    batch: int,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> Any:
    """Return lm-eval's own wrapper around a loaded model, with progress reports.

    If several processes share a run, each answers a part of the requests and gets the answers of
    the others; lm-eval then scores all questions in each of them, as if it had asked them all.

    A tokenizer with neither BOS nor EOS works until a task needs one; plain lm-eval fails at the
    first text that it encodes. Token ids outside the model's vocabulary raise `DataError` before
    they reach the device.
    """
    import jinja2
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    vocabulary = embedded(model)
    if (tokenizer.pad_token_id or 0) >= vocabulary:  # one that text never produces
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token_id = pad_id(tokenizer, vocabulary)
    bare = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None

    class Wrapped(HFLM):
        """lm-eval's model with our progress reports instead of its bars."""

        label, total, done = "", 0, 0

        @property
        def prefix_token_id(self) -> int:
            if bare:
                raise _no_token(self.label, "scores text without a context", "BOS")
            return super().prefix_token_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **more: Any
        ) -> Any:
            if bare and add_special_tokens is None:  # there is no BOS to start the text with
                add_special_tokens = True
            return super().tok_encode(string, add_special_tokens, **more)

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(*args, **kwargs)
            check_ids(ids.tolist(), vocabulary)
            return ids, mask

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.total, self.done = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def check_fit(self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]]) -> None:
            """Raise `DataError` for an answer that is empty or longer than the context."""
            longest = max((len(ending) for _, _, ending in requests), default=1)
            if longest > self.max_length:
                raise DataError(
                    f"Task '{self.label}' has an answer of {longest} tokens, but the checkpoint's "
                    f"context has {self.max_length}.",
                    "Leave this task out.",
                )
            if not all(before and ending for _, before, ending in requests):
                raise DataError(
                    f"Task '{self.label}' has a question or an answer without any token.",
                    "Fix its data, or leave this task out.",
                )

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.check_fit(requests)
            for _, context, answer in requests:
                check_ids((context, answer), vocabulary)
            longest = max((len(a) + len(b) for _, a, b in requests), default=0)
            own = requests[ranks.share(len(requests))]
            self.total = len(own) if ranks.size > 1 else self.total
            pairs = [(context, answer) for _, context, answer in own]
            if not requests or not shared_prefix.is_possible(self.model, longest):
                plain = super()._loglikelihood_tokens
                return self.answered(own, lambda: plain(own, *args, **options))
            return self.answered(own, lambda: self.scored(pairs))

        def answered(self, own: Sequence[Any], work: Callable[[], list[Any]]) -> list[Any]:
            """Return the answers to this process's ``own`` requests, and to those of the others.

            Running out of memory is for `ask`, but one of several processes cannot begin again.
            """
            while own and ranks.size > 1:
                try:
                    with out_of_memory_explained(f"asking {self.label}"):
                        return ranks.joined(work())
                except OutOfMemoryError:
                    if self.batch_size_per_gpu <= 1:
                        raise
                    self.batch_size_per_gpu //= 2
            return ranks.joined(work() if own else [])

        def scored(self, pairs: list[tuple[Sequence[int], Sequence[int]]]) -> Any:
            """Return the answers; the tokens that a question's choices share are computed once."""
            found: dict[int, shared_prefix.Answer] = {}
            for batch in shared_prefix.answers(
                self.model,
                pairs,
                context=self.max_length,
                rows=self.batch_size_per_gpu,
                softmax_dtype=self.softmax_dtype,
            ):
                found.update(batch)
                progress.step(min(len(found), self.total), self.total, self.label)
            return [found[number] for number in range(len(pairs))]

        def apply_chat_template(self, *args: Any, **options: Any) -> str:
            try:
                return str(super().apply_chat_template(*args, **options))
            except jinja2.TemplateError as error:
                raise DataError(
                    f"The chat template does not accept a question of task '{self.label}': "
                    f"{str(error).rstrip('.')}.",
                    "Leave out --chat-template, --system-instruction, or this task.",
                ) from error

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            progress.check_cancel()
            if self.tokenizer.eos_token_id is None:
                raise _no_token(self.label, "generates text up to its end", "EOS")
            for request in requests:
                asked = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
                if asked >= self.max_length:
                    raise DataError(
                        f"Task '{self.label}' generates up to {asked} tokens, but the "
                        f"checkpoint's context has {self.max_length}.",
                        "Leave this task out.",
                    )
            own = requests[ranks.share(len(requests))]
            self.total, self.done = len(own), 0
            plain = super().generate_until
            return self.answered(own, lambda: plain(own, disable_tqdm=True))

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self.done += len(context)
            progress.step(min(self.done, self.total), self.total, self.label)
            return found

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            self.done += len(inps)
            progress.step(min(self.done, self.total), self.total, self.label)
            return super()._model_call(inps, *args, **kwargs)

    return Wrapped(pretrained=model, tokenizer=tokenizer, batch_size=batch, backend="causal")


def _no_token(task: str, why: str, kind: str) -> DataError:
    """Return the error for a task that needs a token that the tokenizer lacks."""
    others = " and no EOS" if kind == "BOS" else ""
    return DataError(
        f"Task '{task}' {why}, but this checkpoint's tokenizer has no {kind} token{others}.",
        f"Set {kind.lower()}_token in tokenizer_config.json, or leave out this task.",
    )


def ask(
    lm: Any,
    place: Place,
    loaded: Any,
    limit: int | None,
    progress: Progress = SILENT,
    prompting: Prompting = USUAL,
) -> TaskResult:
    """Run one task; the batch is halved as long as the device runs out of memory.

    ``limit`` is the number of questions per task; None for all. Seeds are lm-eval's own.
    """
    from lm_eval import evaluator

    began = time.perf_counter()
    lm.label = place.name
    while True:
        try:
            asking = out_of_memory_explained(f"asking {place.name}")
            with asking, in_this_process(progress.check_cancel):
                _seed(loaded)
                found = evaluator.evaluate(
                    lm=lm, task_dict=loaded, limit=limit, **prompting.options
                )
            break
        except OutOfMemoryError:
            if lm.batch_size_per_gpu <= 1:
                raise
            lm.batch_size_per_gpu //= 2
            batch = lm.batch_size_per_gpu
            progress.log(f"{place.name}: out of memory; retrying with a batch of {batch}.")
    assert found is not None
    named = [task for task in found["results"] if task in found["samples"]]
    samples = tuple(
        sample(task, entry, _delimiter(loaded, task))
        for task in named
        for entry in found["samples"][task]
    )
    return TaskResult(
        scores=scores(found),
        samples=samples,
        versions=dict(found["versions"]),
        shots={task: int(n) for task, n in found["n-shot"].items() if task in named},
        output_types={task: str(loaded["tasks"][task].OUTPUT_TYPE) for task in named},
        seconds=round(time.perf_counter() - began, 3),
        batch=lm.batch_size_per_gpu,
    )


def _seed(loaded: Any) -> None:
    """Seed everything as lm-eval's command line does."""
    import numpy
    import torch

    random.seed(SEEDS[0])
    numpy.random.seed(SEEDS[1])
    torch.manual_seed(SEEDS[2])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEEDS[3])


def scores(found: Any) -> tuple[Score, ...]:
    """Return lm-eval's results as scores; for the paper's tasks, only the paper's metric."""
    sizes = {task: int(n["effective"]) for task, n in found["n-samples"].items()}
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, which = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            if task in PAPER and metric != PAPER[task]:
                continue
            stderr = values.get(f"{metric}_stderr,{which}")
            name = metric if which == "none" else f"{metric},{which}"
            error = float(stderr) if isinstance(stderr, (int, float)) else None
            size = sizes.get(task) or _group_size(task, found, sizes)
            rows.append(Score(task, name, float(value), error, size))
    return tuple(rows)


def _group_size(group: str, found: Any, sizes: dict[str, int]) -> int:
    """Return the number of questions of a group: the sum over all its tasks."""
    below = found.get("group_subtasks", {}).get(group) or []
    return sum(sizes.get(task) or _group_size(task, found, sizes) for task in below)


def _delimiter(loaded: Any, task: str) -> str:
    """Return the delimiter between a question and its choices."""
    return str(loaded["tasks"][task].get_config("target_delimiter") or "")


def sample(task: str, entry: dict[str, Any], delimiter: str = "") -> Sample:
    """Return one question with its answer and its metrics.

    ``metrics`` are the question's own values. Multiple choice also has the ``choices``, the
    log-likelihood of each, and the indices of ``target`` and ``answer``, the likeliest choice.
    """
    common: dict[str, Any] = {
        "task": task,
        "index": int(entry["doc_id"]),
        "filter": entry["filter"],
        "content": entry["doc_hash"],
        "metrics": {name: _plain(entry[name]) for name in entry["metrics"]},
        "target": _plain(entry["target"]),
    }
    arguments, answers = entry["arguments"], entry["filtered_resps"]
    pairs = [a for a in arguments if len(a) == 2 and isinstance(a[1], str)]
    scored = all(isinstance(a, (tuple, list)) and len(a) == 2 for a in answers)
    if len(pairs) == len(answers) > 1 and scored:
        contexts, endings = {a[0] for a in pairs}, [a[1].removeprefix(delimiter) for a in pairs]
        one = len(contexts) == 1
        likely = tuple(float(a[0]) for a in answers)
        return Sample(
            **common,
            question=pairs[0][0] if one else pairs[0][1],
            choices=tuple(endings if one else (a[0] for a in pairs)),
            loglikelihoods=likely,
            answer=max(range(len(answers)), key=lambda i: likely[i]),
        )
    raw = [text for one in entry.get("resps", ()) for text in (one if _is_list(one) else [one])]
    texts = [text for text in raw if isinstance(text, str)]
    return Sample(
        **common,
        question=arguments[0][0] if arguments else "",
        answer=_plain(answers[0] if len(answers) == 1 else answers),
        generated=tuple(texts) or None,
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _plain(value: Any) -> Any:
    """Return ``value`` as plain JSON: other libraries' numbers as Python's, the rest as text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def batch_for(device: str) -> int:
    """Return the initial batch of requests for a kind of device."""
    return QUESTIONS_AT_ONCE.get(device, QUESTIONS_AT_ONCE["cpu"])
