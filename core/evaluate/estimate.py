"""Estimated operations, memory and rate of evaluations, from headers and text; no torch."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

from core.checkpoint.headers import CheckpointInfo
from core.checkpoint.tokenizer import SentencePiece, read_tokenizer
from core.data import sources
from core.data.evaluation import evaluation_stream
from core.demo import DATA
from core.errors import OptionError
from core.evaluate import suites
from core.evaluate.results import Summary
from core.evaluate.spec import EvaluateSpec, with_texts
from core.evaluate.suites import DEMO
from core.importance.capacity import Capacity, Demand, decide, limit_of
from core.importance.estimate import block_flops, head_flops
from core.runs import devices, pace, ranks
from core.runs.devices import GIB, MIB
from core.runs.dtypes import BYTES, Formats, computable
from core.runs.footprint import Footprint, whole
from core.runs.workspace import Looks, Workspace

QUESTIONS_AT_ONCE = {"cpu": 8, "cuda": 64, "mps": 16}
"""Questions of a task that are answered together at first; halved until they fit."""
STATE_MIB = {"cpu": 64.0, "cuda": 2048.0, "mps": 512.0}
"""Hidden states of all variants without a block, held at the same time (`block_tasks`)."""


def forward_flops(info: CheckpointInfo, rows: int, tokens: int) -> float:
    """Return the operations of one pass over ``rows`` rows of ``tokens`` tokens."""
    blocks = sum(block_flops(info, block, rows, tokens) for block in range(info.blocks))
    return blocks + head_flops(info, rows, tokens)


def text_tokens(source: str, folder: Path) -> int | None:
    """Return the number of tokens of a text for a checkpoint; None if that needs a download."""
    name = sources.split_field(source)[0]
    if name.startswith("hub:") or name in sources.PRESETS:
        return None
    return _count(source, folder, sources.stamp(source))


@functools.lru_cache(maxsize=64)
def _count(source: str, folder: Path, _: str) -> int:
    kind = sources.kind_of(source)
    if kind == "input_ids":
        return sum(len(row["input_ids"]) for row in sources.rows_of(source))
    text = evaluation_stream(source)
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        return len(tokenizer.encode(text, add_special_tokens=False).ids)
    if (folder / "tokenizer.model").is_file():
        return len(SentencePiece(folder).ids(text, special=False))
    return len(text) // 4


def perplexity_flops(info: CheckpointInfo, tokens: int, window: int) -> float:
    """Return the operations of all windows of a text."""
    return forward_flops(info, tokens // window, window)


def task_flops(
    info: CheckpointInfo, task: str, limit: int | None, folder: Path, *, each_block: bool
) -> float | None:
    """Return the operations of a task; None if its questions are unknown until it is loaded.

    Only the demo's questions are known: one pass per question, which its choices share.
    """
    if task not in DEMO:
        return None
    lines = (DATA / f"questions_{task.removeprefix('demo_')}.jsonl").read_text(encoding="utf-8")
    asked = [json.loads(line) for line in lines.splitlines()[:limit]]
    letters = sum(len(one["context"]) for one in asked)
    length = max(2, letters // max(1, len(asked)) // 4)
    once = forward_flops(info, len(asked), length)
    return once * (1 + ((info.blocks + 1) / 2 if each_block else 0))


START_S = pace.START_S


def rate(device: str, parameters: int) -> tuple[float | None, str | None]:
    """Return the operations per second to expect of an evaluation, and their origin."""
    return pace.expected(("evaluate", "importance", "search"), device, parameters)


def question_s(task: str, device: str, parameters: int) -> float | None:
    """Return the seconds per question of a task in earlier runs on a device; None without one.

    In proportion to the model's parameters; the run whose model is nearest in size counts, and of
    those the newest. Of a task of ``--task-dir`` only its name is compared.
    """
    best, found = math.inf, None
    for measured, each_s in _asked(device).get(task, ()):
        apart = abs(math.log(measured / parameters))
        if apart < best - pace.NEAR:
            best = apart
            found = each_s * parameters / measured
    return found


_tasks: Looks[dict[str, list[tuple[int, float]]]] = Looks(8)


def _asked(device: str) -> dict[str, list[tuple[int, float]]]:
    """Return by task what earlier runs on a device took, the newest first.

    Parameters of the model, and seconds per question.
    """
    return _tasks.take((device, Workspace().root.absolute()), lambda: _asked_now(device))


def _asked_now(device: str) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for record in Workspace().runs("evaluate"):
        ours = record.state == "done" and not record.is_elsewhere
        summary = Summary.read(record.path) if ours else None
        if not summary or not summary.parameters or not pace.is_on(summary.device, device):
            continue
        for one in summary.tasks:
            asked = max((row.samples or 0 for row in one.rows), default=0)
            if not one.reused_from and one.seconds and asked:
                pair = summary.parameters, one.seconds / asked
                found.setdefault(one.task, []).append(pair)
    return found


def questions_flops(info: CheckpointInfo, count: int, *, each_block: bool) -> float:
    """Return the operations of ``count`` usual questions, each with its choices in one row."""
    once = forward_flops(info, count, QUESTION_TOKENS)
    return once * (1 + (info.blocks + 1) / 2 if each_block else 1)


def task_s(
    info: CheckpointInfo, task: str, spec: EvaluateSpec, folder: Path, per_s: float | None
) -> float | None:
    """Return the estimated seconds of a task: as earlier, else from its operations.

    ``per_s``: operations per second of this device; None if unknown.
    """
    count = spec.limit or USUAL_QUESTIONS
    if not spec.each_block and (one := question_s(task, spec.device, info.parameters)):
        return one * count
    flops = task_flops(info, task, spec.limit, folder, each_block=spec.each_block)
    if flops is None:
        flops = questions_flops(info, count, each_block=spec.each_block)
    return flops / per_s if per_s else None


USUAL_TOKENS, USUAL_QUESTIONS, QUESTION_TOKENS = 300_000, 1000, 100
"""A text that is not on this machine, a task, and a question with its choices, roughly."""


PART = 32_768
"""Tokens of a text that perplexity is measured on unless the whole text is asked for."""


def capped(spec: EvaluateSpec, folder: Path) -> EvaluateSpec:
    """Return the spec without a cap that no text reaches: the result is that of the whole text."""
    if spec.max_tokens is None:
        return spec
    texts = with_texts(spec, folder).perplexity
    sizes = [text_tokens(source, folder) for source in texts]
    short = all(size is not None and size <= spec.max_tokens for size in sizes)
    return replace(spec, max_tokens=None) if short else spec


def weights(spec: EvaluateSpec, info: CheckpointInfo, folder: Path) -> list[float]:
    """Return what each text, each task, and each task without every block takes.

    In seconds of earlier runs on this device, if they have asked all the tasks; else in tokens.
    """
    found: list[float] = []
    names = suites.expand(spec.tasks)
    per_s, _ = rate(spec.device, info.parameters)
    seconds = {name: question_s(name, spec.device, info.parameters) for name in names}
    if per_s and not spec.each_block and all(seconds.values()):
        a_token = forward_flops(info, 1, spec.window[0]) / spec.window[0] / per_s
        counts = [spec.limit or USUAL_QUESTIONS] * len(names)
        asked = [(seconds[name] or 0.0) * n for name, n in zip(names, counts, strict=True)]
        return [*(a_token * tokens for tokens in _text_weights(spec, folder)), *asked]
    found += _text_weights(spec, folder)
    each = (spec.limit or USUAL_QUESTIONS) * QUESTION_TOKENS
    found += [each] * len(names)
    if spec.each_block:
        found += [each * (info.blocks + 1) / 2] * len(names)
    return found


def _text_weights(spec: EvaluateSpec, folder: Path) -> list[float]:
    """Return the tokens of every text, once for each window."""
    found: list[float] = []
    for source in spec.perplexity:
        tokens = text_tokens(source, folder) or USUAL_TOKENS
        found += [min(tokens, spec.max_tokens or tokens)] * len(spec.window)
    return found


BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}
"""Tokens of the first batch of windows; halved until it fits. A CPU gains nothing from more."""


def capacity(
    spec: EvaluateSpec, info: CheckpointInfo, formats: Formats, windows: int, window: int
) -> Capacity:
    """Return how the perplexity of a text in ``windows`` windows runs within the memory."""
    batch = BATCH_TOKENS.get(devices.resolve(spec.device).partition(":")[0], 2048)
    # all windows' states, before and after a block, if blocks are read one after another, else
    # those of a batch alone
    demand = Demand("windows", 2, prepared=False, resident_states=0, tokens=2 * batch)
    limit = limit_of(spec.device, spec.memory_limit, spec.processes)
    windows = max(1, ranks.most(windows, spec.processes))
    return decide(info, formats, spec.device, limit, windows, window, [demand])


def text_footprint(
    spec: EvaluateSpec, info: CheckpointInfo, formats: Formats, tokens: int, window: int
) -> Footprint:
    """Return what the perplexity of a text of ``tokens`` takes in windows of ``window``."""
    room = capacity(spec, info, formats, tokens // window, window)
    flops = perplexity_flops(info, tokens, window)
    return room.footprint(info, flops, processes=spec.processes)


def tasks_footprint(
    spec: EvaluateSpec,
    info: CheckpointInfo,
    formats: Formats,
    flops: float,
    limit: int | None = None,
) -> Footprint:
    """Return what tasks of ``flops`` take; ``limit`` is the device's memory in bytes.

    They need the whole model in memory. The weights pass once for every batch of usual questions,
    and for all variants without a block once for as many as have room for their states.
    """
    kind = devices.resolve(spec.device).partition(":")[0]
    asked = ranks.most(spec.limit or USUAL_QUESTIONS, spec.processes)
    batch = min(asked, QUESTIONS_AT_ONCE.get(kind, QUESTIONS_AT_ONCE["cpu"]))
    together = batch * QUESTION_TOKENS
    held = Demand("questions", 1, splits=False, prepared=False, tokens=together)
    memory, passes = 0, -(-asked // batch)
    if spec.each_block:
        states = int(STATE_MIB.get(kind, STATE_MIB["cpu"]) * MIB)
        width = BYTES[computable(formats.arithmetic)]
        row = (info.blocks + 1) * QUESTION_TOKENS * info.hidden * width
        memory, passes = states, passes + -(-asked // max(1, states // max(1, row)))
    room = decide(info, formats, spec.device, None, batch, QUESTION_TOKENS, [held])
    memory += room.in_memory_bytes
    return Footprint(
        memory_bytes=memory,
        way=whole(memory, limit),
        flops=flops,
        passes=passes,
        read_bytes=info.stored_bytes,
        processes=spec.processes,
    )


def check_whole(spec: EvaluateSpec, info: CheckpointInfo, formats: Formats) -> None:
    """Raise `OptionError` if the whole model does not fit within --memory-limit."""
    if spec.memory_limit is None:
        return
    found = capacity(spec, info, formats, 1, 2)
    if found.in_memory_bytes > (found.limit_bytes or 0):
        what = "Quantized weights need" if info.quantization else "Tasks need"
        raise OptionError(
            f"--memory-limit: {spec.memory_limit:g} GiB are too little. {what} the whole model in "
            f"memory, which needs {found.in_memory_bytes / GIB:.2f} GiB.",
            "Raise the limit; perplexity alone can be measured with less.",
        )
