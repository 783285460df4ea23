"""The one way in which pages keep what is typed into their forms.

A `Form` draws widgets for the options of one command. Each starts from what was changed here
before, else from the study's settings, else from the command's default, and every change is stored
in the study's file (`core.study.store`): so values survive a page change, a refresh and a restart.
Only what differs from the study and from the defaults is stored. `Form.origin` says in one quiet
line which values are the study's and which were changed, and offers the way back.

A widget's key has a turn in it, which `put` and `reset` raise: a new widget starts with the new
value, and what the browser still sends for the old one is not taken for a choice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import streamlit as st

from core.errors import OutputError
from core.runs import flags
from core.runs.spec import hints_of, kind_of, show
from core.study import settings as study_settings
from core.study import store
from core.study.settings import Settings
from core.study.store import Kept
from core.ui import state, text_choice
from core.ui.say import plain

_UNSAVED, _TURNS, _STUDY = "study_unsaved", "form_turns", "form_study"
_ABSENT: Any = object()
WRITTEN_FOR = ("retrain", "data")
"""The form and field for which texts that a model wrote are offered."""
SHOWN = 60
"""Characters of a value in the line on its origin."""


def kept(checkpoint: str) -> Kept:
    """Return the study of a checkpoint: its settings and what was changed on pages."""
    found = store.of(checkpoint, state.workspace())
    unsaved: dict[str, Kept] = st.session_state.get(_UNSAVED, {})
    found = unsaved.get(found.key, found)
    if st.session_state.get(_STUDY) != found.key:
        if _STUDY in st.session_state:
            turn()
        st.session_state[_STUDY] = found.key
    return found


def change(checkpoint: str, how: Callable[[Kept], Kept]) -> None:
    """Change a study and store it; in a read-only workspace, for this session only."""
    with store.TURN:
        found = how(kept(checkpoint))
        unsaved: dict[str, Kept] = st.session_state.setdefault(_UNSAVED, {})
        try:
            store.save(found)
            unsaved.pop(found.key, None)
        except OutputError:
            unsaved[found.key] = found


def put(checkpoint: str, command: str, values: Mapping[str, Any]) -> None:
    """Change values of a form from outside it, e.g. to those of an earlier run."""

    def how(now: Kept) -> Kept:
        return now.with_change(command, {**now.changed(command), **_plain(values)})

    change(checkpoint, how)
    turn(command)


def reset(checkpoint: str, command: str, fields: Iterable[str] = ()) -> None:
    """Return a form, or only these fields of it, to the study's settings and the defaults."""
    names = tuple(fields)

    def how(now: Kept) -> Kept:
        left = {k: v for k, v in now.changed(command).items() if names and k not in names}
        return now.with_change(command, left)

    change(checkpoint, how)
    turn(command)


def set_settings(checkpoint: str, settings: Settings) -> None:
    """Store a study's settings; all forms start from them at their next drawing."""
    change(checkpoint, lambda now: dataclasses.replace(now, settings=settings, asked=True))
    turn()


