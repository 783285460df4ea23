"""The tokenizer of a GGUF file, built by transformers and completed as llama.cpp reads the file.

A GGUF names its rule for splitting text (``tokenizer.ggml.pre``). transformers knows many of these
rules; for the others it uses GPT-2's. What llama.cpp implies by a rule (BOS, whole words before
merges, digits one by one) is added here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.checkpoint.gguf import Header
from core.checkpoint.tokenizer import TOKENIZER_FILES
from core.errors import CheckpointError
from core.model import loading

_GPT2 = ("gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""GPT-2's rule after every digit is split off."""
_LLAMA3 = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "tekken",
)
"""A word that is a token is not merged, and a text begins with BOS unless the file says not to."""


def write(header: Header, folder: Path) -> tuple[str, ...]:
    """Save the tokenizer with its chat template into ``folder``; return notes for the user.

    Raises `CheckpointError` if the file has no tokenizer or one that transformers cannot build.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{header.path} has "
            + (f"a tokenizer of the kind '{kind}'." if kind else "no tokenizer."),
            "Supported: gpt2 (byte-level BPE) and llama (SentencePiece).",
        )
    from transformers import PreTrainedTokenizerFast

    loading.quiet()
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, local_files_only=True
        )
    except (*loading.REFUSALS, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot build the tokenizer of {header.path}: {loading.reason(error)}",
            f"Give the safetensors checkpoint it was made from ({TOKENIZER_FILES[0]}).",
        ) from error
    notes = _complete(header, tokenizer, kind)
    tokenizer.init_kwargs.pop("gguf_file", None)
    tokenizer.save_pretrained(str(folder))
    return notes


def _complete(header: Header, tokenizer: Any, kind: str) -> tuple[str, ...]:
    from tokenizers import decoders, normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    entry = header.metadata.get
    if kind == "llama":
        # As LLaMA 2's own tokenizer.json. transformers' Metaspace puts no space before a text that
        # begins with one, and none after a special token; llama.cpp and SentencePiece do.
        prefix = entry("tokenizer.ggml.add_space_prefix") is not False
        spaces: list[Any] = [normalizers.Replace(" ", "▁")]
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            spaces = [normalizers.Prepend("▁"), *spaces]
            steps = [*steps, decoders.Strip(" ", 1, 0)]
        backend.normalizer = normalizers.Sequence(spaces)
        backend.pre_tokenizer = None
        backend.decoder = decoders.Sequence(steps)
        return ()
    rule = entry("tokenizer.ggml.pre")
    if rule in _DIGITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif rule in _LLAMA3:
        backend.model.ignore_merges = True
        if "tokenizer.ggml.add_bos_token" not in header.metadata:
            tokenizer.add_bos_token = True
    if rule in (*_GPT2, *_DIGITS, *_LLAMA3) or _is_known(rule):
        return ()
    named = f"names the rule '{rule}'" if isinstance(rule, str) else "names no rule"
    return (
        f"The file {named} for splitting text, which is not known here; GPT-2's rule is used, so "
        "some texts may be split into other tokens than in llama.cpp.",
    )


def _is_known(rule: Any) -> bool:
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    return rule in gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
