"""``python -m core estimate CONFIG --on h100``: what every command takes, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from core.estimate import machines, shapes, table
from core.runs.devices import GIB
from core.runs.footprint import CONVERTED_PER_S
from core.runs.spec import option


@dataclass(frozen=True, kw_only=True)
class EstimateSpec:
    """Estimate memory, bytes read and time of every command, from shapes alone."""

    config: str = option(
        positional=True,
        help="Folder (config.json is enough), run, Hub id, smollm2, demo, or a shape of LLaMA 3.1: "
        "8b, 70b, 405b.",
    )
    on: str = option("h100", help="Device.", choices=machines.NAMES)
    memory_limit: float | None = option(
        None,
        help="Memory to use, in GiB. Default: nine tenths of the device's.",
        low=0.01,
        high=1_000_000,
        unit="GiB",
    )
    processes: int = option(
        1,
        help="Processes of the commands that can share their work (--processes there), each with "
        "such a device; memory and bytes are those of one process.",
        low=1,
        high=64,
    )
    disk_gb_s: float = option(
        machines.DISK_BYTES_PER_S / machines.GB,
        help="What the disk reads, in GB per second.",
        low=0.001,
        high=10_000,
    )


def run(spec: EstimateSpec) -> dict[str, Any]:
    """Return the table, and what it assumes."""
    (info, config), machine = shapes.opened(spec.config), machines.MACHINES[spec.on]
    limit = None if spec.memory_limit is None else int(spec.memory_limit * GIB)
    made = table.Table(
        info, machine, config=config, limit=limit, disk=spec.disk_gb_s * machines.GB,
        processes=spec.processes,
    )  # fmt: skip
    rows = made.rows()
    return {
        "schema": 1,
        "config": spec.config,
        "parameters": info.parameters,
        "blocks": info.blocks,
        "dtype": info.dtype,
        "on": machine.label,
        "processes": spec.processes,
        "memory_limit_bytes": made.limit,
        "kind": "estimated",
        "assumes": {
            "matmul_flops_per_s": machine.matmul_flops_per_s,
            "matmul_share": machines.MATMUL_SHARE,
            "float64_flops_per_s": machine.float64_flops_per_s,
            "bandwidth_bytes_per_s": machine.bandwidth_bytes_per_s,
            "bandwidth_share": machines.BANDWIDTH_SHARE,
            "disk_bytes_per_s": made.disk,
            "converted_per_s": CONVERTED_PER_S,
        },
        "most_tokens_per_s": table.tokens_per_s(info, machine, made.width),
        "rows": table.as_dicts(rows),
        "left_out": table.as_dicts(made.left_out),
    }
