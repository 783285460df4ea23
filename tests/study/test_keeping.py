"""What follows from a study is worked out once for each study."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import study_helpers as made

import core.study as studies
from core.checkpoint import headers
from core.runs import workspace
from core.runs.workspace import Workspace
from core.study import keeping
from core.study.kinds import Study, Variant


def test_results_are_kept_for_the_same_study_and_equal_arguments():
    asked = []

    @keeping.kept
    def work_out(study, cell, *, tasks=()):
        asked.append((study.dense.id, cell, tasks))
        return [len(asked)]

    one, twin = (Study((Variant("a", "a", "dense"),)) for _ in range(2))
    assert one == twin
    first = work_out(one, (1, 12, 128), tasks=["x"])
    assert work_out(one, (1, 12, 128), tasks=["x"]) is first
    assert work_out(one, (4, 12, 128), tasks=["x"]) is not first
    assert work_out(one, (1, 12, 128)) is not first
    assert work_out(twin, (1, 12, 128), tasks=["x"]) is not first  # read again, so changed
    assert len(asked) == 4
    for cell in range(keeping.KEPT):
        work_out(twin, cell)
    assert work_out(one, (1, 12, 128), tasks=["x"]) is not first  # the oldest are forgotten


def test_a_draw_sees_one_study_and_the_next_draw_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    root, dense = tmp_path / "ws", made.checkpoint(tmp_path / "dense")
    here, total = Workspace(root), headers.inspect(dense).parameters
    made.pruned(root, "cut", dense, [1], 1, total)
    made.run(root, "measured", "evaluate", 2, checkpoint="cut")
    table = root / "measured" / "perplexity.csv"

    def write(ppl):  # another process, which this one does not notice
        table.write_text(f"source,window,bos,tokens,ppl\ndemo,128,once,9,{ppl}\n")

    def ppls():
        return [q.ppl for q in studies.study(here, str(dense)).quality]

    def draw():
        workspace.begin_draw()
        write(3.0)
        assert ppls() == [3.0]
        write(4.25)
        assert ppls() == [3.0]
        workspace.begin_draw()
        assert ppls() == [4.25]
        write("4.2")  # of the same size at the same time, perhaps: half a number
        here.rename(here.find("cut"), "shorter")  # this process writes: seen at once
        assert ppls() == [4.2]
        assert studies.study(here, str(dense)).variants[1].label == "shorter"

    with ThreadPoolExecutor(1) as pool:
        pool.submit(draw).result()
    write(5.5)
    assert ppls() == [5.5]  # no draw: always as it is now


def test_the_finder_of_a_study_looks_at_the_disk_again(tmp_path):
    folder = made.checkpoint(tmp_path / "dense")
    study = Study((Variant("a", "a", "dense", folder=folder),))
    link = tmp_path / "link"
    assert study.at(link) is None
    link.symlink_to(folder)
    assert study.at(link) is study.dense
