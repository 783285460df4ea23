"""pruning.json as a dataclass: old and hand-made files still open, nothing breaks a reader."""

from __future__ import annotations

import json

import pytest

from core.prune.results import Cut, PlanFile, Pruning
from core.study.variants import allowed_blocks
from core.width.results import BlockCut, Target, WidthPruning


def put(folder, **values):
    (folder / "pruning.json").write_text(json.dumps(values))
    return folder


def test_a_depth_file_of_an_older_version_opens(tmp_path):
    put(tmp_path, schema=1, method="depth", dropped=[3, 1], ratio=0.25, future={"x": 1},
        lineage=[{"method": "flap", "dropped": []}, {}])  # fmt: skip
    found = Pruning.read(tmp_path)
    assert found == Pruning(
        method="depth", dropped=(3, 1), ratio=0.25, lineage=(Cut("flap", dropped=()), Cut())
    )
    assert found.planned is None
    assert WidthPruning.read(tmp_path).layers is None


def test_the_plan_is_kept_as_given_and_read_as_a_plan(tmp_path):
    plan = {"drop": [2, 4], "blocks": 6, "protected": [0], "protect_first": 1, "note": "mine"}
    put(tmp_path, plan=plan, original_blocks=[0, 1, 3, 5], dropped_original=[2, 4])
    found = Pruning.read(tmp_path)
    assert found.plan == plan
    assert found.planned == PlanFile((2, 4), blocks=6, protected=(0,), protect_first=1)
    assert allowed_blocks(WidthPruning.read(tmp_path)) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("drop", ["2", [True], None, [1, "2"]])
def test_a_plan_that_names_no_blocks_says_so_and_keeps_the_rest(drop):
    assert Pruning(plan={"drop": drop, "protect_last": 2}).planned == PlanFile(protect_last=2)
    assert Pruning(plan={}).planned is None


def test_the_text_of_a_width_file_has_one_line_per_block():
    blocks = (BlockCut(0, 2, 1, 5, (1,), (2, 3), (4,)), BlockCut(1, 4, 2, 6))
    record = WidthPruning(method="flap", target=Target("small", 10, 1, 0.1), blocks=blocks)
    text = record.to_text()
    lines = [line for line in text.splitlines() if '"block":' in line]
    assert [json.loads(line.strip().rstrip(",")) for line in lines] == [
        {"block": 0, "heads": 2, "kv_heads": 1, "neurons": 5, "dropped_kv_heads": [1],
         "dropped_heads": [2, 3], "dropped_neurons": [4]},
        {"block": 1, "heads": 4, "kv_heads": 2, "neurons": 6, "dropped_kv_heads": [],
         "dropped_heads": [], "dropped_neurons": []},
    ]  # fmt: skip
    assert json.loads(text) == record.to_dict()
    assert list(json.loads(text))[:3] == ["schema", "method", "source"]
