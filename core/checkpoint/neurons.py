"""Which MLP neurons a narrower block keeps: the order that a budget run found; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from core import outside
from core.checkpoint.drop import Removal
from core.errors import PlanError
from core.runs import workspace
from core.runs.results import JsonResult


@dataclass(frozen=True, kw_only=True)
class NeuronOrder(JsonResult):
    """neurons.json of a budget run."""

    FILE: ClassVar[str] = "neurons.json"

    checkpoint_key: str = ""
    """Identifies the weights."""
    method: str = ""
    """The width method whose scores rank them."""
    order: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Block -> its MLP's neurons, the most important first."""


def kept(
    removal: Removal, neurons: Sequence[int], checkpoint_key: str = ""
) -> dict[int, tuple[int, ...]]:
    """Return the neurons that the blocks of ``removal.width`` keep, in ascending order.

    ``neurons`` is the width of every block's MLP; ``checkpoint_key`` identifies the weights, empty
    if they are not known. Raises `PlanError` if the order is missing or belongs to other weights.
    """
    if not removal.width:
        return {}
    if not removal.order:
        raise PlanError(
            "Which MLP neurons to keep is not known.",
            "Name the budget run that ranked them: --neurons RUN.",
        )
    folder = workspace.located(removal.order)
    found = NeuronOrder.read(folder) if folder and outside.is_folder(folder) else None
    if found is None:
        raise PlanError(
            f"{outside.brief(removal.order, 200)} has no order of MLP neurons.",
            "Give a budget run with the versions mlp75, mlp50 or mlp25.",
        )
    if checkpoint_key and found.checkpoint_key != checkpoint_key:
        raise PlanError(
            f"The neurons of {outside.brief(removal.order, 200)} were ranked for other weights.",
            "Give the checkpoint of the budget run, or measure this one.",
        )
    result = {}
    for block, count in removal.width:
        order = found.order.get(str(block), ())
        if sorted(order) != list(range(neurons[block])):
            raise PlanError(
                f"{outside.brief(removal.order, 200)} does not rank the {neurons[block]:,} neurons "
                f"of block {block}.",
                "Measure this checkpoint with budget.",
            )
        result[block] = tuple(sorted(order[:count]))
    return result
