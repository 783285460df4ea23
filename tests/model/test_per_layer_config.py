"""per_layer_config beside the custom code: loading is the same with it; stock classes refuse it."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.checkpoint import own_code
from core.model import modeling_depthcut

SIZES = {
    "model_type": "depthcut_llama",
    "architectures": ["DepthcutLlamaForCausalLM"],
    "head_dim": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "layer_num_attention_heads": [4, 2, 4],
    "layer_num_key_value_heads": [2, 1, 2],
    "layer_intermediate_size": [48, 40, 32],
}
IDS = torch.arange(2, 22)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with individual shapes, once without per_layer_config and once with it."""
    without, beside = tmp_path_factory.mktemp("without"), tmp_path_factory.mktemp("beside")
    torch.manual_seed(0)
    config = modeling_depthcut.DepthcutLlamaConfig.from_dict(SIZES | {"initializer_range": 0.3})
    modeling_depthcut.DepthcutLlamaForCausalLM(config).save_pretrained(without)
    shutil.copytree(without, beside, dirs_exist_ok=True)
    saved = json.loads((without / "config.json").read_text())
    written = own_code.with_own_code(saved)
    plain = {k: v for k, v in written.items() if k != "per_layer_config"}
    (without / "config.json").write_text(json.dumps(plain))
    (beside / "config.json").write_text(json.dumps(written))
    for folder in (without, beside):
        assert own_code.copy(written, folder)
        assert own_code.is_trusted(folder)
    return without, beside


def test_the_code_loads_the_same_model(folders):
    logits = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [48, 40, 32]
        with torch.no_grad():
            logits.append(model(IDS).logits)
    assert torch.equal(*logits)
    assert logits[0].std() > 0.1
    text = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert text.shape == (1, 24)


def test_without_the_code_nothing_is_built(folders, tmp_path):
    beside = folders[1]
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(beside, trust_remote_code=False)
    stock = tmp_path / "stock"
    shutil.copytree(beside, stock, ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((stock / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k != "auto_map" and not k.startswith("layer_")}
    kept |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (stock / "config.json").write_text(json.dumps(kept))
    assert kept["per_layer_config"]["1"]["intermediate_size"] == 40
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(stock)
