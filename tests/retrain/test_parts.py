"""Retraining a variant whose blocks lack attention or MLP: fused where whole, and merged."""

import pytest
import torch
from retrain_helpers import execute, summary
from transformers import AutoModelForCausalLM

from core.checkpoint import headers
from core.checkpoint.drop import Removal
from core.prune import depth
from core.retrain import fused

CUT = Removal((), (3,), (1,))


@pytest.fixture(scope="module")
def parts(tiny_gqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "cut"
    depth.prune(tiny_gqa, CUT, folder)
    return folder


def test_whole_layers_are_fused_and_the_gradients_are_the_same(parts):
    ids = torch.randint(5, 300, (2, 16), generator=torch.Generator().manual_seed(3))
    found = []
    for install in (False, True):
        model = AutoModelForCausalLM.from_pretrained(parts, trust_remote_code=True)
        assert not install or fused.install(model) == 3  # of 5 blocks
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        kept = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((float(loss.detach()), kept))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_retrained_variant_keeps_its_parts(parts, tiny_gqa, tasks, tmp_path, method):
    out = tmp_path / "out"
    options = {"checkpoint": str(parts), "dense": str(tiny_gqa), "data": tasks, "method": method}
    sizes = {"steps": 2, "batch": 4, "cutoff": 128, "holdout": 6, "template": "plain"}
    assert execute(**options, **sizes, merge=method == "lora", out=str(out)) == 0
    assert summary(out)["merged"]["max_logit_difference"] < 1e-4
    before, after = headers.inspect(parts), headers.inspect(out / "merged")
    assert after.block_shapes == before.block_shapes
    assert after.parameters == before.parameters
    assert not after.unused_tensors
    assert (out / "merged" / "modeling_depthcut.py").is_file()
