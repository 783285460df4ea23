"""The chapters of a report, each from the material; what was not measured is said in a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from core.charts import compare as charts
from core.charts import importance as importance_charts
from core.charts import retrain as retrain_charts
from core.charts.checkpoint import parameter_bars
from core.charts.prune import block_strip
from core.compare import choice, headline, published
from core.compare.scene import accuracy
from core.findings import Finding
from core.findings.certainty import certainty
from core.findings.scores import protected_of
from core.prune.known import measured_on
from core.report import html
from core.report.html import Section
from core.report.material import Material, commands, summary_of, versions
from core.retrain import history
from core.retrain.log import MetricLog, evaluation_table
from core.runs.workspace import BOOKKEEPING, RunRecord
from core.study import Study, info_of, read_rows

MOST_CURVES = 6
"""Retrainings whose curves are drawn; all of them are in the table."""
MOST_STRIPS = 16
"""Variants drawn as a strip of blocks."""


def checkpoint(material: Material) -> Section:
    """Say what the dense checkpoint is."""
    known = material.study
    info = info_of(known.dense)
    title = "Checkpoint"
    if info is None:
        return Section("checkpoint", title, [html.paragraph(f"{known.dense.id} is not here.")])
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
    figure = html.figure(
        parameter_bars(info),
        "Parameters of the embedding, of every block by kind, and of the head.",
        "Where the parameters are, counted from the headers.",
    )
    return Section("checkpoint", title, [html.facts(found, "The dense checkpoint"), figure])


def findings(found: Sequence[Finding]) -> Section:
    """List what the figures show and what to try."""
    parts = [
        f'<div class="finding"><p><strong>{html.text(f.sentence)}</strong></p>'
        f"<p>Try: {html.text(f.try_next)}</p><details><summary>Evidence</summary>"
        f"{html.facts(f.evidence, 'The figures behind it')}</details></div>"
        for f in found
    ]
    return Section("findings", "Findings", parts or [html.paragraph("Nothing stands out.")])


# ------------------------------------------------------------------------------------- importance


def importance(material: Material) -> Section:
    """Show what every block is worth, and on which text that was measured."""
    record, title = material.scores, "Calibration and importance"
    blocks = _csv(record, "blocks.csv") if record else None
    if record is None or blocks is None:
        words = "No importance of this checkpoint was measured yet."
        return Section("importance", title, [html.paragraph(words)])
    summary = summary_of(record)
    note = measured_on(summary)
    calibration = {
        "run": record.id,
        "calibration text": summary.get("calibration"),
        "its content": summary.get("calibration_content"),
        "rows x tokens": f"{summary.get('samples')} x {summary.get('length')}",
        "seed": str(summary.get("seed")),
        "predictions": summary.get("tokens"),
        "dense perplexity on it": summary.get("dense_ppl"),
        "device, precision": f"{summary.get('device')}, {summary.get('dtype')}",
    }
    parts = [html.facts(calibration, "What the blocks were scored on (measured)")]
    parts += _block_figures(record, blocks, summary.get("dense_ppl"), note)
    parts.append(html.table(_records(blocks), "Scores of every block (measured)"))
    return Section("importance", title, parts)


def _block_figures(
    record: RunRecord, blocks: pd.DataFrame, dense: float | None, note: str
) -> list[str]:
    parts = []
    values = blocks["ppl"].tolist()
    samples, weights = _csv(record, "samples.csv"), _csv(record, "weights.csv")
    angular, greedy = _csv(record, "angular.csv"), _csv(record, "greedy.csv")
    if blocks["ppl"].notna().all():
        top = importance_charts.useful_top(values, dense)
        figure = importance_charts.perplexity_bars(values, dense)
        parts.append(html.figure(figure, "Perplexity without each block, all of it.", note))
        if top:
            figure = importance_charts.perplexity_bars(values, dense, log=False, top=top)
            words = f"{note} The same, cut off to the useful band."
            parts.append(html.figure(figure, "Perplexity without each block, useful band.", words))
    if samples is not None:
        parts += _samples(samples, len(blocks), note)
    for column in ("taylor", "magnitude"):
        if weights is not None and weights[column].notna().all():
            figure = importance_charts.taylor_heatmap(weights, column)
            parts.append(html.figure(figure, f"{column} by module and block.", note))
    if angular is not None:
        figure = importance_charts.angular_triangle(angular)
        words = f"{note} Ringed: where a cut of that length turns the state least."
        parts.append(html.figure(figure, "Angular distance by start and length of the cut.", words))
    if greedy is not None:
        figure = importance_charts.greedy_line(greedy, dense)
        parts.append(html.figure(figure, "Perplexity after every round of greedy removal.", note))
    if len(importance_charts.scored_columns(blocks)) > 1:
        figure = importance_charts.agreement_heatmap(blocks)
        words = f"{note} Spearman's rank correlation: 1 is the same order of blocks."
        parts.append(html.figure(figure, "Rank agreement of the criteria.", words))
    return parts


def _samples(samples: pd.DataFrame, blocks: int, note: str) -> list[str]:
    """Draw perplexity by row, and say how far the order depends on the rows."""
    table = importance_charts.row_perplexity(samples)
    top = importance_charts.useful_top(table.to_numpy().ravel().tolist(), None)
    figure = importance_charts.sample_heatmap(samples, top=top)
    parts = [html.figure(figure, "Perplexity of each row without each block.", note)]
    found = certainty(_records(samples), protected_of(blocks))
    if found:
        rows = [
            {
                "rank": place + 1,
                "block": block,
                "same rank in": f"{found.rank_share[place]:.0%}",
                "rank in 90 % of them": " to ".join(map(str, sorted(set(found.rank_range[place])))),
                "same set up to here in": f"{found.set_share[place]:.0%}",
            }
            for place, block in enumerate(found.order)
        ]
        words = "How far the order would differ with other rows: 1,000 resamples of the rows"
        parts.append(html.table(rows, f"{words} (seed 1234), protected blocks left out"))
    return parts


# ----------------------------------------------------------------------------- plans and variants


def variants(material: Material) -> Section:
    """List every checkpoint of the study, and draw which blocks each one keeps."""
    known = material.study
    labels = {v.id: v.label for v in known.variants}
    rows = [
        {
            "variant": v.label,
            "kind": v.kind,
            "method": v.method_label,
            "retrained": v.retrained,
            "dropped blocks, in order": v.dropped or None,
            "parameters": v.parameters,
            "removed": f"{v.ratio:.1%}" if v.ratio else None,
            "made from": labels.get(v.parent, v.parent),
            "run": v.record.id if v.record else None,
        }
        for v in known.variants
    ]
    parts = [html.table(rows, "Checkpoints of this study")]
    cuts = {v.label: v.dropped for v in known.variants if v.dropped and not v.retrained}
    info = info_of(known.dense)
    if cuts and info:
        strip = block_strip(info.blocks, dict(list(cuts.items())[:MOST_STRIPS]))
        words = "Numbered and crossed: dropped, in removal order."
        parts.append(html.figure(strip, "Blocks that each variant drops.", words))
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
    parts.append(
        html.table(planned, "Plans whose perplexity was measured; no checkpoint was written")
    )
    return Section("variants", "Plans and variants", parts)


# ------------------------------------------------------------------------------------- retraining


def retraining(material: Material) -> Section:
    """Show what came back by retraining."""
    records = material.retrained
    title = "Retraining"
    if not records:
        return Section("retraining", title, [html.paragraph("Nothing was retrained.")])
    table = history.comparison(records)
    parts = [html.table(_records(table), "Retrainings; losses on held-out rows, nat per token")]
    if table["recovered"].notna().any():
        figure = retrain_charts.recovered_bars(table)
        words = "Share of the gap between pruned and dense that was closed (measured)."
        parts.append(html.figure(figure, "Recovered share of every retraining.", words))
    for record in records[:MOST_CURVES]:
        parts += _curve(record)
    if len(records) > MOST_CURVES:
        words = f"Curves of the newest {MOST_CURVES} are drawn; the others' figures are above."
        parts.append(html.paragraph(words, "note"))
    return Section("retraining", title, parts)


def _curve(record: RunRecord) -> list[str]:
    summary = summary_of(record)
    log = MetricLog(record.path / BOOKKEEPING / "metrics.jsonl")
    log.update()
    parts = [html.heading(history.run_label(record))]
    if "heldout_loss_before" in summary:
        parts.append(html.paragraph(history.verdict(summary)))
    note = history.measured_on(summary) if summary.get("heldout") else ""
    if log.steps:
        figure = retrain_charts.loss(log.steps, log.series["loss"], log.evaluations)
        parts.append(html.figure(figure, f"Loss by step of {record.name}.", note))
    path = evaluation_table(record.path)
    table = _csv(record, path.name) if path else None
    if table is not None:
        words = "Further evaluation: loss and KL(dense || model) in nats per token, accuracy"
        parts.append(html.table(_records(table), words))
    return parts


# ---------------------------------------------------------------------------------------- quality


def quality(material: Material) -> Section:
    """Show perplexities by every protocol, and task scores with their difference to dense."""
    known, scene = material.study, material.scene
    parts = []
    if scene.protocol and any(c.ppl for c in scene.found):
        figure = charts.quality(scene.found)
        words = f"Measured: {scene.protocol.label}. Large: checkpoints; small: plans."
        parts.append(
            html.figure(figure, "Perplexity against the share of parameters removed.", words)
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
        parts.append(html.table(rows, f"Perplexity (measured): {protocol.label}"))
    rows = _tasks(known)
    if rows:
        words = "Task scores (measured), with the difference to dense and its standard error"
        parts.append(html.table(rows, words))
    empty = [html.paragraph("No quality was measured yet.")]
    return Section("quality", "Quality", [p for p in parts if p] or empty)


def _tasks(known: Study) -> list[dict[str, Any]]:
    newest = {
        (t.variant, t.task, t.metric): t for t in sorted(known.tasks, key=lambda t: t.started)
    }
    labels = {v.id: v.label for v in known.variants}
    rows = []
    for (variant, task, metric), found in newest.items():
        base = newest.get((known.dense.id, task, metric))
        delta = found.value - base.value if base and variant != known.dense.id else None
        error = None
        if base and base.stderr is not None and found.stderr is not None:
            error = math.hypot(base.stderr, found.stderr)
        rows.append(
            {
                "task": task,
                "variant": labels.get(variant, variant),
                "metric": metric,
                "value": found.value,
                "stderr": found.stderr,
                "minus dense": delta,
                "stderr of that": error if delta is not None else None,
                "samples": found.samples,
            }
        )
    return sorted(rows, key=lambda r: (str(r["task"]), str(r["variant"])))


# ------------------------------------------------------------------------------------------- cost


def cost(material: Material) -> Section:
    """Show latency, throughput and memory, and quality against them."""
    scene = material.scene
    title = "Speed and memory"
    if not scene.rows:
        words = "No benchmark was run yet, so nothing is said about speed; memory is estimated."
        cell = headline.cell_of(scene)
        return Section("cost", title, [html.paragraph(words), _cost_table(material, cell)])
    summary = scene.runs[0].summary
    note = (
        f"Measured on {summary.get('device')} ({summary.get('device_name')}), "
        f"{summary.get('input_tokens')} tokens in, seed {summary.get('seed')}."
    )
    cell = headline.cell_of(scene)
    here = [r for r in scene.rows if (r["input_tokens"], r["output_tokens"]) == cell[1:]]
    parts = []
    for metric in ("latency_s_p50", "tokens_per_s", "peak_memory_mib", "speedup"):
        figure = charts.against(here, scene.found, metric, capacity_mib=scene.capacity_mib)
        if charts.data_of(figure):
            label = charts.METRICS[metric]
            words = f"{note} {label} against batch size, {cell[2]} tokens out."
            parts.append(html.figure(figure, f"{label} against batch size.", words))
    rows = scene.table(cell, estimates=True)
    front = choice.frontier(rows, "per_token_ms")
    if front:
        looks = {c.key: charts.look_of(c) for c in scene.found}
        figure = charts.pareto(rows, looks, front, "per_token_ms")
        words = "Filled: measured cost; hollow: estimated. Arrows: retraining."
        parts.append(html.figure(figure, "Perplexity against time per token.", words))
    parts.append(_cost_table(material, cell))
    said = accuracy(scene.runs)
    return Section("cost", title, [*parts, html.paragraph(said, "note")] if said else parts)


def _cost_table(material: Material, cell: tuple[int, int, int]) -> str:
    rows = [
        {
            "variant": r["label"],
            "cost is": r["kind_of_cost"],
            "latency, s": r["latency_s"],
            "ms a token": r["per_token_ms"],
            "tokens/s": r["tokens_per_s"],
            "times dense speed": r["speedup"],
            "memory, MiB": r["memory_mib"],
            "perplexity": r["ppl"],
        }
        for r in material.scene.table(cell, estimates=True)
    ]
    batch, given, made = cell
    return html.table(rows, f"Cost at batch {batch}, {given} tokens in, {made} out")


# -------------------------------------------------------------------------------------- published


def others(material: Material) -> Section:
    """Show published figures beside the measured ones, with their source; never mixed."""
    parts = [
        html.paragraph(
            "Other models, texts and machines: these only compare as times their own dense "
            "model's figure. Each table is of one source.",
            "note",
        )
    ]
    scene = material.scene
    for source in published.sources():
        overlay = published.over_dense(source)
        judged = any(c.ppl for c in scene.found if c.kind == "dense")
        if overlay and judged and scene.protocol:
            figure = charts.quality(scene.found, relative=True, published=overlay)
            words = f"Lines measured: {scene.protocol.label}. Stars published: {source}, "
            words += "WikiText-2, windows of 128."
            parts.append(html.figure(figure, f"Measured beside published by {source}.", words))
        rows = [
            {"model": r["model"], "variant": r["label"], "figures are": "published"}
            | {k: v for k, v in r.items() if k not in ("source", "model", "label", "method")}
            for r in published.figures()
            if r["source"] == source
        ]
        parts.append(html.table(rows, f"Published: {source}"))
    return Section("published", "Published figures", parts)


# -------------------------------------------------------------------------------------- reproduce


def reproduce(material: Material) -> list[Section]:
    """List versions and the commands that made every figure, in order."""
    lines = commands(material.runs)
    made = [html.table(versions(material.runs), "Device, precision and versions of the runs")]
    again = [
        html.paragraph("Each line is one run, oldest first. Steps follow their recipe."),
        html.code(lines),
    ]
    nothing = [html.paragraph("There are no runs yet.")]
    return [
        Section("versions", "Versions", made if made[0] else nothing),
        Section("reproduce", "Reproduce", again if lines else nothing),
    ]


def _csv(record: RunRecord, name: str) -> pd.DataFrame | None:
    path: Path = record.path / name
    return pd.read_csv(path) if path.is_file() and read_rows(path) else None


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows with None for what is missing."""
    return [
        {str(k): None if v is None or v != v else v for k, v in row.items()}
        for row in frame.to_dict("records")
    ]
