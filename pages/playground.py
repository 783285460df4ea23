"""Playground: one prompt for up to four models, side by side, token by token."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from core.checkpoint.drop import Removal
from core.compare.verdict import verdict_of
from core.errors import DepthcutError
from core.live import client
from core.live import columns as playground_columns
from core.live.columns import Column
from core.live.playground import Output, Session
from core.live.protocol import Sampling
from core.live.replies import Begun
from core.prune import toggle
from core.runs.spec import build
from core.study import Variant, study
from core.study.settings import options_of
from core.ui import forms, frame, prune_pad, say, state, token_pair
from core.ui.say import plain

SESSION, REFRESH_S = "playground_session", 0.2
FIRST = Removal((0,))
"""What a column skips if there is no plan."""
NAMES = ("max_tokens", "temperature", "top_k", "top_p", "seed", "batch")
STYLE = """<style>
.pg-text {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5}
.pg-text .prompt {opacity: .62}
.pg-text mark {background: rgba(213, 94, 0, .22); color: inherit; border-bottom: 2px solid #D55E00}
</style>"""


def beside_dense(name: str, known: Sequence[Variant]) -> str:
    """Return the column that stands beside dense at first: the plan under way, or the best variant.

    The best is what the verdict takes; without one, the variant made last.
    """
    pad = prune_pad.plan_elsewhere()
    made = [v for v in known[1:] if v.record]
    if pad.removal or not made:
        return f"skip:{toggle.removal_to_text(pad.removal or FIRST)}"
    take = verdict_of(study(state.workspace(), name), forms.kept(name).settings).take
    best = next((v for v in made if take and v.id == take.id), made[-1])
    return f"run:{best.record.id if best.record else best.id}"


def chooser(name: str) -> list[Column]:
    """Draw the choice of columns, which is kept in the URL; return the columns."""
    known = playground_columns.variants(state.workspace(), name)
    pad = prune_pad.plan_elsewhere()
    skip = toggle.removal_to_text(pad.removal or FIRST)
    kept_codes = st.session_state.get("playground_kept_columns", "")
    asked = playground_columns.from_address(st.query_params.get("columns", "") or kept_codes)
    runs = playground_columns.of_runs(known)
    codes = ["dense", beside_dense(name, known), f"skip:{skip}", *runs]
    codes = list(dict.fromkeys([*codes, *(c for c in asked if c.startswith("skip:"))]))
    found = {code: runs.get(code) or _column(code, name, known) for code in codes}
    choices = {code: one for code, one in found.items() if one}
    if "playground_columns" not in st.session_state:
        start = [c for c in asked if c in choices] or codes[:2]
        st.session_state["playground_columns"] = start
    kept = [c for c in st.session_state["playground_columns"] if c in choices]
    st.session_state["playground_columns"] = kept
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    picked = left.multiselect(
        "Columns",
        list(choices),
        key="playground_columns",
        format_func=lambda code: choices[code].title,
        max_selections=playground_columns.MOST,
        help="Up to four: the dense model, the dense model without some blocks, or its variants.",
    )

    def add() -> None:
        blocks = st.session_state["playground_skip"].strip()
        with contextlib.suppress(DepthcutError):  # what is wrong, the column says
            blocks = toggle.removal_to_text(toggle.removal_from_text(blocks))
        if blocks and len(picked) < playground_columns.MOST:
            st.session_state["playground_columns"] = [*picked, f"skip:{blocks}"]
            st.query_params["columns"] = playground_columns.to_address([*picked, f"skip:{blocks}"])
            st.session_state["playground_skip"] = ""

    right.text_input(
        "Add one without blocks",
        key="playground_skip",
        on_change=add,
        placeholder="3,5; attention 7",
        help="Blocks to skip in the dense model, or parts of blocks: 3,5; attention 7; mlp 2,4. "
        "Nothing is written to disk.",
    )
    codes_now = playground_columns.to_address(picked)
    st.query_params["columns"] = st.session_state["playground_kept_columns"] = codes_now
    return [choices[code] for code in picked]


def _column(code: str, name: str, known: Sequence[Variant]) -> Column | None:
    try:
        return playground_columns.column(code, name, known)
    except DepthcutError as error:
        say.error(str(error))
        return None


def prompt_box(name: str) -> tuple[str, bool]:
    """Draw the prompt with examples; return it and whether it is a chat message."""
    examples = playground_columns.examples(name)
    if "playground_prompt" not in st.session_state:
        before = st.query_params.get("prompt", "") or st.session_state.get("playground_kept_prompt")
        st.session_state["playground_prompt"] = before or next(iter(examples.values()))

    def take() -> None:
        chosen = st.session_state.get("playground_example")
        if chosen:
            st.session_state["playground_prompt"] = examples[chosen]
            st.session_state["playground_example"] = None

    st.pills(
        "Examples", list(examples), key="playground_example", on_change=take, format_func=plain
    )
    prompt = st.text_area("Prompt", key="playground_prompt", height=100)
    st.query_params["prompt"] = prompt[:1500]
    st.session_state["playground_kept_prompt"] = prompt  # a widget's own value ends with its page
    if not playground_columns.has_chat_template(name):
        return prompt, False
    chat = st.toggle(
        "Send as a chat message",
        st.query_params.get("chat") != "off",
        help="Writes the prompt with the tokenizer's chat template, as a message of the user.",
    )
    st.query_params["chat"] = "on" if chat else "off"
    st.caption(
        "This tokenizer has a chat template: prompts are messages by default. Switch it off to let "
        "the model continue the text instead."
    )
    return prompt, chat


def settings(name: str) -> dict[str, Any]:
    """Draw the sampling controls, which are kept in the URL too."""
    start: dict[str, Any] = {}
    if "playground_read" not in st.session_state:
        st.session_state["playground_read"] = True
        for option in NAMES:
            given = st.query_params.get(option)
            if given:
                start[option] = _number(given)
        try:
            start = {n: getattr(build(Sampling, start), n) for n in start}
        except DepthcutError as error:
            say.error(str(error))
            start = {}
    if start:
        forms.put(name, "generate", start)
    values = forms.Form("generate", name, {}).fields(Sampling, NAMES)
    for option, value in values.items():
        st.query_params[option] = str(value)
    return values


def _number(text: str) -> Any:
    """Return a number from the URL; anything else stays text, which the spec then rejects."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def text_html(output: Output, reference: Output | None, row: int, prompt: str) -> str:
    """Return one row's text as HTML: prompt faded, differences from ``reference`` marked."""
    text = output.texts[row] if row < len(output.texts) else ""
    other = reference.texts[row] if reference and row < len(reference.texts) else None
    body = html.escape(text) if other is None else playground_columns.marked(text, other)
    caret = " ▌" if output.state == "writing" else ""
    return (
        f'<div class="pg-text"><span class="prompt">{html.escape(prompt)}</span>{body}{caret}</div>'
    )


def draw(session: Session, prompt: str, differences: bool) -> None:
    """Draw every column in its current state."""
    st.html(STYLE)
    first = session.outputs[0]
    for place, output in zip(st.columns(len(session.outputs)), session.outputs, strict=True):
        with place, st.container(border=True):
            say.bold(output.title)
            reference = None if output is first or not differences else first
            if output.state == "failed":
                say.error(output.note)
            elif output.state == "waiting":
                say.caption(output.note.capitalize() or "Waiting for the previous column.")
            for row in range(len(output.texts)):
                if row:
                    st.divider()
                st.html(text_html(output, reference, row, prompt))
            if output.state == "stopped":
                st.caption("Stopped.")
    table(session)


def table(session: Session) -> None:
    """Draw the measurements of all columns."""
    rows = {o.title: playground_columns.figures(o.begun, o.result) for o in session.outputs}
    if not any(rows.values()):
        return
    say.table(pd.DataFrame(rows).fillna("…"))
    about = next((o.begun for o in session.outputs if o.begun), Begun())
    say.caption(
        f"Measured on {about.device}, {about.dtype}, one column after another. "
        "Memory is for that column alone: its weights and the key/value cache at full length "
        "(on CUDA: the measured peak). Speed covers all rows, from the prompt to the last token."
    )


def results(prompt: str, differences: bool) -> None:
    """Draw the last run; redraw it continually while it is running."""
    session: Session | None = st.session_state.get(SESSION)
    if session is None:
        return
    running = session.running

    def view() -> None:
        session.look()
        if running and not session.running:
            st.rerun()
        if running and st.button("Stop", key="playground_stop", icon=":material/stop_circle:"):
            session.stop()
        draw(session, st.session_state.get("playground_shown", prompt), differences)

    st.fragment(view, run_every=REFRESH_S if running else None)()


def memory() -> None:
    """Draw what the live model holds in memory, and the button that unloads it."""
    record = client.running(state.workspace())
    now = client.status(record) if record else None
    if record is None or now is None:
        st.caption("The live model starts with the first generation and stays in memory.")
        return
    left, right = st.columns([4, 1], vertical_alignment="center")
    held = ", ".join(n if len(n) < 30 else "…" + n[-28:] for n in now.models) or "nothing"
    left.caption(
        f"In memory on {plain(now.device)}: {plain(held)}; {now.memory_mib:,.0f} of "
        f"{now.budget_mib:,.0f} MiB; least recently used models are evicted first."
    )
    if right.button("Unload", icon=":material/eject:", help="Stops the live model's process."):
        client.stop(record)
        st.rerun()


frame.start("Playground")
name = state.active_checkpoint()
info = state.inspect(name)
columns = chooser(name)
prompt, chat = prompt_box(name)
values = settings(name)
last: Session | None = st.session_state.get(SESSION)
busy = bool(last and last.running)
with st.container(horizontal=True, vertical_alignment="center"):
    pressed = st.button(
        "Generate",
        type="primary",
        icon=":material/play_arrow:",
        disabled=busy or not columns or not prompt.strip(),
    )
    differences = st.toggle("Mark differences from the first column", value=True)
if not columns:
    st.info("Choose at least one column.")
if pressed and not busy:
    asked = {**values, "prompt": prompt, "chat": chat}
    st.session_state["playground_shown"] = f"{prompt}\n\n" if chat else prompt
    st.session_state[SESSION] = Session(
        [(c.title, {**asked, **c.question}) for c in columns],
        state.workspace(),
        on=options_of(forms.kept(name).settings, "live"),
    ).start()
    st.rerun()
results(prompt, differences)
shown: Session | None = st.session_state.get(SESSION)
finished = shown.outputs[0].texts[:1] if shown and not shown.running and not chat else []
written = "".join([st.session_state.get("playground_shown", ""), *finished]) if finished else ""
token_pair.show(columns, prompt, written, options_of(forms.kept(name).settings, "live"))
memory()
