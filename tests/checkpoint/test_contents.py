"""Stored tensors against used ones, in both directions; stock transformers is the reference."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main
from core.checkpoint import headers, locate
from core.checkpoint.make_index import main as make_index
from core.errors import CheckpointError
from core.model.loading import load_model, load_tokenizer
from core.prune import depth

CPU = torch.device("cpu")
IDS = torch.arange(3, 33)[None]


@pytest.fixture
def changed(tiny_dir, tmp_path):
    """A copy of a tiny checkpoint with more tensors and other config fields."""

    def make(variant="gqa", tensors=None, name="changed", **fields):
        folder = shutil.copytree(tiny_dir(variant), tmp_path / name)
        stored = load_file(folder / "model.safetensors")
        save_file(stored | (tensors or {}), folder / "model.safetensors", {"format": "pt"})
        edit(folder, **fields)
        return folder

    return make


def edit(folder, file="config.json", **fields):
    value = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(value))


def stock(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


def head(folder):
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    return embedding + 0.05 * noise


def biases(*modules, value=0.5):
    widths = {"q": 32, "k": 16, "v": 16, "o": 32}
    return {
        f"model.layers.{block}.self_attn.{name}_proj.bias": torch.full((widths[name],), value)
        for block in range(5)
        for name in modules
    }


# ------------------------------------------------------------------------------------------- head


@pytest.fixture
def own_head(changed, tiny_dir):
    """The flag says tied, and the file holds a head of its own."""
    return changed("tied", {"lm_head.weight": head(tiny_dir("tied"))})


def test_a_head_of_its_own_is_counted_and_used_despite_the_flag(own_head, tiny_dir):
    info, model = locate.open(own_head).info, stock(own_head)
    assert info.parameters == count(model) == headers.inspect(tiny_dir("tied")).parameters + 10240
    assert (info.tied, info.parts["head"]) == (False, 320 * 32)
    assert "different head" in info.warnings[0]
    ours = load_model(own_head, CPU, torch.float32)
    assert torch.equal(logits(ours), logits(model))
    assert not torch.equal(logits(ours), logits(stock(tiny_dir("tied"))))


def test_variants_keep_a_head_of_its_own_and_say_so(own_head, tmp_path):
    record = depth.prune(own_head, (1,), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert locate.open(tmp_path / "out").info.warnings == ()
    model, whole = stock(tmp_path / "out"), stock(own_head)
    assert count(model) == record.parameters_after
    whole.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert torch.equal(logits(model), logits(whole))


def test_width_and_merging_keep_a_head_of_its_own(own_head, tmp_path):
    argv = ["width", own_head, "--method", "magnitude", "--ratio", "0.2", "--device", "cpu"]
    assert main([str(a) for a in [*argv, "--out", tmp_path / "narrow"]]) == 0
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    narrow = load_model(tmp_path / "narrow", CPU, torch.float32)
    assert count(narrow) == headers.inspect(tmp_path / "narrow").parameters
    assert torch.equal(narrow.lm_head.weight, stock(own_head).lm_head.weight)
    # What a merge does: transformers saves a model that was loaded here.
    load_model(own_head, CPU, torch.float32).save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(stock(tmp_path / "merged")), logits(stock(own_head)))
    assert headers.inspect(tmp_path / "merged").parameters == locate.open(own_head).info.parameters


def test_a_stored_copy_of_a_tied_head_counts_once(changed, tiny_dir):
    embedding = load_file(tiny_dir("tied") / "model.safetensors")["model.embed_tokens.weight"]
    info = headers.inspect(folder := changed("tied", {"lm_head.weight": embedding.clone()}))
    assert info.tied
    assert info.parameters == count(stock(folder)) == headers.inspect(tiny_dir("tied")).parameters
    assert info.unused_tensors == ()
    assert "a second time" in info.warnings[0]


# ----------------------------------------------------------------------------------------- unused


def leftovers():
    """Adapters left in the blocks, a vision tower, a second head: 5 x 2 x 64 + 100 + 320."""
    lora = {
        f"model.layers.{b}.self_attn.q_proj.lora_{side}.weight": torch.ones(shape)
        for b in range(5)
        for side, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    return lora | {
        "vision_tower.embed.weight": torch.ones(10, 10),
        "v_head.weight": torch.ones(320),
    }


def test_leftovers_are_named_and_counted_apart(changed, tiny_gqa, tmp_path, capsys):
    folder = changed(tensors=leftovers())
    info = locate.open(folder).info
    assert info.parameters == count(stock(folder)) == headers.inspect(tiny_gqa).parameters
    assert info.block_parameters == headers.inspect(tiny_gqa).block_parameters
    assert info.unused_tensors == tuple(sorted(leftovers()))
    assert info.unused_parameters == 5 * 2 * 64 + 100 + 320
    assert main(["inspect", str(folder)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["unused_parameters"] == info.unused_parameters
    assert "12 stored tensors are not part of the model (1,060 parameters" in printed["warnings"][0]
    assert "lora_A" in printed["warnings"][0]
    assert torch.equal(logits(load_model(folder, CPU, torch.float32)), logits(stock(tiny_gqa)))
    depth.prune(folder, (1,), tmp_path / "out")
    assert headers.inspect(tmp_path / "out").warnings == ()  # a variant has only what is used


class Log(list):
    """Progress that keeps what is logged."""

    log = list.append

    def check_cancel(self):
        """Never cancelled."""


def test_warnings_are_logged_where_the_weights_are_used(changed):
    log = Log()
    locate.open(changed(tensors=leftovers()), log)
    assert [line[:30] for line in log] == ["Warning: 12 stored tensors are"]


def test_old_rotary_tables_are_neither_counted_nor_named(changed, tiny_gqa):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    info = headers.inspect(changed(tensors={name: torch.ones(4)}))
    assert info.parameters == headers.inspect(tiny_gqa).parameters
    assert (info.unused_tensors, info.warnings) == ((), ())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            biases("q", "k", "v", "o"),
            r'biases .* ignored: .* and 17 more\..*"attention_bias": true',
        ),
        (biases("q", "k", "v"), "biases .* ignored: .* LLaMA has no setting for them"),
        ({"lm_head.bias": torch.ones(320)}, r"biases .* 'lm_head\.bias'\. .* no setting"),
        ({"model.norm.bias": torch.ones(32)}, r"biases .* 'model\.norm\.bias'"),
        (
            {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)},
            r"quantized or scaled: 'model\.layers\.0\.mlp\.up_proj\.weight_scale'",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)},
            "quantized or scaled: .*weight_scale_inv",
        ),
        ({"model.layers.0.mlp.up_proj.input_scale": torch.ones(1)}, "quantized or scaled"),
        (
            {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)},
            "norms that LLaMA blocks do not have",
        ),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)},
            "quantized: 'model.layers.0.mlp.up_proj.weight' stored as int8",
        ),
    ],
)
def test_what_would_change_the_result_is_refused(changed, tmp_path, capsys, tensors, says):
    folder = changed(tensors=tensors)
    with pytest.raises(CheckpointError, match=says):
        load_model(folder, CPU, torch.float32)
    for argv in (
        ["inspect", folder],
        ["prune", folder, "--drop", "1", "--dry-run", "--out", tmp_path / "out"],
        ["prune", folder, "--drop", "1", "--out", tmp_path / "out"],
    ):
        assert main([str(a) for a in argv]) == 2
        assert "Wrote" not in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_biases_with_their_flag_and_biases_of_zero(changed, tiny_gqa):
    flagged = changed(tensors=biases("q", "k", "v", "o"), attention_bias=True)
    info = headers.inspect(flagged)
    assert info.parameters == count(stock(flagged)) == headers.inspect(tiny_gqa).parameters + 5 * 96
    assert torch.equal(logits(load_model(flagged, CPU, torch.float32)), logits(stock(flagged)))
    zero = changed(tensors=biases("q", "k", "v", "o", value=0.0), name="zero")
    assert headers.inspect(zero).unused_parameters == 5 * 96  # they change nothing
    assert torch.equal(logits(load_model(zero, CPU, torch.float32)), logits(stock(tiny_gqa)))


def test_what_transformers_cannot_place_is_not_swallowed(changed, monkeypatch):
    """If the headers' rules miss something, its own report still counts."""
    folder = changed(tensors=leftovers())
    found = locate.at(folder)
    blind = dataclasses.replace(found, info=dataclasses.replace(found.info, unused_tensors=()))
    monkeypatch.setattr(locate, "at", lambda *_, **__: blind)
    with pytest.raises(CheckpointError, match="12 tensors are not used by the model: model.layers"):
        load_model(folder, CPU, torch.float32)


