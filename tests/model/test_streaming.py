"""A model whose blocks are read when they are needed: the same numbers, each weight read once."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError, NotFiniteError
from core.importance import scoring
from core.importance.branches import make_batch
from core.importance.taylor import taylor
from core.model.blocks import BlockView
from core.model.loading import load_model
from core.model.streaming import StreamedView, Weights

CPU = torch.device("cpu")
ALL = ("ppl", "kl", "taylor", "magnitude", "block-influence", "angular", "relative-update",
       "sleb", "sublayers")  # fmt: skip


def rows(count=7, length=20):
    made = torch.randint(3, 320, (count, length), generator=torch.Generator().manual_seed(0))
    return [row[: length - at % 3] for at, row in enumerate(made.tolist())]


def scores(view, metrics=ALL, group=0):
    found = scoring.compute(view, make_batch(rows(), view, group), metrics)
    found.seconds = {}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["gqa", "tied", "qwen2", "qwen3", "mistral"])
def test_all_scores_are_the_same_bit_for_bit(tiny_dir, variant, dtype):
    folder = tiny_dir(variant, shard_bytes=40_000)
    here = scores(BlockView(load_model(folder, CPU, dtype)))
    view = StreamedView(folder, dtype, CPU)
    assert scores(view) == here
    view.close()


def test_a_checkpoint_whose_blocks_differ(tiny_gqa, tmp_path):
    from core.checkpoint.drop import Removal
    from core.prune import depth

    depth.prune(tiny_gqa, Removal((1,), (2,), (3,)), tmp_path / "parts")
    metrics = tuple(m for m in ALL if m not in ("sublayers",))
    here = scores(BlockView(load_model(tmp_path / "parts", CPU, torch.float32)), metrics)
    assert scores(StreamedView(tmp_path / "parts", torch.float32, CPU), metrics) == here


@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_rows_give_the_same_scores(tiny_gqa, group):
    whole = BlockView(load_model(tiny_gqa, CPU, torch.float32))
    here = scores(whole, group=group)
    assert scores(StreamedView(tiny_gqa, torch.float32, CPU), group=group) == here
    at_once = scores(whole)
    for name in ("ppl", "kl", "block_influence", "relative_update"):
        one, other = (torch.tensor(getattr(found.sweep, name)) for found in (here, at_once))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert [end[:2] for end in here.sweep.angular] == [end[:2] for end in at_once.sweep.angular]
    nll = [torch.tensor(found.sweep.sample_nll) for found in (here, at_once)]
    torch.testing.assert_close(*nll, rtol=1e-6, atol=1e-6)


def stored_bytes(folder):
    return sum(e.end - e.start for e in Weights(folder, torch.float32, CPU).entries.values())


def test_each_weight_is_read_once_per_pass(tiny_dir):
    folder = tiny_dir("gqa")
    view = StreamedView(folder, torch.float32, CPU)
    norm = view.source.bytes_read
    scores(view, ("ppl", "kl", "block-influence"))
    assert view.source.bytes_read == stored_bytes(folder)
    before = view.source.bytes_read
    taylor(view, make_batch(rows(), view))  # forwards, and back; the last block is read twice
    blocks = sum(e.end - e.start for n, e in view.source.entries.items() if ".layers." in n)
    ends = stored_bytes(folder) - blocks - norm
    assert view.source.bytes_read - before == 2 * blocks + ends


def test_two_blocks_are_in_memory_at_most(tiny_gqa, monkeypatch):
    view = StreamedView(tiny_gqa, torch.float32, CPU)
    most = 0
    real = StreamedView._usable

    def counted(self, prefix, stored):
        nonlocal most
        held = [b for b in range(len(self)) if self.blocks[b].mlp.up_proj.weight.device == CPU]
        ahead = self._ahead is not None
        most = max(most, len(held) + ahead + (prefix != ""))
        return real(self, prefix, stored)

    monkeypatch.setattr(StreamedView, "_usable", counted)
    scores(view)
    assert most == 1  # the one that is put in place; the next is read after that
    view.head_weight  # noqa: B018 - read for its effect
    assert not [b for b in view.blocks if b.mlp.up_proj.weight.device == CPU]


def test_a_weight_that_is_not_finite_is_named(tiny_gqa, tmp_path):
    import shutil

    shutil.copytree(tiny_gqa, tmp_path / "broken")
    path = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"][4, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    view = StreamedView(tmp_path / "broken", torch.float32, CPU)
    with pytest.raises(NotFiniteError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        scores(view)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tiny_gqa, tmp_path):
    import shutil

    shutil.copytree(tiny_gqa, tmp_path / "cut")
    view = StreamedView(tmp_path / "cut", torch.float32, CPU)
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(CheckpointError, match="ends within the tensor"):
        scores(view)


def test_ids_are_looked_up_in_pieces(tiny_gqa, monkeypatch):
    from core.model import streaming

    whole = BlockView(load_model(tiny_gqa, CPU, torch.float32))
    view = StreamedView(tiny_gqa, torch.float32, CPU)
    monkeypatch.setattr(streaming, "TABLE_BYTES", 17 * tiny.HIDDEN * 4)
    ids = torch.arange(320).view(4, 80).flip(0)
    assert torch.equal(view.embed(ids), whole.embed(ids))
