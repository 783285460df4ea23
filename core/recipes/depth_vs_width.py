"""Recipe ``depth-vs-width``: depth and width pruning at one parameter count, on this machine.

Depth by perplexity and by Taylor+; LLM-Pruner, FLAP and Wanda-sp match the depth variant's number
of parameters as closely as possible. Each method prunes the blocks its paper does: LLM-Pruner
spares the blocks that depth pruning protects, FLAP and Wanda-sp none; with ``--same-layers`` all
methods spare the same ones. All variants are evaluated on the same text and measured side by side.
The Compare page shows the result.
"""

from __future__ import annotations

import statistics
from typing import Any

from core import words
from core.benchmark import results as benchmark
from core.compare.speed import Speed, speed_up
from core.recipes import parts, texts
from core.recipes.chain import Chain, Recipe, Step, Verdict
from core.recipes.spec import RecipeSpec
from core.study.kinds import criterion_label, width_label
from core.study.variants import allowed_blocks, cut_of
from core.words import rounded

RATIO = 0.33
"""Share of all parameters: 11 of LLaMA-7B's 32 blocks, the second size of the paper."""
DEPTH = ("ppl", "taylor")
WIDTH = ("llm-pruner", "flap", "wanda-sp")
BATCHES = (1, 4, 16)
SAMPLES = 64
"""Calibration rows of the width methods: enough for a small model, and fast."""
OUTPUT = 32
CPU_SECONDS = 45.0
LIGHT, LIGHTER = "light-", 0.6
"""Prefix of the lighter variants' steps, and their ratio relative to the main one's."""


def steps(spec: RecipeSpec) -> list[Step]:
    """Score, plan, prune by depth and by width, evaluate, and measure everything together.

    A lighter set is created and evaluated too, so that quality has a curve; its cost is not
    measured.
    """
    ratio = spec.ratio or RATIO
    made = [parts.scored(spec, metrics=DEPTH)]
    made += _set(spec, "", ratio)
    made.append(Step("curve", "curve", lambda chain: {
        "checkpoint": spec.checkpoint, "scores": chain.dir("scores"), "criteria": DEPTH,
    }))  # fmt: skip
    made.append(_evaluated(spec, "dense"))
    made += [_evaluated(spec, name) for name in VARIANTS]
    made.append(Step("benchmark", "benchmark", _benchmark))
    made += _set(spec, LIGHT, LIGHTER * ratio)
    made += [_evaluated(spec, LIGHT + name) for name in VARIANTS]
    return made


VARIANTS = (*(f"depth-{c}" for c in DEPTH), *(f"width-{m}" for m in WIDTH))
"""Steps that create a checkpoint; width ones may fail if a model is too small for them."""


def _set(spec: RecipeSpec, prefix: str, ratio: float) -> list[Step]:
    """Return the steps that create one variant per method at one parameter count."""
    optional = bool(prefix)
    made: list[Step] = []
    for criterion in DEPTH:
        made += _cut(spec, prefix, criterion, ratio, optional)
    return [*made, *(_narrowed(spec, prefix, method) for method in WIDTH)]


def _cut(spec: RecipeSpec, prefix: str, criterion: str, ratio: float, optional: bool) -> list[Step]:
    plan = f"{prefix}plan-{criterion}"
    name = f"{prefix}depth-{criterion}"
    return parts.cut(spec, name, criterion, plan=plan, optional=optional, ratio=ratio)


def _narrowed(spec: RecipeSpec, prefix: str, method: str) -> Step:
    values: dict[str, Any] = {"checkpoint": spec.checkpoint, "method": method}
    if method != "llm-pruner":  # its 10 rows are few enough
        values["samples"] = SAMPLES

    def options(chain: Chain) -> dict[str, Any]:
        same = {"layers": _layers(chain, f"{prefix}plan-ppl")} if spec.same_layers else {}
        text, match = texts.apart(chain)[0], chain.dir(f"{prefix}depth-ppl")
        return {**values, **same, "calibration": text, "match": match}

    return Step(
        f"{prefix}width-{method}", "width", options, optional=True, needs=f"{prefix}depth-ppl"
    )


def _layers(chain: Chain, plan: str) -> str:
    """Return the blocks that a depth plan may drop, in the form of ``--layers``."""
    made = chain.plan(plan)
    return f"{made.protect_first}:{(made.blocks or 0) - made.protect_last}"


def _evaluated(spec: RecipeSpec, name: str) -> Step:
    return parts.evaluated(spec, name, optional="width" in name or LIGHT in name)


def there(chain: Chain) -> list[str]:
    """Return dense and the variants that were created and evaluated."""
    return ["dense", *(v for v in VARIANTS if not {v, f"evaluate-{v}"} & chain.failed.keys())]


def _benchmark(chain: Chain) -> dict[str, Any]:
    names = there(chain)
    return {
        "checkpoints": tuple(parts.folder_of(chain, name) for name in names),
        "batch_sizes": BATCHES,
        "output_tokens": (OUTPUT,),
        "time_limit_s": CPU_SECONDS if chain.spec.device in ("auto", "cpu") else None,
    }


