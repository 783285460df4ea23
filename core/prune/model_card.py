"""The README.md written beside a pruned checkpoint: what it is, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


def depth_card(record: Mapping[str, Any], *, custom_code: bool = False) -> str:
    """Return the model card of a depth-pruned checkpoint.

    ``record`` is the content of pruning.json (see `core.prune.depth`); ``custom_code`` means that
    the checkpoint comes with its own modelling code.
    """
    criterion = record["criterion"] or "chosen by hand"
    lines = [
        *_front_matter(record["base_model"], "depth-pruning"),
        f"# {record['base_model']} without {len(record['dropped'])} blocks",
        "",
        "Depth pruning: whole transformer blocks are removed; all other weights are unchanged.",
        "The model was not retrained after this cut.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {record['base_model']} |",
        f"| made from | {record['source']} |",
        f"| criterion | {criterion} |",
        f"| dropped blocks | {_list(record['dropped'])} of {record['blocks_before']} |",
        f"| kept blocks of the base model | {_list(record['original_blocks'])} |",
        _parameters(record),
        "",
        *_loading(custom_code),
    ]
    return "\n".join(lines)


def width_card(record: Mapping[str, Any], *, custom_code: bool = False) -> str:
    """Return the model card of a width-pruned checkpoint; arguments as for `depth_card`."""
    text = record["calibration"]
    calibrated_on = (
        f"{text['source']}, {text['samples']} x {text['length']} tokens, seed {text['seed']}"
        if text
        else "nothing: the scores use the weights alone"
    )
    kept = [f"{b['block']}: {b['heads']} heads, {b['neurons']} neurons" for b in record["blocks"]]
    bias = record["bias_compensation"]
    lines = [
        *_front_matter(record["base_model"], "width-pruning"),
        f"# {record['base_model']}, narrower by {record['label']}",
        "",
        "Width pruning: attention heads and MLP neurons are removed; all other weights are "
        "unchanged."
        + (" Biases of the output projections compensate for them." if bias else "")
        + " The model was not retrained after this cut.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {record['base_model']} |",
        f"| made from | {record['source']} |",
        f"| criterion | {record['criterion']} |",
        f"| the method's own ratio | {record['method_ratio']:.6g} |",
        f"| calibrated on | {calibrated_on} |",
        _parameters(record),
        f"| what each block keeps | {'; '.join(kept)} |",
        "",
        *_loading(custom_code),
    ]
    return "\n".join(lines)


def _parameters(record: Mapping[str, Any]) -> str:
    before, after = record["parameters_before"], record["parameters_after"]
    return f"| parameters | {after:,} of {before:,} ({1 - after / before:.1%} removed) |"


def _loading(custom_code: bool) -> list[str]:
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
        "Block shapes differ, so the modelling code beside the weights is needed to load them."
        if custom_code
        else "No custom code is needed: stock transformers loads it.",
        "",
        "pruning.json records this cut and any earlier ones.",
        "",
    ]


def _front_matter(base: str, kind: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if _HUB_ID.match(base):
        lines += [f"base_model: {base}"]
    return [*lines, "tags:", "- pruned", f"- {kind}", "---", ""]


def _list(blocks: list[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))
