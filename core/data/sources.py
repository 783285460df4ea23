"""Text to calibrate, evaluate and retrain on: one SOURCE grammar for all three.

auto                                the default text of a checkpoint: demo or english
demo                                bundled: stories and instructions, generated on the fly
english                             bundled: general English, calibration and held-out documents
FILE                                .txt, .json, .jsonl, .csv, .tsv or .parquet, each also .gz
FOLDER                              written by ``save_to_disk`` of datasets; FOLDER/SPLIT
RUN                                 the folder of a ``generate`` run: text that a model wrote
hub:NAME[/CONFIG][:SPLIT][:FIELD]   a dataset on the Hub, through ``datasets``
c4 | wikitext2 | ptb                presets; ptb is no longer on the Hub: give a file

``SOURCE::FIELD`` names the column to read. Without it the columns are recognised
(`core.data.columns`); a .txt is the whole text for evaluation, else its non-empty lines. Rows
without what their kind needs are skipped and counted.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from core import outside
from core.data import english, generated, hub
from core.data.columns import Row, Unusable, as_instruction, as_messages, layout_of, plain_text
from core.data.readers import file_rows, source_file
from core.errors import DataError

PRESETS = {
    "c4": "hub:allenai/c4/en:train:text",
    "wikitext2": "hub:Salesforce/wikitext/wikitext-2-raw-v1:test:text",
}
BUNDLED = ("demo", "english")
"""Sources with text for every use: rows to calibrate on, and others to evaluate on."""
DEMO_SEED = 20240205
DEMO_ROWS = {"calibration": 400, "heldout": 120, "train": 4000}
DEMO_INSTRUCTIONS = {"calibration": 200, "heldout": 200, "train": 2000}
PEEK = 64
"""Rows whose columns decide how a source is read."""

Use = Literal["train", "calibration", "heldout"]


class Rows(Iterator[Row]):
    """The usable rows of a SOURCE, read as they are asked for.

    ``kind`` is that of all rows (`core.data.columns`); ``skipped`` counts the unusable rows so far,
    and ``reason`` says what the first of them lacks.
    """

    def __init__(
        self,
        source: str,
        raw: Iterator[Mapping[str, Any]],
        field: str = "",
        want: Sequence[str] = (),
        *,
        blanks: bool = False,
    ) -> None:
        """Take the rows of ``source``; raises `DataError` if it is empty or not recognised."""
        head = list(itertools.islice(raw, PEEK))
        if not head:
            raise DataError(f"There is no text in {source}.", "Give a source with text in it.")
        layout = layout_of(source, head, field, want, blanks=blanks)
        self.source, self.kind, self.skipped, self.reason = source, layout.kind, 0, ""
        self._rows = self._usable(itertools.chain(head, raw), layout.read)

    def __next__(self) -> Row:
        """Return the next usable row; raises `DataError` at the end if there was none."""
        return next(self._rows)

    def _usable(
        self, raw: Iterator[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Row]
    ) -> Iterator[Row]:
        number = 0
        for number, found in enumerate(raw, 1):
            try:
                yield read(found)
            except Unusable as error:
                self.skipped += 1
                self.reason = self.reason or f"row {number} {error}"
        if self.skipped == number:
            what = f"none of its {number:,} rows can be used" if number > 1 else "it has one row"
            raise DataError(
                f"{self.source}: {what}; {self.reason}.",
                "Give rows with text, or name another column: SOURCE::FIELD.",
            )


def open_rows(
    source: str,
    use: Use = "calibration",
    *,
    want: Sequence[str] = (),
    stream: bool = True,
    blanks: bool = False,
) -> Rows:
    """Return the rows of a SOURCE, each with ``text``, ``input_ids``, ``messages`` or instructions.

    Args:
        source: see the module docstring.
        use: ``calibration`` or ``heldout`` (disjoint in the bundled texts) or ``train``.
        want: kinds to prefer, if the columns are those of several.
        stream: load only what is asked for; a dataset on the Hub is else stored locally.
        blanks: keep empty texts instead of skipping their rows.

    Raises:
        DataError: there is no such source, it is empty, or it has wrong columns or encoding.
    """
    if source == "demo":
        if {"instruction", "messages"} & set(want):
            return Rows(source, iter(_demo_instructions(use)), want=want)
        return Rows(source, ({"text": story} for story in _demo_stories(use)))
    if source == "english":
        return Rows(source, ({"text": text} for text in _english(use)))
    raw, field = _raw(source, stream)
    return Rows(source, raw, field, want, blanks=blanks)


def _english(use: Use) -> Sequence[str]:
    """Return passages to calibrate on, and whole documents for all else."""
    if use == "calibration":
        return english.passages("calibration")
    return english.documents("heldout" if use == "heldout" else "calibration")


def split_field(source: str) -> tuple[str, str]:
    """Split ``SOURCE::FIELD``; the field is empty if none is named."""
    if "::" in source and not outside.exists(outside.path_of(source)):
        name, _, field = source.rpartition("::")
        return name, field
    return source, ""


def _raw(source: str, stream: bool) -> tuple[Iterator[Mapping[str, Any]], str]:
    name, field = split_field(source)
    name = preset(name)
    if name.startswith("hub:"):
        return hub.hub_rows(name, stream=stream), field or hub.split_name(name)[3]
    path = outside.path_of(name)
    if generated.is_generated(path):
        return file_rows(path / generated.FILE), field
    if outside.is_folder(path):
        return hub.saved_rows(path), field
    return file_rows(source_file(name)), field


def rows_of(source: str, use: Use = "calibration") -> list[Row]:
    """Return all rows of a SOURCE; arguments and errors as for `open_rows`."""
    return list(open_rows(source, use, stream=False))


@functools.cache
def _demo_stories(use: Use) -> tuple[str, ...]:
    """Return the demo's stories; generating them takes seconds, so the result is cached."""
    from core.demo import world

    return tuple(world.stories(DEMO_ROWS[use], DEMO_SEED, use))