def figures(chain: Chain) -> dict[str, dict[str, Any]]:
    """Return the measurements of every variant by its name in the recipe, dense first."""
    entries = chain.read("benchmark", benchmark.Summary).variants
    points = chain.table("benchmark", benchmark.Point)
    times = parts.latencies(chain, "benchmark")
    found: dict[str, dict[str, Any]] = {}
    total = entries[0].parameters or 1
    for name, entry in zip(there(chain), entries, strict=True):
        at_one = next(p for p in points if p.variant == entry.name and p.batch_size == 1)
        found[name] = {
            "parameters": entry.parameters,
            "ratio": 1 - (entry.parameters or 0) / total,
            "cut_in": allowed_blocks(cut_of(chain.dir(name))),
            "ppl": parts.perplexity(chain, name),
            "latencies_s": times[entry.name],
            "peak_memory_mib": at_one.peak_memory_mib if times[entry.name] else None,
        }
    return found


def verdict(chain: Chain) -> Verdict:
    """Compare the best depth and width variants in speed and quality; report what is noise."""
    found = figures(chain)
    dense = found["dense"]
    speeds = {
        name: speed_up(dense["latencies_s"], f["latencies_s"])
        for name, f in found.items()
        if name != "dense"
    }
    worse = {name: f["ppl"] / dense["ppl"] for name, f in found.items()}
    depth = [n for n in speeds if n.startswith("depth")]
    width = [n for n in speeds if n.startswith("width")]
    removed = statistics.median(found[n]["ratio"] for n in speeds)
    fast = max(depth, key=lambda n: speeds[n].factor)
    good = min(depth, key=lambda n: worse[n])
    if not width:
        text = (
            f"With {removed:.0%} of the parameters removed, {label(fast)} runs at {speeds[fast]}; "
            "no width baseline could be created, so there is nothing to compare it with."
        )
        return Verdict(text, findings(found, speeds, worse), plain(found, speeds, worse))
    rival, better = max(width, key=lambda n: speeds[n].factor), min(width, key=lambda n: worse[n])
    text = (
        f"With {removed:.0%} of the parameters removed and one prompt at a time, depth runs at "
        f"{speeds[fast]} ({label(fast)}), the fastest width baseline at {speeds[rival]} "
        f"({label(rival)}): {contrast(speeds[fast], speeds[rival])} Perplexity rises to "
        f"{worse[good]:.3f} x dense with depth pruning ({label(good)}) and to "
        f"{worse[better]:.3f} x with width pruning ({label(better)}).{where(found)}"
    )
    return Verdict(text, findings(found, speeds, worse), plain(found, speeds, worse))


def where(found: dict[str, dict[str, Any]]) -> str:
    """Return which blocks each method may prune; if they differ, how to make them the same.

    Sparing the first and last blocks can matter more for quality than the method.
    """
    allowed = {label(name): f["cut_in"] for name, f in found.items() if name != "dense"}
    text = words.by_blocks(allowed)
    differ = len({blocks for blocks in allowed.values() if blocks}) > 1
    more = (
        " by default, as in the papers (--same-layers gives all the same blocks)" if differ else ""
    )
    return f" Allowed to cut{more}: {text}." if text else ""


def contrast(depth: Speed, width: Speed) -> str:
    """Return whether depth is faster than width by more than the noise of both."""
    gap, noise = depth.factor / width.factor - 1, depth.noise + width.noise
    if not (depth.is_known and width.is_known):
        return f"with a noise of {noise:.0%} there is no telling which is faster."
    if abs(gap) <= noise:
        return f"the difference of {abs(gap):.0%} is within the noise of {noise:.0%}."
    faster, slower = ("depth", "width") if gap > 0 else ("width", "depth")
    share = gap if gap > 0 else 1 / (1 + gap) - 1
    return f"{faster} is {share:.0%} faster than {slower}, beyond the noise of {noise:.0%}."


def label(name: str) -> str:
    """Return the label of a variant of this recipe."""
    kind, _, method = name.partition("-")
    return criterion_label(method, True) if kind == "depth" else width_label(method)


def findings(
    found: dict[str, dict[str, Any]], speeds: dict[str, Speed], worse: dict[str, float]
) -> tuple[str, ...]:
    """Return a sentence for each variant."""
    dense = found["dense"]
    return tuple(
        f"{label(name)}: {found[name]['parameters']:,} parameters (-{found[name]['ratio']:.1%}), "
        f"{cut_in(found[name])}perplexity {rounded(found[name]['ppl'])} "
        f"({worse[name]:.3f} x dense), {speed}, peak memory {memory(found[name], dense)}."
        for name, speed in speeds.items()
    )


def cut_in(own: dict[str, Any]) -> str:
    """Return the blocks that a method may prune, with a comma; empty if they are unknown."""
    return f"cut in blocks {words.block_ranges(own['cut_in'])}, " if own["cut_in"] else ""


def memory(own: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return a variant's peak memory next to the dense model's."""
    if own["peak_memory_mib"] is None or dense["peak_memory_mib"] is None:
        return "unknown"
    return f"{own['peak_memory_mib']:,.1f} of {dense['peak_memory_mib']:,.1f} MiB"


def plain(
    found: dict[str, dict[str, Any]], speeds: dict[str, Speed], worse: dict[str, float]
) -> dict[str, Any]:
    """Return the figures as plain JSON values."""
    kept = ("parameters", "ratio", "ppl", "peak_memory_mib")
    return {
        name: {
            **{k: f[k] for k in kept},
            "cut_in": list(f["cut_in"]),
            "ppl_over_dense": worse[name],
            "speedup": speeds[name].factor if name in speeds else 1.0,
            "noise": speeds[name].noise if name in speeds else None,
        }
        for name, f in found.items()
    }


RECIPE = Recipe(
    "depth-vs-width",
    "Depth against width",
    "Creates depth- and width-pruned models of the same size; compares quality, latency and memory "
    "on this machine.",
    steps,
    verdict,
)
