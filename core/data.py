"""Text to calibrate on, to judge by and to retrain on: one SOURCE grammar for all three.

    demo                                the bundled world: stories and instructions, made on the fly
    FILE.txt                            evaluation takes it whole; calibration its non-empty lines
    FILE.jsonl | .csv | .parquet        column ``text``, or ``instruction,input,output``,
                                        or exact ``input_ids`` rows
    hub:NAME[/CONFIG][:SPLIT][:FIELD]   a data set of the Hub, through ``datasets``
    wikitext2 | ptb                     presets; ptb is no longer on the Hub: give a file

Sampling follows Shortened LLaMA (arXiv 2402.02834): rows of at least the wanted number of tokens,
in an order drawn by the seed, a random crop of each.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from core.errors import DataError

FILE_KINDS = (".txt", ".jsonl", ".csv", ".parquet")
PRESETS = {"wikitext2": "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text"}
DEMO_SEED = 20240205
DEMO_ROWS = {"calibration": 400, "heldout": 120, "train": 4000}
DEMO_INSTRUCTIONS = {"calibration": 200, "heldout": 200, "train": 2000}
BOS_PROTOCOLS = ("once", "window")


class Encoder(Protocol):
    """What sampling needs of a tokenizer (transformers' own fit)."""

    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of ``text``."""


Row = dict[str, Any]
Use = Literal["train", "calibration", "heldout"]


def rows_of(source: str, use: Use = "calibration") -> list[Row]:
    """Return the rows of a SOURCE, each with ``text``, ``input_ids`` or instruction columns.

    Args:
        source: see the module docstring.
        use: ``calibration`` or ``heldout`` (disjoint in the demo world) or ``train``.

    Raises:
        DataError: no such source, wrong columns, wrong encoding, or nothing in it.
    """
    if source == "demo":
        return [{"text": story} for story in _demo_stories(use)]
    source = _preset(source)
    is_hub = source.startswith("hub:")
    rows = _hub_rows(source) if is_hub else list(_file_rows(_file(source)))
    if not rows:
        raise DataError(f"There is nothing in {source}.", "Give a source with text in it.")
    return rows


@functools.cache
def _demo_stories(use: Use) -> tuple[str, ...]:
    """Return the demo's stories; making them takes seconds, so they are made once."""
    from core.demo import world

    return tuple(world.stories(DEMO_ROWS[use], DEMO_SEED, use))


def text_rows(source: str, use: Use = "calibration") -> list[str]:
    """Return the texts of a SOURCE: its ``text`` column, or a .txt file's non-empty lines."""
    rows = rows_of(source, use)
    if "text" not in rows[0]:
        raise DataError(
            f"{source} has no column 'text' (it has {', '.join(rows[0])}).",
            "Name another field, or give a .txt file.",
        )
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{source}: row {number} has no text.", "Remove or mend that row.")
        if row["text"].strip():
            texts.append(row["text"])
    if not texts:
        raise DataError(f"Every text in {source} is empty.", "Give a source with text in it.")
    return texts


def evaluation_stream(source: str) -> str:
    """Return the text to judge by: a .txt as it is, documents joined by a blank line otherwise."""
    if _preset(source).endswith(".txt") and not source.startswith("hub:"):
        text = _read_text(_file(source))
        if not text.strip():
            raise DataError(f"There is nothing in {source}.", "Give a file with text in it.")
        return text
    if _preset(source).startswith("hub:"):  # as published: WikiText-2's blank rows count
        texts = [str(row["text"]) for row in rows_of(source, "heldout") if "text" in row]
        if any(text.strip() for text in texts):
            return "\n\n".join(texts)
    return "\n\n".join(text_rows(source, "heldout"))


def evaluation_windows(
    ids: Sequence[int], window: int, bos: str, bos_id: int | None
) -> list[list[int]]:
    """Cut a token stream into non-overlapping windows of ``window`` tokens, remainder dropped.

    ``bos`` names the protocol: ``once`` puts one BOS before the stream, ``window`` one at the
    start of every window (which then holds ``window - 1`` tokens of text). A tokenizer without a
    BOS token gets none.
    """
    if bos not in BOS_PROTOCOLS:
        raise DataError(f"No BOS protocol '{bos}'.", f"Choose from: {', '.join(BOS_PROTOCOLS)}.")
    if window < 2:
        raise DataError(f"A window of {window} tokens predicts nothing.", "Give 2 or more.")
    head = [] if bos_id is None else [bos_id]
    stream = head + list(ids) if bos == "once" else list(ids)
    front = head if bos == "window" else []
    step = window - len(front)
    starts = range(0, len(stream) - step + 1, step)
    windows = [front + stream[start : start + step] for start in starts]
    if not windows:
        raise DataError(
            f"The text has {len(stream)} tokens, fewer than one window of {window}: "
            f"{step - len(stream)} are missing.",
            "Give more text or a smaller --window.",
        )
    return windows


def calibration_rows(
    source: str,
    tokenizer: Encoder,
    samples: int,
    length: int,
    seed: int,
    *,
    or_fewer: bool = False,
) -> list[list[int]]:
    """Return ``samples`` rows of exactly ``length`` token ids, drawn by ``seed``.

    Exact ``input_ids`` rows are taken as they are, in order, cut to ``length``. With ``or_fewer``
    all rows that are long enough will do, at least one.

    Raises:
        DataError: fewer than ``samples`` rows are long enough; says how many are missing.
    """
    rows = rows_of(source)
    if "input_ids" in rows[0]:
        return _exact_rows(source, rows, samples, length, or_fewer)
    texts = text_rows(source)
    order = list(range(len(texts)))
    draw = random.Random(seed)
    draw.shuffle(order)
    chosen: list[list[int]] = []
    longest = 0
    for index in order:
        if len(chosen) == samples:
            break
        ids = tokenizer.encode(texts[index], add_special_tokens=True)
        longest = max(longest, len(ids))
        if len(ids) >= length:
            start = draw.randint(0, len(ids) - length)
            chosen.append(ids[start : start + length])
    if len(chosen) < samples and not (or_fewer and chosen):
        raise DataError(
            f"{source} has {len(chosen)} rows of at least {length} tokens; {samples} are wanted, "
            f"{samples - len(chosen)} are missing (its longest row has {longest} tokens).",
            "Give more text, fewer --samples or a smaller --length.",
        )
    return chosen


def _exact_rows(
    source: str, rows: list[Row], samples: int, length: int, or_fewer: bool = False
) -> list[list[int]]:
    chosen = []
    for number, row in enumerate(rows, 1):
        ids = row.get("input_ids")
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise DataError(
                f"{source}: row {number} has no list of token ids in 'input_ids'.",
                "Write whole numbers from 0 up.",
            )
        if len(ids) >= length:
            chosen.append(ids[:length])
    if len(chosen) < samples and not (or_fewer and chosen):
        raise DataError(
            f"{source} has {len(chosen)} input_ids rows of at least {length} tokens; "
            f"{samples} are wanted, {samples - len(chosen)} are missing.",
            "Give more rows, fewer --samples or a smaller --length.",
        )
    return chosen[:samples]


def instruction_rows(source: str, use: Use = "train") -> list[dict[str, str]]:
    """Return rows of ``instruction``, ``input`` and ``output``; empty responses are refused."""
    if source == "demo":
        from core.demo import world

        return list(world.instructions(DEMO_INSTRUCTIONS[use], DEMO_SEED, use))
    rows = rows_of(source, use)
    missing = [c for c in ("instruction", "output") if c not in rows[0]]
    if missing:
        raise DataError(
            f"{source} lacks the column(s) {', '.join(missing)} (it has {', '.join(rows[0])}).",
            "Instruction data has the columns instruction, input (may be empty) and output.",
        )
    clean = []
    for number, row in enumerate(rows, 1):
        values = {c: str(row.get(c) or "") for c in ("instruction", "input", "output")}
        if not values["output"].strip():
            raise DataError(
                f"{source}: row {number} has an empty response.", "Fill or remove that row."
            )
        clean.append(values)
    return clean


def kind_of(source: str) -> str:
    """Return what the rows are: ``input_ids``, ``instruction`` or ``text``."""
    if source == "demo":
        return "text"
    first = rows_of(source)[0]
    return next((k for k in ("input_ids", "instruction") if k in first), "text")


def describe(source: str) -> dict[str, str]:
    """Return what results say of their data: the source's name and a hash of its content."""
    if source == "demo":
        return {"source": "demo", "content": f"generator seed {DEMO_SEED}"}
    source = _preset(source)
    if source.startswith("hub:"):
        return {"source": source, "content": "as downloaded"}
    path = _file(source)
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"source": path.name, "content": f"sha256:{digest[:16]}"}


