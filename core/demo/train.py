"""Train the demo checkpoint from scratch: ``python -m core.demo.train --out DIR``.

A plain recipe: a tokenizer trained on the stories, a randomly initialised LlamaForCausalLM, and
next-token cross entropy, optimised with Muon (the matrices of the blocks) and AdamW (the embedding
and the norms), with warm-up, a constant rate, then linear decay. Training starts with whole
stories, first only the shorter half, so that the answer to a question is always in context; packed
rows, which can split stories, come last. No dropout, no layer drop, no edited weights.

The bundled checkpoint was trained with the defaults. Every step depends only on the seed and its
own number, so ``--resume`` continues from the last save to the same result as an uninterrupted run
on the same device and threads.

DIR gets a Hugging Face folder `checkpoint/`, the loss curve `training.csv`, and
`training.pt` (optimizer state, for ``--resume``).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from core.demo.tokenizer import CONTEXT, train_tokenizer
from core.demo.world import stories


@dataclass(frozen=True)
class Recipe:
    """Model and training settings."""

    steps: int = 4600
    """Optimizer steps."""
    seed: int = 1234
    """Seed for the weights, the text and its order."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 2
    """CPU threads of torch."""
    blocks: int = 14
    """Decoder blocks."""
    hidden: int = 128
    """Width of the residual stream."""
    intermediate: int = 256
    """Width of the MLP."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key/value heads."""
    vocabulary: int = 1280
    """Tokens of the byte-level BPE."""
    stories: int = 60000
    """Training stories; each epoch has a new order."""
    batch: int = 16
    """Stories per step."""
    length: int = 512
    """Tokens per packed row; a step takes half as many rows as stories."""
    easy: int = 540
    """Number of initial steps on the shorter half of the stories."""
    packed: int = 900
    """Number of final steps on packed rows."""
    lr: float = 3e-3
    """Peak learning rate of both optimizers."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.4
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    clip: float = 1.0
    """Maximum gradient norm."""
    every: int = 100
    """Steps between measurements of the held-out loss, which also save."""


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a model with random weights.

    The standard deviation is 1/sqrt(hidden) for the tied embedding and half of 1/sqrt(inputs) for
    the other matrices; the outputs of the branches are scaled down further, by 5 sqrt(2 blocks).
    So every block starts close to the identity, and a token's own embedding dominates the residual
    stream. With an embedding of 0.02, the model takes many times longer to learn to copy from its
    context.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.blocks,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                gain = 1.0 if "embed" in name else 0.5
                weight.normal_(0.0, gain * weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.2 * (2 * recipe.blocks) ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
    )
    return model


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return each story's tokens between BOS and EOS."""
    found = tokenizer._tokenizer.encode_batch(texts)
    return [[*encoded.ids, tokenizer.eos_token_id] for encoded in found]


