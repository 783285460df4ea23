"""``python -m core report CHECKPOINT|DIR --out FILE.html``: a study in one file to hand over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import outside
from core.errors import OptionError, OutputError
from core.runs.spec import option


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """Write a study as one self-contained HTML file, and as a zip."""

    checkpoint: str = option(
        positional=True,
        help="A checkpoint (dense or a variant), or the folder of a run, recipe or workspace.",
    )
    out: str = option(help="HTML file to write.")
    zip: str = option("", help="Also write the study's runs to this zip file, without weights.")
    weights: bool = option(False, help="Include the weights of the variants in the zip.")
    memory: float | None = option(
        None,
        help="Available memory; findings report whether each variant fits. Default: memory of "
        "the benchmarked device.",
        unit="GiB",
        low=0,
    )
    overwrite: bool = option(False, help="Replace files that exist.")


def run(spec: ReportSpec) -> dict[str, Any]:
    """Write the files and return what is printed: their paths, sizes and contents."""
    targets = [outside.path_of(name) for name in (spec.out, spec.zip) if name]
    if spec.weights and not spec.zip:
        raise OptionError("--weights needs --zip, which is missing.", "Add --zip FILE.zip.")
    for path in targets:
        _check_target(path, spec.overwrite)
    if len({p.resolve() for p in targets}) < len(targets):
        raise OptionError(f"--out and --zip are both {targets[0]}.", "Give two different files.")

    from core.report import build, bundle
    from core.report.material import gather
    from core.runs import workspace

    material = gather(spec.checkpoint)
    text = build.page(material, 1024 * spec.memory if spec.memory else None)
    workspace.write_text(targets[0], text)
    result: dict[str, Any] = {
        "schema": 1,
        "checkpoint": material.study.dense.id,
        "report": str(targets[0]),
        "bytes": len(text.encode()),
        "variants": len(material.study.variants),
        "runs": [r.id for r in material.runs],
        "findings": [f.key for f in build.findings_of(material)],
    }
    if spec.zip:
        count = bundle.write(targets[1], material, text, weights=spec.weights)
        result |= {"zip": str(targets[1]), "zip_files": count, "weights": spec.weights}
    return result


def _check_target(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder.", "Give a file to write.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} already exists.", "Give another file, or add --overwrite.")