def _preset(source: str) -> str:
    if source == "ptb":
        raise DataError(
            "ptb is a script data set, which the Hub no longer serves.",
            "Give the Penn Treebank validation text as a .txt file.",
        )
    return PRESETS.get(source, source)


def _file(source: str) -> Path:
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(
            f"No text source '{source}': there is no such file.",
            "Give demo, a .txt, .jsonl, .csv or .parquet file, or hub:NAME.",
        )
    if path.suffix.lower() not in FILE_KINDS:
        raise DataError(
            f"{path.name}: files ending in '{path.suffix}' are not read.",
            f"Give one of {', '.join(FILE_KINDS)}.",
        )
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name} is not UTF-8 text (byte {error.start}).", "Save it as UTF-8."
        ) from None


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text = _read_text(path)
    if suffix == ".txt":
        yield from ({"text": line.strip()} for line in text.splitlines() if line.strip())
    elif suffix == ".csv":
        yield from _csv_rows(path, text)
    else:
        yield from _json_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    for row in csv.DictReader(io.StringIO(text, newline="")):
        if "input_ids" in row:
            try:
                row["input_ids"] = [int(i) for i in str(row["input_ids"]).strip("[] ").split(",")]
            except ValueError:
                raise DataError(
                    f"{path.name}: input_ids '{row['input_ids'][:40]}' are not whole numbers.",
                    "Write them as 1,2,3.",
                ) from None
        yield dict(row)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise DataError(
                f"{path.name}: line {number} is not a JSON object.", "Write one object a line."
            )
        yield value


