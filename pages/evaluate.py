"""Evaluate: what a checkpoint and its variants can still do, on standard benchmarks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from core import recipes, words
from core.charts import evaluate as charts
from core.checkpoint.vocabulary import default_text, text_of
from core.data.calibration import SOURCE_HELP
from core.errors import DepthcutError
from core.evaluate import by_content, command, generation
from core.evaluate import estimate as work
from core.evaluate import tables as view
from core.evaluate.by_content import Evaluated, Measure
from core.evaluate.compare import is_mean
from core.evaluate.spec import EvaluateSpec
from core.recipes.results import CalibrationRow, RecipeSummary
from core.recipes.spec import RecipeSpec
from core.runs import jobs
from core.runs.spec import build, parse_numbers
from core.study import Quality, Study, Task, Variant, study, tokenizer_conflict
from core.study import settings as study_settings
from core.study.missing import unevaluated
from core.ui import (
    chat_note,
    forms,
    frame,
    memory_note,
    paging,
    recipe_time,
    run_on,
    runs,
    say,
    state,
    widgets,
)
from core.ui.say import plain

ASKED: Any = "query-params"
"""Of each text, unless more is asked for: 256 windows of 128 tokens."""
BEGINNING = 90
"""Characters of a question that its closed card shows."""
SHOWN = 10
"""Questions on a page; each opens with a click."""
TOGETHER = 24
"""Checkpoints beside the dense one in a table and a chart; of more, one page at a time."""


def name_of(variant: Variant) -> str:
    """Return a variant as a run's options name it: its folder, or the dense checkpoint's name."""
    if variant.record is None:
        return variant.id
    return str(variant.folder or variant.record.path)


def options(form: forms.Form) -> dict[str, Any]:
    """Draw the choice of what to measure; return it as the command's options."""
    columns = st.columns([2, 1, 1])
    texts = form.text(
        "perplexity", "Perplexity of", at=columns[0],
        help=f"{SOURCE_HELP} Several are separated by commas. Empty: none.",
    )  # fmt: skip
    window = form.text(
        "window", "Window (tokens)", "128", at=columns[1],
        help="One or more, separated by commas. Published settings are 128 and 2048.",
    )  # fmt: skip
    bos = form.select(
        "bos", "BOS", ("once", "window", "extra"), "once", at=columns[2],
        help="Once before the text, as the first token of every window, or extra: in front of "
        "every window, which then has one token more.",
    )  # fmt: skip
    form.offer("perplexity", many=True)
    parts = [work.PART, 4 * work.PART, 0]
    asked = form.value("max_tokens", work.PART) or 0
    most = form.select(
        "max_tokens", "Part of each text", [*parts, *({asked} - {*parts})], work.PART,
        format_func=lambda tokens: f"the first {tokens:,} tokens" if tokens else "the whole text",
        help="Part of a text is faster, with a larger standard error, which the results show. Only "
        "results on the same part compare.",
    )  # fmt: skip
    columns = st.columns([2, 1, 1])
    tasks = form.several(
        "tasks", "Tasks", view.task_choices(form.value("task_dir", "")), at=columns[0], free=True,
        placeholder="none",
        help="Presets (paper, demo, reasoning, domains), or type any task that lm-eval knows.",
    )  # fmt: skip
    folder = form.text(
        "task_dir", "Folder of custom tasks", at=columns[1], placeholder="none",
        help="A folder with lm-eval YAML files.",
    )  # fmt: skip
    limit = form.number(
        "limit", "Questions per task", 1, at=columns[2], placeholder="all",
        help="Fewer is faster but less certain. Compare only results with the same number.",
    )  # fmt: skip
    code = bool(folder.strip()) and form.switch(
        "allow_task_code", "Allow these tasks to run Python code", box=True,
        help="A YAML file with !function runs the Python file beside it, with your rights. Read "
        "that file first; tasks without code need no permission.",
    )  # fmt: skip
    each = form.switch(
        "each_block", "Repeat with each block removed", disabled=not tasks,
        help="Measures what removing each block costs on every task; the model is loaded once.",
    )  # fmt: skip
    return {
        "perplexity": view.texts_of(texts),
        "window": parse_numbers(window, "--window"),
        "bos": bos,
        "max_tokens": most or None,
        "tasks": tuple(tasks),
        "task_dir": folder,
        "allow_task_code": code,
        "limit": limit if tasks else None,
        "each_block": bool(each and tasks),
    }


