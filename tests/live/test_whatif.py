"""What-if perplexity in the process: against really pruned checkpoints, and what is computed."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import tiny
import torch
from live_helpers import CPU, naive_perplexity, windows_of

from core.errors import DataError, PlanError
from core.live import whatif as whatif_module
from core.live.whatif import WhatIf
from core.model import loading
from core.model.blocks import BlockView
from core.prune import depth

PLENTY = 2**30


def random_sets(count, blocks, seed):
    rng = random.Random(seed)
    return [tuple(rng.sample(range(blocks), rng.randint(1, blocks - 1))) for _ in range(count)]


@pytest.fixture
def whatif(tiny_dir, text):
    """A function from a variant and the room for states to (folder, windows, WhatIf)."""

    def make(variant="gqa", room=PLENTY, bos="once"):
        folder = tiny_dir(variant)
        windows = windows_of(folder, text, 24, bos)
        view = BlockView(loading.load_model(folder, CPU, torch.float32))
        return folder, windows, WhatIf(view, windows, room)

    return make


@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_random_sets_equal_really_pruned_checkpoints(whatif, tmp_path, variant):
    folder, windows, text = whatif(variant, bos="window")
    sets = random_sets(4, tiny.BLOCKS, variant)
    wanted = {}
    for number, drop in enumerate(sets):
        depth.prune(folder, drop, tmp_path / str(number))
        wanted[drop] = naive_perplexity(tmp_path / str(number), windows)
    for drop in (*sets, *reversed(sets)):
        assert text.answer(drop).ppl == pytest.approx(wanted[drop], rel=1e-5)
    for drop in sets:
        text.forget()
        assert text.answer(drop).ppl == pytest.approx(wanted[drop], rel=1e-5)
    assert text.answer(()).ppl == pytest.approx(naive_perplexity(folder, windows), rel=1e-5)


@pytest.mark.parametrize("states", [0, 1, 2, 4, 7, 100])
def test_memory_for_states_changes_the_work_and_not_the_answer(whatif, states):
    _, _, plain = whatif(room=0)
    _, _, kept = whatif(room=states * plain._state_bytes)
    for drop in ((), *random_sets(8, tiny.BLOCKS, 5)):
        assert kept.answer(drop).ppl == pytest.approx(plain.answer(drop).ppl, rel=1e-6)
        assert kept.state_bytes <= states * plain._state_bytes
    assert plain.state_bytes == 0


def test_late_blocks_are_nearly_free_and_answers_are_kept(whatif):
    _, windows, text = whatif()
    chunks = text.answer(()).block_passes // tiny.BLOCKS
    assert text.answer((4,)).block_passes == 0
    assert text.answer((3,)).block_passes == chunks
    assert text.answer((1,)).block_passes == 3 * chunks
    assert text.answer((1, 4)).block_passes == 0
    found = text.answer((1,))
    assert found.block_passes == 0
    assert found.windows == len(windows)
    assert found.predictions == len(windows) * 23


def test_an_abandoned_question_leaves_what_it_computed(whatif):
    _, windows, text = whatif()
    text._chunks = torch.tensor(windows).split(3)
    text._plan(100)

    class Enough(Exception):
        pass

    def stop(answer):
        if answer.windows >= 6:
            raise Enough

    with pytest.raises(Enough):
        text.answer((2,), stop)
    parts = []
    rest = text.answer((2,), parts.append)
    assert parts[0].windows == 9
    assert rest.block_passes == 4 * (len(text._chunks) - 2)
    text.forget()
    assert text.answer((2,)).ppl == pytest.approx(rest.ppl, rel=1e-9)


def test_the_first_windows_go_to_all_cores(whatif):
    _, windows, text = whatif()
    one = [text.answer((1,), windows=count).ppl for count in (1, 2, 3, len(windows))]
    text.forget()
    sizes = whatif_module._sizes(len(windows), 3, 2)
    assert sizes[:3] == [1, 1, 3]
    assert sum(sizes) == len(windows)
    assert whatif_module._sizes(5, 3, 1) == [3, 2]
    text._chunks, text._threads = torch.tensor(windows).split(sizes), 2
    text._plan(100)
    quick = text.answer((1,), windows=2)
    assert quick.block_passes == 2 * (tiny.BLOCKS - 1)
    parts = [quick.ppl, *(text.answer((1,), windows=c).ppl for c in (3, len(windows)))]
    assert parts == pytest.approx(one[1:], rel=1e-6)


def test_what_cannot_be_asked(whatif):
    _, windows, text = whatif()
    with pytest.raises(PlanError, match="All 5 blocks are selected"):
        text.answer(range(5))
    with pytest.raises(PlanError, match="Block 5 does not exist"):
        text.answer((5,))
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        WhatIf(text._view, [[1, 2, 320]], 0)


def test_several_chunks_at_a_time_equal_one(whatif):
    _, windows, text = whatif()
    one = [text.answer(s).ppl for s in ((), (1,), (0, 3))]
    text.forget()
    text._chunks, text._threads = torch.tensor(windows).split(2), 2
    text._plan(100)
    threads = torch.get_num_threads()
    assert [text.answer(s).ppl for s in ((), (1,), (0, 3))] == pytest.approx(one, rel=1e-6)
    assert torch.get_num_threads() == threads


def test_the_beginning_of_a_text_is_exact_and_the_rest_goes_on_from_there(whatif, tmp_path):
    folder, windows, text = whatif()
    text._chunks = torch.tensor(windows).split(3)
    text._plan(100)
    depth.prune(folder, (1, 3), tmp_path / "p")
    start = text.answer((1, 3), windows=4)
    wanted = naive_perplexity(tmp_path / "p", windows[:4])
    assert start.ppl == pytest.approx(wanted, rel=1e-5)
    assert (start.windows, start.predictions) == (4, 4 * 23)
    assert start.block_passes == 2 * 3  # two chunks cover four windows
    rest = text.answer((1, 3))
    assert rest.ppl == pytest.approx(naive_perplexity(tmp_path / "p", windows), rel=1e-5)
    assert rest.block_passes == (len(text._chunks) - 2) * 3
    again = text.answer((1, 3), windows=4)
    assert (again.ppl, again.block_passes) == (start.ppl, 0)


def test_the_ratio_to_dense_and_its_error_are_over_the_same_windows(whatif, tmp_path):
    folder, windows, text = whatif()
    assert text.answer((1, 3), windows=6).dense_ppl is None
    text.answer((), windows=6)
    found = text.answer((1, 3), windows=6)
    depth.prune(folder, (1, 3), tmp_path / "p")
    pairs = [[naive_perplexity(f, [w]) for f in (tmp_path / "p", folder)] for w in windows[:6]]
    apart = [math.log(one / other) for one, other in pairs]
    assert found.dense_ppl == pytest.approx(naive_perplexity(folder, windows[:6]), rel=1e-5)
    assert math.log(found.ppl / found.dense_ppl) == pytest.approx(statistics.fmean(apart), abs=1e-5)
    assert found.stderr == pytest.approx(statistics.stdev(apart) / 6**0.5, rel=1e-3)
    assert text.answer((), windows=6).stderr == 0
    assert text.answer((1, 3)).dense_ppl is None  # dense was computed on fewer windows
    assert text.answer((1, 3), windows=1).stderr is None
