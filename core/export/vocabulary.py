"""A tokenizer in GGUF's terms: tokens, their types, scores or merges, special tokens, flags.

llama.cpp has two kinds for these families. ``gpt2`` is byte-level BPE, with merges and the name of
a pre-tokenizer (`core.export.pretokenizers`). ``llama`` is SentencePiece's BPE: instead of merges,
every token has a score, and the adjacent pair whose joined token scores best is merged first. The
rank of a token's first merge gives the same order, so scores need no tokenizer.model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core import outside
from core.checkpoint.tensors import read_config
from core.errors import CheckpointError
from core.export import pretokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens (gguf.TokenType)."""
_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_GENERIC = (None, "PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend")
"""Classes that take tokenizer.json as it is; the others rebuild parts of it."""
_NEVER = -1e9
"""Score of a token that no merge makes."""
_SAMPLE = "word"


@dataclass(frozen=True)
class Source:
    """A tokenizer as transformers uses it."""

    table: Mapping[str, Any]
    """As in tokenizer.json."""
    special: Mapping[str, str]
    """bos, eos, unk and pad -> the token's text."""
    templates: Mapping[str, str]
    """Chat templates by name; the default one has an empty name."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file holds of a tokenizer."""

    model: str
    """gpt2 or llama."""
    pre: str
    """llama.cpp's name of the pre-tokenizer; ``default`` for llama."""
    tokens: list[str]
    types: list[int]
    scores: list[float]
    """Empty for gpt2."""
    merges: list[str]
    """Empty for llama."""
    ids: dict[str, int]
    """bos, eos, eot, unknown and padding -> token id."""
    flags: dict[str, bool]
    """add_bos_token, add_eos_token, add_space_prefix."""
    templates: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes in the file, to within a few hundred."""
        texts = sum(len(t.encode()) + 8 for t in (*self.tokens, *self.merges))
        return (
            texts
            + 4 * len(self.types)
            + 4 * len(self.scores)
            + 8 * len(self.templates)
            + sum(len(t.encode()) for t in self.templates.values())
        )


MISSING = Vocabulary(
    "", "", [], [], [], [], {}, {}, notes=("There is no tokenizer, so its size is not counted.",)
)
"""Stands for the tokenizer of a checkpoint without one."""


def read(folder: Path, *, light: bool = False) -> Source:
    """Return the tokenizer of a checkpoint folder as transformers uses it.

    A tokenizer.json that transformers takes as it is needs neither transformers nor torch; with
    ``light`` every tokenizer.json is taken as it is. Raises `CheckpointError` if there is no
    tokenizer, or it cannot be read.
    """
    settings = _settings(folder)
    path = folder / "tokenizer.json"
    if outside.is_file(path) and (light or settings.get("tokenizer_class") in _GENERIC):
        special = {
            role: _text(settings.get(f"{role}_token")) for role in ("bos", "eos", "unk", "pad")
        }
        found = {role: text for role, text in special.items() if text}
        return Source(read_config(path), found, _templates(folder, settings))
    return _through_transformers(folder, settings)


def _through_transformers(folder: Path, settings: Mapping[str, Any]) -> Source:
    import json

    from core.model.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"The tokenizer of {folder} ({type(tokenizer).__name__}) has no tokenizer.json form.",
            "Save it once as tokenizer.json: tokenizer.save_pretrained(...).",
        )
    special = {role: getattr(tokenizer, f"{role}_token") for role in ("bos", "eos", "unk", "pad")}
    found = {role: str(text) for role, text in special.items() if text}
    return Source(json.loads(backend.to_str()), found, _templates(folder, settings))


def _settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if outside.is_file(folder / name):
            found |= read_config(folder / name)
    return found


def _text(token: Any) -> str:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else ""


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; a file of its own comes before the settings."""
    found: dict[str, str] = {}
    given = settings.get("chat_template")
    if isinstance(given, str):
        found[""] = given
    for item in given if isinstance(given, list) else ():
        name, text = item.get("name"), item.get("template")
        if isinstance(name, str) and isinstance(text, str):
            found["" if name == "default" else name] = text
    if outside.is_file(folder / "chat_template.jinja"):
        found[""] = outside.text(folder / "chat_template.jinja")
    more = folder / "additional_chat_templates"
    for path in sorted(more.glob("*.jinja")) if more.is_dir() else ():
        found[path.stem] = outside.text(path)
    return found


