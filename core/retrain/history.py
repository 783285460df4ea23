"""What the Retrain page shows, computed from runs and their results; no Streamlit here."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from core import outside, words
from core.checkpoint import locate
from core.prune.results import Pruning
from core.retrain import shares
from core.retrain.results import Evaluation, Merged, Step, Summary, read_measures
from core.retrain.spec import FSDP, Sharding
from core.runs import workspace
from core.runs.workspace import RunRecord, Workspace
from core.words import size


def variants(where: Workspace) -> list[RunRecord]:
    """Return the finished runs that hold a checkpoint to retrain, newest first."""
    makers = [command for command in workspace.MAKERS if command != "quantize"]
    done = [r for r in where.runs() if r.command in makers and r.state == "done"]
    return [r for r in done if holder(r)]


def has_teacher(name: str, dense: str | None = None) -> bool:
    """Whether the dense model of a pruned checkpoint is on this machine; ``dense`` names another.

    One that would have to be downloaded does not count.
    """
    folder = locate.local_folder(name)
    cut = Pruning.read(folder) if folder and not dense else None
    wanted = dense or (cut and (cut.base_model or cut.source))
    return bool(wanted and locate.local_folder(wanted))


def holder(record: RunRecord) -> Path | None:
    """Return the folder of the checkpoint that a run left: its own, or ``merged/``."""
    for folder in (record.path, record.path / "merged"):
        if (folder / "config.json").is_file():
            return folder
    return None


def is_unmerged(record: RunRecord) -> bool:
    """Whether a finished retraining left an adapter and no whole checkpoint."""
    done = record.command == "retrain" and record.state == "done"
    return done and holder(record) is None and (record.path / "adapter").is_dir()


def is_training(record: RunRecord) -> bool:
    """Whether a run retrains, and does not only test learning rates."""
    return record.command == "retrain" and not record.spec.get("lr_range_test")


def same_parent(records: Iterable[RunRecord], record: RunRecord) -> list[RunRecord]:
    """Return the retrainings of the checkpoint that ``record`` retrains, oldest first."""
    parent = _parent(record)
    found = [r for r in records if is_training(r) and _parent(r) == parent]
    return sorted(found, key=lambda r: r.started)


def _parent(record: RunRecord) -> str:
    name = str(record.spec.get("checkpoint") or "")
    folder = locate.local_folder(name)
    return str(folder.resolve()) if folder else name


Points = list[tuple[float, float]]
"""Tokens trained on, and the share recovered after them."""


def by_tokens(steps: Iterable[Step], evaluations: Iterable[Evaluation]) -> dict[str, Points]:
    """Return the shares recovered by loss and by KL against the tokens trained on."""
    trained = {step.step: step.tokens for step in steps} | {0: 0}
    found: dict[str, Points] = {"loss": [], "KL": []}
    for one in evaluations:
        tokens = trained.get(one.step)
        for name, share in (("loss", one.recovered), ("KL", one.recovered_kl)):
            if tokens is not None and share is not None:
                found[name].append((float(tokens), share))
    return {name: points for name, points in found.items() if points}


def _loss_of(record: RunRecord) -> str:
    """Return what a retraining minimised: ce, kl or both."""
    return "both" if record.spec.get("distil") else str(record.spec.get("loss") or "ce")


def comparison(records: Iterable[RunRecord], name: Callable[[RunRecord], str]) -> pd.DataFrame:
    """Return one row per retraining, called by ``name``: options, cost and recovery."""
    rows = []
    for record in records:
        found = Summary.read(record.path) or Summary()
        rows.append(
            {
                "name": name(record),
                "state": record.state,
                "method": record.spec.get("method"),
                "loss": _loss_of(record),
                "recovered": found.recovered,
                "recovered by KL": found.recovered_kl,
                "dense": found.heldout_loss_dense,
                "before": found.heldout_loss_before,
                "after": found.heldout_loss_after,
                "data": Path(str(record.spec.get("data") or "")).name,
                "rows": found.data.kind or None,
                "lr": found.settings.lr,
                "steps": found.steps,
                "tokens": found.tokens,
                "trained": found.trainable_parameters,
                "tokens_per_s": found.tokens_per_s,
                "memory_mib": found.peak_memory_mib,
                "seed": record.spec.get("seed"),
                "heldout": found.heldout.tokens,
            }
        )
    return pd.DataFrame(rows)


def differing(records: Iterable[RunRecord], name: Callable[[RunRecord], str]) -> pd.DataFrame:
    """Return the options that differ between runs: a row each, a column for every run."""
    found = list(records)
    keys = dict.fromkeys(key for r in found for key in r.spec if key not in ("out", "resume"))
    rows = {}
    for key in keys:
        values = [r.spec.get(key) for r in found]
        if any(value != values[0] for value in values):
            rows[key.replace("_", " ")] = [
                "" if v is None else outside.brief(v, 60) for v in values
            ]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[name(r) for r in found])


def verdict(summary: Summary) -> str:
    """Return a sentence that says how much was recovered."""
    before, after = summary.heldout_loss_before, summary.heldout_loss_after
    dense, share = summary.heldout_loss_dense, summary.recovered
    if before is None or after is None:
        return "The run recorded no held-out loss."
    fell = f"The held-out loss went from {before:.4f} to {after:.4f} nats per token"
    if dense is None:
        return f"{fell}. Without a dense model to compare with, recovery is not reported."
    if share is None:
        return (
            f"{fell}; the dense model has {dense:.4f}. The gap of {before - dense:.3f} nats is "
            "too small to report a recovery."
        )
    told = f"{words.percent(share)} of the gap was recovered. {fell}; the dense model has "
    told += f"{dense:.4f}."
    by_kl, first, last = (
        summary.recovered_kl, summary.heldout_kl_before, summary.heldout_kl_after
    )  # fmt: skip
    if by_kl is None or first is None or last is None:
        return told
    return (
        f"{told} The KL divergence from the dense model went from {first:.4f} to {last:.4f} nats "
        f"per token: {words.percent(by_kl)} of it was closed."
    )


def elsewhere(folder: Path, summary: Summary) -> str:
    """Return what came back on the other texts that a run measured, and if it is adaptation.

    Empty if it measured no other text and the gain is none of adaptation.
    """
    found = shares.shares(summary, read_measures(folder))
    others = [one for one in found if not one.is_held_out]
    if others or any(one.is_adaptation for one in found):
        return shares.sentence(found)
    return ""


def rows_in_words(kind: str, template: str) -> str:
    """Return the kind of the rows and how they are written."""
    how = {"chat": "chat template", "alpaca": "Alpaca prompt", "plain": "plain layout"}
    return f"{kind}, {how[template]}" if template in how else kind


def measured_on(summary: Summary) -> str:
    """Return the caption of the results: device, precision, held-out rows, data and seed."""
    held, data = summary.heldout, summary.data
    return (
        f"Measured: {held.rows} held-out rows of {held.source} ({held.tokens or 0:,} predicted "
        f"tokens), never trained on; trained on {data.source} "
        f"({rows_in_words(data.kind, data.template)}), seed "
        f"{summary.seed}, {summary.device}, {summary.compute_dtype}."
    )


def merged_note(merged: Merged) -> str:
    """Return how much the merged checkpoint differs from the trained model."""
    return (
        f"The merged model is stored in {merged.dtype} (trained in {merged.trained_in}): its "
        f"logits differ by at most {merged.max_logit_difference:.2g} from the trained model's on "
        f"{merged.rows_compared} rows, its held-out loss is {merged.heldout_loss:.4f} "
        f"against {merged.heldout_loss_trained:.4f}."
    )


LOST_SHARE = 0.02
"""Share of what retraining gained above which a loss through rounding is reported."""


def lost_in_merging(summary: Summary) -> str:
    """Return what rounding the merged weights cost, in a sentence; empty if next to nothing."""
    merged, before = summary.merged, summary.heldout_loss_before
    if not merged or before is None or merged.dtype == "float32":
        return ""
    lost = merged.heldout_loss - merged.heldout_loss_trained
    gain = before - merged.heldout_loss_trained
    if lost <= LOST_SHARE * abs(gain):
        return ""
    share = f", {lost / gain:.0%} of what retraining gained" if gain > 0 else ""
    return (
        f"Stored in {merged.dtype}, the merged checkpoint loses {lost:.4f} nats per token on the "
        f"held-out rows{share}; stored in float32 it keeps them and takes twice the space."
    )


def sample_html(parts: Iterable[Mapping[str, Any]]) -> str:
    """Return one training row as HTML: the prompt in grey italics, tokens with a loss marked."""
    looks = {
        True: "opacity:.6;font-style:italic",
        False: "background:rgba(0,158,115,.22);border-bottom:2px solid #009E73;font-weight:600",
    }
    spans = "".join(
        f'<span style="{looks[bool(part["masked"])]}">{html.escape(str(part["text"]))}</span>'
        for part in parts
    )
    style = "white-space:pre-wrap;font-family:monospace;font-size:.85rem;line-height:1.6"
    return f'<div style="{style}">{spans}</div>'


def tiles(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the results of a dry run as label -> text."""
    free, disk = plan["free_bytes"], plan["teacher_disk_bytes"]
    seconds = plan["seconds"]
    return {
        "Trainable": f"{count(plan['trainable_parameters'])} ({plan['trainable_share']:.1%})",
        "Memory needed": size(plan["memory_bytes"]["total"]),
        "Memory free": "not known" if free is None else size(free),
        **({"Disk for the teacher": size(disk)} if disk else {}),
        "Tokens": count(plan["tokens"]),
        "Steps": f"{plan['settings']['steps']:,} x {plan['settings']['batch']}",
        "At once": f"{plan['settings']['micro_batch']:,} of {plan['settings']['batch']:,}",
        "Time": "not known" if seconds is None else f"about {words.duration(seconds)}",
    }


def layers_note(plan: Mapping[str, Any]) -> str:
    """Return which decoder layers a dry run says will train, and how memory is saved."""
    if plan["fused"]:
        said = "Hand-written layers."
    else:
        said = f"Layers of transformers and peft: {plan['not_fused_because']}."
    if plan.get("recomputed"):
        said += f" Activations are recomputed: {plan['recomputed_because']}."
    if plan.get("sharding"):
        said += f" {Sharding(plan['sharding'] == FSDP, plan['sharding_because']).sentence}"
    return said


def count(value: float) -> str:
    """Return a number in short: 950, 12.3 k, 4.5 M, 7.0 B."""
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f} B"
