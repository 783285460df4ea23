"""What the columns of a row mean: any layout becomes one of four kinds of row.

    text           {"text": str}
    input_ids      {"input_ids": [int, ...]}
    instruction    {"instruction": str, "input": str, "output": str}
    messages       {"messages": [{"role": "system|user|assistant|tool", "content": str}, ...]}

Recognised as messages: ``messages`` and ``conversations`` (with role and content, or ShareGPT's
from and value), and ``prompt`` with ``completion`` or ``response`` (text, or messages).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core import outside
from core.errors import DataError

Row = dict[str, Any]
"""One row of one of the four kinds."""
Message = dict[str, str]

KINDS = ("input_ids", "messages", "instruction", "text")
"""In the order in which columns are recognised, if a source has those of several kinds."""
CHATS = ("messages", "conversations", "conversation")
PAIRS = (("prompt", "completion"), ("prompt", "response"))
INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"))
"""Instruction, input (may be missing) and output: of Alpaca's rows, and of Dolly's."""
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
HIGHEST_ID = (1 << 31) - 1
"""Of a token."""


class Unusable(ValueError):
    """A row lacks what its kind needs; the text says what, as in "row 3 ..."."""


@dataclass(frozen=True)
class Layout:
    """How the rows of one source are read."""

    kind: str
    read: Callable[[Mapping[str, Any]], Row]
    """Normalises a row; raises `Unusable`."""


def layout_of(
    source: str,
    sample: Sequence[Mapping[str, Any]],
    field: str = "",
    want: Sequence[str] = (),
    *,
    blanks: bool = False,
) -> Layout:
    """Return the layout of a source whose first rows are ``sample``.

    ``field`` names the column to read; ``want`` are kinds to prefer if the columns allow it.
    With ``blanks`` empty texts are rows.

    Raises `DataError` if there is no such column, or none that is recognised.
    """
    columns = list(dict.fromkeys(str(name) for row in sample for name in row))
    if field:
        if field not in columns:
            raise DataError(f"{source} has no field '{field}'.", f"Its fields: {_list(columns)}.")
        values = (row.get(field) for row in sample)
        kind = next(filter(None, map(_kind_of_value, values)), "text")
        reader = _blank_of if blanks and kind == "text" else _READERS[kind]
        return Layout(kind, reader(field))
    only = "instruction" in want and not _recognised("messages", columns)
    for kind in want if only else (*want, *KINDS):
        if read := _recognised(kind, columns):
            return Layout(kind, _blank_of(kind) if blanks and kind == "text" else read)
    if "instruction" in (*want, *columns):
        missing = [name for name in ("instruction", "output") if name not in columns]
        raise DataError(
            f"{source}: missing columns: {', '.join(missing)} (its columns: {_list(columns)}).",
            "Instruction data needs the columns instruction, input (may be empty) and output.",
        )
    bare = source.partition("::")[0]
    raise DataError(
        f"{source} has no column 'text' (its columns: {_list(columns)}).",
        f"Name the column to read, e.g. {bare}::{columns[0] if columns else 'FIELD'}.",
    )


def _list(columns: Sequence[str]) -> str:
    return outside.brief(", ".join(columns), 300) or "none"


def _kind_of_value(value: Any) -> str | None:
    if isinstance(value, list) and value:
        return "input_ids" if all(type(i) is int for i in value) else "messages"
    return "text" if isinstance(value, str) and value.strip() else None


def _recognised(kind: str, columns: Collection[str]) -> Callable[[Mapping[str, Any]], Row] | None:
    if kind == "messages":
        for name in CHATS:
            if name in columns:
                return _messages_of(name)
        pair = next((pair for pair in PAIRS if set(pair) <= set(columns)), None)
        return _pair_of(*pair) if pair else None
    if kind == "instruction":
        for names in INSTRUCTIONS:
            if names[0] in columns and names[2] in columns:
                return _instruction_of(*names)
        return None
    return _READERS[kind](kind) if kind in columns else None


def _text_of(field: str) -> Callable[[Mapping[str, Any]], Row]:
    def read(row: Mapping[str, Any]) -> Row:
        value = row.get(field)
        if value is None or value == "":
            raise Unusable("has no text")
        if not isinstance(value, str):
            raise Unusable(f"has {outside.quoted(value)} instead of text")
        if not value.strip():
            raise Unusable("has no text")
        return {"text": value}

    return read


def _blank_of(field: str) -> Callable[[Mapping[str, Any]], Row]:
    filled = _text_of(field)
    return lambda row: {"text": row[field]} if isinstance(row.get(field), str) else filled(row)


def _ids_of(field: str) -> Callable[[Mapping[str, Any]], Row]:
    def read(row: Mapping[str, Any]) -> Row:
        value = row.get(field)
        if isinstance(value, str):  # a cell of a CSV file
            try:
                value = [int(i) for i in value.strip("[] ").split(",")]
            except ValueError:
                raise Unusable(
                    f"has '{field}' {outside.brief(str(value))}, which are not whole numbers such "
                    "as 1,2,3"
                ) from None
        if not isinstance(value, list) or not all(
            type(i) is int and 0 <= i <= HIGHEST_ID for i in value
        ):
            raise Unusable(
                f"has {outside.quoted(value)} in '{outside.brief(field)}', which is not a list of "
                "token ids (whole numbers from 0)"
            )
        return {"input_ids": value}

    return read


def _instruction_of(asked: str, given: str, answer: str) -> Callable[[Mapping[str, Any]], Row]:
    def read(row: Mapping[str, Any]) -> Row:
        values = [str(row.get(name) or "") for name in (asked, given, answer)]
        if not values[2].strip():
            raise Unusable("has an empty response")
        return dict(zip(("instruction", "input", "output"), values, strict=True))

    return read


def _messages_of(field: str) -> Callable[[Mapping[str, Any]], Row]:
    def read(row: Mapping[str, Any]) -> Row:
        return _checked(_turns(row.get(field), field))

    return read


def _pair_of(prompt: str, completion: str) -> Callable[[Mapping[str, Any]], Row]:
    def read(row: Mapping[str, Any]) -> Row:
        turns = []
        for name, role in ((prompt, "user"), (completion, "assistant")):
            value = row.get(name)
            if isinstance(value, str) and not value.lstrip().startswith("[{"):
                turns.append({"role": role, "content": value})
            elif value is not None:
                turns += _turns(value, name)
        return _checked(turns)

    return read


def _turns(value: Any, field: str) -> list[Message]:
    if isinstance(value, str):  # a cell that holds JSON
        try:
            value = outside.loads(value)
        except outside.Malformed:
            value = None
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):
        names = list(value)  # columns of messages, as older datasets have them
        value = [dict(zip(names, turn, strict=True)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise Unusable(f"has no list of messages in '{outside.brief(field)}'")
    return [_turn(turn) for turn in value]


def _turn(turn: Mapping[str, Any]) -> Message:
    said = str(turn.get("role", turn.get("from")) or "")
    role = ROLES.get(said.strip().lower())
    if role is None:
        raise Unusable(f"has a message from '{outside.brief(said)}', which is not a known role")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, of which some are text
        parts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(part for part in parts if isinstance(part, str))
    return {"role": role, "content": content if isinstance(content, str) else ""}


def _checked(turns: list[Message]) -> Row:
    """Return the messages up to the last answer."""
    turns = turns[: 1 + max((at for at, turn in enumerate(turns) if _answers(turn)), default=-1)]
    if not turns:
        raise Unusable("has no assistant turn")
    return {"messages": turns}


def _answers(turn: Message) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip())


_READERS = {"text": _text_of, "input_ids": _ids_of, "messages": _messages_of}


def as_messages(row: Row) -> Row:
    """Return an instruction row as a user and an assistant message; messages rows unchanged."""
    if "messages" in row:
        return row
    asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": row["output"]},
        ]
    }


def as_instruction(row: Row) -> Row:
    """Return the last answer of a messages row with what came before it as the instruction."""
    turns = row["messages"]
    last = max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = "\n".join(turn["content"] for turn in turns[:last])
    return {"instruction": asked, "input": "", "output": turns[last]["content"]}


def plain_text(row: Row) -> str:
    """Return a row as text without a template: its parts, a line each."""
    if "text" in row:
        return str(row["text"])
    parts = (
        [turn["content"] for turn in row["messages"]] if "messages" in row
        else [row["instruction"], row["input"], row["output"]]
    )  # fmt: skip
    return "\n".join(filter(None, parts))