# ------------------------------------------------------------------------------------- conversion


def kind_of(table: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of a tokenizer.json (gpt2 or llama) and its pre-tokenizer's name.

    Raises `CheckpointError` for a tokenizer that llama.cpp is not known to have.
    """
    model = table.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise CheckpointError(
            f"The tokenizer is of the kind {outside.brief(model.get('type'))}; for this model "
            "family llama.cpp has BPE only.",
            "Give a checkpoint with a BPE tokenizer.",
        )
    if model.get("byte_fallback") is True:
        _space_prefix(table)
        return "llama", "default"
    _check_normalizer(table.get("normalizer"))
    return "gpt2", pretokenizers.name_of(table)


def convert(source: Source, rows: int, eos_ids: Sequence[int] = ()) -> Vocabulary:
    """Return a tokenizer in GGUF's terms, with exactly ``rows`` tokens (those of the embedding).

    ``eos_ids``: all ids that end a text, as generation_config.json has them. Raises
    `CheckpointError` for a tokenizer that llama.cpp is not known to have.
    """
    table = source.table
    kind, pre = kind_of(table)
    vocab: dict[str, int] = table["model"]["vocab"]
    added = table.get("added_tokens") or []
    tokens, types = _listed(vocab, added, rows, source.special.get("unk", ""), kind)
    merges = [m if isinstance(m, str) else " ".join(m) for m in table["model"].get("merges", [])]
    number = {**vocab, **{t["content"]: t["id"] for t in added}}
    ids = {
        name: number[text]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (text := source.special.get(role)) and number.get(text, rows) < rows
    }
    others = [i for i in eos_ids if i != ids.get("eos") and 0 <= i < rows]
    if "eos" not in ids and others:
        ids["eos"] = others.pop(0)
    if others:
        ids["eot"] = others[0]
    before, after = _around(table)
    flags, notes = _flags(before, after, ids)
    if kind == "llama":
        flags["add_space_prefix"] = _space_prefix(table)
        if flags["add_space_prefix"] and table.get("pre_tokenizer"):
            notes.append(
                "A text that begins with a space, or with a special token, gets one space more in "
                "llama.cpp, as in SentencePiece, than in transformers."
            )
    beyond = [text for text, i in number.items() if i >= rows]
    if beyond:
        what = (
            f"Token {outside.quoted(beyond[0])} is"
            if len(beyond) == 1
            else (f"{len(beyond):,} tokens ({outside.brief(', '.join(beyond))}) are")
        )
        notes.append(f"{what} left out: the embedding has only {rows:,} rows.")
    if isinstance(table.get("normalizer"), dict) and kind == "gpt2":
        notes.append(
            "The tokenizer normalises text (NFC), which llama.cpp does not: text that is not in "
            "that form, e.g. letters with separate accents, gives other tokens."
        )
    if pre in pretokenizers.APPROXIMATE:
        notes.append(
            f"llama.cpp approximates this pre-tokenizer ({pre}): text with combining marks, e.g. "
            "Devanagari, gives other tokens than in transformers."
        )
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if kind == "llama" else [],
        merges=merges if kind == "gpt2" else [],
        ids=ids,
        flags=flags,
        templates=dict(source.templates),
        notes=tuple(notes),
    )


def _listed(
    vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], rows: int, unknown: str, kind: str
) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their ids, and their types; ids without one are unused."""
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for text, i in vocab.items():
        if i < rows:
            tokens[i] = text
            types[i] = BYTE if kind == "llama" and _BYTE.fullmatch(text) else NORMAL
    for token in added:
        i = token["id"]
        if i < rows:
            tokens[i] = token["content"]
            types[i] = CONTROL if token.get("special") else USER_DEFINED
    if kind == "llama" and unknown in tokens:
        types[tokens.index(unknown)] = UNKNOWN
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> list[float]:
    """Return the score of every token: minus the rank of the first merge that makes it."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), place)
    return [-float(rank[token]) if token in rank else _NEVER for token in tokens]


def _around(table: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the tokens that are put before and after a text."""
    import json

    from tokenizers import Tokenizer

    # the vocabulary does not matter here, and reading one takes seconds
    special = [t for t in table.get("added_tokens") or [] if t.get("special")]
    names = {t["content"]: t["id"] for t in special}
    small = {**table, "pre_tokenizer": None, "normalizer": None, "truncation": None}
    word = max(names.values(), default=-1) + 1
    small["model"] = {"type": "WordLevel", "vocab": {**names, _SAMPLE: word}, "unk_token": _SAMPLE}
    small["added_tokens"] = special
    encoded = Tokenizer.from_str(json.dumps(small)).encode(_SAMPLE)
    numbers = [names.get(text, -1) for text in encoded.tokens]
    at = encoded.tokens.index(_SAMPLE)
    return numbers[:at], numbers[at + 1 :]


def _flags(
    before: list[int], after: list[int], ids: dict[str, int]
) -> tuple[dict[str, bool], list[str]]:
    """Return add_bos_token and add_eos_token; what they cannot say becomes a note."""
    notes = []
    for role, around in (("bos", before), ("eos", after)):
        if len(around) == 1 and role not in ids:
            ids[role] = around[0]
        if around and around != [ids.get(role)]:
            place = "before" if role == "bos" else "after"
            notes.append(
                f"transformers puts the tokens {around} {place} every text; llama.cpp can add only "
                f"{role.upper()} there, so it adds none."
            )
    flags = {f"add_{role}_token": around == [ids.get(role)]
             for role, around in (("bos", before), ("eos", after))}  # fmt: skip
    return flags, notes


def _check_normalizer(node: Any) -> None:
    """Raise `CheckpointError` for a normaliser of a byte-level BPE that changes ordinary text."""
    if node is None or (isinstance(node, dict) and node.get("type") in ("NFC",)):
        return
    kind = node.get("type") if isinstance(node, dict) else node
    if kind == "Sequence" and not node.get("normalizers"):
        return
    raise CheckpointError(
        f"The tokenizer normalises text ({outside.brief(kind)}), which llama.cpp does not do.",
        "The model would read other tokens, so no file is written.",
    )


def _space_prefix(table: Mapping[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before every text.

    Raises `CheckpointError` if its structure is none that SentencePiece's BPE has.
    """
    normalizer, splitter = table.get("normalizer"), table.get("pre_tokenizer")
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    steps = [(p.get("type"), p.get("prepend") or p.get("content")) for p in parts]
    if splitter is None:
        if steps == [("Prepend", _SPACE), ("Replace", _SPACE)]:
            return True
        if steps == [("Replace", _SPACE)]:
            return False
    elif not steps and splitter.get("type") == "Metaspace":
        scheme = splitter.get("prepend_scheme")
        if splitter.get("replacement") == _SPACE:
            if scheme is None:
                return bool(splitter.get("add_prefix_space", True))
            return scheme in ("first", "always")
    shown = ", ".join(str(kind) for kind, _ in steps) or "none"
    after = splitter.get("type") if isinstance(splitter, dict) else "none"
    raise CheckpointError(
        "The tokenizer falls back to bytes as SentencePiece does, but prepares text otherwise "
        f"(normalizer: {outside.brief(shown)}; pre_tokenizer: {outside.brief(after)}).",
        "llama.cpp would read other tokens, so no file is written.",
    )
