"""The README.md written beside a quantized checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core import words
from core.checkpoint.imported import Imported
from core.prune.model_card import ancestry, fact, front_matter, loading, origin, runs_in, shown
from core.prune.results import Pruning
from core.quantize.results import QuantizationRecord


def quantized_card(
    record: QuantizationRecord,
    config: Mapping[str, Any],
    pruning: Pruning | None = None,
    *,
    custom_code: bool = False,
    imported: Imported | None = None,
) -> str:
    """Return the model card of a quantized checkpoint.

    ``config`` is its config.json, ``pruning`` the source's own record of how it was cut;
    ``custom_code`` and
    ``imported`` as for `depth_card`.
    """
    per = f"{record.group} weights" if record.group else "output channel"
    if pruning is None or not pruning.method:
        made = []
    elif pruning.method == "depth":
        made = [f"| pruned before | {pruning.counted} removed |"]
    else:
        made = [fact("pruned before", f"heads and neurons removed by {pruning.method}")]
    one_byte = (
        " Each 4-bit number takes one byte, so that the weights compute on the CPU, CUDA and MPS."
        if record.bits == 4
        else ""
    )
    lines = [
        *front_matter(record.base_model, f"{record.label}-weight-only", pruned=bool(made)),
        f"# {shown(record.source)} in {record.label}",
        "",
        f"Weight-only quantization by torchao {record.torchao}: {record.scheme}, one scale per "
        f"{per}. Activations are not quantized.{one_byte}",
        "",
        "| | |",
        "| --- | --- |",
        *ancestry(record.base_model, record.source),
        *made,
        *origin(imported),
        f"| quantized | {record.tensors} weights of the blocks' linear layers, "
        f"{record.parameters:,} of {record.total_parameters:,} parameters |",
        f"| left in {record.dtype} | {', '.join(record.left)} |",
        f"| weights | {words.size(record.bytes_after)} instead of "
        f"{words.size(record.bytes_before)} |",
        "",
        *loading(custom_code, needs="torchao", records=made != []),
        "quantization.json records how it was quantized.",
        "",
        *runs_in(config),
    ]
    return "\n".join(lines)