def turn(command: str = "", but: str = "") -> None:
    """Let the widgets of a form, or of all forms ``but`` one, start with the stored values."""
    turns: dict[str, int] = st.session_state.setdefault(_TURNS, {})
    turns[command] = turns.get(command, 0) + 1
    if but:
        turns[but] = turns.get(but, 0) - 1  # the sum, which is in its keys, stays


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _as_text(value: Any) -> str:
    """Return a value as a text field shows it: a list with commas."""
    if isinstance(value, list | tuple):
        numbers = all(isinstance(v, int) for v in value)
        return ("," if numbers else ", ").join(map(str, value))
    return "" if value is None else str(value)


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same option; a list and its text do."""
    if isinstance(one, str) or isinstance(other, str):
        return _as_text(one) == _as_text(other)
    one, other = (list(v) if isinstance(v, tuple) else v for v in (one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


class Form:
    """The widgets of one command's options, which keep their values."""

    def __init__(
        self, command: str, checkpoint: str, base: Mapping[str, Any] | None = None
    ) -> None:
        """Start from the study of ``checkpoint``; ``base`` replaces what it means here."""
        self.command, self.checkpoint = command, checkpoint
        self.kept = kept(checkpoint)
        study = study_settings.options_of(self.kept.settings, command)
        self.base: Mapping[str, Any] = study if base is None else base
        self.drawn: dict[str, tuple[str, Any, bool]] = {}
        """Field -> label, current value, and whether it was changed here."""

    def key(self, field: str) -> str:
        """Return the key of a field's widget."""
        turns = st.session_state.get(_TURNS, {})
        turn = turns.get("", 0) + turns.get(self.command, 0)
        return f"in_{self.command}_{field}" + (f"_{turn}" if turn else "")

    def value(self, field: str, default: Any = None) -> Any:
        """Return a field's value: as changed here, else the study's, else ``default``."""
        return self.kept.changed(self.command).get(field, self.base.get(field, default))

    def keep(self, field: str, value: Any, default: Any = None) -> None:
        """Store a field's value; one equal to the study's, or the default, is not stored."""
        usual = self.base.get(field, default)

        def how(now: Kept) -> Kept:
            values = {k: v for k, v in now.changed(self.command).items() if k != field}
            if not _same(value, usual):
                values |= _plain({field: value})
            return now.with_change(self.command, values)

        change(self.checkpoint, how)

    def _bind(
        self, field: str, default: Any, usable: Callable[[Any], Any]
    ) -> tuple[dict[str, Any], Any]:
        """Return ``key`` and ``on_change`` of a widget, and the value a new one starts with.

        ``usable`` returns a stored value as the widget takes it, or `_ABSENT`.
        """
        key = self.key(field)
        start = _ABSENT
        for value in (self.value(field, default), self.base.get(field, default), default):
            if start is _ABSENT:
                start = usable(value)

        def keep() -> None:
            self.keep(field, st.session_state[key], default)

        return {"key": key, "on_change": keep}, start

    def _note(self, field: str, label: str, value: Any, default: Any) -> Any:
        changed = not _same(value, self.base.get(field, default))
        self.drawn[field] = (label, value, changed)
        return value

    def text(self, field: str, label: str, default: str = "", at: Any = st, **more: Any) -> str:
        """Draw a text field."""

        def usable(value: Any) -> Any:
            return _as_text(value) if isinstance(value, str | list | tuple | None) else _ABSENT

        bound, start = self._bind(field, default, usable)
        if bound["key"] not in st.session_state:
            more["value"] = start
        given = at.text_input(plain(label), **bound, **_escaped(more))
        return str(self._note(field, label, given, default))

    def number(
        self,
        field: str,
        label: str,
        low: float | None = None,
        high: float | None = None,
        default: float | None = None,
        at: Any = st,
        whole: bool = True,
        **more: Any,
    ) -> Any:
        """Draw a number field; without a default it may be empty."""
        kind: type = int if whole else float
        low, high = (None if end is None else kind(end) for end in (low, high))

        def usable(value: Any) -> Any:
            if value is None:
                return None if default is None else _ABSENT
            if type(value) not in (int, float) or not math.isfinite(value):
                return _ABSENT
            inside = (low is None or value >= low) and (high is None or value <= high)
            return kind(value) if inside else _ABSENT

        bound, start = self._bind(field, default, usable)
        more["value"] = None if start is _ABSENT else start
        given = at.number_input(plain(label), low, high, **bound, **_escaped(more))
        given = None if given is None else kind(given)
        self._note(field, label, given, default)
        if given is None and "placeholder" in more:
            self.drawn[field] = (label, more["placeholder"], self.drawn[field][2])
        return given

    def select(
        self, field: str, label: str, options: Sequence[Any], default: Any = None, at: Any = st,
        **more: Any,
    ) -> Any:  # fmt: skip
        """Draw a choice of one of ``options``."""
        names = list(options)
        bound, start = self._bind(field, default, lambda v: v if v in names else _ABSENT)
        if bound["key"] not in st.session_state:
            more["index"] = names.index(start) if start in names else 0
        elif st.session_state[bound["key"]] not in names and names:
            st.session_state[bound["key"]] = names[0]
        given = at.selectbox(plain(label), names, **bound, **_escaped(more))
        return self._note(field, label, given, default)

    def radio(
        self, field: str, label: str, options: Sequence[str], default: str, **more: Any
    ) -> str:
        """Draw a choice of one of ``options``, all in view."""
        names = list(options)
        bound, start = self._bind(field, default, lambda v: v if v in names else _ABSENT)
        if bound["key"] not in st.session_state:
            more["index"] = names.index(start)
        given = st.radio(plain(label), names, format_func=plain, **bound, **_escaped(more))
        return str(self._note(field, label, given, default))

    def several(
        self, field: str, label: str, options: Sequence[str], default: Sequence[str] = (),
        at: Any = st, free: bool = False, **more: Any,
    ) -> list[str]:  # fmt: skip
        """Draw a choice of any of ``options``; with ``free``, others can be typed."""
        names = list(options)

        def usable(value: Any) -> Any:
            if not isinstance(value, list | tuple):
                return _ABSENT
            return [v for v in value if v in names or (free and isinstance(v, str))]

        bound, start = self._bind(field, list(default), usable)
        start = [] if start is _ABSENT else start
        now = st.session_state.get(bound["key"], start)
        names += [v for v in now if free and v not in names]
        if bound["key"] not in st.session_state:
            more["default"] = start
        elif any(v not in names for v in now):
            st.session_state[bound["key"]] = [v for v in now if v in names]
        given = at.multiselect(
            plain(label), names, accept_new_options=free, **bound, **_escaped(more)
        )
        self._note(field, label, list(given), list(default))
        return list(given)

    def choices(
        self, field: str, label: str, options: Sequence[str], default: Sequence[str], **more: Any
    ) -> tuple[str, ...]:
        """Draw a choice of any of ``options``, all in view; returned in their order."""
        names = list(options)

        def usable(value: Any) -> Any:
            return [v for v in names if v in value] if isinstance(value, list | tuple) else _ABSENT

        bound, start = self._bind(field, list(default), usable)
        if bound["key"] not in st.session_state:
            more["default"] = start
        given = st.pills(
            plain(label),
            names,
            selection_mode="multi",
            format_func=plain,
            wrap=True,
            **bound,
            **_escaped(more),
        )
        chosen = tuple(v for v in names if v in given)
        self._note(field, label, chosen, tuple(default))
        return chosen

    def switch(
        self, field: str, label: str, default: bool = False, at: Any = st, box: bool = False,
        **more: Any,
    ) -> bool:  # fmt: skip
        """Draw a switch, or with ``box`` a checkbox."""
        bound, start = self._bind(field, default, lambda v: v if isinstance(v, bool) else _ABSENT)
        draw = at.checkbox if box else at.toggle
        given = draw(plain(label), start, **bound, **_escaped(more))
        return bool(self._note(field, label, given, default))

    def slider(
        self, field: str, label: str, low: float, high: float, default: float, step: float,
        at: Any = st, **more: Any,
    ) -> float:  # fmt: skip
        """Draw a slider for a number."""

        def usable(value: Any) -> Any:
            number = type(value) in (int, float) and low <= value <= high
            return float(value) if number else _ABSENT

        bound, start = self._bind(field, default, usable)
        given = at.slider(plain(label), low, high, start, step=step, **bound, **_escaped(more))
        return float(self._note(field, label, given, default))

    def source(
        self, field: str, label: str, at: Any = st, *, many: bool = False, **more: Any
    ) -> str:
        """Draw a field for a SOURCE, with texts and files to choose below it.

        An empty field, or ``auto``, means the study's text.
        """
        with at.container(horizontal=True, vertical_alignment="bottom", gap="small"):
            given = self.text(field, label, self.base.get(field, ""), **more)
            self.offer(field, many=many, brief=True)
        return given

    def offer(self, field: str, *, many: bool = False, brief: bool = False) -> None:
        """Draw the texts that a click writes into the text field of ``field``."""
        key, folder = self.key(field), self.kept.folder

        def take(picked: str) -> None:
            given = str(st.session_state.get(key) or "")
            names = [name.strip() for name in given.split(",") if name.strip()] if many else []
            written = ", ".join(dict.fromkeys([*names, picked]))
            st.session_state[key] = written
            self.keep(field, written, self.base.get(field))

        more = text_choice.written() if (self.command, field) == WRITTEN_FOR else None
        text_choice.offer(key, folder, take, brief=brief, more=more)

    def fields(
        self, spec_class: type, names: tuple[str, ...], defaults: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Draw one widget per field of a spec, side by side, and return their values.

        ``defaults`` replaces those of the spec.
        """
        by_name = {f.name: f for f in dataclasses.fields(spec_class)}
        found = {}
        for name, column in zip(names, st.columns(len(names)), strict=True):
            with column:
                found[name] = self._widget(spec_class, by_name[name], defaults or {})
        return found

    def _widget(
        self, spec_class: type, field: dataclasses.Field[Any], defaults: Mapping[str, Any]
    ) -> Any:
        meta, name = field.metadata, field.name
        label = flags.called(name)
        label += f" ({meta['unit']})" if meta["unit"] and meta["unit"] not in label else ""
        about: dict[str, Any] = {"help": flags.about(field)}
        default = defaults.get(name, field.default)
        default = None if default is dataclasses.MISSING else default
        if meta["choices"] and isinstance(default, tuple):
            return self.choices(name, label, meta["choices"], default, **about)
        if meta["choices"]:
            return self.select(name, label, meta["choices"], default, **about)
        kind, many, optional = kind_of(hints_of(spec_class)[name])
        if kind is bool:
            return self.switch(name, label, bool(default), box=True, **about)
        if kind in (int, float) and not many:
            if default is None:
                about["placeholder"] = "default"
            if kind is float:
                size = math.log10(default) if isinstance(default, float) and default > 0 else 0
                about |= {"format": "%g", "step": 10.0 ** (math.floor(size) - 1)}
            low, high, whole = meta["low"], meta["high"], kind is int
            return self.number(name, label, low, high, default, whole=whole, **about)
        if many:
            given = self.text(name, label, show(default or ()), **about)
            return tuple(part.strip() for part in given.split(",") if part.strip())
        given = self.text(name, label, default or "", **about)
        return None if optional and not given.strip() else given

    def unseen(self, spec_class: type) -> dict[str, Any]:
        """Return the options without a widget here, if they are not the command's defaults.

        Those that the study decides, and those taken from an earlier run.
        """
        found = {}
        for field in dataclasses.fields(spec_class):
            name, default = field.name, field.default
            if name in self.drawn or name == "out" or field.metadata["positional"]:
                continue
            value = self.value(name, default)
            value = tuple(value) if isinstance(value, list) else value
            if name in self.base or not _same(value, default):
                self._note(name, flags.called(name), value, default)
                found[name] = value
        return found

    def origin(self) -> None:
        """Draw one quiet line: which values are the study's, which were changed, and a way back."""
        same = [f for f in self.drawn if f in self.base and not self.drawn[f][2]]
        changed = [f for f in self.drawn if self.drawn[f][2]]
        parts = []
        if same:
            parts.append("From the study: " + self._named(same) + ".")
        if changed:
            parts.append("Changed here: " + self._named(changed) + ".")
        if not parts:
            return
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(plain(" ".join(parts)))
            if changed:
                st.button(
                    "Undo the changes",
                    key=f"undo_{self.command}",
                    type="tertiary",
                    icon=":material/undo:",
                    help="Back to the study's settings and the defaults.",
                    on_click=reset,
                    args=(self.checkpoint, self.command),
                )

    def _named(self, fields: Sequence[str]) -> str:
        return ", ".join(_named(*self.drawn[field][:2]) for field in fields)


def of_recipe(name: str, checkpoint: str) -> Form:
    """Return the form of a recipe on ``checkpoint``."""
    settings = kept(checkpoint).settings
    return Form(f"recipe {name}", checkpoint, study_settings.recipe_options(settings, name))


def _lower(label: str) -> str:
    return label[:1].lower() + label[1:] if label[1:2].islower() else label


def _named(label: str, value: Any) -> str:
    """Return a value after its label; a colon parts it from one of several words."""
    mark = ":" if label.count(" ") > 1 else ""
    return f"{_lower(label)}{mark} {_brief(value)}"


def _brief(value: Any) -> str:
    if value is None or value == "" or value == [] or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return _brief(", ".join(study_settings.short(str(v)) for v in value))
    found = study_settings.short(str(value))
    return found if len(found) <= SHOWN else found[: SHOWN - 1] + "…"


def _escaped(more: dict[str, Any]) -> dict[str, Any]:
    """Return a widget's arguments with its help text shown letter for letter."""
    return more | ({"help": plain(flags.in_words(more["help"]))} if more.get("help") else {})
