"""What the Prune page asks the live model about a plan, in which order, and what it answered.

`ask` is called at the beginning of every drawing: first a few windows spread over the held-out
text, whose figure is there at once; then more of the same text; then a few words that the pruned
model writes; last the scores' own rows, if they take no longer than the rest. Each question also
evaluates the whole model on the same windows, so that the two compare. What the plan no longer
needs is given up. `core.ui.cockpit` shows the figures, `details` what they were measured on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core.checkpoint.drop import Removal
from core.checkpoint.headers import CheckpointInfo
from core.live import client, columns
from core.live.replies import Status
from core.prune import known as prune_view
from core.prune.outlook import CurvePoint
from core.prune.score_results import Importance
from core.runs.workspace import RunRecord, read_run
from core.study import settings as study_settings
from core.ui import forms, prune_pad, say, state
from core.ui.live import Question, desk, key_of
from core.ui.say import plain

POLL_S = 0.15
WINDOW = 128
"""Tokens in a window of the held-out text; fewer if the model's context is shorter."""
WORDS = 28
"""Tokens that the pruned model writes: two lines."""
ROWS_S = 1.0
"""The scores' own rows are measured unasked if the live model needs no longer for them."""


@dataclass(frozen=True)
class Live:
    """The questions about one plan; None for what was not asked."""

    removal: Removal
    quick: Question | None = None
    whole: Question | None = None
    words: Question | None = None
    rows: Question | None = None

    @property
    def asked(self) -> list[Question]:
        """The questions asked so far, in their order."""
        return [q for q in (self.quick, self.whole, self.words, self.rows) if q]

    @property
    def best(self) -> Question | None:
        """The held-out figure on most windows so far; None before the first."""
        found = [q for q in (self.whole, self.quick) if q and q.ppl]
        return max(found, key=lambda q: q.windows) if found else None

    @property
    def done(self) -> bool:
        """Whether all questions have ended, successfully or not."""
        return all(q.done for q in self.asked)

    @property
    def errors(self) -> list[str]:
        """What went wrong, each once."""
        return list(dict.fromkeys(q.error for q in self.asked if q.error))


def rows_of(run: Importance) -> dict[str, Any] | None:
    """Return an importance run's calibration rows as a question's text; None if it has none."""
    if not (run.calibration and run.samples and run.length):
        return None
    return {
        "source": run.calibration,
        "samples": run.samples,
        "window": run.length,
        "seed": run.seed or 0,
        "join": "on" if run.text.joined else "off",
        "chat_template": "on" if run.text.chat_template else "off",
        "paired": True,
    }


def on(name: str) -> dict[str, Any]:
    """Return the device and precision that the study sets for the live model; auto is left out."""
    wanted = study_settings.options_of(forms.kept(name).settings, "live")
    return {key: value for key, value in wanted.items() if value != "auto"}


def with_answers(
    name: str, known: prune_view.Known
) -> tuple[prune_view.Known, dict[str, Any] | None]:
    """Return ``known`` with every set that the live model has measured on the scores' own rows.

    Also returns these rows as the text of a question; None if there are no scores.
    """
    if not known.run:
        return known, None
    rows = rows_of(Importance.read(state.workspace().root / known.run) or Importance())
    if rows is None:
        return known, None
    rows |= on(name)
    points = tuple(
        CurvePoint("live", len(skip.drop), ppl, skip.drop, "live", skip.parts)
        for skip, ppl in desk().answers(known.info, rows)
    )
    return dataclasses.replace(known, points=(*known.points, *points)), rows


def usual_source(name: str) -> str:
    """Return the text to evaluate on if none is given: the study's evaluation text."""
    return forms.kept(name).settings.evaluation


def usual_prompt(name: str) -> str:
    """Return the prompt that the pruned model continues if none is given."""
    return next(iter(columns.examples(name).values()))


def is_on() -> bool:
    """Whether live figures are on: a live model is running, or this session started one."""
    return bool(st.session_state.get("live_on")) or client.running(state.workspace()) is not None


def held_out(name: str, info: CheckpointInfo, pad: prune_pad.Pad) -> dict[str, Any]:
    """Return the held-out text as a question's text."""
    return {
        "source": pad.text or usual_source(name),
        "window": min(WINDOW, info.context or WINDOW),
        "spread": True,
        "paired": True,
        **on(name),
    }


