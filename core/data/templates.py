"""Prompt templates: the text a model is given for an instruction."""

from __future__ import annotations

_INTRO = "Below is an instruction that describes a task"
_PAIR = ", paired with an input that provides further context"
_ASK = ". Write a response that appropriately completes the request."


def prompt_of(row: dict[str, str], template: str) -> str:
    """Return the prompt of an instruction row; the response follows it directly.

    ``alpaca`` is the wording that instruction models of the LLaMA family are commonly trained
    with; ``plain`` puts instruction and input on separate lines.
    """
    instruction, given = row["instruction"], row["input"]
    if template == "plain":
        return "\n".join(filter(None, (instruction, given))) + "\n"
    head = _INTRO + (_PAIR if given else "") + _ASK
    middle = f"\n\n### Input:\n{given}" if given else ""
    return f"{head}\n\n### Instruction:\n{instruction}{middle}\n\n### Response:\n"
