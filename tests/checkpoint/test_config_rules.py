"""The rules for config.json against transformers' own verdict on a table of configurations."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

from core.__main__ import main
from core.checkpoint import config_rules, families, headers
from core.errors import CheckpointError
from core.model.loading import load_model, load_tokenizer
from core.prune import depth

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TABLE = {
    "rms_norm_eps": ["1e-05", 1, 1e-5, None, True],
    "pad_token_id": [64, 63, 0, -1, -64, -65, None, "0", True],
    "bos_token_id": [99, None, "1", [1]],
    "eos_token_id": [[1, 2], None, "2", [1, "2"], 2, 99],
    "layer_types": [
        [FULL] * 2, [FULL] * 3, [FULL], None, ["attention"] * 2, ["foo"] * 2, FULL,
        [SLIDING] * 2, ["linear_attention"] * 2,
    ],
    "hidden_act": ["silu", "gelu_new", "foo", None, 1],
    "attention_bias": [True, False, 1, None, "true"],
    "mlp_bias": [True, 0, None],
    "use_cache": [True, 1, None],
    "tie_word_embeddings": [True, 1, None, "true"],
    "attention_dropout": [0, 0.0, None, "0", True],
    "initializer_range": [0.02, 1, 2.0, -1.0, None],
    "num_key_value_heads": [None, 3, "2", 4],
    "head_dim": [None, 8, 7, 16, "8"],
    "hidden_size": [33, "32", None, 40],
    "num_attention_heads": [None, 4.0],
    "vocab_size": [None, "64"],
    "max_position_embeddings": [None, 64.0],
    "num_hidden_layers": [None, "2"],
    "pretraining_tp": [1, None, "1"],
    "sliding_window": [16, None, "16", 16.0],
    "use_sliding_window": [True, False, None, 1],
    "max_window_layers": [1, None, 0, "1", 99],
    "rope_parameters": [
        None, {}, {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": "2"},
        {"rope_type": "foo"}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "yarn"}, LLAMA3,
        {"rope_type": "llama3", "factor": 2.0}, {"rope_type": "default", "rope_theta": "x"},
        {"rope_type": "default", "rope_theta": None}, "linear", [1], {"rope_type": "longrope"},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
        {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "dynamic"},
        {"rope_type": "proportional"},
    ],
    "rope_scaling": [
        None, {"type": "linear", "factor": 2.0}, {"type": "linear"}, {"factor": 2.0}, "x",
        {"type": "dynamic", "factor": 2},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": None},
    ],
    "rope_theta": [1e4, 10000, "x", None],
    "dtype": ["float16", "half", "float12", "auto", None, "bfloat16", "float64"],
    "torch_dtype": ["float16", "foo"],
    "id2label": [{"0": "a"}, {"a": "b"}, ["x"], None],
    "use_return_dict": [True],
    "output_attentions": [True],
    "return_dict": [True, None],
}  # fmt: skip
"""Values of single fields; the verdict is whether the model can be built and computes."""


def verdict(config):
    """Return why transformers cannot build or compute the model, or None if it can."""
    try:
        settings = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        with torch.no_grad():
            model(torch.arange(6)[None])
    except Exception as error:  # whatever it raises, it refuses
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("family", families.SUPPORTED)
def test_the_verdict_is_that_of_transformers(family):
    logging.set_verbosity(logging.CRITICAL)
    windows = {"use_sliding_window": True, "layer_types": [FULL, SLIDING]}
    changes = [{field: value} for field, values in TABLE.items() for value in values]
    changes += [{**windows, "sliding_window": 16}, {**windows, "sliding_window": None}]
    wrong = []
    for change in changes:
        config = {"model_type": family, **SIZES, "head_dim": 8, **change}
        try:
            config_rules.check(config)
            ours = None
        except CheckpointError as error:
            ours = str(error)
        theirs = verdict(config)
        if (ours is None) != (theirs is None):
            wrong.append((change, ours, theirs))
    assert wrong == []


def edit(folder, **fields):
    value = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(value))


@pytest.fixture
def copied(tiny_gqa, tmp_path):
    """A writable copy of a tiny checkpoint."""
    return shutil.copytree(tiny_gqa, tmp_path / "copy")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer_types": [FULL] * 6}, "lists 6 layer_types for 5 blocks"),
        ({"rms_norm_eps": "1e-05"}, "sets rms_norm_eps to '1e-05'. It must be a number with a dec"),
        ({"pad_token_id": 320}, "sets pad_token_id to 320, but the embedding has only 320 rows"),
        ({"dtype": "float12"}, "sets dtype to 'float12'"),
        ({"use_cache": 1}, "sets use_cache to 1. It must be true or false"),
        ({"hidden_act": "swoosh"}, "sets hidden_act to 'swoosh'. Known: gelu,"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' without factor"),
    ],
)
def test_no_command_promises_what_transformers_refuses(copied, tmp_path, capsys, fields, says):
    edit(copied, **fields)
    out = tmp_path / "out"
    for argv in (
        ["inspect", copied],
        ["prune", copied, "--drop", "1", "--dry-run", "--out", out],
        ["prune", copied, "--drop", "1", "--out", out],
    ):
        assert main([str(a) for a in argv]) == 2
        said = capsys.readouterr()
        assert says in said.err
        assert said.out == ""
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError):
        load_model(copied, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_format_with_torch_in_front_is_understood(copied, tmp_path, field):
    edit(copied, **{"dtype": None, field: "torch.float16"})
    info = headers.inspect(copied)
    assert f"gives {field} as 'torch.float16'" in info.warnings[0]
    with pytest.raises(AttributeError):
        AutoModelForCausalLM.from_pretrained(copied)
    model = load_model(copied, torch.device("cpu"), torch.float32)
    stored = load_file(copied / "model.safetensors")
    assert torch.equal(model.model.norm.weight, stored["model.norm.weight"])
    assert load_tokenizer(copied)("Ann").input_ids[0] == 1
    depth.prune(copied, (1,), tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == torch.float16
    assert headers.inspect(tmp_path / "out").warnings == ()


def test_config_alone_names_its_format(tmp_path):
    config = {"model_type": "llama", "torch_dtype": "torch.bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert headers.inspect(tmp_path).dtype == "bfloat16"


def test_the_reason_of_another_library_is_kept(copied, monkeypatch):
    """A strict configuration names the validator on its first line and the reason below."""
    monkeypatch.setattr(config_rules, "check", lambda config: ())
    edit(copied, layer_types=[FULL] * 6)
    with pytest.raises(
        CheckpointError, match=r"must be equal to the number of `layer_types` \(6\)"
    ):
        load_model(copied, torch.device("cpu"), torch.float32)
