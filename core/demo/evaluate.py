"""Measure a demo checkpoint: ``python -m core.demo.evaluate [CHECKPOINT] --out DIR``.

Held-out loss compared with the generator's own entropy, accuracy per skill compared with chance,
ten unselected samples, and the perplexity without each block, with the block actually removed.
Plain transformers and plain loops: these figures do not depend on the rest of the project, so they
can check it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from core.demo import CHECKPOINT
from core.demo.questions import CHANCE, SKILLS, questions
from core.demo.world import tell


@torch.no_grad()
def story_loss(model: LlamaForCausalLM, tokenizer: Any, texts: list[str]) -> tuple[float, int]:
    """Return the mean loss in nats per predicted token, and the number of predicted tokens.

    Texts are scored separately, as BOS, text, EOS; all tokens but BOS are predicted.
    """
    total, count = 0.0, 0
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        rows = torch.tensor([ids])
        logits = model(input_ids=rows, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    return total / count, count


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: Any, question: dict[str, Any]) -> int:
    """Return the index of the choice with the highest log-likelihood, summed over its tokens."""
    context = tokenizer(question["context"]).input_ids
    endings = [tokenizer(c, add_special_tokens=False).input_ids for c in question["choices"]]
    longest = max(map(len, endings))
    padded = [[*ending, *[0] * (longest - len(ending))] for ending in endings]
    rows = torch.tensor([context + ending for ending in padded])
    logits = model(input_ids=rows, use_cache=False).logits[:, len(context) - 1 : -1]
    taken = logits.float().log_softmax(-1).gather(2, torch.tensor(padded)[..., None])[..., 0]
    scores = [taken[i, : len(ending)].sum().item() for i, ending in enumerate(endings)]
    return scores.index(max(scores))


def accuracy(
    model: LlamaForCausalLM, tokenizer: Any, skill: str, count: int, seed: int = 0
) -> float:
    """Return the share of a skill's questions that the model answers correctly."""
    asked = questions(skill, count, seed)
    return sum(answer(model, tokenizer, one) == one["answer"] for one in asked) / count


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Any, seed: int, limit: int = 400) -> str:
    """Return a story sampled from BOS at temperature 0.8, of at most ``limit`` tokens."""
    torch.manual_seed(seed)
    start = torch.tensor([[tokenizer.bos_token_id]])
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=limit,
        do_sample=True,
        temperature=0.8,
        top_k=0,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@contextmanager
def without_block(model: LlamaForCausalLM, block: int) -> Iterator[None]:
    """Remove one decoder block from the model, and restore it afterwards."""
    layers = model.model.layers
    kept = [layer for index, layer in enumerate(layers) if index != block]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    try:
        yield
    finally:
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)


def leave_one_out(
    model: LlamaForCausalLM, tokenizer: Any, texts: list[str]
) -> list[dict[str, float]]:
    """Return the perplexity without each block; row -1 is the dense model."""
    dense = math.exp(story_loss(model, tokenizer, texts)[0])
    rows = [{"block": -1, "ppl": round(dense, 4), "ratio": 1.0}]
    for block in range(len(model.model.layers)):
        with without_block(model, block):
            ppl = math.exp(story_loss(model, tokenizer, texts)[0])
        rows.append({"block": block, "ppl": round(ppl, 4), "ratio": round(ppl / dense, 4)})
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows that have the same keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def evaluate(checkpoint: Path, out: Path, count: int = 200, seed: int = 0) -> dict[str, float]:
    """Measure a checkpoint, write the tables into a folder, and return the summary.

    Args:
        checkpoint: A Hugging Face folder.
        out: Folder for demo_summary.json, demo_skills.csv, demo_blocks.csv and demo_samples.txt.
        count: Number of held-out stories, and of questions per skill; the perplexity without each
            block uses a quarter of the stories.
        seed: Seed of the stories and questions.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    told = list(islice(tell(seed, "heldout"), count))
    texts = [story.text for story in told]
    loss, tokens = story_loss(model, tokenizer, texts)
    summary = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "heldout_stories": count,
        "heldout_tokens": tokens,
        "heldout_loss": round(loss, 4),
        "heldout_ppl": round(math.exp(loss), 4),
        "generator_entropy_bound": round(sum(story.nats for story in told) / tokens, 4),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo_summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_csv(out / "demo_blocks.csv", leave_one_out(model, tokenizer, texts[: count // 4]))
    skills = []
    for skill in SKILLS:
        share = accuracy(model, tokenizer, skill, count, seed)
        error = math.sqrt(share * (1 - share) / count)
        skills.append(
            {
                "skill": skill,
                "questions": count,
                "chance": round(CHANCE[skill], 4),
                "accuracy": round(share, 4),
                "stderr": round(error, 4),
            }
        )
    write_csv(out / "demo_skills.csv", skills)
    samples = [f"seed {number}: {sample(model, tokenizer, number)}\n" for number in range(10)]
    (out / "demo_samples.txt").write_text("\n".join(samples))
    return summary


def main(arguments: list[str] | None = None) -> None:
    """Run `evaluate` from the command line and print the summary."""
    parser = argparse.ArgumentParser(prog="python -m core.demo.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")
    parser.add_argument("--count", type=int, default=200, help="stories, and questions per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    print(json.dumps(evaluate(given.checkpoint, given.out, given.count, given.seed), indent=2))


if __name__ == "__main__":
    main()
