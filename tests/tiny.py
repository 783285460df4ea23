"""Tiny random checkpoints of every supported family, with a tokenizer trained on the spot.

``write(folder, "gqa")`` writes one; `VARIANTS` lists them. Weights are large enough (standard
deviation 0.12 at hidden size 32) that every block matters to the logits.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

BLOCKS = 5
HIDDEN = 32

_SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (family, config fields on top of the common ones)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", {}),
    "gqa": ("llama", {"num_key_value_heads": 2}),
    "tied": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama3": ("llama", {"num_key_value_heads": 2, "rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}),
    "qwen2": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 3,
        },
    ),
    "qwen3": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
}
FAMILIES = ("gqa", "mistral", "qwen2", "qwen3")
"""One variant of each family."""


def text(rows: int = 400, seed: int = 7) -> str:
    """Return lines of made-up English, the same for the same seed."""
    rng = random.Random(seed)
    names, verbs = ("Ann", "Ben", "Cora", "Dan"), ("sees", "finds", "takes", "wants")
    things = ("red ball", "small boat", "blue cup", "old book", "warm coat")
    places = ("in the garden", "by the river", "at home", "on the hill")
    return "".join(
        f"{rng.choice(names)} {rng.choice(verbs)} the {rng.choice(things)} {rng.choice(places)}.\n"
        for _ in range(rows)
    )


def tokenizer(size: int = 320) -> Any:
    """Train a byte-level BPE tokenizer of at most ``size`` tokens with <unk>, <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        # The last is what transformers adds to every tokenizer of a Qwen2 checkpoint.
        special_tokens=["<unk>", "<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text().splitlines(), trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def model(variant: str = "gqa", seed: int = 0, **fields: Any) -> Any:
    """Return a randomly initialised causal language model in float32, eval mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, extra = VARIANTS[variant]
    config = AutoConfig.for_model(family, **{**_SHAPE, "vocab_size": 320, **extra, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # Norms and biases start as ones and zeros, which would hide mistakes with them.
            for name, weight in result.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(0, 0.1)
                elif "norm" in name:
                    weight.uniform_(0.7, 1.3)
    return result.eval()


def write_sentencepiece(folder: Path) -> Path:
    """Write a tiny LLaMA with a byte-fallback BPE tokenizer.model, as LLaMA 2 has it; 400 tokens.

    Returns its folder, which has no tokenizer.json.
    """
    import json

    import sentencepiece

    model("gqa", vocab_size=400).save_pretrained(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write(
    folder: str | Path,
    variant: str = "gqa",
    *,
    shard_bytes: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    **fields: Any,
) -> Path:
    """Write a tiny checkpoint and return its folder.

    ``shard_bytes`` (say 40_000) splits the weights into several files; ``fields`` go on top of
    the variant's config, as ``num_hidden_layers=14``.
    """
    import torch

    folder = Path(folder)
    size = "5GB" if shard_bytes is None else shard_bytes
    result = model(variant, seed, **fields).to(getattr(torch, dtype))
    result.save_pretrained(folder, max_shard_size=size)
    tokenizer(min(320, result.config.vocab_size)).save_pretrained(folder)
    return folder