def prompting(known: Study, form: forms.Form) -> dict[str, Any]:
    """Draw how tasks are asked; return it as the command's options."""
    with st.expander("Few-shot examples and chat template"):
        values = form.fields(EvaluateSpec, ("fewshot", "chat_template", "fewshot_turns"))
        values |= form.fields(EvaluateSpec, ("system_instruction",))
    chat_note.draw(
        name_of(known.dense),
        "This tokenizer has a chat template: tasks are asked without it by default, as by lm-eval "
        "and in the paper. Results with and without it are separate measures.",
    )
    return values


def folder_of(known: Study) -> Path:
    """Return the folder of the dense checkpoint, or of its first variant that has one."""
    return next((v.folder for v in known.variants if v.folder), Path())


def launcher(known: Study) -> None:
    """Draw the choice of checkpoints and measures, the estimated cost and the button."""
    form = forms.Form("evaluate", name)
    present = {v.id: v for v in known.variants if v.folder}
    labels = {v.id: v.label for v in present.values()}
    chosen = form.several(
        "checkpoints", "Checkpoints", list(present), list(present)[:1],
        format_func=lambda one: plain(labels.get(one, one)),
        help="Each checkpoint is a separate run; the runs queue for the device.",
    )  # fmt: skip
    on = run_on.choose("evaluate", name, shared=True)
    problem, specs = "", {}
    try:
        values = options(form)
        with st.expander("Short rows, device and precision"):
            values |= form.fields(
                EvaluateSpec, ("join", "device", "dtype", "memory_limit", *run_on.several())
            )
        if values["tasks"]:
            values |= prompting(known, form)
        values["fresh"] = st.session_state.get("eval_fresh", False)
        for one in chosen:
            named = {"checkpoint": name_of(present[one]), "out": "DIR"}
            spec = build(EvaluateSpec, {**values, **named})
            folder = present[one].folder
            specs[one] = work.capped(spec, folder) if folder else spec
        estimates = [command.dry_run(spec) for spec in specs.values()]
        if not chosen:
            problem = "Choose at least one checkpoint."
        else:
            estimated(estimates)
            say_parts(known, next(iter(specs.values())))
            lines = [jobs.command_line("evaluate", spec, on) for spec in specs.values()]
            st.code("\n".join(lines), "bash", wrap_lines=True)
    except DepthcutError as error:
        problem = str(error)
    if problem:
        say.error(problem)
    for text in next(iter(specs.values())).perplexity if specs else ():
        if seen := study_settings.seen_before(text, form.kept.settings):
            say.warning(seen)
    form.origin()
    absent = [] if problem or not specs else unmeasured(known, next(iter(specs.values())))
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button(
            "Evaluate", type="primary", icon=":material/play_arrow:", disabled=bool(problem)
        )
        count = "1 checkpoint" if len(absent) == 1 else f"{len(absent)} checkpoints"
        rest = bool(absent) and st.button(
            f"Evaluate the {count} without these results",
            icon=":material/playlist_play:",
            key="eval_rest",
            help="Every checkpoint of this study that was not evaluated in this way yet, the dense "
            "one too, one after another: each is a run in the queue.",
        )
    if rest:
        base = next(iter(specs.values()))
        specs = {v.id: replace(base, checkpoint=name_of(v)) for v in absent}
        pressed = True
    with st.container(horizontal=True):
        st.checkbox(
            "Ignore cached results", key="eval_fresh",
            help="By default, results already measured for identical inputs are reused.",
        )  # fmt: skip
    if pressed:
        started = []
        for spec in specs.values():
            options_of = {k: getattr(spec, k) for k in spec.__dataclass_fields__ if k != "out"}
            record = runs.launch_once("evaluate", options_of, on)
            started += [record.id] if record else []
        st.session_state["eval_started"] = started
        st.rerun()


def unmeasured(known: Study, spec: EvaluateSpec) -> list[Variant]:
    """Return the checkpoints of the study that lack what a run would measure."""
    texts = [text_of(source, folder_of(known)) for source in spec.perplexity]
    found = unevaluated(
        known, texts=texts, windows=spec.window, bos=spec.bos, max_tokens=spec.max_tokens,
        tasks=spec.tasks, limit=spec.limit, prompting=spec.prompting.label,
    )  # fmt: skip
    return list(found)


