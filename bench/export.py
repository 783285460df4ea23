"""GGUF files of three models and their variants against torch: ``python -m bench.export --save``.

For each model and cut: the file's architecture, the largest difference among the 20 likeliest next
tokens (natural log-probabilities, float32), whether 32 greedy tokens and the tokens of a Unicode
paragraph are equal, and the perplexity of a q8_0 file beside torch's. llama.cpp is asked through
xllamacpp. Models that are not on this machine are left out. ``--models`` names those to measure;
figures are kept in a file in the workspace, and ``--resume`` measures only what it lacks. SmolLM2's
cuts by depth and by FLAP are those of `bench.smollm2` if ``--made`` (its folder) has them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.llama_cpp import engine
from core.checkpoint import locate
from core.demo import DATA
from core.export import gguf_file
from core.model.loading import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
RESULTS = ROOT / "docs" / "results"
FIGURES = ROOT / "workspace" / "bench-export.json"
"""Figures of all models, so that one can be measured by itself."""
MADE = ROOT / "workspace" / "proof-smollm2"
"""Where `make proof` has bench.smollm2 write its variants."""
SMOLLM2 = Path.home() / ".cache" / "depthcut-real" / "smollm2-135m"
REAL_MODEL = "SmolLM2-135M"
MODELS = {"stories260k": REAL / "stories260k", "demo": "demo", REAL_MODEL: SMOLLM2}
KINDS = ("dense", "depth", "uniform width", "FLAP")
PROMPTS = ("Once upon a time, there was a little girl", "The red ball is in the", "It is")
PARAGRAPH = (
    "Ärger über naïve Façades: ½ of 1,234.50 € - 日本語のテスト, 한국어, русский текст, עברית, "
    "العربية, हिन्दी; emoji 🦙 and\ttabs\n\n  two  spaces.\r\nIt's we'll THEY'VE don't x=3.14159 "
)
TOKENS = 512
"""Of the perplexity; with fewer, the rounding of a few of them decides."""
CLOSE = 0.01
"""Aims: difference of log-probabilities, and of the q8_0 file's perplexity as a share."""


def command(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "core", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr}")


PROVED = {"depth": "depth-ppl", "FLAP": "width-flap"}
"""Kinds of which bench.smollm2 has a variant, and its name there."""


def made(name: str, source: str, kind: str, folder: Path, proof: Path) -> tuple[Path, str]:
    """Return the folder of a variant and the command that made it."""
    found = proof / PROVED.get(kind, "")
    if name == REAL_MODEL and kind in PROVED and (found / "config.json").is_file():
        return found, f"python -m bench.smollm2 DIR --only make  # DIR/{found.name}"
    checkpoint = locate.open(source)
    blocks = checkpoint.info.blocks
    out = folder / f"{name}-{kind.replace(' ', '-')}"
    argv = {
        "depth": ["prune", source, "--drop", f"{blocks // 3},{blocks // 2}"],
        "uniform width": ["width", source, "--method", "llm-pruner", "--ratio", "0.2",
                          "--layers", f"0:{blocks}"],
        "FLAP": ["width", source, "--method", "flap", "--ratio", "0.3", "--samples", "16",
                 "--length", "64"],
    }.get(kind)  # fmt: skip
    if argv is None:
        return checkpoint.folder, ""
    argv += ["--device", "cpu"] if argv[0] == "width" else []
    command(*argv, "--out", str(out))
    return out, "python -m core " + " ".join([*argv, "--out", "DIR"]).replace(source, name)


def measured(folder: Path, text: str, scratch: Path) -> dict[str, Any]:
    """Return the figures of one checkpoint."""
    checkpoint = locate.open(str(folder))
    model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32), None
    tokenizer = load_tokenizer(folder)
    content = gguf_file.describe(checkpoint, "f32")
    file, small = scratch / "f32.gguf", scratch / "q8_0.gguf"
    size = gguf_file.write(content, file, overwrite=True)
    start = time.process_time()
    small_size = gguf_file.write(gguf_file.describe(checkpoint, "q8_0"), small, overwrite=True)
    seconds = time.process_time() - start
    worst = 0.0
    with engine(file, threads=1) as run:
        for prompt in (*PROMPTS, PARAGRAPH):
            ids = tokenizer.encode(prompt)
            wanted = logprobs(model, ids)[-1].topk(20)
            found = run.top(ids, 24)
            pairs = zip(wanted.indices.tolist(), wanted.values.tolist(), strict=True)
            worst = max(worst, *(abs(found.get(i, -math.inf) - value) for i, value in pairs))
        ids = tokenizer.encode(PROMPTS[0])
        text_ids = model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)
        greedy = run.greedy(ids, 32) == text_ids[0, len(ids) :].tolist()
        same = run.tokenize(PARAGRAPH) == tokenizer.encode(PARAGRAPH)
    ids = tokenizer.encode(text)[:TOKENS]
    table = logprobs(model, ids)
    nll = -sum(table[at - 1, ids[at]].item() for at in range(1, len(ids))) / (len(ids) - 1)
    with engine(small, context=TOKENS + 8, threads=1) as run:
        q8 = run.nll(ids)
    return {
        "architecture": content.layout.architecture,
        "f32": size,
        "q8_0": small_size,
        "seconds": seconds,
        "difference": worst,
        "greedy": greedy,
        "tokens": same,
        "perplexity": math.exp(nll),
        "perplexity_tokens": len(ids),
        "perplexity_q8_0": math.exp(q8),
        "notes": gguf_file.describe(checkpoint, "q8_0").notes,
    }


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def measure(names: list[str], scratch: Path, proof: Path, resume: bool) -> None:
    """Measure all variants of the named models and keep their figures."""
    for name in names:
        source = str(MODELS[name])
        if source != "demo" and not (Path(source) / "config.json").is_file():
            print(f"{name} is not on this machine.", file=sys.stderr)
            continue
        text = (DATA / "heldout.txt").read_text(encoding="utf-8")
        if name == REAL_MODEL:
            text = (REAL / "text" / "wikipedia.txt").read_text(encoding="utf-8")[:4000]
        for kind in KINDS:
            if resume and kind in known().get(name, {}):
                continue
            folder, line = made(name, source, kind, scratch, proof)
            found = measured(folder, text, scratch) | {"made": line}
            print(name, kind, found, file=sys.stderr)
            keep(name, kind, found)


