"""Jobs: all runs with their states, and the variants they created."""

from __future__ import annotations

import itertools

import streamlit as st

from core import words
from core.places.place import HERE
from core.retrain import caches
from core.runs.workspace import RunRecord
from core.study import Variant
from core.study.kinds import Cut
from core.study.lineage import lineages
from core.ui import frame, job_cards, merging, paging, say, state, widgets
from core.ui.say import plain
from core.words import size

LEADS = ("", *("&emsp;" * (2 * depth) + "└─ " for depth in range(12)))
"""What stands before a checkpoint of the tree, by its depth; deeper ones are not indented more."""

frame.start("Jobs")
where = state.workspace()
asked = st.query_params.get("run", "")
live = any(r.is_live for r in where.runs())


@st.fragment(run_every=2 if live else 10)
def run_list() -> None:
    """Draw the runs, live ones first, then by age; polled, since runs also start elsewhere."""
    records = sorted(state.workspace().runs(), key=lambda r: not r.is_live)
    if state.is_drawn_alone() and any(r.is_live for r in records) != live:
        st.rerun()
    if not records:
        st.info("No runs yet. Score or prune a checkpoint, and its run appears here.")
        return
    states = sorted({r.state for r in records})
    wanted = None
    if len(states) > 1:
        wanted = st.pills(
            "State", states, selection_mode="multi", key="jobs_states", format_func=plain, wrap=True
        )
    commands = sorted({r.command for r in records})
    kinds = st.pills(
        "Command",
        commands,
        selection_mode="multi",
        key="jobs_commands",
        format_func=plain,
        wrap=True,
    )
    filters = st.columns(4, vertical_alignment="bottom")
    places = sorted({r.place for r in records if r.place})
    at = (
        filters[3].multiselect("Place", [HERE, *places], key="jobs_places", format_func=plain)
        if places
        else []
    )
    tags = sorted({tag for r in records for tag in r.remarks.tags})
    words = filters[0].text_input("Search", key="jobs_text", placeholder="name, tag or note")
    tagged = filters[1].multiselect(
        "Tags", tags, key="jobs_tags", format_func=plain, placeholder="any"
    )
    starred = filters[2].toggle("Starred only", key="jobs_starred")
    kept = [
        r
        for r in records
        if (not wanted or r.state in wanted)
        and (not kinds or r.command in kinds)
        and (not at or (r.place or HERE) in at)
        and set(tagged) <= set(r.remarks.tags)
        and (r.remarks.starred or not starred)
        and (not words or has_text(r, words))
    ]
    if not kept:
        st.info("No run matches these filters.")
    for record in kept:
        if record.id == asked:
            job_cards.card(record, records, opened=True)
    for record in paging.page_of([r for r in kept if r.id != asked], "page", "runs"):
        job_cards.card(record, records)


def has_text(record: RunRecord, text: str) -> bool:
    """Whether a run's name, id, tags or note have every word of ``text``."""
    parts = (state.names().run(record), record.id, *record.remarks.tags, record.remarks.note)
    return all(word in " ".join(parts).lower() for word in text.lower().split())


def variant_tree() -> None:
    """Draw every dense checkpoint with the variants made from it."""
    records = where.runs()
    found = lineages(records)
    if not found:
        st.info("No variants yet. Create one on the Prune page.")
    rows = [(lineage, depth, variant) for lineage in found for depth, variant in lineage.walk()]
    shown = paging.page_of(rows, "variants", "checkpoints")
    for lineage, group in itertools.groupby(shown, key=lambda row: row[0]):
        with st.container(border=True):
            for _, depth, variant in group:
                variant_row(depth, variant, records)
            number = len(lineage.children(lineage.dense))
            st.caption(
                f"{number} {'variant' if number == 1 else 'variants'} made from "
                f"{plain(lineage.dense.label)}, {size(lineage.total_bytes)} in total."
            )


def variant_row(depth: int, variant: Variant, records: list[RunRecord]) -> None:
    """Draw one checkpoint of the tree."""
    text, buttons = st.columns([3, 2], vertical_alignment="center")
    facts = [] if depth else ["dense"]
    if variant.record and variant.record.state != "done":
        facts.append(variant.record.state)
    if variant.record:
        facts.append(variant.record.command)
    cut = variant.cut or Cut(blocks=variant.blocks)
    if cut.removal.partial:
        facts.append("without " + cut.removal.text)
    elif cut.dropped:
        facts.append("without " + words.block_ranges(cut.dropped))
    if cut.blocks:
        facts.append(f"{cut.blocks} block{'s' * (cut.blocks > 1)}")
    if cut.parameters:
        facts.append(f"{cut.parameters:,} parameters")
    if cut.ratio:
        facts.append(f"{cut.ratio:.1%} removed")
    facts.append(size(variant.disk_bytes) if variant.folder or variant.record else "not found")
    lead = LEADS[min(depth, len(LEADS) - 1)]
    text.markdown(
        f"{lead}**{plain(variant.label)}** :gray[{plain(' · '.join(facts))}]",
        help=plain(variant.folder) if variant.folder and not variant.record else None,
    )
    with buttons.container(horizontal=True, horizontal_alignment="right"):
        if variant.record:
            merging.draw(variant.record, "tree")
        if variant.folder and st.button(
            "Use", key=f"use_{variant.id}", help="Make it the active checkpoint."
        ):
            state.set_checkpoint(variant.id)
            st.rerun()
        if variant.record and not variant.record.is_live:
            job_cards.manage(variant.record, "tree", records)


def kept_distributions() -> None:
    """Draw what retraining keeps of dense models, and the button that deletes it."""
    taken = caches.taken(where.root)
    if not taken.number:
        return
    busy = any(r.is_live and r.command == "retrain" for r in where.runs())
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        number = "one set" if taken.number == 1 else f"{taken.number} sets"
        say.caption(
            f"Retraining keeps {number} of the dense model's next-token distributions or of frozen "
            f"blocks' states ({size(taken.bytes)}), so that runs on the same rows share them. They "
            "are written again when they are needed."
        )
        widgets.action(
            "Delete them",
            lambda: caches.delete(where.root),
            key="delete_teachers",
            icon=":material/delete:",
            disabled=busy,
            help="Not while a retraining runs." if busy else None,
        )


runs_tab, variants_tab = st.tabs(["Runs", "Variants"])
with runs_tab:
    run_list()
with variants_tab:
    variant_tree()
    kept_distributions()
