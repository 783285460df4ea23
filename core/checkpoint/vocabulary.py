"""Which vocabulary a checkpoint has, and the default text that follows from it."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from core import outside
from core.checkpoint.tokenizer import TOKENIZER_FILES
from core.demo import CHECKPOINT

AUTO = "auto"


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


def default_text(folder: Path) -> str:
    """Return the SOURCE to calibrate and evaluate a checkpoint on if none is named.

    The demo's stories for checkpoints with its vocabulary, which knows few other words; english for
    all others.
    """
    key = tokenizer_key(folder)
    return "demo" if key and key == tokenizer_key(CHECKPOINT) else "english"


def text_of(source: str, folder: Path) -> str:
    """Return ``source``, or what `AUTO` (or nothing) means for the checkpoint in ``folder``."""
    return source if source not in ("", AUTO) else default_text(folder)