# ------------------------------------------------------------------------------------- other files


def without_index(folder):
    (folder / headers.INDEX).unlink()


def test_shards_without_an_index(tiny_dir, tmp_path, capsys):
    folder = shutil.copytree(tiny_dir("gqa", shard_bytes=40_000), tmp_path / "shards")
    index = json.loads((folder / headers.INDEX).read_text())
    without_index(folder)
    assert main(["inspect", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "has 7 of 7 safetensors shards (model-00001-of-00007.safetensors, ...) but no" in said
    assert f"python -m core.checkpoint.make_index {folder}" in said
    assert make_index([str(folder)]) == 0
    assert json.loads((folder / headers.INDEX).read_text())["weight_map"] == index["weight_map"]
    assert count(stock(folder)) == locate.open(folder).info.parameters
    assert make_index([str(folder)]) == 2
    without_index(folder)
    (folder / "model-00003-of-00007.safetensors").unlink()
    assert main(["inspect", str(folder)]) == 2
    assert "has only 6 of 7 safetensors shards" in capsys.readouterr().err
    assert make_index([str(folder)]) == 2


def gguf(folder):
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(100))


def adapter(folder):
    value = {"peft_type": "LORA", "base_model_name_or_path": "owner/name"}
    (folder / "adapter_config.json").write_text(json.dumps(value))
    save_file({"x.lora_A.weight": torch.zeros(8, 32)}, folder / "adapter_model.safetensors")


def other_name(folder):
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (gguf, r"only as GGUF \(model-Q4_K_M.gguf\).*python -m core import "),
        (adapter, "an adapter for owner/name, not a whole checkpoint.*merge_and_unload"),
        (other_name, "has consolidated.safetensors, but transformers reads only"),
    ],
)
@pytest.mark.parametrize("config", [True, False])
def test_what_lies_beside_the_config_is_said(tiny_gqa, tmp_path, put, says, config):
    folder = tmp_path / "folder"
    folder.mkdir()
    put(folder)
    if config:
        shutil.copyfile(tiny_gqa / "config.json", folder / "config.json")
    elif put is other_name:
        says = "has no config.json"
    for need in ("weights", "headers", "config"):
        with pytest.raises(CheckpointError, match=says) as error:
            locate.open(folder, need=need)
        assert "only config.json" not in str(error.value).lower()


