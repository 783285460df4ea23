"""The recipe, carried out by its own rules, gives the variant; other variants are refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from core.checkpoint import locate
from core.errors import CheckpointError
from core.export import formats, mergekit
from core.prune import depth


def rebuilt(recipe):
    """Return the weights that passthrough slices build: blocks renumbered, the rest copied."""
    assert recipe["merge_method"] == "passthrough"
    result, number = {}, 0
    for piece in recipe["slices"]:
        (source,) = piece["sources"]
        dense = load_file(f"{source['model']}/model.safetensors")
        result |= {name: w for name, w in dense.items() if ".layers." not in name}
        for block in range(*source["layer_range"]):
            old, new = f"model.layers.{block}.", f"model.layers.{number}."
            result |= {new + n.removeprefix(old): w for n, w in dense.items() if n.startswith(old)}
            number += 1
    return result


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_the_recipe_builds_the_variant(tiny_dir, tmp_path, variant):
    source = tiny_dir(variant)
    depth.prune(source, [1], tmp_path / "one")
    depth.prune(tmp_path / "one", [2], tmp_path / "two")  # block 3 of the dense checkpoint
    text = mergekit.recipe(locate.at(tmp_path / "two"))
    recipe = yaml.safe_load(text)
    assert [s["sources"][0]["layer_range"] for s in recipe["slices"]] == [[0, 1], [2, 3], [4, 5]]
    assert recipe["dtype"] == "float32"
    found, wanted = rebuilt(recipe), load_file(tmp_path / "two" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_variants_are_refused(tiny_gqa, tmp_path):
    with pytest.raises(CheckpointError, match="is not a pruned variant"):
        mergekit.recipe(locate.at(tiny_gqa))
    folder = tmp_path / "pruned"
    depth.prune(tiny_gqa, [1], folder)
    record = json.loads((folder / "pruning.json").read_text())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="'model.layers.3.mlp.up_proj.weight': the variant was"
    ):
        mergekit.recipe(locate.at(folder))
    (folder / "pruning.json").write_text(json.dumps(record | {"method": "flap"}))
    with pytest.raises(CheckpointError, match="pruned in width .flap."):
        mergekit.recipe(locate.at(folder))


def test_pages_learn_which_formats_there_are(tiny_gqa, tmp_path):
    gguf, recipe, hub = formats.formats(locate.at(tiny_gqa))
    assert gguf.possible
    assert gguf.architecture == "llama"
    assert list(gguf.bytes) == ["f32", "f16", "bf16", "q8_0"]
    assert gguf.bytes["q8_0"] < gguf.bytes["f16"] < gguf.bytes["f32"]
    assert "48 weights do not divide by 32" in gguf.notes["q8_0"][0]
    assert not recipe.possible
    assert "not a pruned variant" in recipe.why_not
    assert hub.bytes["all"] > (tiny_gqa / "model.safetensors").stat().st_size
    depth.prune(tiny_gqa, [1], tmp_path / "pruned")
    (tmp_path / "pruned" / "model.safetensors").unlink()
    without = formats.formats(locate.at(tmp_path / "pruned"))
    assert "no weights" in without[0].why_not
    depth.prune(tiny_gqa, [1], tmp_path / "pruned", overwrite=True)
    assert all(f.possible for f in formats.formats(locate.at(tmp_path / "pruned")))
