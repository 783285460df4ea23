"""The README.md written beside a pruned checkpoint: what it is, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from core import words
from core.checkpoint import engines, locate
from core.checkpoint.imported import Imported
from core.checkpoint.own_code import MODELLING
from core.prune.results import Healing, Pruning

_HEALED = {
    "refit": "the down projection before a seam is refitted in closed form.",
    "linear": "a linear map is folded into the down projection before a seam (ReplaceMe).",
    "scale": "the output projections above a seam are divided by a factor (after Prune&Comp).",
}


def depth_card(
    record: Pruning,
    config: Mapping[str, Any],
    *,
    custom_code: bool = False,
    imported: Imported | None = None,
) -> str:
    """Return the model card of a depth-pruned checkpoint.

    ``record`` is the content of pruning.json (see `core.prune.depth`), ``config`` the variant's
    config.json; ``custom_code`` means that the checkpoint comes with Depthcut's own modelling code,
    and with no other. ``imported`` is the source's import.json.
    """
    criterion = record.criterion or "chosen by hand"
    what = ["whole transformer blocks"] if record.dropped or not record.removal.partial else []
    what += ["attention or MLP of single blocks"] if record.removal.parts else []
    what += ["MLP neurons of single blocks"] if record.removal.width else []
    lines = [
        *front_matter(record.base_model, "depth-pruning"),
        f"# {shown(record.base_model)} without {record.counted}",
        "",
        f"Depth pruning: {' and '.join(what)} are removed; "
        + ("all other weights are unchanged." if not record.healed else _HEALED[record.healed]),
        "The model was not retrained after this cut.",
        "",
        "| | |",
        "| --- | --- |",
        *ancestry(record.base_model, record.source),
        fact("criterion", criterion),
        f"| dropped blocks | {_list(record.dropped) or 'none'} of {record.blocks_before} |",
        *_lacking(record),
        f"| kept blocks of the base model | {_list(record.original_blocks)} |",
        parameters(record),
        *healing(record.healing),
        *origin(imported),
        "",
        *loading(custom_code),
        *runs_in(config),
    ]
    return "\n".join(lines)


def _lacking(record: Pruning) -> list[str]:
    """Return the table's rows on kept blocks that lack a part, by the base model's numbers."""
    rows = {
        "blocks of the base model without attention, and without its key/value cache": (
            record.without_attention
        ),
        "blocks of the base model without an MLP": record.without_mlp,
    }
    found = [f"| {what} | {_list(blocks)} |" for what, blocks in rows.items() if blocks]
    width = ", ".join(f"{block}: {count:,}" for block, count in record.mlp_width.items())
    return [*found, *([f"| MLP neurons left, by block of the source | {width} |"] if width else [])]


def healing(found: Healing | None) -> list[str]:
    """Return the table's rows on a repair in closed form, refused ones included."""
    if found is None:
        return []
    parts = []
    for seam in found.seams:
        blocks = f"{seam.first}" if seam.first == seam.last else f"{seam.first}-{seam.last}"
        blocks = seam.removed or f"blocks {blocks}"
        how = [f"alpha {seam.alpha:g}"] if seam.alpha is not None else []
        how += [f"factor {seam.scale:.4g}"] if seam.scale is not None else []
        kept = "kept" if seam.kept else "not kept: the KL did not fall"
        parts.append(f"{blocks}: {', '.join([*how, kept])}")
    done = found.method if found.method != "none" else "no repair lowered the KL"
    text = found.calibration
    return [
        f"| healing | {found.asked}: {done} |",
        f"| healed seams | {'; '.join(parts)} |",
        *([fact("healed on", f"{text.label}, a quarter of it held out")] if text else []),
        f"| held-out KL to the dense model | {found.kl_before:.4f} to {found.kl_after:.4f} nats "
        f"per token, {found.heldout_tokens:,} tokens |",
    ]


def ancestry(base: str, source: str) -> list[str]:
    """Return the table's rows on what a checkpoint was made from; they name no paths."""
    rows = {"base model": base, "made from": source}
    return [f"| {key} | {shown(name)} |" for key, name in rows.items()]


def shown(recorded: str) -> str:
    """Return the recorded name of a checkpoint without its path, as text that is not rendered."""
    return words.markdown(locate.plain_name(recorded))


def fact(name: str, value: object) -> str:
    """Return a row of the table: a name of ours, and a value that may be text from outside."""
    return f"| {name} | {words.markdown(value)} |"


def origin(imported: Imported | None) -> list[str]:
    """Return the table's rows on the file that the first checkpoint of the line was made from."""
    if imported is None:
        return []
    found = f"{imported.file}, stored as {imported.how_stored}; see {Imported.FILE}"
    return [
        fact("imported from", found),
        *([fact("license", imported.license)] if imported.license else []),
    ]


def parameters(record: Pruning) -> str:
    """Return the table's row with the parameters left."""
    before, after = record.parameters_before or 0, record.parameters_after or 0
    return f"| parameters | {after:,} of {before:,} ({1 - after / before:.1%} removed) |"


def loading(custom_code: bool, *, needs: str = "", records: bool = True) -> list[str]:
    """Return the lines on how to load the checkpoint.

    ``needs``: a package besides transformers; ``records``: pruning.json lies beside the weights.
    """
    trust = ", trust_remote_code=True" if custom_code else ""
    return [
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER"{trust})',
        "```",
        "",
        f"The blocks differ, so {MODELLING.name}, which Depthcut wrote beside the weights, is "
        "needed to load them; trust_remote_code=True runs this file and no other."
        if custom_code
        else "No custom code is needed: stock transformers loads it.",
        *([f"The package {needs} must be installed."] if needs else []),
        "",
        *(["pruning.json records this cut and any earlier ones.", ""] if records else []),
    ]


def runs_in(config: Mapping[str, Any]) -> list[str]:
    """Return the section on which programs run the checkpoint with this config.json."""
    found = engines.rows(config)
    lines = ["## Runs in", "", "| program | runs | why | basis |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.engine} | {row.runs} | {words.markdown(row.why)} | {row.basis} |" for row in found
    ]
    lines += [
        "",
        "tested: Depthcut's tests run small models with blocks of this kind. documented: by the "
        "program's documentation; not tried.",
        "",
    ]
    commands: list[str] = []
    for row in found:
        if row.command and row.language == "bash":
            commands += [f"# {row.engine}", *row.command.splitlines()]
    if commands:
        lines += [
            "```",
            *commands,
            "```",
            "",
            "`python -m core` runs in a checkout of Depthcut.",
            "",
        ]
    return lines


def front_matter(base: str, kind: str, *, pruned: bool = True) -> list[str]:
    """Return the metadata that the Hub reads; ``kind`` is a tag."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if locate.is_hub_id(base):
        lines += [f"base_model: {base.partition('@')[0]}"]
    return [*lines, "tags:", *(["- pruned"] if pruned else []), f"- {kind}", "---", ""]


def _list(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))
