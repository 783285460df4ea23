"""``python -m core generate CHECKPOINT --prompts SOURCE --out DIR``: training text of its own.

For each prompt the model's own answer is kept if it passes a check, and the reference otherwise
(self-data distillation, arXiv 2410.09982). Nothing here imports torch at its top.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.benchmark import analytic
from core.checkpoint import locate
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.diversity import diversity_of
from core.errors import DataError
from core.generate import checks
from core.generate import prompts as reading
from core.generate.results import OWN, REFERENCE, Pair, Summary, write_rows
from core.generate.spec import BATCH, GenerateSpec, temperature_of
from core.generate.tape import TAPE, Tape
from core.retrain import encoders
from core.runs import devices, dtypes, pace
from core.runs.devices import MIB
from core.runs.footprint import PROCESS_BYTES, Footprint, kind_of, whole

if TYPE_CHECKING:
    from core.checkpoint.headers import CheckpointInfo
    from core.checkpoint.locate import Checkpoint
    from core.generate.prompts import Prompt, Prompts
    from core.runs.run import Run

SHOWN = 8
"""Prompts that a dry run shows."""

__all__ = ("GenerateSpec", "dry_run", "run")


def dry_run(spec: GenerateSpec) -> dict[str, Any]:
    """Return the prompts, and the estimated tokens, memory and time; no torch."""
    checkpoint = locate.open(spec.checkpoint, need="config", quantized=True)
    info, spec = checkpoint.info, _with_text(spec, checkpoint)
    encoder = encoders.of_folder(checkpoint.folder)
    found = reading.read(spec, encoder, vocab=info.vocab, context=info.context)
    given = sum(len(prompt.ids) for prompt in found.found)
    most = len(found.found) * spec.max_tokens
    dtype = dtypes.expected(spec.dtype, info.dtype, spec.device).weights
    taken = footprint(spec, info, [len(prompt.ids) for prompt in found.found], dtype)
    rate = pace.flops_per_s("generate", spec.device, info.parameters)
    device = devices.resolve(spec.device)
    return {
        "dry_run": True,
        "checkpoint": spec.checkpoint,
        "prompts": spec.prompts,
        "format": found.kind,
        "template": found.template,
        "check": spec.check,
        "temperature": temperature_of(spec, found.kind),
        "rows": len(found.found),
        "skipped": found.skipped,
        "too_long": found.too_long,
        "too_short": found.too_short,
        "notes": found.notes(info.context - spec.max_tokens),
        "prompt_tokens": given,
        "most_new_tokens": most,
        "device": device,
        "memory_mib": round(taken.memory_bytes / MIB, 1),
        **taken.facts(),
        "flops": taken.flops,
        "seconds": taken.flops / rate if rate else None,
        "kind": "estimated",
        "seconds_from": "the rate of the last run in this workspace" if rate else None,
        "examples": [
            {"prompt": prompt.text, "reference": prompt.reference} for prompt in found.found[:SHOWN]
        ],
    }


def _with_text(spec: GenerateSpec, checkpoint: Checkpoint) -> GenerateSpec:
    return replace(spec, prompts=text_of(spec.prompts, checkpoint.folder))


def _flops(info: CheckpointInfo, tokens: int) -> float:
    """Return the operations for ``tokens`` tokens: two for each weight that multiplies."""
    table = 0 if info.tied else info.parts.get("embedding", 0)
    return 2.0 * (info.parameters - table) * tokens


def footprint(
    spec: GenerateSpec,
    info: CheckpointInfo,
    prompts: Sequence[int],
    dtype: str,
    limit: int | None = None,
) -> Footprint:
    """Return what answers of the greatest length take.

    Args:
        spec: The options.
        info: The checkpoint.
        prompts: Tokens of each prompt.
        dtype: Format of the model in memory.
        limit: The device's memory in bytes.
    """
    device = devices.resolve(spec.device)
    at_once = spec.batch or BATCH.get(device.partition(":")[0], BATCH["cpu"])
    batch, longest = min(at_once, len(prompts)), max(prompts)
    memory = analytic.memory_bytes(info, batch, longest, spec.max_tokens, dtype)["total"]
    memory += PROCESS_BYTES[kind_of(device)]
    batches, mean = -(-len(prompts) // batch), sum(prompts) / len(prompts)
    cache = analytic.kv_bytes(info, len(prompts), round(mean + spec.max_tokens / 2), dtype)
    return Footprint(
        memory_bytes=memory,
        way=whole(memory, limit),
        flops=_flops(info, sum(prompts) + len(prompts) * spec.max_tokens),
        passes=batches * spec.max_tokens,
        cache_bytes=float(spec.max_tokens * cache),
        read_bytes=info.stored_bytes,
    )


def run(spec: GenerateSpec, run: Run) -> None:
    """Let the model answer every prompt, check the answers and write the rows."""
    from core.generate.writing import Writer
    from core.model import loading
    from core.retrain.encoders import ModelTokenizer

    checkpoint = locate.open(spec.checkpoint, run.progress, quantized=True)
    info, spec = checkpoint.info, _with_text(spec, checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint.folder)
    encoder = ModelTokenizer(tokenizer, encoders.config_eos(checkpoint.folder))
    found = reading.read(spec, encoder, vocab=info.vocab, context=info.context)
    for note in found.notes(info.context - spec.max_tokens):
        run.progress.log(note)
    prepared = loading.prepare(spec, checkpoint)
    writer = Writer(spec, found, tokenizer, prepared, run.progress)
    settings = {
        "checkpoint": info.key,
        "prompts": sources.describe(spec.prompts)["content"],
        "device": str(prepared.device),
        "dtype": str(prepared.dtype),
        **{name: getattr(spec, name) for name in _DECISIVE},
    }
    tape = Tape(run.book / TAPE, settings, resume=spec.resume)
    if tape.answers:
        run.progress.log(f"Resuming: {len(tape.answers):,} answers are written already.")
    writer.write(tape)
    summary = _finish(spec, run, found, tape, writer)
    given = sum(len(prompt.ids) for prompt in found.found)
    seconds, new = tape.seconds, sum(len(one.ids) for one in tape.answers.values())
    replace(
        summary,
        checkpoint=spec.checkpoint,
        checkpoint_key=info.key,
        prompts=spec.prompts,
        content=settings["prompts"],
        batch=writer.batch,
        prompt_tokens=given,
        new_tokens=new,
        parameters=info.parameters,
        seconds=round(seconds, 3),
        tokens_per_s=new / seconds if seconds else None,
        flops_per_s=_flops(info, given + new) / seconds if seconds else None,
        **prepared.facts(),
        versions=_versions(),
    ).write(run)


_DECISIVE = (
    *("samples", "prompt_tokens", "format", "template", "temperature", "max_tokens"),
    *("batch", "seed", "check"),
)
"""Options that answers depend on; with others a run is not resumed."""


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from core import __version__

    return {
        "depthcut": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _finish(spec: GenerateSpec, run: Run, found: Prompts, tape: Tape, writer: Any) -> Summary:
    """Check the answers, write the rows, and return what became of the prompts."""
    texts = [writer.text(number, tape.answers[number].ids) for number in range(len(found.found))]
    rows, reasons, kept = [], Counter[str](), Counter[str]()
    for number, prompt in enumerate(found.found):
        answer = tape.answers[number]
        why = checks.problem(
            texts[number], answer.ids, answer.why, prompt.reference, spec.check,
            open_ended=found.kind == "text",
        )  # fmt: skip
        reasons[why] += 1
        which = REFERENCE if why else OWN
        if why and not prompt.reference.strip():
            kept["dropped"] += 1
            continue
        kept[which] += 1
        pair = Pair(
            prompt=prompt.text, own=texts[number], reference=prompt.reference, kept=which, why=why
        )
        rows.append((_row(found, prompt, pair), pair, found.template))
    del reasons[""]
    if not rows:
        raise DataError(
            f"No answer passed the check ({_in_words(reasons)}), and the prompts have no reference "
            "to keep instead.",
            "Give a larger --max-tokens, another --check, or prompts with references.",
        )
    write_rows(run, rows)
    failed = sum(reasons.values())
    why = f" The others: {_in_words(reasons)}." if failed else ""
    run.progress.log(
        f"Wrote {len(rows):,} rows: {kept[OWN]:,} with the model's own answer, "
        f"{kept[REFERENCE]:,} with the reference.{why}"
    )
    if not kept[OWN]:
        run.progress.log("No own answer passed the check, so this is the dataset as it was.")
    return Summary(
        kind=found.kind,
        template=found.template,
        check=spec.check,
        temperature=temperature_of(spec, found.kind),
        max_tokens=spec.max_tokens,
        seed=spec.seed,
        rows=len(rows),
        own=kept[OWN],
        references=kept[REFERENCE],
        dropped=kept["dropped"],
        reasons=dict(reasons),
        skipped=found.skipped,
        too_long=found.too_long,
        too_short=found.too_short,
        own_text=diversity_of(texts),
        reference_text=diversity_of(p.reference for p in found.found if p.reference),
    )


def _in_words(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,} {checks.REASONS[why]}" for why, count in reasons.most_common())


def _row(found: Prompts, prompt: Prompt, pair: Pair) -> dict[str, Any]:
    """Return a row to train on, of the source's own kind."""
    text = pair.own if pair.kept == OWN else pair.reference
    if found.kind == "text":
        return {"text": prompt.text + text}
    if found.kind == "messages":
        *before, last = prompt.row["messages"]
        return {"messages": [*before, {**last, "content": text}]}
    return {**prompt.row, "output": text}
