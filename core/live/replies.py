"""What the live process answers, as dataclasses: the only module that knows the events' keys.

Every reply is one JSON object; ``event`` says its kind. A question ends with one of kind ``done``,
whose other keys depend on the question, or with one of kind ``error``
(`core.live.protocol.error_event`). No torch here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from core.evaluate.token_view import TokenView
from core.runs.results import from_dict


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Nothing to say yet."""

    why: str = ""
    """What is waited for; ``for`` in the event."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A perplexity so far."""

    ppl: float | None = None
    """None if it is not finite."""
    windows: int = 0
    """Windows that it is over."""
    of: int = 0
    """Windows of the text."""
    dense_ppl: float | None = None
    """The whole model's on the same windows, if it was computed."""
    stderr: float | None = None
    """Standard error of ``log(ppl / dense_ppl)`` over the windows."""


@dataclass(frozen=True, kw_only=True)
class Measured(Part):
    """The perplexity that was asked for."""

    predictions: int = 0
    block_passes: int = 0
    """Passes of a chunk through a block that were computed for it; 0 if all was known."""
    seconds: float = 0.0
    tokens_per_s: float = 0.0
    """Rate of the whole model, measured when it was first asked."""
    checkpoint_key: str = ""
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Text is about to be generated: with which model."""

    device: str = ""
    dtype: str = ""
    parameters: int = 0
    """Of the blocks that are not left out, and of all else."""
    weights_mib: float = 0.0
    cache_mib: float = 0.0
    """Keys and values at full length."""
    prompt_tokens: int = 0
    blocks: int = 0


@dataclass(frozen=True, kw_only=True)
class Token:
    """One generated token per row."""

    ids: tuple[int, ...] = ()
    """Empty for text that was held back until the end."""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Written(Begun):
    """Text was generated: what that took."""

    tokens: int = 0
    """Of all rows."""
    seconds: float = 0.0
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    ended: bool = False
    """Whether every row ended by itself."""
    peak_mib: float | None = None
    """Peak memory of this model alone; None if the device does not report it."""


@dataclass(frozen=True, kw_only=True)
class Scored(TokenView):
    """A text token by token."""

    left_out: int = 0
    """Tokens at the end of the text that were too many."""
    device: str = ""
    dtype: str = ""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the live process holds."""

    models: tuple[str, ...] = ()
    memory_mib: float = 0.0
    """Of models and kept states."""
    budget_mib: float = 0.0
    process_mib: float = 0.0
    device: str = ""
    held: bool = False
    """Whether it holds the device now."""
    situation: str = ""
    """What it is doing; empty while it waits for a question."""
    waiting: int = 0
    """Questions in line."""
    answered: int = 0


@dataclass(frozen=True, kw_only=True)
class Done:
    """Done, with nothing to tell."""


Reply = Waiting | Part | Measured | Begun | Token | Written | Scored | Status | Done
LAST: dict[str, type[Measured | Written | Scored | Status | Done]] = {
    "perplexity": Measured,
    "generate": Written,
    "tokens": Scored,
    "status": Status,
    "unload": Status,
    "stop": Done,
}
"""What ends the answer to each question."""
_BEFORE: dict[str, type[Part | Begun | Token]] = {"part": Part, "begin": Begun, "token": Token}


def to_event(reply: Reply) -> dict[str, Any]:
    """Return a reply as it goes over the wire."""
    if isinstance(reply, Waiting):
        return {"event": "waiting", "for": reply.why}
    kind = next((name for name, kind in _BEFORE.items() if type(reply) is kind), "done")
    return {"event": kind, **asdict(reply)}


def from_event(ask: str, event: dict[str, Any]) -> Reply:
    """Return what an event of the answer to the question ``ask`` says; keys it lacks default."""
    kind = event.get("event")
    if kind in _BEFORE:
        return from_dict(_BEFORE[kind], event) or Done()
    if kind == "done":
        return from_dict(LAST.get(ask, Done), event) or Done()
    return Waiting(why=str(event.get("for", "")))