def ask(
    name: str, info: CheckpointInfo, pad: prune_pad.Pad, rows: dict[str, Any] | None = None
) -> Live:
    """Return the questions about the plan with their current answers; the next one is asked."""
    removal = pad.removal
    if not is_on() or (removal and prune_view.problem_of(removal, info)):
        return Live(removal)
    whole = held_out(name, info, pad)
    quick = {**whole, "quick": True}
    prompt = forms.Form("curve", name).value("prompt") or usual_prompt(name)
    words = {"prompt": prompt, "max_tokens": WORDS, "temperature": 0.0, **on(name)}
    texts = [quick, whole, words, *([rows] if rows else [])]
    desk().give_up(_owner(), [key_of(info, text, removal) for text in texts])

    def want(text: dict[str, Any]) -> Question:
        question = Question(name, removal, dict(text))
        return desk().want(_owner(), key_of(info, text, removal), question)

    found = Live(removal, quick=want(quick))
    for part, text in (("whole", whole), ("words", words), ("rows", rows)):
        first = found.quick
        if not (first and first.done) or not found.done or found.errors or text is None:
            break
        if part == "whole" and first.windows >= first.of:
            continue
        if part == "rows" and not _soon(text, first) and not pad.rows:
            continue
        asked: dict[str, Any] = {part: want(text)}
        found = dataclasses.replace(found, **asked)
    return found


def other(
    name: str, info: CheckpointInfo, pad: prune_pad.Pad, removal: Removal, who: str
) -> Question | None:
    """Ask for a first figure of another plan than the pad's; None if live figures are off.

    ``who`` asks: it has one question at a time.
    """
    if not is_on() or not removal or prune_view.problem_of(removal, info):
        return None
    text = {**held_out(name, info, pad), "quick": True}
    question = Question(name, removal, dict(text))
    return desk().want(f"{_owner()} {who}", key_of(info, text, removal), question)


def _soon(rows: dict[str, Any], measured: Question) -> bool:
    """Whether the live model needs little time for the scores' own rows."""
    return bool(rows["samples"] * rows["window"] <= ROWS_S * measured.tokens_per_s)


def _owner() -> str:
    from streamlit.runtime.scriptrunner import get_script_run_ctx

    context = get_script_run_ctx()
    return context.session_id if context else "nobody"


def switch() -> None:
    """Draw the button that starts or stops the live model."""
    record = client.running(state.workspace())

    def turn() -> None:
        st.session_state["live_on"] = record is None
        if record:
            client.stop(record)

    if record:
        pressed = st.button(
            "Stop live",
            key="live_stop",
            on_click=turn,
            help="Stop the live model and free its memory.",
        )
    else:
        pressed = st.button(
            "Measure live",
            key="live_start",
            icon=":material/bolt:",
            on_click=turn,
            help="Keeps the model in memory and measures every choice you make; it releases the "
            "device whenever another run needs it.",
        )
    if pressed:
        st.rerun()  # the whole page shows it


def errors(info: CheckpointInfo, live: Live) -> None:
    """Show what went wrong, with a button to ask again."""

    def again() -> None:
        for one in live.asked:
            desk().forget(key_of(info, one.text, live.removal))

    for error in live.errors:
        say.warning(error)
    if live.errors and st.button(
        "Ask again", key="live_again", icon=":material/refresh:", on_click=again
    ):
        st.rerun()


def details(
    name: str, info: CheckpointInfo, pad: prune_pad.Pad, rows: dict[str, Any] | None
) -> None:
    """Draw what the live model evaluates on, all its answers for the plan, and its memory."""
    st.subheader("Live model")
    form = forms.Form("curve", name)
    places = st.columns(2)
    _source_field(pad, usual_source(name), places[0])
    form.text(
        "prompt",
        "Prompt",
        "",
        at=places[1],
        placeholder=usual_prompt(name),
        help="What the pruned model continues, always with the most likely token.",
    )
    live = ask(name, info, pad, rows)
    st.fragment(_answers, run_every=1 if not live.done else 5)(name, info, pad, rows)


