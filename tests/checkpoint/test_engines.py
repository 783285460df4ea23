"""Which programs run which kind of variant, and commands that can be typed as they are."""

import ast
import json
import shlex

import pytest

from core.checkpoint import engines, own_code, traits
from core.prune import depth

DENSE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 64,
}
NARROW = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
OWN = {
    "model_type": "depthcut_llama",
    "head_dim": 64,
    "layer_num_attention_heads": [8, 6, 8],
    "layer_num_key_value_heads": [4, 3, 4],
    "layer_intermediate_size": [1024, 1000, 1024],
}
ALIKE = {name: [sizes[0]] * 3 for name, sizes in OWN.items() if isinstance(sizes, list)}
BIASED = OWN | ALIKE | {"o_bias": True, "down_bias": True}
INT4 = {"quant_method": "torchao", "quant_type": {"default": {"_type": "IntxWeightOnlyConfig"}}}
SERVERS = ("vLLM", "SGLang")


def answers(**changes):
    return {row.engine: row.runs for row in engines.rows(DENSE | changes)}


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [
        ({}, ()),
        ({"num_hidden_layers": 2}, ()),
        (NARROW, ()),
        (NARROW | {"model_type": "mistral"}, ()),
        (NARROW | {"model_type": "qwen2"}, (*SERVERS, "MLX", "CTranslate2")),
        ({"model_type": "qwen2"}, ()),
        (NARROW | {"model_type": "qwen3"}, ()),
        ({"hidden_act": "gelu"}, ("llama.cpp", "Ollama")),
    ],
)
def test_alike_blocks_run_in_stock_classes(changes, refusing):
    found = answers(**changes)
    assert len(found) == 11
    assert {name for name, answer in found.items() if answer == "no"} == set(refusing)
    assert "with code" not in found.values()


@pytest.mark.parametrize(
    ("changes", "in_llama_cpp", "architecture"),
    [
        (OWN, "yes", "deci"),
        (BIASED, "yes", "llama"),
        (BIASED | {"model_type": "depthcut_qwen2"}, "yes", "deci"),
        (OWN | {"model_type": "depthcut_qwen3"}, "no", ""),
    ],
)
def test_individual_shapes_and_added_biases_need_code(changes, in_llama_cpp, architecture):
    found = answers(**changes)
    assert found["transformers"] == found["GPTQ (llm-compressor)"] == "with code"
    assert found["llama.cpp"] == found["Ollama"] == in_llama_cpp
    assert traits.of(DENSE | changes).architecture == architecture
    assert found["torchao"] == "yes"
    others = [*SERVERS, "MLX", "ONNX Runtime GenAI", "OpenVINO", "CTranslate2"]
    assert {found[name] for name in others} == {"no"}
    assert "trust_remote_code=True" in engines.rows(DENSE | changes)[0].command
    stranger = engines.rows(DENSE | changes, trusted=False)[0]
    assert "trust_remote_code" not in stranger.command
    assert "read it before you use it" in stranger.why


def test_quantized_weights_run_in_transformers_alone():
    found = engines.rows(DENSE | {"quantization_config": INT4})
    assert [row.engine for row in found if row.runs == "yes"] == ["transformers"]
    assert "int4: torchao must be installed" in found[0].why
    assert not any(row.command for row in found[1:])


def test_numbers_of_gpus_divide_heads_and_neurons():
    assert traits.of(DENSE).parallel == [1, 2, 4, 8]  # 4 key/value heads on 8 GPUs: two copies
    assert traits.of(DENSE | NARROW).parallel == [1]  # 3 or 6 GPUs cannot share 1024 neurons
    assert traits.of(DENSE | NARROW | {"intermediate_size": 1536}).parallel == [1, 3, 6]
    vllm = next(r for r in engines.rows(DENSE) if r.engine == "vLLM")
    assert "--tensor-parallel-size can be 2, 4 or 8." in vllm.why


def test_groups_of_the_quantizers():
    assert traits.of(DENSE).group == 128
    assert traits.of(DENSE | {"intermediate_size": 1056}).group == 32
    assert traits.of(DENSE | {"intermediate_size": 1001}).group is None
    rows = {r.engine: r for r in engines.rows(DENSE | {"intermediate_size": 1001})}
    assert "multiples of 128; here: 1,001" in rows["torchao"].why
    assert "--bits 8" in rows["torchao"].command
    assert 'scheme="W8A16"' in rows["GPTQ (llm-compressor)"].command


def test_commands_hold_for_any_folder():
    folder = "/some where/it's"
    found = (*engines.rows(DENSE, folder), *engines.of_adapter(DENSE, folder, folder + "/a", 24))
    for row in found:
        if row.language == "python":
            strings = [n.value for n in ast.walk(ast.parse(row.command))
                       if isinstance(n, ast.Constant)]  # fmt: skip
            assert folder in strings
        elif row.command:
            assert folder in shlex.split(row.command)
    adapter = {row.engine: row for row in found[-11:]}
    assert "--max-lora-rank 32" in adapter["vLLM"].command
    assert {n for n, row in adapter.items() if row.runs == "yes"} == {
        "transformers with peft", *SERVERS
    }  # fmt: skip


def test_what_the_export_refuses_is_said():
    found = engines.rows(DENSE, refused="The tokenizer is of the kind Unigram.")
    assert [r.why for r in found if r.runs == "no"] == ["The tokenizer is of the kind Unigram."] * 2


def test_the_card_holds_no_path(tiny_gqa, tmp_path):
    depth.prune(tiny_gqa, [1], tmp_path / "out", name="base")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for row in engines.rows(config):
        assert f"| {row.engine} | {row.runs} | {row.why} | {row.basis} |" in card
    assert "vllm serve PATH_OF_THIS_FOLDER" in card


def test_sizes_in_transformers_own_terms():
    config = DENSE | OWN
    assert own_code.with_own_code(config)["per_layer_config"]["1"] == {
        "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 1000
    }  # fmt: skip
    assert "per_layer_config" not in own_code.with_own_code(config | {"down_bias": True})
    assert "per_layer_config" not in own_code.with_own_code(DENSE)
