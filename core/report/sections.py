"""The chapters of a report, each from the material; a line names what was not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from core.charts import compare as charts
from core.charts import importance as importance_charts
from core.charts import retrain as retrain_charts
from core.charts.checkpoint import parameter_bars
from core.charts.prune import block_strip
from core.compare import choice, compiled, published, writing
from core.compare.scene import accuracy
from core.evaluate import token_view
from core.evaluate.token_view import TokenView
from core.findings import Finding
from core.findings.certainty import certainty
from core.findings.scores import protected_of
from core.prune.known import measured_on
from core.prune.score_results import (
    AngularRow,
    BlockRow,
    DivergenceRow,
    GreedyRow,
    Importance,
    SampleRow,
    WeightRow,
)
from core.report import html
from core.report.html import Part, Section
from core.report.material import Material, commands, versions
from core.retrain import history
from core.retrain.log import MetricLog
from core.retrain.results import Summary, read_measures
from core.runs.workspace import BOOKKEEPING, RunRecord
from core.study import Study, info_of
from core.study.settings import short

MOST_CURVES = 6
"""Retrainings whose curves are drawn; the table lists all of them."""
MOST_STRIPS = 16
"""Variants drawn as a strip of blocks."""


def checkpoint(material: Material) -> Section:
    """Describe the dense checkpoint."""
    known = material.study
    info = info_of(known.dense)
    title = "Checkpoint"
    if info is None:
        return Section(
            "checkpoint", title, [html.Paragraph(f"{known.dense.id} is not on this machine.")]
        )
    found = {
        "name": known.dense.id,
        "family": info.family,
        "blocks": info.blocks,
        "parameters": info.parameters,
        "hidden size": info.hidden,
        "vocabulary": info.vocab,
        "context": info.context,
        "precision of the weights": info.dtype,
        "content": info.key,
    }
    figure = html.Figure(
        parameter_bars(info),
        "Parameters of the embedding, of every block by kind, and of the head.",
        "Where the parameters are, counted from the weight headers.",
    )
    return Section("checkpoint", title, [*html.facts(found, "The dense checkpoint"), figure])


def findings(found: Sequence[Finding]) -> Section:
    """List what the figures show and what to try next."""
    parts = [
        html.Remark(f.sentence, f.try_next, html.facts(f.evidence, "The figures behind it"))
        for f in found
    ]
    return Section("findings", "Findings", parts or [html.Paragraph("Nothing stands out.")])


# ------------------------------------------------------------------------------------- importance


def importance(material: Material) -> Section:
    """Show the importance of every block and the text it was measured on."""
    record, title = material.scores, "Calibration and importance"
    blocks = BlockRow.read(record.path) if record else ()
    if record is None or not blocks:
        words = "The importance of the blocks has not been measured yet."
        return Section("importance", title, [html.Paragraph(words)])
    run = Importance.read(record.path) or Importance()
    note = measured_on(run)
    calibration = {
        "run": material.names.run(record),
        "calibration text": run.calibration,
        "its content": run.calibration_content,
        "rows x tokens": f"{run.samples} x {run.length}",
        "seed": str(run.seed),
        "predictions": run.tokens,
        "dense perplexity on it": run.dense_ppl,
        "device, precision": f"{run.device}, {run.dtype}",
    }
    parts = html.facts(calibration, "What the blocks were scored on (measured)")
    parts += _block_figures(record, blocks, run.dense_ppl, note)
    parts += html.table([asdict(b) for b in blocks], "Scores of every block (measured)")
    return Section("importance", title, parts)


def _block_figures(
    record: RunRecord, blocks: Sequence[BlockRow], dense: float | None, note: str
) -> list[Part]:
    parts: list[Part] = []
    values = [b.ppl for b in blocks if b.ppl is not None]
    samples, weights = SampleRow.read(record.path), WeightRow.read(record.path)
    angular, greedy = AngularRow.read(record.path), GreedyRow.read(record.path)
    if len(values) == len(blocks):
        top = importance_charts.useful_top(values, dense)
        figure = importance_charts.perplexity_bars(values, dense)
        parts.append(html.Figure(figure, "Perplexity without each block, full range.", note))
        if top:
            figure = importance_charts.perplexity_bars(values, dense, log=False, top=top)
            words = f"{note} The same, with outliers clipped."
            parts.append(
                html.Figure(figure, "Perplexity without each block, outliers clipped.", words)
            )
    if samples:
        parts += _samples(samples, len(blocks), note)
    if all(b.kl is not None for b in blocks):
        parts += _divergences(record, blocks, note)
    for column in ("taylor", "magnitude"):
        if weights and all(getattr(w, column) is not None for w in weights):
            figure = importance_charts.taylor_heatmap(importance_charts.table(weights), column)
            parts.append(html.Figure(figure, f"{column} by module and block.", note))
    if angular:
        figure = importance_charts.angular_triangle(importance_charts.table(angular))
        words = (
            f"{note} Circled: the start block with the smallest angular change for that cut length."
        )
        parts.append(html.Figure(figure, "Angular distance by start and length of the cut.", words))
    if greedy:
        figure = importance_charts.greedy_line(importance_charts.table(greedy), dense)
        parts.append(html.Figure(figure, "Perplexity after each round of greedy removal.", note))
    scores = importance_charts.table(blocks)
    if len(importance_charts.scored_columns(scores)) > 1:
        figure = importance_charts.agreement_heatmap(scores)
        words = f"{note} Spearman's rank correlation; 1 means the same order of blocks."
        parts.append(html.Figure(figure, "Rank agreement between the criteria.", words))
    return parts


def _samples(samples: Sequence[SampleRow], blocks: int, note: str) -> list[Part]:
    """Draw perplexity by row, and report how much the order depends on the rows."""
    table = importance_charts.table(samples)
    ratios = importance_charts.row_ratios(table)
    top = importance_charts.useful_top(ratios.to_numpy().ravel().tolist(), None)
    figure = importance_charts.sample_heatmap(table, top=top)
    words = "Perplexity of each row without each block, as times the row's dense perplexity."
    parts: list[Part] = [html.Figure(figure, words, note)]
    return parts + _certain(samples, blocks)


def _divergences(record: RunRecord, blocks: Sequence[BlockRow], note: str) -> list[Part]:
    """Draw the KL from the dense model, and report how much its order depends on the rows."""
    top = importance_charts.useful_top([b.kl or 0.0 for b in blocks], None)
    figure = importance_charts.score_bars(importance_charts.table(blocks), "kl", top)
    clipped = ", outliers clipped" if top else ""
    words = f"KL from the dense model without each block, in nats per token{clipped}."
    parts: list[Part] = [html.Figure(figure, words, note)]
    rows = DivergenceRow.read(record.path)
    if rows:
        table = importance_charts.table(rows)
        top = importance_charts.useful_top(table["kl"].tolist(), None)
        figure = importance_charts.divergence_heatmap(table, top=top)
        parts.append(html.Figure(figure, "KL of each row without each block, in nats.", note))
    return parts + _certain([row.as_sample for row in rows], len(blocks), "KL")


def _certain(samples: Sequence[SampleRow], blocks: int, by: str = "perplexity") -> list[Part]:
    """Return how certain the order by a criterion is, as a table; empty if that is unknown."""
    parts: list[Part] = []
    found = certainty(samples, protected_of(blocks))
    if found:
        rows = [
            {
                "rank": place + 1,
                "block": block,
                "same rank in": f"{found.rank_share[place]:.0%}",
                "rank in 90 % of resamples": " to ".join(
                    map(str, sorted(set(found.rank_range[place])))
                ),
                "same set up to this rank in": f"{found.set_share[place]:.0%}",
            }
            for place, block in enumerate(found.order)
        ]
        words = f"How much the order by {by} would change with other rows: 1,000 resamples"
        parts += html.table(rows, f"{words} (seed 1234), protected blocks excluded")
    return parts


# ----------------------------------------------------------------------------- plans and variants


def variants(material: Material) -> Section:
    """List every checkpoint of the study, and draw which blocks each one drops."""
    known = material.study
    labels = {v.id: v.label for v in known.variants}
    rows = [
        {
            "variant": v.label,
            "kind": v.kind,
            "method": v.method_label,
            "retrained": v.retrained,
            "quantized": v.quantized,
            "dropped blocks, in order": v.dropped or None,
            "no attention": v.without_attention or None,
            "no MLP": v.without_mlp or None,
            "parameters": v.parameters,
            "removed": f"{v.ratio:.1%}" if v.ratio else None,
            "made from": labels.get(v.parent, v.parent),
            "run": v.record.id if v.record else None,
        }
        for v in known.variants
    ]
    parts = html.table(rows, "Checkpoints of this study")
    cuts = {
        v.label: v.dropped
        for v in known.variants
        if v.dropped and not v.retrained and not v.quantized
    }
    info = info_of(known.dense)
    if cuts and info:
        strip = block_strip(info.blocks, dict(list(cuts.items())[:MOST_STRIPS]))
        words = "Crossed out: dropped blocks, numbered in removal order."
        parts.append(html.Figure(strip, "Blocks that each variant drops.", words))
    plans = [c for c in material.scene.found if c.is_plan]
    planned: list[dict[str, Any]] = [
        {
            "plan": c.label,
            "dropped blocks, in order": c.dropped,
            "parameters": c.parameters,
            "removed": f"{c.ratio:.1%}" if c.ratio else None,
            "perplexity": c.ppl,
        }
        for c in plans
    ]
    parts += html.table(planned, "Plans with measured perplexity; no checkpoint was written")
    return Section("variants", "Plans and variants", parts)


# ------------------------------------------------------------------------------------- retraining


def retraining(material: Material) -> Section:
    """Show how much quality retraining recovered."""
    records = material.retrained
    title = "Retraining"
    if not records:
        return Section("retraining", title, [html.Paragraph("Nothing has been retrained yet.")])
    table = history.comparison(records, material.names.run)
    parts = html.table(_records(table), "Retrainings; losses on held-out rows in nats per token")
    if table["recovered"].notna().any():
        figure = retrain_charts.recovered_bars(table)
        words = (
            "Share of the loss gap between pruned and dense, and of KL(dense || model), that "
            "retraining closed (measured)."
        )
        parts.append(html.Figure(figure, "Recovered share of each retraining.", words))
    for record in records[:MOST_CURVES]:
        parts += _curve(record, material.names.run(record))
    if len(records) > MOST_CURVES:
        words = f"Only the newest {MOST_CURVES} curves are drawn; the table has the figures of all."
        parts.append(html.Paragraph(words, note=True))
    return Section("retraining", title, parts)


def _curve(record: RunRecord, name: str) -> list[Part]:
    summary = Summary.read(record.path) or Summary()
    log = MetricLog(record.path / BOOKKEEPING / "metrics.jsonl")
    log.update()
    parts: list[Part] = [html.Heading(name)]
    if summary.heldout_loss_before is not None:
        parts.append(html.Paragraph(history.verdict(summary)))
        if more := history.elsewhere(record.path, summary):
            parts.append(html.Paragraph(more))
    note = history.measured_on(summary) if summary.heldout.rows else ""
    if log.steps:
        figure = retrain_charts.loss(
            [s.step for s in log.steps], [s.loss for s in log.steps], log.evaluations
        )
        parts.append(html.Figure(figure, f"Loss by step of {name}.", note))
    table = [asdict(row) for row in read_measures(record.path)]
    if table:
        words = "Further evaluation: loss and KL(dense || model) in nats per token, accuracy"
        parts += html.table(table, words)
    return parts


# ---------------------------------------------------------------------------------------- quality


def quality(material: Material) -> Section:
    """Show perplexities by every protocol, and task scores with their difference from dense."""
    known, scene = material.study, material.scene
    parts: list[Part] = []
    if scene.protocol and any(c.ppl for c in scene.found):
        figure = charts.quality(scene.found)
        words = f"Measured: {scene.protocol.label}. Large markers: checkpoints; small: plans."
        parts.append(
            html.Figure(figure, "Perplexity against the share of parameters removed.", words)
        )
    for protocol in known.protocols:
        base = known.perplexity(known.dense.id, protocol)
        rows = []
        for v in known.variants:
            found = known.perplexity(v.id, protocol)
            if found:
                rows.append(
                    {
                        "variant": v.label,
                        "perplexity": found.ppl,
                        "times dense": found.ppl / base.ppl if base else None,
                        "tokens": found.tokens,
                        "device": found.device,
                        "precision": found.dtype,
                        "run": found.run,
                    }
                )
        parts += html.table(rows, f"Perplexity (measured): {protocol.label}")
    rows = _tasks(known)
    if rows:
        words = "Task scores (measured), with the difference from dense and its standard error"
        parts += html.table(rows, words)
    rows = writing.rows(known)
    if rows:
        words = (
            "Text written in tasks (measured): length, repetition and distinct-n, beside the dense "
            "model"
        )
        parts += html.table(rows, words)
    parts += _token_views(material)
    return Section(
        "quality", "Quality", parts or [html.Paragraph("No quality has been measured yet.")]
    )


def _tasks(known: Study) -> list[dict[str, Any]]:
    newest = {
        (t.variant, t.task, t.metric, t.prompting): t
        for t in sorted(known.tasks, key=lambda t: t.started)
    }
    labels = {v.id: v.label for v in known.variants}
    rows = []
    for (variant, task, metric, how), found in newest.items():
        base = newest.get((known.dense.id, task, metric, how))
        delta = found.value - base.value if base and variant != known.dense.id else None
        error = None
        if base and base.stderr is not None and found.stderr is not None:
            error = math.hypot(base.stderr, found.stderr)
        rows.append(
            {
                "task": task,
                "variant": labels.get(variant, variant),
                "metric": metric,
                "asked": how or "as the task says",
                "value": found.value,
                "stderr": found.stderr,
                "minus dense": delta,
                "stderr of difference": error if delta is not None else None,
                "samples": found.samples,
            }
        )
    return sorted(rows, key=lambda r: (str(r["task"]), str(r["variant"])))


MOST_VIEWS = 2
"""Texts that are shown token by token."""


def _token_views(material: Material) -> list[Part]:
    """Return the beginning of texts as the dense model and the best variant read them."""
    known, take = material.study, material.verdict.take
    other = take or next((c for c in material.verdict.found[1:]), None)
    if other is None:
        return []
    newest: dict[str, dict[tuple[int, ...], TokenView]] = {}
    evaluated = {r.id: r for r in known.runs if r.command == "evaluate"}
    for row in sorted(known.quality, key=lambda q: q.started):
        if row.run in evaluated and row.variant in (known.dense.id, other.id):
            views = token_view.read(evaluated[row.run].path)
            newest.setdefault(row.variant, {}).update({view.ids: view for view in views})
    dense, own = (list(newest.get(name, {}).values()) for name in (known.dense.id, other.id))
    parts: list[Part] = []
    first, second = known.dense.label, other.label
    for one, view in token_view.pairs(dense, own)[:MOST_VIEWS]:
        parts.append(html.Heading(f"Token by token: the beginning of {short(view.source)}"))
        parts.append(html.Paragraph(token_view.summary(one, view, second)))
        parts.append(
            html.Beside(
                (
                    (f"{first}, by loss", token_view.by_loss(one, view, first, second)),
                    (f"{second}, by loss", token_view.by_loss(view, one, second, first)),
                    (
                        f"{second}, by difference",
                        token_view.by_difference(one, view, second, first),
                    ),
                )
            )
        )
    return [*parts, html.Paragraph(token_view.LEGEND, note=True)] if parts else []


# ------------------------------------------------------------------------------------------- cost


def cost(material: Material) -> Section:
    """Show latency, throughput and memory, and quality against them."""
    scene = material.scene
    title = "Speed and memory"
    if not scene.rows:
        words = "No benchmark has been run yet: speed is unknown, and memory is estimated."
        cell = material.verdict.cell
        return Section("cost", title, [html.Paragraph(words), *_cost_table(material, cell)])
    summary = scene.runs[0].summary
    note = (
        f"Measured on {summary.device} ({summary.device_name}), "
        f"{summary.input_tokens} tokens in, seed {summary.seed}."
    )
    cell = material.verdict.cell
    here = [r for r in scene.rows if r.cell[1:] == cell[1:]]
    parts: list[Part] = []
    for metric in ("latency_s_p50", "tokens_per_s", "peak_memory_mib", "speedup"):
        figure = charts.against(here, scene.found, metric, capacity_mib=scene.capacity_mib)
        if charts.data_of(figure):
            label = charts.METRICS[metric]
            words = f"{note} {label} by batch size, {cell[2]} tokens out."
            parts.append(html.Figure(figure, f"{label} by batch size.", words))
    rows = scene.table(cell, estimates=True)
    front = choice.frontier(rows, "per_token_ms")
    if front:
        looks = {c.id: charts.look_of(c) for c in scene.found}
        figure = charts.pareto(rows, looks, front, "per_token_ms")
        words = "Filled: measured cost; hollow: estimated. Arrows: retraining."
        parts.append(html.Figure(figure, "Perplexity against time per token.", words))
    parts += _cost_table(material, cell)
    batch, given, made = cell
    words = f"{compiled.HOW} Batch {batch}, {given} tokens in, {made} out; measured"
    parts += html.table(compiled.rows(material.study, scene.runs, cell), words)
    said = accuracy(scene.runs)
    return Section("cost", title, [*parts, html.Paragraph(said, note=True)] if said else parts)


def _cost_table(material: Material, cell: tuple[int, int, int]) -> list[Part]:
    rows = [
        {
            "variant": r.candidate.label,
            "cost is": r.kind_of_cost,
            "latency, s": r.latency_s,
            "ms per token": r.per_token_ms,
            "tokens/s": r.tokens_per_s,
            "speed-up over dense": r.speedup,
            "memory, MiB": r.memory_mib,
            "perplexity": r.ppl,
        }
        for r in material.scene.table(cell, estimates=True)
    ]
    batch, given, made = cell
    where = f"at batch {batch}, {given} tokens in, {made} out"
    guessed = [row for row in rows if row["cost is"] == "estimated"]
    known = [row for row in rows if row["cost is"] != "estimated"]
    return [
        *(html.table(known, f"Cost {where}") if known else []),
        *(html.table(guessed, f"Estimated cost {where}") if guessed else []),
    ]


# -------------------------------------------------------------------------------------- published


def others(material: Material) -> Section:
    """Show published figures next to the measured ones, with their source; never mixed."""
    parts: list[Part] = [
        html.Paragraph(
            "Published on other models, data and hardware; compare them only relative to their "
            "own dense baseline. Each table is from one source.",
            note=True,
        )
    ]
    scene = material.scene
    for source in published.sources():
        overlay = published.over_dense(source)
        evaluated = any(c.ppl for c in scene.found if c.kind == "dense")
        if overlay and evaluated and scene.protocol:
            figure = charts.quality(scene.found, relative=True, published=overlay)
            words = f"Lines measured: {scene.protocol.label}. Stars published: {source}, "
            words += "WikiText-2, windows of 128."
            parts.append(
                html.Figure(figure, f"Measured figures next to those published by {source}.", words)
            )
        rows = [
            {"model": r["model"], "variant": r["label"], "figures are": "published"}
            | {k: v for k, v in r.items() if k not in ("source", "model", "label", "method")}
            for r in published.figures()
            if r["source"] == source
        ]
        parts += html.table(rows, f"Published: {source}")
    return Section("published", "Published figures", parts)


# -------------------------------------------------------------------------------------- reproduce


def reproduce(material: Material) -> list[Section]:
    """List versions and, in order, the commands that produced every figure."""
    lines = commands(material.runs)
    made = html.table(versions(material.runs), "Device, precision and versions of the runs")
    again: list[Part] = [
        html.Paragraph("Each line is one run, oldest first. The steps of a recipe follow it."),
        html.Code(lines),
    ]
    nothing: list[Part] = [html.Paragraph("There are no runs yet.")]
    return [
        Section("versions", "Versions", made or nothing),
        Section("reproduce", "Reproduce", again if lines else nothing),
    ]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows with None for missing values."""
    return [
        {str(k): None if v is None or v != v else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]