def _answers(
    name: str, info: CheckpointInfo, pad: prune_pad.Pad, rows: dict[str, Any] | None
) -> None:
    record = client.running(state.workspace())
    if not is_on():
        st.caption("Off. Press Measure live above to measure every choice you make.")
        return
    _process(record)
    live = ask(name, info, pad, rows)
    table = [
        row(title, q)
        for title, q in (
            ("held-out text, first figure", live.quick),
            ("held-out text", live.whole),
            ("calibration rows of the scores", live.rows),
        )
        if q
    ]
    if table:
        say.table(pd.DataFrame(table).set_index(""))
    if rows and live.quick and live.quick.done and not _soon(rows, live.quick):
        seconds = rows["samples"] * rows["window"] / max(1.0, live.quick.tokens_per_s)

        def turn() -> None:
            pad.rows = bool(st.session_state["live_rows"])

        st.checkbox(
            "Also measure on the calibration rows of the scores",
            pad.rows,
            key="live_rows",
            on_change=turn,
            help=f"Takes about {seconds:.0f} s for each plan. The curve and the table then show a "
            "measured perplexity instead of an estimate.",
        )


def row(title: str, question: Question) -> dict[str, str]:
    """Return one answer as a row of the table: text, amount, perplexities and their ratio."""
    dense, ppl = question.dense_ppl, question.ppl
    ratio = f"{ppl / dense:.4g}" if ppl and dense else "…"
    if ppl and dense and question.stderr is not None and question.skip:
        ratio += f" ± {question.stderr * ppl / dense:.2g}"
    return {
        "": title,
        "text": text_name(question),
        "tokens": amount(question) or "…",
        "dense": f"{dense:.5g}" if dense else "…",
        "plan": f"{ppl:.5g}" + ("" if question.done else " …") if ppl else "…",
        "plan / dense": ratio,
        "seconds": f"{question.seconds:.2f}",
    }


def text_name(question: Question) -> str:
    """Return the name of a question's text, without the folders of a file."""
    return str(question.text["source"]).rstrip("/").rsplit("/", 1)[-1]


def amount(question: Question) -> str:
    """Return how many tokens of its text a figure is over; empty before the first."""
    window = question.text["window"]
    if not question.windows:
        return ""
    used, of = question.windows * window, question.of * window
    if question.windows >= question.of:
        return f"all {used:,} tokens"
    return f"{used:,} of {of:,} tokens"


def measured_on(question: Question) -> str:
    """Return the line under a live figure: text, tokens, device and precision, and its error."""
    parts = [f"Measured live on {text_name(question)} (held out)", amount(question)]
    if question.device:
        parts.append(f"{question.device} {question.dtype}")
    elif not question.done:
        parts.append("more to come")
    if question.stderr and question.skip:
        parts.append(f"ratio ± {question.stderr:.1%}")
    return ", ".join(parts) + "."


def _source_field(pad: prune_pad.Pad, usual: str, at: Any) -> None:
    """Draw the field for the held-out text; its value goes into the URL."""
    given = at.text_input(
        "Held-out text",
        value=pad.text,
        placeholder=usual,
        help="Text to evaluate on: demo, wikitext2, a .txt, .jsonl, .csv or .parquet file, or "
        f"hub:NAME. Empty: {plain(usual)}.",
    )
    if given.strip() != pad.text:
        pad.text = given.strip()
        st.rerun()


def _process(record: RunRecord | None) -> None:
    """Draw the process's memory use, or what it is doing."""
    now = _status_of(str(record.path)) if record else None
    if now:
        line = (
            f"{now.memory_mib:,.0f} of {now.budget_mib:,.0f} MiB used on {now.device}, process "
            f"{now.process_mib:,.0f} MiB."
        )
    elif record:
        line = f"The live model: {record.progress[2] or record.state}."
    elif (gone := client.last(state.workspace())) and gone.state in ("lost", "failed"):
        line = f"Its process exited ({gone.state}); it restarts with the next request."
    else:
        line = "Starting the live model."
    say.caption(line)


@st.cache_data(ttl=2, show_spinner=False)
def _status_of(path: str) -> Status | None:
    record = read_run(Path(path))
    return client.status(record) if record else None
