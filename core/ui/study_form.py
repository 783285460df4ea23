"""The settings of the study, asked once: one short form on the Home and Checkpoint pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import streamlit as st

from core.errors import DepthcutError
from core.evaluate import tables
from core.runs.dtypes import COMPUTED
from core.study import settings as study_settings
from core.study import sharing
from core.study.settings import Settings
from core.study.store import Kept
from core.ui import forms, say
from core.ui.say import plain

PAGE = "study"
"""Name of the form whose values are the settings themselves."""
HELP = {f.name: f.metadata["help"] for f in dataclasses.fields(Settings)}


def panel(checkpoint: str) -> None:
    """Draw the study's settings in one line; the form below it is open until it was confirmed."""
    kept = forms.kept(checkpoint)
    if kept.problem:
        say.warning(kept.problem)
    key = f"study_open_{kept.key}"
    opened = st.session_state.setdefault(key, not kept.asked)
    label = f"Study: {in_words(kept.settings)}"
    with st.expander(plain(label), expanded=opened, icon=":material/tune:"):
        st.caption(
            "Every page and recipe starts from these settings, for this checkpoint and everything "
            "made from it. Change them here at any time, or for one run on its page."
        )
        _form(checkpoint, kept.settings)
        with st.container(horizontal=True, vertical_alignment="center"):
            if not kept.asked or opened:
                st.button(
                    "Use these settings",
                    icon=":material/check:",
                    key="study_confirm",
                    on_click=_confirm,
                    args=(checkpoint, key),
                )
            _share(kept)
    for problem in study_settings.problems(kept.settings):
        say.warning(problem)


def _confirm(checkpoint: str, key: str) -> None:
    """Close the form and store its settings."""
    st.session_state[key] = False
    forms.change(checkpoint, lambda now: dataclasses.replace(now, asked=True))


def _share(kept: Kept) -> None:
    """Draw the buttons that save the settings as a file and load them from one."""
    st.download_button(
        "Save as YAML",
        lambda: sharing.to_yaml(kept.settings, kept.checkpoint),
        f"{kept.key}.yaml",
        "application/yaml",
        key="study_save",
        type="tertiary",
        icon=":material/download:",
        on_click="ignore",
    )
    with st.popover("Load a file", type="tertiary", icon=":material/upload:"):
        turn = st.session_state.setdefault("study_loads", 0)
        key = f"study_load_{turn}"

        def load() -> None:
            given = st.session_state.get(key)
            if given is None:
                return
            st.session_state["study_loads"] += 1
            try:
                found, saved_for = sharing.from_yaml(given.getvalue(), kept.folder)
            except DepthcutError as error:
                st.session_state["study_loaded"] = str(error)
                return
            forms.set_settings(kept.checkpoint, found)
            other = f", saved for {saved_for}" if saved_for != kept.checkpoint else ""
            st.session_state["study_loaded"] = ""
            st.toast(plain(f"Settings taken from {given.name}{other}."))

        st.file_uploader(
            "Settings of a study (YAML)", type=("yaml", "yml"), key=key, on_change=load
        )
        if problem := st.session_state.get("study_loaded"):
            say.error(problem)


def in_words(settings: Settings) -> str:
    """Return settings in one line."""
    texts = {name: study_settings.short(getattr(settings, name)) for name in study_settings.TEXTS}
    if len(set(texts.values())) == 1:
        parts = [f"text {texts['calibration']}"]
    else:
        parts = [f"{name} {text}" for name, text in texts.items()]
    if settings.tasks:
        count = f", {settings.limit} questions each" if settings.limit else ""
        parts.append(f"tasks {', '.join(settings.tasks)}{count}")
    else:
        parts.append("no tasks")
    targets = [
        f"{settings.ratio:.0%} smaller" if settings.ratio else "",
        f"{settings.ms_per_token:g} ms per token" if settings.ms_per_token else "",
        f"{settings.memory_gib:g} GiB" if settings.memory_gib else "",
    ]
    parts.append(" and ".join(filter(None, targets)) or "no target")
    parts.append(f"device {settings.device}")
    if settings.dtype != "auto":
        parts.append(settings.dtype)
    return " · ".join(parts)


class _Form(forms.Form):
    """The form of the settings themselves: a change is stored as the study's."""

    def __init__(self, checkpoint: str, settings: Settings) -> None:
        self.settings = settings
        values: dict[str, Any] = dataclasses.asdict(settings)
        values["percent"] = None if settings.ratio is None else round(100 * settings.ratio, 4)
        super().__init__(PAGE, checkpoint, values)

    def keep(self, field: str, value: Any, default: Any = None) -> None:
        """Store a setting."""
        if field == "percent":
            field, value = "ratio", None if value is None else value / 100
        value = tuple(value) if isinstance(value, list) else value

        def how(now: forms.Kept) -> forms.Kept:
            changed = dataclasses.replace(now.settings, **{field: value})
            changed = study_settings.resolved(changed, now.folder)
            return dataclasses.replace(now, settings=changed, asked=True)

        forms.change(self.checkpoint, how)
        forms.turn(but=PAGE)
        if field in study_settings.TEXTS:  # an empty field, or auto, is now what it means
            st.session_state[self.key(field)] = getattr(forms.kept(self.checkpoint).settings, field)


def _form(checkpoint: str, settings: Settings) -> None:
    form = _Form(checkpoint, settings)
    columns = st.columns(3)
    for name, label, column in zip(
        study_settings.TEXTS,
        ("Calibration text", "Evaluation text", "Training data"),
        columns,
        strict=True,
    ):
        form.source(name, label, column, help=HELP[name])
    columns = st.columns([1, 2, 1])
    folder = form.text(
        "task_dir", "Folder of custom tasks", at=columns[0], placeholder="none",
        help=HELP["task_dir"],
    )  # fmt: skip
    form.several(
        "tasks", "Tasks", tables.task_choices(folder), at=columns[1], free=True, placeholder="none",
        help=HELP["tasks"],
    )  # fmt: skip
    form.number(
        "limit", "Questions per task", 1, at=columns[2], placeholder="all", help=HELP["limit"]
    )
    if folder.strip():
        form.switch(
            "allow_task_code", "Allow these tasks to run Python code", box=True,
            help=HELP["allow_task_code"],
        )  # fmt: skip
    columns = st.columns([2, 2, 2, 1.5, 1.5])
    more: dict[str, Any] = {"whole": False, "placeholder": "no target", "format": "%g"}
    form.number(
        "percent", "Smaller by (%)", 0.1, 95, at=columns[0], step=5.0,
        help=HELP["ratio"], **more,
    )  # fmt: skip
    form.number(
        "ms_per_token", "Max ms per token", 0.001, 1e6, at=columns[1], step=1.0,
        help=HELP["ms_per_token"], **more,
    )  # fmt: skip
    form.number(
        "memory_gib", "Max memory (GiB)", 0.001, 1e6, at=columns[2], step=0.5,
        help=HELP["memory_gib"], **more,
    )  # fmt: skip
    form.text("device", "Device", "auto", at=columns[3], help=HELP["device"])
    form.select(
        "dtype", "Precision", ("auto", *COMPUTED), "auto", at=columns[4], help=HELP["dtype"]
    )
