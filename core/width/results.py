"""pruning.json of a width-pruned checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass

from core.prune.results import Calibration, Pruning
from core.runs import workspace


@dataclass(frozen=True)
class Target:
    """The size that --params or --match asked for, and how close the cut came."""

    match: str | None = None
    """The checkpoint of --match."""
    parameters: int = 0
    difference: int | None = None
    """Parameters left beyond the target; negative if fewer are left."""
    relative_difference: float | None = None
    """``difference`` as a share of the target."""


@dataclass(frozen=True)
class BlockCut:
    """What one block keeps, and which of its units went, by their numbers in the source."""

    block: int
    heads: int = 0
    kv_heads: int = 0
    neurons: int = 0
    dropped_kv_heads: tuple[int, ...] = ()
    dropped_heads: tuple[int, ...] = ()
    dropped_neurons: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WidthPruning(Pruning):
    """What a width run records beyond `Pruning`."""

    label: str = ""
    """The method's display name."""
    method_ratio: float | None = None
    """The method's own ratio; ``ratio`` is the share of all parameters."""
    target: Target | None = None
    layers: tuple[int, ...] | None = None
    """Blocks that the method might cut, by their numbers in ``source``."""
    attention_layers: tuple[int, ...] | None = None
    """Those whose attention it might cut; None in old records: ``layers``."""
    mlp_layers: tuple[int, ...] | None = None
    """Those whose MLP it might cut."""
    round_to: int | None = None
    """Widths that were cut are multiples of it."""
    order: str = ""
    """LLM-Pruner's order: first, second, mixed or vector."""
    ranking: str = ""
    """block or global: whose units were ranked together."""
    metric: str = ""
    """FLAP's metric: wifv, wifn or ifv."""
    structure: str = ""
    """FLAP's structure: al-am, al-mm, ul-mm or ul-um."""
    remove_heads: int | None = None
    """Heads to remove, as given for al-mm and ul-mm."""
    variant: str = ""
    """What of all this differs from the method's usual way, in words; empty if nothing does."""
    bias_compensation: bool = False
    rescued: tuple[str, ...] = ()
    """Blocks' parts that kept their best unit instead of losing all, as ``3 attention``."""
    calibration: Calibration | None = None
    """None if the weights alone decided."""
    device: str = ""
    dtype: str = ""
    peak_memory_mib: float | None = None
    processes: int = 1
    """Those that shared the rows; ``peak_memory_mib`` is the first one's."""
    blocks: tuple[BlockCut, ...] = ()

    def to_text(self) -> str:
        """Return the file's text with one line per block: a large model drops 10,000s of units."""
        rest = self.to_dict()
        blocks = rest.pop("blocks")
        lines = ",\n    ".join(json.dumps(block) for block in blocks)
        head = workspace.to_json(rest, indent=2)
        return head[:-2] + f',\n  "blocks": [\n    {lines}\n  ]\n}}\n'
