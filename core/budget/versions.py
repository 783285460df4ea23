"""The versions that a block can become, from shapes alone; no torch."""

from __future__ import annotations

from collections.abc import Sequence

from core.benchmark.analytic import kv_bytes
from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.errors import CheckpointError, PlanError
from core.prune.plan import parameters_after
from core.prune.version_results import MLP_SHARES, VERSIONS

Unit = tuple[int, str]
"""A part of a block: (block, attention or mlp)."""
LOSES = {
    "drop": ("attention", "mlp"),
    "no-attention": ("attention",),
    "no-mlp": ("mlp",),
}
"""Version -> the parts that the block loses."""


def neurons_left(neurons: int, version: str) -> int:
    """Return how many of an MLP's ``neurons`` a version keeps, at least one.

    Widths from 256 on are rounded to a multiple of 32, which suits tensor cores and quantizers.
    """
    if version in MLP_SHARES:
        wanted = MLP_SHARES[version] * neurons
        step = 32 if wanted >= 256 else 1
        return max(1, min(neurons - 1, step * round(wanted / step)))
    return 0 if "mlp" in LOSES.get(version, ()) else neurons


def check(info: CheckpointInfo, versions: tuple[str, ...]) -> None:
    """Raise what is wrong with measuring ``versions`` of a checkpoint.

    Raises `PlanError` if there is but one block or no version, `CheckpointError` if a block has no
    such versions or the weights are quantized.
    """
    if not versions:
        raise PlanError("--versions is empty.", f"Choose from: {', '.join(VERSIONS)}.")
    if info.blocks < 2:
        raise PlanError("The model has one block, which has to stay.", "Give a deeper model.")
    if info.quantization:
        raise CheckpointError(
            "The weights are quantized, so blocks cannot be measured without a part.",
            "Prune first, then quantize: give the checkpoint that this one was quantized from.",
        )
    parts = {part for version in versions for part in LOSES.get(version, ("mlp",))}
    if versions == ("drop",):
        return
    for block, shape in enumerate(info.block_shapes):
        for part, size, word in (
            ("attention", "heads", "attention"),
            ("mlp", "intermediate", "MLP"),
        ):
            if part in parts and not shape[size]:
                raise CheckpointError(
                    f"Block {block} has no {word}, so it has no version without a part.",
                    "Give the checkpoint that this one was cut from, or --versions drop.",
                )


def lost(block: int, version: str) -> frozenset[Unit]:
    """Return the parts that the model loses if ``block`` becomes ``version``; none if whole.

    A narrower MLP is the loss of the whole one, and a part of its own, named as the version.
    """
    if version in MLP_SHARES:
        return frozenset({(block, "mlp"), (block, version)})
    return frozenset((block, part) for part in LOSES.get(version, ()))


def removal(info: CheckpointInfo, block: int, version: str) -> Removal:
    """Return the same as a `Removal`, without the order of neurons."""
    if version == "drop":
        return Removal((block,))
    if version in MLP_SHARES:
        count = neurons_left(info.block_shapes[block]["intermediate"], version)
        return Removal(width=((block, count),))
    parts = LOSES.get(version, ())
    return Removal(
        attention=(block,) if "attention" in parts else (), mlp=(block,) if "mlp" in parts else ()
    )


def together(choice: Sequence[str]) -> frozenset[Unit]:
    """Return all parts that the model loses if every block becomes its version in ``choice``."""
    return frozenset().union(*(lost(block, version) for block, version in enumerate(choice)))


def parameters(info: CheckpointInfo, block: int, version: str) -> int:
    """Return the parameters of a block as ``version``; one without a part keeps both norms."""
    gone = info.parameters - parameters_after(info, removal(info, block, version))
    return info.block_parameters[block] - gone


def cache_bytes(
    info: CheckpointInfo, block: int, version: str, batch: int, context: int, dtype: str
) -> int:
    """Return the bytes of a block's keys and values for ``batch`` sequences of ``context``."""
    if "attention" in LOSES.get(version, ()):
        return 0
    heads = info.block_shapes[block]["kv_heads"]
    whole = kv_bytes(info, batch, context, dtype)
    return whole * heads // max(1, sum(shape["kv_heads"] for shape in info.block_shapes))


def kinds(info: CheckpointInfo) -> dict[tuple[object, ...], list[int]]:
    """Group blocks that take equally long: same shapes, same attention window."""
    found: dict[tuple[object, ...], list[int]] = {}
    for block, shape in enumerate(info.block_shapes):
        found.setdefault(tuple(shape.values()), []).append(block)
    return found
