"""Which of llama.cpp's pre-tokenizers a tokenizer.json means, by its own structure.

A GGUF file names its pre-tokenizer (``tokenizer.ggml.pre``); the rules themselves are in llama.cpp.
A wrong name gives other tokens, and so another model, without any error. So the name is never
guessed from the model's name: the steps in tokenizer.json must be exactly those of a row here.

======================  ==================================================================
name                    steps before the merges
======================  ==================================================================
gpt-2                   GPT-2's expression (ByteLevel with use_regex)
smollm                  single digits, then GPT-2's expression (SmolLM, StarCoder)
llama-bpe, smaug-bpe    LLaMA 3's expression; the second without ignore_merges
qwen2                   Qwen2's and Qwen3's expression, single digits in it
tekken                  Mistral's expression since Nemo
gpt-4o                  o200k's expression
deepseek-coder          five expressions: line ends, letters, punctuation, Han and Hangul, digits
======================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from core import outside
from core.errors import CheckpointError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
GPT4O = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|"
    rf"\p{{N}}{{1,3}}|{_REST_SLASH}"
)
Steps = tuple[str, ...]
_BYTES, _GPT2 = "bytes", "bytes, GPT-2's expression"
_DIGITS = "single digits"


def _split(expression: str) -> str:
    return f"split {expression}"


_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
KNOWN: dict[tuple[Steps, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_split(LLAMA3), _BYTES), True): "llama-bpe",
    ((_split(LLAMA3), _BYTES), False): "smaug-bpe",
    ((_split(QWEN2), _BYTES), False): "qwen2",
    ((_split(TEKKEN), _BYTES), True): "tekken",
    ((_split(TEKKEN), _BYTES), False): "tekken",
    ((_split(GPT4O), _BYTES), False): "gpt-4o",
    ((*map(_split, _DEEPSEEK_CODER), _DIGITS, _BYTES), False): "deepseek-coder",
}
"""Steps, and whether whole words of the vocabulary bypass the merges -> llama.cpp's name."""

APPROXIMATE = ("tekken", "gpt-4o")
"""Names whose expression llama.cpp rewrites without classes of marks, which its engine lacks."""


def name_of(table: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json (a byte-level BPE).

    Raises `CheckpointError` with the steps if llama.cpp is not known to have them.
    """
    steps = tuple(_steps(table.get("pre_tokenizer")))
    model = table.get("model") or {}
    name = KNOWN.get((steps, model.get("ignore_merges") is True))
    if name is None:
        merges = ", with ignore_merges" if model.get("ignore_merges") is True else ""
        raise CheckpointError(
            "llama.cpp is not known to have this tokenizer's pre-tokenizer "
            f"({'; '.join(outside.brief(step, 120) for step in steps) or 'none'}{merges}).",
            f"Known: {', '.join(dict.fromkeys(KNOWN.values()))}. With another one the model would "
            "read other tokens, so no file is written.",
        )
    return name


def _steps(node: Any) -> Iterator[str]:
    """Yield the steps of a pre-tokenizer in words that `KNOWN` compares."""
    if node is None:
        return
    kind = node.get("type") if isinstance(node, dict) else None
    if kind == "Sequence":
        for part in node.get("pretokenizers") or []:
            yield from _steps(part)
    elif kind == "ByteLevel":
        prefix = ", with a space in front" if node.get("add_prefix_space") else ""
        # use_regex is true if an old file leaves it out
        yield (_GPT2 if node.get("use_regex", True) else _BYTES) + prefix
    elif kind == "Digits":
        yield _DIGITS if node.get("individual_digits") else "runs of digits"
    elif kind == "Split":
        pattern = node.get("pattern") or {}
        expression = pattern.get("Regex", f"the string {pattern.get('String')!r}")
        behaviour = str(node.get("behavior", "")).lower()
        inverted = node.get("invert") is True
        # "removed, inverted" keeps exactly the matches, as "isolated" does if all text matches
        plain = (behaviour == "isolated" and not inverted) or (behaviour == "removed" and inverted)
        yield _split(expression) + ("" if plain else f" ({behaviour}, invert {inverted})")
    else:
        yield outside.brief(kind)
