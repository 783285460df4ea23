"""GGUF files of three models and their variants against torch: ``python -m bench.export --save``.

For each model and cut: the file's architecture, the largest difference among the 20 likeliest next
tokens (natural log-probabilities, float32), whether 32 greedy tokens and the tokens of a Unicode
paragraph are equal, and the perplexity of a q8_0 file beside torch's. llama.cpp is asked through
xllamacpp. Models that are not on this machine are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.llama_cpp import engine
from core.checkpoint import locate
from core.demo import DATA
from core.export import gguf_file
from core.model.loading import load_model, load_tokenizer
from core.runs import processes

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "real"
SMOLLM2 = Path.home() / ".cache" / "depthcut-real" / "smollm2-135m"
MODELS = {"stories260k": REAL / "stories260k", "demo": "demo", "SmolLM2-135M": SMOLLM2}
KINDS = ("dense", "depth", "uniform width", "FLAP")
PROMPTS = ("Once upon a time, there was a little girl", "The red ball is in the", "It is")
PARAGRAPH = (
    "Ärger über naïve Façades: ½ of 1,234.50 € - 日本語のテスト, 한국어, русский текст, עברית, "
    "العربية, हिन्दी; emoji 🦙 and\ttabs\n\n  two  spaces.\r\nIt's we'll THEY'VE don't x=3.14159 "
)
TOKENS = 256
"""Of the perplexity."""


def command(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "core", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stderr}")


def made(name: str, source: str, kind: str, folder: Path) -> tuple[Path, str]:
    """Return the folder of a variant and the command that made it."""
    checkpoint = locate.open(source)
    blocks = checkpoint.info.blocks
    out = folder / f"{name}-{kind.replace(' ', '-')}"
    argv = {
        "depth": ["prune", source, "--drop", f"{blocks // 3},{blocks // 2}"],
        "uniform width": ["width", source, "--method", "random", "--ratio", "0.5",
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
    with engine(file, threads=2) as run:
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
    with engine(small, threads=2) as run:
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
        "perplexity_q8_0": math.exp(q8),
        "notes": gguf_file.describe(checkpoint, "q8_0").notes,
    }


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def rows(scratch: Path) -> Iterator[str]:
    commands, notes = [], []
    yield "| model | variant | architecture | MiB f32 | MiB q8_0 | CPU s | difference | greedy |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    perplexities = [
        "| model | variant | torch float32 | llama.cpp q8_0 | change | paragraph's tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, source in MODELS.items():
        if source != "demo" and not (Path(source) / "config.json").is_file():
            yield f"| {name} | not on this machine |"
            continue
        text = (DATA / "heldout.txt").read_text(encoding="utf-8")
        if name == "SmolLM2-135M":
            text = (REAL / "text" / "wikipedia.txt").read_text(encoding="utf-8")[:4000]
        for kind in KINDS:
            folder, line = made(name, str(source), kind, scratch)
            commands += [line] if line else []
            found = measured(folder, text, scratch)
            print(name, kind, found, file=sys.stderr)
            change = found["perplexity_q8_0"] / found["perplexity"] - 1
            assert found["difference"] < 0.01, found
            assert found["greedy"], found
            assert found["tokens"], found
            assert abs(change) < 0.01, found
            yield (
                f"| {name} | {kind} | {found['architecture']} | {found['f32'] / 2**20:.2f} | "
                f"{found['q8_0'] / 2**20:.2f} | {found['seconds']:.2f} | "
                f"{found['difference']:.1e} | equal |"
            )
            perplexities.append(
                f"| {name} | {kind} | {found['perplexity']:.4f} | "
                f"{found['perplexity_q8_0']:.4f} | {change:+.3%} | equal |"
            )
            notes += [f"- {name}, {kind}: {note}" for note in found["notes"]]
    yield ""
    yield (
        "Difference: the largest among the 20 likeliest next tokens after four texts, in natural "
        "log-probability, f32 file against torch in float32. Greedy: 32 tokens. CPU s: writing the "
        "q8_0 file, in CPU seconds."
    )
    yield ""
    yield f"Perplexity of {TOKENS} tokens (demo and stories260k: the demo's held-out stories):"
    yield ""
    yield from perplexities
    yield ""
    yield from notes
    yield ""
    yield from ("The variants:", "", "```", *commands, "```")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="Write docs/results/export.md.")
    save = parser.parse_args().save
    torch.set_num_threads(2)
    libraries = ("torch", "transformers", "gguf", "xllamacpp")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    with tempfile.TemporaryDirectory() as scratch:
        lines = [
            "# GGUF files against torch",
            "",
            "Written by `python -m bench.export --save` (part of `make proof`): CPU, float32, "
            f"{versions}. Widths use seed 1234.",
            "",
            *rows(Path(scratch)),
        ]
    text = (
        "\n".join(lines)
        + f"\n\nPeak memory of the whole bench: {processes.memory_mib('VmHWM:'):,.0f} MiB.\n"
    )
    print(text)
    if save:
        (ROOT / "docs" / "results" / "export.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
