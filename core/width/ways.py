"""The variants of a width method: how it scores, ranks, divides and rounds; no torch.

LLM-Pruner: the order of its Taylor expansion (vector: the absolute value of each channel's summed
first-order terms, where the others sum absolute values), and whether the units of each block or
those of all blocks are ranked together. FLAP: its metric, and its structure. ``ul`` cuts every
block alike and ``al`` ranks over the blocks; in ``um`` one ratio holds for heads and neurons, in
``mm`` the heads to remove are given and the neurons make up the rest of the ratio, and in ``am``
heads and neurons are ranked together.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import OptionError
from core.width.methods import Method

ORDERS = ("first", "second", "mixed", "vector")
RANKINGS = ("block", "global")
METRICS = ("wifv", "wifn", "ifv")
STRUCTURES = ("al-am", "al-mm", "ul-mm", "ul-um")


@dataclass(frozen=True)
class Ways:
    """The variant of a method that a run uses; the defaults are the papers'."""

    order: str = "first"
    """LLM-Pruner's: first, second, mixed or vector."""
    ranking: str = "block"
    """block ranks the units of each block by themselves, global those of all blocks together."""
    metric: str = "wifv"
    """FLAP's: wifv, wifn or ifv."""
    structure: str = "al-am"
    """FLAP's: al-am, al-mm, ul-mm or ul-um."""
    heads: int | None = None
    """Heads to remove over all blocks; for the structures al-mm and ul-mm."""
    round_to: int | None = None
    """Widths that are cut become multiples of it."""

    @property
    def manual(self) -> bool:
        """Whether heads and neurons have amounts of their own."""
        return self.structure in ("al-mm", "ul-mm")

    def counting(self, method: Method) -> str:
        """Return how what each block keeps follows from the ratio; see core.width.allocation.

        ``adaptive``: it depends on the scores.
        """
        if method.name == "flap":
            return {"ul-um": "units", "ul-mm": "manual"}.get(self.structure, "adaptive")
        return "adaptive" if self.ranking == "global" else method.counting

    def differing(self, method: Method) -> tuple[str, ...]:
        """Return what differs from the paper's way, as in names of variants."""
        found = []
        if method.name == "llm-pruner" and self.order != "first":
            found.append("vector" if self.order == "vector" else f"{self.order} order")
        if method.ranks and self.ranking == "global":
            found.append("global")
        if method.name == "flap":
            found += [self.metric.upper()] if self.metric != "wifv" else []
            found += [self.structure.upper()] if self.structure != "al-am" else []
        return (*found, *([f"multiples of {self.round_to}"] if self.round_to else []))


def check(ways: Ways, method: Method, parts: str) -> None:
    """Raise `OptionError` if an option has no effect on ``method``, or needs another.

    ``parts``: both, attention or mlp.
    """
    usual = Ways()
    for field, flag, applies, to in (
        ("order", "--order", method.name == "llm-pruner", "llm-pruner"),
        ("ranking", "--ranking", method.ranks, "llm-pruner, magnitude and random"),
        ("metric", "--metric", method.name == "flap", "flap"),
        ("structure", "--structure", method.name == "flap", "flap"),
    ):
        given = getattr(ways, field)
        if given != getattr(usual, field) and not applies:
            raise OptionError(
                f"{flag} {given} has no effect on {method.name}; it is an option of {to}.",
                "Leave it out, or choose another method.",
            )
    needs = method.name == "flap" and ways.manual
    if ways.heads is not None and not needs:
        raise OptionError(
            f"--remove-heads {ways.heads} has no effect here; it belongs to FLAP's structures "
            "al-mm and ul-mm.",
            "Leave it out, or add --structure al-mm.",
        )
    if needs and ways.heads is None:
        raise OptionError(
            f"--structure {ways.structure} needs the number of heads to remove.",
            "Give it with --remove-heads, or use --structure al-am, which finds it.",
        )
    if needs and parts != "both":
        raise OptionError(
            f"--structure {ways.structure} divides the cut between heads and neurons, but only "
            f"the {'MLP' if parts == 'mlp' else parts} may be cut.",
            "Use --structure al-am or ul-um.",
        )
