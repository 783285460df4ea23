"""Prune, then quantize, on SmolLM2: ``python -m bench.quantize FOLDER`` (part of ``make proof``).

The dense model and its variant without the blocks that PPL+ chooses (of `bench.smollm2`, whose
FOLDER this is), each as stored, in int8 and in int4: perplexity on WikiText-2, size on disk and in
memory, and speed, all relative to the dense model in one run of the benchmark. Every step is a
command of the product and keeps its run in FOLDER, so that the script repeats only what is missing.
Writes docs/results/quantize.md.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from bench.smollm2 import NAMES, ROOT, WIKITEXT, Proof, begun, make, parser_of
from core.benchmark.results import MeasuredVariant, Point
from core.benchmark.results import Summary as Benchmark
from core.evaluate.results import TextRow
from core.runs.devices import MIB

PAGE = ROOT / "docs" / "results" / "quantize.md"
SOURCES = ("dense", "depth-ppl")
BITS = (None, 8, 4)
"""None: as stored, in bfloat16."""
WINDOW, BENCHMARK = 2048, "quantized-benchmark"


@dataclass
class Study(Proof):
    """The steps of this study; their page is not that of `bench.smollm2`."""

    def save(self) -> None:
        """Write the page with what has been measured so far."""
        PAGE.write_text("\n".join(page(self)) + "\n", encoding="utf-8")


def name_of(source: str, bits: int | None) -> str:
    """Return the name of a variant's folder."""
    return source if bits is None else f"{source}-int{bits}"


def every() -> list[tuple[str, int | None]]:
    """Return all variants, the dense model first."""
    return [(source, bits) for source in SOURCES for bits in BITS]


def measure(study: Study, seconds: int) -> None:
    """Make the variants that are missing, and measure all of them."""
    if not (study.checkpoint("depth-ppl") / "config.json").is_file():
        make(study)
    for source, bits in every():
        if bits is not None:
            study.run(name_of(source, bits), "quantize", str(study.checkpoint(source)), "--bits",
                      str(bits))  # fmt: skip
    names = [name_of(source, bits) for source, bits in every()]
    for name in names:
        study.run(f"quantized-ppl-{name}", "evaluate", str(study.checkpoint(name)), "--perplexity",
                  str(WIKITEXT), "--window", str(WINDOW), "--max-tokens",
                  str(study.args.tokens))  # fmt: skip
    study.run(BENCHMARK, "benchmark", *(str(study.checkpoint(name)) for name in names),
              "--batch-sizes", "1", "--output-tokens", "32", "--warmup", "2", "--time-limit-s",
              str(seconds))  # fmt: skip


def page(study: Study) -> list[str]:
    """Return the page; what is not measured yet is a dash."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "torchao")
    )
    summary = Benchmark.read(study.at(BENCHMARK))
    device = f"{summary.device}, {', '.join(summary.dtypes)}" if summary else "not measured"
    lines = [
        "# Prune, then quantize: SmolLM2",
        "",
        "Written by `python -m bench.quantize DIR` (part of `make proof`). SmolLM2-135M-Instruct, "
        f"and the same model without the 8 blocks that PPL+ chooses. Versions: {versions}. All "
        "figures are measured; a dash stands for what has not been measured yet.",
        "",
        f"Perplexity: WikiText-2 test, first {study.args.tokens:,} tokens, windows of {WINDOW:,}. "
        f"Benchmark ({device}): 12 tokens in, 32 out, batch 1. In memory: the weights as they are "
        "held there; a CPU without bfloat16 instructions computes in float32, and keeps what is "
        "not quantized in that format. Speed: the dense model's median latency divided by that of "
        "the checkpoint; behind it the median, with the 10th and 90th percentile of all runs, "
        "which show how busy the machine was.",
        "",
        "| checkpoint | weights | on disk | in memory | peak memory | perplexity | of its own "
        "16 bits | speed | seconds |",
        "| --- | --- |" + " ---: |" * 7,
    ]
    measured, points = _benchmark(study)
    ppl = {each: _perplexity(study, name_of(*each)) for each in every()}
    base = points.get("dense")
    for source, bits in every():
        name = name_of(source, bits)
        folder = study.checkpoint(name)
        found, point = measured.get(name), points.get(name)
        value, own = ppl[source, bits], ppl[source, None]
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        cells = [
            NAMES[source],
            f"int{bits}" if bits else "bfloat16",
            f"{files / MIB:,.0f} MiB" if files else "-",
            f"{found.weight_bytes / MIB:,.0f} MiB" if found and found.weight_bytes else "-",
            f"{point.peak_memory_mib:,.0f} MiB" if point and point.peak_memory_mib else "-",
            f"{value:.2f}" if value else "-",
            f"{value / own:.4f}" if value and own else "-",
            *_speed(point, base),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_together(ppl), ""]
    commands = list(dict.fromkeys(study.commands))
    return [*lines, "## Commands", "", "DIR is the folder given.", "", "```", *commands, "```"]


def _speed(point: Point | None, base: Point | None) -> tuple[str, str]:
    """Return the speed relative to the dense model, and the seconds it follows from."""
    if not point or not base or not point.latency_s_p50 or not base.latency_s_p50:
        return "-", "-"
    low, high = point.latency_s_p10 or 0.0, point.latency_s_p90 or 0.0
    ratio = base.latency_s_p50 / point.latency_s_p50
    return f"{ratio:.2f}x", f"{point.latency_s_p50:.1f} ({low:.1f} to {high:.1f})"


def _perplexity(study: Study, name: str) -> float | None:
    rows = TextRow.read(study.at(f"quantized-ppl-{name}"))
    return next((row.ppl for row in rows if row.window == WINDOW), None)


def _benchmark(study: Study) -> tuple[dict[str, MeasuredVariant], dict[str, Point]]:
    """Return what was measured of each variant, by our names."""
    summary = Benchmark.read(study.at(BENCHMARK))
    if summary is None:
        return {}, {}
    folders = {str(study.checkpoint(name_of(*each))): name_of(*each) for each in every()}
    found = {folders[v.path]: v for v in summary.variants if v.path in folders}
    names = {v.name: name for name, v in found.items()}
    points = Point.read(study.at(BENCHMARK))
    return found, {names[p.variant]: p for p in points if p.variant in names}


def _together(ppl: dict[tuple[str, int | None], float | None]) -> list[str]:
    """Return how pruning and quantizing add up: factors on the dense model's perplexity."""
    dense, cut = ppl["dense", None], ppl["depth-ppl", None]
    lines = []
    for bits in (8, 4):
        alone, both = ppl["dense", bits], ppl["depth-ppl", bits]
        if dense and cut and alone and both:
            lines.append(
                f"- int{bits}: pruning alone multiplies the dense model's perplexity by "
                f"{cut / dense:.3f}, quantizing alone by {alone / dense:.4f}, both by "
                f"{both / dense:.3f} (the product of the two would be "
                f"{cut / dense * alone / dense:.3f})."
            )
    return lines


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=int, default=240, help="Time limit of the benchmark.")
    args = parser.parse_args()
    study = begun(Study, args)
    measure(study, args.seconds)
    study.save()


if __name__ == "__main__":
    main()
