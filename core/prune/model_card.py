"""The README.md written beside a pruned checkpoint: what it is, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


def depth_card(record: Mapping[str, Any], *, custom_code: bool = False) -> str:
    """Return the model card of a depth-pruned checkpoint.

    ``record`` is what goes into pruning.json (see `core.prune.depth`); ``custom_code`` says that
    the checkpoint brings its own modelling code.
    """
    before, after = record["parameters_before"], record["parameters_after"]
    criterion = record["criterion"] or "chosen by hand"
    trust = ", trust_remote_code=True" if custom_code else ""
    lines = [
        *_front_matter(record["base_model"]),
        f"# {record['base_model']} without {len(record['dropped'])} blocks",
        "",
        "Depth pruning: whole transformer blocks are left out, all other weights are unchanged.",
        "It was not retrained after this cut.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {record['base_model']} |",
        f"| made from | {record['source']} |",
        f"| criterion | {criterion} |",
        f"| dropped blocks | {_list(record['dropped'])} of {record['blocks_before']} |",
        f"| kept blocks of the base model | {_list(record['original_blocks'])} |",
        f"| parameters | {after:,} of {before:,} ({1 - after / before:.1%} removed) |",
        "",
        "## How to load it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"{trust})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")',
        "```",
        "",
    ]
    lines += (
        ["The blocks have shapes of their own: the modelling code beside the weights loads them."]
        if custom_code
        else ["No code of its own is needed: stock transformers loads it."]
    )
    lines += ["", "pruning.json records the cut and what went before it.", ""]
    return "\n".join(lines)


def _front_matter(base: str) -> list[str]:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if _HUB_ID.match(base):
        lines += [f"base_model: {base}"]
    return [*lines, "tags:", "- pruned", "- depth-pruning", "---", ""]


def _list(blocks: list[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))