def say_parts(known: Study, spec: EvaluateSpec) -> None:
    """Draw which part of the texts is measured, and how certain that will be."""
    if spec.max_tokens is None or not spec.perplexity:
        return
    windows = max(1, spec.max_tokens // spec.window[0])
    error = view.expected_error(known.runs, spec.perplexity, spec.window[0], windows)
    certain = (
        "its standard error is shown with it"
        if error is None
        else f"its standard error will be about {error:.1%}, by earlier runs on this text"
    )
    say.caption(
        f"Perplexity is measured on the first {spec.max_tokens:,} tokens of each text ({windows:,} "
        f"windows); {certain}. Differences from the dense model are more certain: they are paired "
        "by window."
    )


def estimated(found: list[dict[str, Any]]) -> None:
    """Draw the estimated cost of all runs together."""
    flops = [one["flops"] for one in found]
    seconds = [one["seconds"] for one in found]
    memory = max(one["memory_mib"] for one in found)
    time = f"about {words.duration(sum(seconds))}, " if all(seconds) else ""
    work = (
        f"{sum(flops) / 1e9:,.0f} GFLOP, "
        if all(f is not None for f in flops)
        else "operation count unknown until the data is loaded, "
    )
    origin = f" Time at {found[0]['seconds_from']}." if time else ""
    say.caption(f"Estimated: {time}{work}up to {memory:,.0f} MiB of memory.{origin}")
    for one in found:
        if problem := memory_note.draw(one):
            say.error(problem)


def downloaded(name: str, rows: list[dict[str, Any]]) -> None:
    """Draw a table's download button."""
    widgets.csv_download(
        name, lambda: view.csv_of(rows), key=f"get_{name}", type="tertiary",
        icon=":material/download:",
    )  # fmt: skip


def overview(evaluated: list[Evaluated[Variant]], chosen: list[Measure]) -> None:
    """Draw the table of checkpoints and the dot chart by task."""
    st.subheader("Results")
    rows = view.wide(evaluated, chosen)
    st.dataframe(pd.DataFrame(rows), hide_index=True, height=min(640, 38 + 35 * len(rows)))
    note = view.protocol_note(evaluated, chosen)
    dense = evaluated[0].variant.label
    say.caption(
        f"{note} In brackets: the difference from {dense} with its standard error, paired by "
        "window or question; * = more than two standard errors."
    )
    downloaded("evaluation.csv", by_content.table(evaluated, chosen))
    conflict = tokenizer_conflict(one.variant for one in evaluated)
    if conflict:
        say.warning(conflict)
    tasks = [m for m in chosen if m.kind == "task" and is_mean(m.how)]
    if tasks:
        st.subheader("By task")
        figure = charts.task_dots(evaluated, tasks, view.chances())
        widgets.chart(figure, key="task_dots", alt="Score of every checkpoint on every task.")
        say.caption(f"{note} Bars: one standard error. Dotted: chance level, if known.")


def skills(known: Study) -> None:
    """Draw blocks against skills, for the runs that repeated tasks with each block removed."""
    found = by_content.block_rows(state.workspace(), known.dense)
    st.subheader("What each block is for")
    if not found:
        st.info(
            "Not measured yet. Choose tasks above and switch on 'Repeat with each block removed': "
            "it shows which tasks suffer without which block."
        )
        return
    by_id = {record.id: (record, summary, rows) for record, summary, rows in found}
    picked = st.selectbox("Run", list(by_id), key="skill_run", bind=ASKED)
    record, summary, rows = by_id[picked]
    figure = charts.skill_heatmap(rows)
    widgets.chart(figure, key="skills", alt="Change of every task without each block.")
    limit = summary.limit
    asked = f"the first {limit} questions of each task" if limit else "all questions"
    how = next((skill.prompting.label for skill in summary.skills), "")
    asked += f", {how}" if how else ""
    say.caption(
        f"Measured: {known.dense.label}, {asked}, {summary.device}, {summary.dtype}. A dot "
        "marks a change within two paired standard errors of zero. "
        "Few questions give a quick look; many give certainty."
    )
    downloaded("skills.csv", [asdict(row) for row in rows])


def flipped(evaluated: list[Evaluated[Variant]], chosen: list[Measure]) -> None:
    """Draw the questions that two checkpoints answer differently."""
    tasks = {m.label: m for m in chosen if m.kind == "task"}
    both = {label: [one for one in evaluated if m in one.cells] for label, m in tasks.items()}
    labels = [label for label, found in both.items() if len(found) > 1]
    if not labels:
        return
    st.subheader("Which questions flipped")
    columns = st.columns(3)
    label = columns[0].selectbox("Task", labels, key="flip_task", bind=ASKED)
    names = {one.variant.label: one for one in both[label]}
    first = columns[1].selectbox("From", list(names), key="flip_from")
    others = [name for name in names if name != first]
    second = columns[2].selectbox("To", others, key="flip_to")
    found = view.flips_between(names[first], names[second], tasks[label])
    say.paragraph(view.flip_sentence(found, first, second))
    rows = view.flip_rows(found)
    for row in paging.page_of(rows, "flips", "questions", SHOWN):
        icon = ":material/trending_down:" if row["flip"] == "lost" else ":material/trending_up:"
        about = f"{row['flip']}, question {row['question']}: {beginning(row['text'])}"
        with st.expander(plain(about), icon=icon):
            st.text(row["text"] if len(row["text"]) < 700 else "…" + row["text"][-700:])
            st.text(
                f"correct: {row['right']}   {first}: {row['first']}   {second}: {row['second']}"
                + (f"   (choices: {row['choices']})" if row["choices"] else "")
            )
    if rows:
        downloaded("flips.csv", rows)


def beginning(question: str) -> str:
    """Return the first words of a question, without what tasks write before it."""
    words = " ".join(question.removeprefix("Question:").split())
    return words if len(words) <= BEGINNING else words[:BEGINNING].rsplit(" ", 1)[0] + " …"


def written(evaluated: list[Evaluated[Variant]], chosen: list[Measure]) -> None:
    """Draw what checkpoints wrote in tasks: how varied it is, and every question's raw text."""
    names = generation.tasks_of(evaluated, chosen)
    if not names:
        return
    st.subheader("Text that they wrote")
    rows = generation.table(evaluated, chosen)
    shares = ("repeated 4-grams", "more than dense")
    st.dataframe(
        pd.DataFrame(rows), hide_index=True,
        column_config={name: st.column_config.NumberColumn(format="percent") for name in shares}
        | {"words": st.column_config.NumberColumn("words per text", format="%.1f")}
        | {f"distinct-{n}": st.column_config.NumberColumn(format="%.3f") for n in (1, 2, 3)},
    )  # fmt: skip
    say.caption(
        f"Measured on the generated text before the task's filters. {evaluated[0].variant.label} "
        "is the yardstick: text that repeats more, or varies less, than its text for the same "
        "questions has lost something that right answers do not count."
    )
    downloaded("written.csv", rows)
    columns = st.columns(3)
    task = columns[0].selectbox("Task", names, key="written_task", bind=ASKED)
    folders = {
        one.variant.label: folder
        for one in evaluated
        if (folder := generation.folder_of(one, chosen, task))
    }
    first = columns[1].selectbox("Left", list(folders), key="written_left")
    others = [name for name in folders if name != first] or [first]
    second = columns[2].selectbox("Right", others, key="written_right")
    left, right = (
        {text.index: text for text in generation.texts(folders[name], task)}
        for name in (first, second)
    )
    for index in paging.page_of([*left], "written", "questions", SHOWN):
        one, other = left[index], right.get(index)
        marks = [generation.mark(text) for text in (one, other) if text]
        with st.expander(plain(f"Question {index}: {' / '.join(marks)}")):
            st.text(one.question if len(one.question) < 700 else "…" + one.question[-700:])
            st.text(f"correct: {one.target.strip()}")
            for column, name, text in zip(
                st.columns(2), (first, second), (one, other), strict=True
            ):
                with column:
                    say.caption(f"{name}: {generation.mark(text) if text else 'not asked'}")
                    st.code(text.generated if text else "", language=None, wrap_lines=True)


def default_pair(known: Study) -> str:
    """Return the two texts that are compared if none are named."""
    if default_text(folder_of(known)) == "demo":
        return "demo: stories and instructions"
    return "english,wikitext2"


def calibration(known: Study) -> None:
    """Draw whether a ranking computed on one text transfers to another; offer that recipe."""
    st.subheader("Does the block ranking transfer to another dataset?")
    name = name_of(known.dense)
    found = view.calibration_runs(state.workspace(), name)
    if found:
        record = found[0]
        summary = RecipeSummary.read(record.path) or RecipeSummary()
        rows = [asdict(row) for row in CalibrationRow.read(record.path)]
        figure = charts.calibration_grid(rows)
        widgets.chart(figure, key="grid", alt="Calibration text against evaluation text.")
        say.paragraph(summary.verdict)
        say.caption(" ".join(summary.findings))
        downloaded("calibration.csv", rows)
    form = forms.of_recipe("calibration", name)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        texts = form.text(
            "data", "Two datasets", placeholder=default_pair(known),
            help="A,B: each is used for calibration and for evaluation.",
        )  # fmt: skip
        pressed = st.button("Compare datasets", icon=":material/grid_on:", key="grid_start")
    try:
        values = {
            "name": "calibration",
            "checkpoint": name,
            "data": texts,
            **form.unseen(RecipeSpec),
        }
        spec = build(RecipeSpec, {**values, "out": "DIR"})
        recipes.get("calibration").steps(spec)
    except DepthcutError as error:
        say.error(str(error))
        return
    on = run_on.choose("recipe calibration", name)
    if not on:  # times are those of this machine
        recipe_time.draw(spec)
    st.code(jobs.command_line("recipe", spec, on), "bash", wrap_lines=True)
    if pressed:
        started = runs.launch_once("recipe", values, on)
        st.session_state["grid_started"] = started.id if started else ""
        st.rerun()
    runs.show_all(
        "recipe",
        started=[st.session_state.get("grid_started", "")],
        only=lambda record: record.spec.get("name") == "calibration",
    )


def side_by_side(known: Study) -> list[Variant]:
    """Return the dense checkpoint and those to show results of: of many, one page.

    The pages start with what was evaluated last. Of many, those count that a run names: whether
    another checkpoint has the same content is only known once all its bytes are read.
    """
    present = [v for v in known.variants if v.folder]
    runs_of = {r.id for r in known.runs if r.command == "evaluate"}
    last: dict[str, float] = {}
    rows: tuple[Quality | Task, ...] = (*known.quality, *known.tasks)
    for row in rows:
        if row.run in runs_of:
            last[row.variant] = max(last.get(row.variant, 0.0), row.started)
    found = present[1:]
    named = [v for v in found if v.id in last]
    if len(found) > TOGETHER >= len(named):
        found = by_content.perhaps_measured(state.workspace(), found)
    if len(found) > TOGETHER:
        found = sorted(named or found, key=lambda v: last.get(v.id, 0.0), reverse=True)
    ids = {v.id for v in paging.page_of(found, "page", "checkpoints", TOGETHER)}
    return [v for place, v in enumerate(present) if place == 0 or v.id in ids]


frame.start("Evaluate")
name = state.active_checkpoint()
state.inspect(name)
known = study(state.workspace(), name)
form = st.container()
gathered = by_content.gather(state.workspace(), side_by_side(known))
measured = [one for place, one in enumerate(gathered) if one.cells or place == 0]
empty = not any(one.cells for one in measured)
opened = state.form_is_open("evaluate", empty)
with form:
    with st.expander("New run", expanded=opened, icon=":material/tune:"):
        launcher(known)
    runs.show_all("evaluate", started=st.session_state.get("eval_started", []))
if not empty:
    asked = by_content.limits(measured)
    limit = asked[0] if asked else None
    if len(asked) > 1:
        limit = st.selectbox(
            "Question limit", asked, key="shown_limit",
            format_func=lambda n: f"the first {n} questions" if n else "all questions",
        )  # fmt: skip
    chosen = by_content.measures(measured, limit)
    overview(measured, chosen)
    flipped(measured, chosen)
    written(measured, chosen)
else:
    st.info("Nothing has been measured for this checkpoint yet. Start a run above.")
skills(known)
calibration(known)
frame.step("compare", "Next: compare quality with cost")