def _demo_instructions(use: Use) -> list[dict[str, str]]:
    from core.demo import world

    return list(world.instructions(DEMO_INSTRUCTIONS[use], DEMO_SEED, use))


def text_rows(source: str, use: Use = "calibration") -> list[str]:
    """Return the texts of a SOURCE; other rows than text as `plain_text` writes them."""
    return list(texts(open_rows(source, use, want=("text",), stream=False)))


def texts(rows: Rows) -> Iterator[str]:
    """Yield the rows as text; raises `DataError` for token ids."""
    if rows.kind == "input_ids":
        raise DataError(
            f"{rows.source} has no text: its rows are token ids.", "Give a source with text in it."
        )
    return map(plain_text, rows)


def instruction_rows(source: str, use: Use = "train") -> list[dict[str, str]]:
    """Return rows of ``instruction``, ``input`` and ``output``.

    Of messages, the last answer is the output and what comes before it the instruction.

    Raises `DataError` as `open_rows` does, and for text or token ids.
    """
    rows = open_rows(source, use, want=("instruction",), stream=False)
    if rows.kind != "instruction":
        return list(map(as_instruction, rows))
    return list(rows)


def chat_rows(source: str, use: Use = "train") -> list[Row]:
    """Return rows of ``messages``: role (system, user, assistant or tool) and content.

    ShareGPT conversations, prompts with completions, and instructions become messages. Rows without
    an assistant turn are skipped.

    Raises `DataError` as `open_rows` does, and if the source has rows of another kind.
    """
    rows = open_rows(source, use, want=("messages",), stream=False)
    if rows.kind not in ("messages", "instruction"):
        raise DataError(
            f"{source} has no messages: its rows are {rows.kind}.",
            "Give rows with messages, conversations, prompt and completion, or instructions.",
        )
    return list(map(as_messages, rows))


def kind_of(source: str) -> str:
    """Return the kind of rows: ``text``, ``input_ids``, ``instruction`` or ``messages``."""
    return "text" if source in BUNDLED else open_rows(source).kind


def describe(source: str) -> dict[str, str]:
    """Return what results record about their data: its source and a hash of the content."""
    if source == "demo":
        return {"source": "demo", "content": f"generator seed {DEMO_SEED}"}
    if source == "english":
        texts = (_sha256(english.FOLDER / f"{part}.txt") for part in ("calibration", "heldout"))
        return {"source": "english", "content": " ".join(texts)}
    name, field = split_field(source)
    name = preset(name)
    tail = f"::{field}" if field else ""
    if name.startswith("hub:"):
        return {"source": name + tail, "content": "as downloaded" + tail}
    path = outside.path_of(name)
    if generated.is_generated(path):
        return {"source": path.name + tail, "content": _sha256(path / generated.FILE) + tail}
    if outside.is_folder(path):
        state = hub.saved_folder(path) / hub.STATE
        return {"source": path.name + tail, "content": f"{_sha256(state)}{tail}"}
    path = source_file(name)
    return {"source": path.name + tail, "content": f"{_sha256(path)}{tail}"}


def _sha256(path: Any) -> str:
    with path.open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()[:16]}"


def stamp(source: str) -> str:
    """Return a string that changes whenever a source's file does; empty for other sources."""
    path = outside.path_of(split_field(source)[0])
    name = generated.FILE if generated.is_generated(path) else hub.STATE
    try:
        state = (path / name if outside.is_folder(path) else path).stat()
    except OSError:
        return ""
    return f"{state.st_mtime_ns} {state.st_size}"


def preset(source: str) -> str:
    """Return the SOURCE that a preset stands for; any other source is returned unchanged."""
    if source == "auto":
        raise DataError(
            "The source auto stands for the default text of a checkpoint.",
            "Name a text here: demo, english, a file or hub:NAME.",
        )
    if source == "ptb":
        raise DataError(
            "ptb is a script-based dataset; the Hub no longer supports those.",
            "Give the Penn Treebank validation text as a .txt file.",
        )
    return PRESETS.get(source, source)