def keep(name: str, kind: str, found: dict[str, Any]) -> None:
    """Add a variant's figures to those of earlier runs."""
    figures = known()
    libraries = ("torch", "transformers", "gguf", "xllamacpp")
    versions = {each: importlib.metadata.version(each) for each in libraries}
    figures.setdefault(name, {})[kind] = found | {"versions": versions}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def known() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the figures of all models measured so far."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}


def missed(name: str, kind: str, found: dict[str, Any]) -> list[str]:
    """Return the aims that a variant misses, a sentence each."""
    change = abs(found["perplexity_q8_0"] / found["perplexity"] - 1)
    aims = {
        f"the log-probabilities differ by {found['difference']:.2g}": found["difference"] > CLOSE,
        "the greedy text differs": not found["greedy"],
        "the paragraph's tokens differ": not found["tokens"],
        f"the perplexity of the q8_0 file differs by {change:.2%}": change > CLOSE,
    }
    return [f"{name}, {kind}: {text}." for text, is_missed in aims.items() if is_missed]


def equal(same: bool) -> str:
    return "equal" if same else "differs"


def page() -> str:
    """Return the figures as Markdown."""
    table = [
        "| model | variant | architecture | MiB f32 | MiB q8_0 | CPU s | difference | greedy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    perplexities = [
        "| model | variant | tokens | torch float32 | llama.cpp q8_0 | change | paragraph |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    notes, commands, versions, failures = [], [], set(), []
    for name, kinds in known().items():
        for kind, f in kinds.items():
            change = f["perplexity_q8_0"] / f["perplexity"] - 1
            table.append(
                f"| {name} | {kind} | {f['architecture']} | {f['f32'] / 2**20:.2f} | "
                f"{f['q8_0'] / 2**20:.2f} | {f['seconds']:.2f} | {f['difference']:.1e} | "
                f"{equal(f['greedy'])} |"
            )
            perplexities.append(
                f"| {name} | {kind} | {f['perplexity_tokens']} | {f['perplexity']:.4f} | "
                f"{f['perplexity_q8_0']:.4f} | {change:+.3%} | {equal(f['tokens'])} |"
            )
            failures += missed(name, kind, f)
            notes += [f"- {name}, {kind}: {note}" for note in f["notes"]]
            commands += [f["made"]] if f["made"] else []
            versions.add(", ".join(f"{key} {value}" for key, value in f["versions"].items()))
    return "\n".join(
        [
            "# GGUF files against torch",
            "",
            "Written by `python -m bench.export --save` (part of `make proof`): CPU, float32, "
            f"{'; '.join(sorted(versions))}. Widths use seed 1234.",
            "",
            *table,
            "",
            "Difference: the largest among the 20 likeliest next tokens after four texts, in "
            "natural log-probability, f32 file against torch in float32. Greedy: 32 tokens. CPU s: "
            "writing the q8_0 file.",
            "",
            "Perplexity (demo and stories260k: the demo's held-out stories; SmolLM2: Wikipedia), "
            "and the tokens of a paragraph in many scripts:",
            "",
            *perplexities,
            "",
            *(failures or ["All aims are met: at most 0.01, equal, and within 1 %."]),
            "",
            "What q8_0 stores otherwise:",
            "",
            *(notes or ["Nothing."]),
            "",
            *("The variants:", "", "```", *commands, "```", ""),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="Write docs/results/export.md.")
    parser.add_argument("--resume", action="store_true", help="Measure only what is missing.")
    parser.add_argument("--made", type=Path, default=MADE, help="bench.smollm2's folder.")
    parser.add_argument("--models", nargs="*", choices=[*MODELS], default=[*MODELS])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure(chosen.models, Path(scratch), chosen.made, chosen.resume)
    if chosen.save:
        (RESULTS / "export.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