def test_an_adapter_beside_whole_weights_is_refused(changed):
    folder = changed()
    adapter(folder)
    with pytest.raises(CheckpointError, match="whole weights and an adapter for owner/name"):
        locate.open(folder)


# --------------------------------------------------------------------------------------- tokenizer


def add_token(folder, content, special=True, number=320):
    table = json.loads((folder / "tokenizer.json").read_text())
    table["added_tokens"].append(
        {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": special}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(table))


def test_a_special_token_beyond_the_embedding_works(changed):
    folder = changed()
    size = headers.inspect(folder).tokenizer["size"]
    add_token(folder, "[PAD]", number=320)
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")
    info = locate.open(folder).info
    assert info.tokenizer["size"] == 321
    assert info.tokenizer["text_size"] == size
    assert "1 special token ([PAD]) beyond the 320 rows" in info.warnings[0]
    assert AutoTokenizer.from_pretrained(folder)("[PAD]").input_ids[-1] == 320  # stock
    tokenizer = load_tokenizer(folder)
    assert max(tokenizer("Ann sees the [PAD] ball.").input_ids) < 320
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def ordinary(folder):
    add_token(folder, "blue", special=False)


def begins(folder):
    add_token(folder, "[BOS]")
    edit(folder, "tokenizer_config.json", bos_token="[BOS]")


def inserted(folder):
    add_token(folder, "[CLS]")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["post_processor"]["single"][0]["SpecialToken"]["id"] = "[CLS]"
    table["post_processor"]["special_tokens"]["[CLS]"] = {
        "id": "[CLS]", "ids": [320], "tokens": ["[CLS]"],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(table))


@pytest.mark.parametrize("put", [ordinary, begins, inserted])
def test_tokens_that_text_produces_are_refused(changed, put):
    folder = changed()
    put(folder)
    with pytest.raises(CheckpointError, match="has 321 tokens but the embedding has only 320"):
        locate.open(folder)


# ------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    ("code", "known"), [("F8_E4M3", True), ("F8_E5M2", True), ("F8_E8M0", False)]
)
def test_unusual_formats_have_sizes(tiny_gqa, tmp_path, code, known):
    folder = shutil.copytree(tiny_gqa, tmp_path / "fp8")
    store_as(folder, code)
    info = headers.inspect(folder)
    assert info.compute_dtype == "float32"
    assert info.stored_bytes == (info.parameters if known else info.disk_bytes)
    assert any("unknown size" in w for w in info.warnings) is not known


def store_as(folder, code):
    """Rewrite the weights as one byte each, in the format ``code``."""
    shard = headers.TensorIndex.read(folder).shards[0]
    table, at = {}, 0
    for tensor in shard.tensors:
        table[tensor.name] = {
            "dtype": code, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.parameters]
        }  # fmt: skip
        at += tensor.parameters
    head = json.dumps(table).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes([56]) * at)