def _parquet_rows(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            "Reading .parquet needs pyarrow, which is not installed.", "Give a .jsonl file."
        ) from None
    try:
        return parquet.read_table(path).to_pylist()
    except Exception as error:
        raise DataError(
            f"{path.name} is not a readable Parquet file: {error}.", "Write it again."
        ) from error


def _hub_rows(source: str) -> list[Row]:
    """Load ``hub:NAME[/CONFIG][:SPLIT][:FIELD]``; NAME may hold one slash, or be a folder."""
    name, _, rest = source.removeprefix("hub:").partition(":")
    split, _, field = rest.partition(":")
    parts = name.split("/")
    folder = Path(name).is_dir()
    repository = name if folder or len(parts) < 3 else "/".join(parts[:2])
    config = None if folder or len(parts) < 3 else "/".join(parts[2:])
    try:
        import datasets
    except ImportError:
        raise DataError(
            "Data sets of the Hub need the package datasets, which is not installed.",
            "Install it, or give a local file.",
        ) from None
    try:
        loaded = datasets.load_dataset(repository, config, split=split or "train")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"The data set '{source}' could not be loaded: {reason}.",
            "Check its name, split and your connection, or give a local file.",
        ) from error
    if field and field not in loaded.column_names:
        raise DataError(
            f"{source} has no field '{field}'.", f"Its fields: {', '.join(loaded.column_names)}."
        )
    rows = loaded.to_list()
    return [{"text": row[field]} for row in rows] if field else rows