def pack(told: list[list[int]], length: int) -> torch.Tensor:
    """Concatenate stories and cut them into rows ``[rows, length]``."""
    stream = [token for story in told for token in story]
    rows = len(stream) // length
    return torch.tensor(stream[: rows * length]).view(rows, length)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate of a step: linear warm-up, constant, linear decay to zero."""
    left = (recipe.steps - step) / max(1.0, recipe.steps * recipe.decay)
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup, left)


class Text:
    """The training text of each step; it depends only on the recipe and the step's number."""

    def __init__(self, told: list[list[int]], recipe: Recipe) -> None:
        """Draw from ``told``, the tokens of each story."""
        self.told, self.recipe = told, recipe
        self.rows = pack(told, recipe.length)
        lengths = [len(story) for story in told]
        middle = sorted(lengths)[len(lengths) // 2]
        self.short = [i for i, length in enumerate(lengths) if length <= middle]
        self.easy, self.whole = recipe.easy, recipe.steps - recipe.packed
        self._batches = functools.lru_cache(maxsize=2)(self._drawn)

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and labels ``[batch, tokens]``; padding has the label -100."""
        if step >= self.whole:
            count = max(1, self.recipe.batch // 2)
            rows = self.rows[batch_rows(step - self.whole, len(self.rows), count, self.recipe.seed)]
            return rows, rows
        easy = step < self.easy
        place = step if easy else step - self.easy
        per_pass = len(self._batches(easy, 0))
        turn, place = divmod(place, per_pass)
        return padded([self.told[i] for i in self._batches(easy, turn)[place]])

    def _drawn(self, easy: bool, turn: int) -> list[list[int]]:
        """Return one epoch: batches of stories of similar length, in random order."""
        draw = random.Random(f"demo {self.recipe.seed} {easy} {turn}")
        order = list(self.short) if easy else list(range(len(self.told)))
        draw.shuffle(order)
        size, batches = self.recipe.batch, []
        for start in range(0, len(order), 64 * size):
            near = sorted(order[start : start + 64 * size], key=lambda i: len(self.told[i]))
            batches += [near[at : at + size] for at in range(0, len(near) - size + 1, size)]
        draw.shuffle(batches)
        return batches


def padded(told: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stories as ids and labels, right-padded, which causal attention never sees."""
    width = max(len(story) for story in told)
    ids = torch.tensor([story + [0] * (width - len(story)) for story in told])
    labels = torch.tensor([story + [-100] * (width - len(story)) for story in told])
    return ids, labels


def batch_rows(step: int, rows: int, count: int, seed: int) -> torch.Tensor:
    """Return the row numbers of a step; each epoch has its own random order."""
    turn, place = divmod(step, rows // count)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + turn))
    return order[place * count : (place + 1) * count]


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean next-token cross entropy of ids ``[batch, tokens]``, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = ids if labels is None else labels
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean loss over held-out rows."""
    return sum(loss_of(model, part).item() * len(part) for part in rows.split(16)) / len(rows)


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks and AdamW for the embedding and the norms.

    There is no weight decay: it would erase small differences in the embedding, e.g. between
    colours.
    """
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(blocks, lr=recipe.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def save_checkpoint(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write a Hugging Face folder atomically."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    settings = partial / "tokenizer_config.json"
    named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(named, indent=2) + "\n")
    for file in partial.iterdir():
        file.chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write the training state; the old file is kept until the new one is complete."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """Write the loss curve as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(curve[0]))
        writer.writeheader()
        writer.writerows(curve)


def train(recipe: Recipe, out: Path, resume: bool = False, stop: int | None = None) -> float:
    """Train with the recipe and return the last held-out loss in nats per token.

    Args:
        recipe: Model and training settings.
        out: Folder for `checkpoint/`, `training.csv` and `training.pt`.
        resume: Continue from `training.pt` if it exists.
        stop: Save and stop before this step, as an interruption would.
    """
    torch.set_num_threads(recipe.threads)
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    texts = stories(recipe.stories, recipe.seed, "train")
    tokenizer = train_tokenizer(texts[:4000], recipe.vocabulary)
    text = Text(tokenize(texts, tokenizer), recipe)
    heldout = stories(100, recipe.seed, "heldout")
    heldout = pack(tokenize(heldout, tokenizer), recipe.length).to(device)
    print(f"{text.rows.numel():,} training tokens, {heldout.numel():,} held out", file=sys.stderr)

    model = build_model(recipe, tokenizer).to(device)
    optimizers = optimizers_for(model, recipe)
    state_file = out / "training.pt"
    first, curve, spent, tokens = 0, [], 0.0, 0
    if resume and state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first, curve, spent, tokens = (state[k] for k in ("step", "curve", "seconds", "tokens"))

    started, losses = time.monotonic() - spent, []
    last = min(recipe.steps, stop or recipe.steps)
    measured = math.nan
    for step in range(first, last):
        rate = learning_rate(step, recipe)
        ids, labels = text.step(step)
        tokens += int((labels != -100).sum())
        loss = loss_of(model, ids.to(device), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        done = step + 1
        if done % recipe.every and done != last:
            continue
        measured = heldout_loss(model, heldout)
        curve.append(
            {
                "step": done,
                "tokens": tokens,
                "loss": round(sum(losses) / len(losses), 4),
                "heldout_loss": round(measured, 4),
                "lr": round(rate, 7),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        losses = []
        print(json.dumps(curve[-1]), file=sys.stderr, flush=True)
        save_state(
            state_file,
            {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": done,
                "tokens": tokens,
                "curve": curve,
                "seconds": time.monotonic() - started,
            },
        )
        save_checkpoint(model, tokenizer, out / "checkpoint")
        write_curve(out / "training.csv", curve)
    return measured


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line; every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(prog="python -m core.demo.train", description=Recipe.__doc__)
    for option in fields(Recipe):
        flag = "--" + option.name.replace("_", "-")
        kind = type(option.default)
        parser.add_argument(flag, type=kind, default=option.default, help=f"({option.default})")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--resume", action="store_true", help="continue from the last save")
    given = vars(parser.parse_args(arguments))
    out, resume = given.pop("out"), given.pop("resume")
    train(Recipe(**given), out, resume)


if __name__ == "__main__":
    main()
