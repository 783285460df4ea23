"""Learning rate, rank and warm-up on SmolLM2 without six blocks: ``python -m bench.rates FOLDER``.

Each row of the page is a run of ``retrain --lr-range-test``: all rates take the same few steps from
the same start. Started again, the script repeats only what is missing; ``--only`` chooses rows. The
text comes from ../shared/real and is not part of the project.
"""

from __future__ import annotations

from bench.smollm2 import C4, ROOT, Proof, begun, parser_of, table_row
from core.retrain.results import Rate, Summary

PAGE = ROOT / "docs" / "results" / "retrain_defaults.md"
DROPPED = "13-18"
SHARED = ("--data", str(C4), "--batch", "4", "--steps", "10", "--holdout", "24", "--lr-range-test")
ROWS = {
    "lora-ce": ("LoRA, rank 8, cross entropy", "lora", ()),
    "lora-kl": ("LoRA, rank 8, KL", "lora", ("--loss", "kl")),
    "partial-kl": ("partial, last 3, KL", "partial", ("--loss", "kl")),
    "lora-kl-32": ("LoRA, rank 32, KL", "lora", ("--loss", "kl", "--rank", "32", "--alpha", "64")),
    "full-kl": ("all weights, KL", "full", ("--loss", "kl")),
    "lora-kl-cold": ("LoRA, rank 8, KL, no warm-up", "lora", ("--loss", "kl", "--warmup", "0")),
    "lora-kl-dry": ("LoRA, rank 8, KL, no dropout", "lora", ("--loss", "kl", "--dropout", "0")),
    "partial-ce": ("partial, last 3, cross entropy", "partial", ()),
    "full-ce": ("all weights, cross entropy", "full", ()),
}


class Rates(Proof):
    """A proof whose page is the table of rates."""

    def save(self) -> None:
        PAGE.write_text("\n".join(page(self)) + "\n")


def page(proof: Rates) -> list[str]:
    """Return the page with what has been measured so far."""
    found = {name: Rate.read(proof.at(name)) for name in ROWS}
    rates = sorted({row.rate for rows in found.values() for row in rows})
    told = next((s for name in ROWS if (s := Summary.read(proof.at(name)))), None)
    lines = [
        "# Learning rate, rank and warm-up for retraining",
        "",
        "`python -m bench.rates DIR`: SmolLM2-135M without blocks 13 to 18, not healed (113 M "
        "parameters); 10 steps of 4 rows of up to 256 tokens of C4 at each learning rate, from the "
        "same start on the same rows, linear schedule with one step of warm-up. A dash: not "
        "measured.",
        "",
    ]
    if told:
        lines += [
            f"{told.device}, {told.compute_dtype}, {told.settings.steps} steps at each rate; "
            f"{told.heldout.rows} held-out rows, {told.heldout.tokens or 0:,} predicted tokens. "
            f"There the dense model's loss is {told.heldout_loss_dense or 0:.3f} nats per token, "
            f"the pruned one's {told.heldout_loss_before or 0:.3f}; its KL from the dense one "
            f"{told.heldout_kl_before or 0:.3f}.",
            "",
        ]
    for title, attribute in (
        ("Share of the KL to the dense model that was closed", "recovered_kl"),
        ("Share of the loss gap that was recovered", "recovered"),
    ):
        lines += [f"## {title}", "", table_row(["", *(f"{rate:g}" for rate in rates)])]
        lines.append("| --- |" + " ---: |" * len(rates))
        for name, (label, *_) in ROWS.items():
            known = {row.rate: getattr(row, attribute) for row in found[name]}
            best = max((v for v in known.values() if v is not None), default=None)
            lines.append(table_row([label, *(_cell(known.get(rate), best) for rate in rates)]))
        lines.append("")
    commands = list(dict.fromkeys(proof.commands))
    return [*lines, "## Commands", "", "DIR is the folder given.", "", "```", *commands, "```"]


def _cell(value: float | None, best: float | None) -> str:
    if value is None:
        return "-"
    return f"**{value:.1%}**" if value == best else f"{value:.1%}"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help="Rows to measure.")
    args = parser.parse_args()
    proof = begun(Rates, args)
    dense = str(proof.checkpoint("dense"))
    proof.run("cut", "prune", dense, "--drop", DROPPED)
    for name, (_, method, options) in ROWS.items():
        proof.recording = name not in args.only.split(",")
        proof.run(name, "retrain", str(proof.at("cut")), "--dense", dense, "--method", method,
                  *SHARED, *options)  # fmt: skip
    proof.save()


if __name__ == "__main__":
    main()
