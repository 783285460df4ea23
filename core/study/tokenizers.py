"""Whether the tokenizers of several checkpoints are the same."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from core import outside
from core.checkpoint.tokenizer import TOKENIZER_FILES
from core.study.kinds import Variant


def tokenizer_key(folder: Path) -> str:
    """Return a hash of a tokenizer's vocabulary; empty if there is no tokenizer.

    The same vocabulary written by another version of transformers has the same key.
    """
    for name in TOKENIZER_FILES:
        path = folder / name
        if outside.is_file(path):
            stat = path.stat()
            return _vocabulary(path, stat.st_mtime_ns, stat.st_size)
    return ""


@functools.lru_cache(maxsize=4096)
def _vocabulary(path: Path, _mtime: int, _size: int) -> str:
    try:
        data = outside.data(path)
    except (OSError, outside.Malformed):
        return ""
    try:
        table = outside.loads(data)
        vocab = (table.get("model") or {}).get("vocab") or table
        data = json.dumps(vocab, sort_keys=True).encode()
    except (outside.Malformed, AttributeError):
        pass  # a sentencepiece file: its bytes are the vocabulary
    return hashlib.sha256(data).hexdigest()[:16]


def tokenizer_conflict(chosen: Iterable[Variant]) -> str:
    """Return a sentence if the variants have different tokenizers, otherwise an empty string.

    Perplexity is per token, so it is not comparable across tokenizers.
    """
    groups: dict[str, list[str]] = {}
    for variant in chosen:
        key = tokenizer_key(variant.folder) if variant.folder else ""
        if key:
            groups.setdefault(key, []).append(variant.label)
    if len(groups) < 2:
        return ""
    names = " and ".join(group[0] for group in list(groups.values())[:2])
    return (
        f"{names} have different tokenizers, so their perplexities are not comparable. "
        "Leave one of them out, or compare only latency, memory and task scores."
    )
