"""Fused layers against those of transformers and peft: outputs, gradients, dropout, fallbacks."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from core.retrain import fused
from core.retrain.spec import PROJECTIONS

IDS = torch.randint(5, 300, (3, 24), generator=torch.Generator().manual_seed(3))
PACKED = torch.cat([torch.arange(9), torch.arange(11), torch.arange(4)]).expand(3, -1)
"""Positions of three rows in one sequence."""


def adapted(folder, *, dropout=0.0, targets=PROJECTIONS, seed=5):
    """A tiny model with adapters whose output is not zero."""
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # neither all 0 nor all 1
                weight.add_(0.1 * torch.randn(weight.shape, generator=seeded(seed)))
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, target_modules=list(targets), bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = get_peft_model(model, config).train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def outcome(model, **inputs):
    """Logits, and the gradients of a loss that depends on every logit."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False, **inputs).logits.float()
    (logits * torch.randn(logits.shape, generator=seeded(1))).mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def same(one, other, rel=2e-5):
    assert one[1].keys() == other[1].keys()
    torch.testing.assert_close(one[0], other[0], rtol=rel, atol=rel * float(one[0].abs().max()))
    for name, gradient in one[1].items():
        most = rel * float(gradient.abs().max())
        torch.testing.assert_close(other[1][name], gradient, rtol=rel, atol=most, msg=name)


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "llama3", "mistral", "qwen2"])
@pytest.mark.parametrize("inputs", [{}, {"position_ids": PACKED}], ids=["rows", "packed"])
def test_adapters_have_the_gradients_of_peft(tiny_dir, variant, inputs):
    model = adapted(tiny_dir(variant))
    stock = outcome(model, **inputs)
    assert len(stock[1]) == 5 * 7 * 2
    assert fused.install(model) == 5
    same(stock, outcome(model, **inputs))


def test_converting_weights_again_gives_the_same_and_keeps_less(tiny_dir):
    found, kept = [], []
    for keep in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_dir("gqa")).train()
        assert fused.install(model, keep=keep) == 5
        saved, own = {}, {weight.data_ptr() for weight in model.parameters()}

        def save(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16), hooks:
            found.append(outcome(model))
        kept.append(sum(count for at, count in saved.items() if at not in own))
    same(*found, rel=1e-9)
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    assert kept[0] - kept[1] > 0.9 * blocks


@pytest.mark.parametrize("variant", ["gqa", "qwen2"])
def test_all_weights_have_the_gradients_of_transformers(tiny_dir, variant):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir(variant)).train()
    stock = outcome(model)
    assert any("layernorm" in name for name in stock[1])
    assert fused.install(model) == 5
    same(stock, outcome(model))


def test_adapters_on_some_projections_only(tiny_dir):
    model = adapted(tiny_dir("gqa"), targets=("v_proj", "down_proj"))
    stock = outcome(model)
    fused.install(model)
    same(stock, outcome(model))


def test_half_precision_is_as_close_to_float32_as_the_stock_layers_are(tiny_dir):
    model = adapted(tiny_dir("gqa"))
    exact = outcome(model)
    half = torch.autocast("cpu", dtype=torch.bfloat16)

    def errors():
        with half:
            logits, gradients = outcome(model)
        pairs = [(logits, exact[0]), *((gradients[n], exact[1][n]) for n in exact[1])]
        return [float((a - b).norm() / b.norm()) for a, b in pairs]

    stock = errors()
    fused.install(model)
    mine = errors()
    assert 0 < mine[0] < 1.3 * stock[0]
    assert sum(mine) < 1.3 * sum(stock)
    # The frozen weights held in bfloat16 too, as on a GPU.
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    held = errors()
    assert max(held) < 0.2
    model.eval()
    with torch.no_grad():  # without autocast the adapters compute in the weights' precision
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_generation_keeps_its_cache(tiny_dir):
    model = adapted(tiny_dir("gqa")).eval()
    want = model.generate(input_ids=IDS[:1], max_new_tokens=12, do_sample=False)
    fused.install(model)
    assert torch.equal(model.generate(input_ids=IDS[:1], max_new_tokens=12, do_sample=False), want)


def test_merging_and_disabling_adapters_still_work(tiny_dir):
    model = adapted(tiny_dir("gqa")).eval()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
        fused.install(model)
        with model.disable_adapter():
            without = model(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_dir("gqa")).eval()
        assert float((without - want).abs().max()) > 0.01
        whole = model.merge_and_unload()
        torch.testing.assert_close(whole(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
        assert whole.state_dict().keys() == plain.state_dict().keys()


def test_unsupported_models_are_left_unchanged(tiny_dir):
    other = AutoModelForCausalLM.from_pretrained(tiny_dir("qwen3"))
    assert fused.install(other) == 0
    assert "forward" not in vars(other.model.layers[0])
    eager = AutoModelForCausalLM.from_pretrained(tiny_dir("gqa"), attn_implementation="eager")
    assert fused.install(eager) == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("gqa")).train()
    fused.install(model)
    model.model.layers[0].self_attn.attention_dropout = 0.9  # falls back to the stock layer
    torch.manual_seed(0)
    first, second = (model(input_ids=IDS).logits for _ in range(2))
    assert not torch.equal(first, second)


# --- dropout ---


@pytest.mark.parametrize("share", [0.05, 0.3, 0.95])
def test_elements_are_dropped_independently_with_equal_probability(share):
    torch.manual_seed(4)
    shapes = [(50, 8), (50, 16)]
    tries = 600
    counts = [torch.zeros(math.prod(shape)) for shape in shapes]
    pairs = 0.0
    for _ in range(tries):
        drawn = fused.draw_dropout(shapes, share, torch.device("cpu"))
        for count, positions in zip(counts, drawn, strict=True):
            assert positions.unique().tolist() == positions.tolist()
            mask = torch.zeros(len(count)).index_fill_(0, positions, 1)
            count += mask
            pairs += float((mask[1:] * mask[:-1]).sum()) / tries
    spread = math.sqrt(share * (1 - share) / tries)
    for count in counts:
        error = (count / tries - share) / spread  # a standard normal for each element
        assert float(error.abs().max()) < 4.7
        assert abs(float(error.mean())) < 4.5 / math.sqrt(len(count))
        assert 0.85 < float(error.std()) < 1.15
    expected = share**2 * (399 + 799)
    assert pairs == pytest.approx(expected, abs=5 * math.sqrt(2 * expected / tries))


def test_dropout_by_its_definition(tiny_dir):
    """Gradients equal those of peft's layers with the same elements set to 0 by hand."""
    model = adapted(tiny_dir("gqa"), dropout=0.3)
    fused.install(model)
    drawn = []
    draw = fused.draw_dropout

    def keep(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "draw_dropout", keep)
        torch.manual_seed(9)
        mine = outcome(model)
    assert [len(dropped) for dropped in drawn] == [7] * 5
    torch.manual_seed(9)
    again = outcome(model)
    assert torch.equal(mine[0], again[0])
    stock = adapted(tiny_dir("gqa"), dropout=0.3)
    for layer, dropped in zip(stock.get_base_model().model.layers, drawn, strict=True):
        modules = [getattr(layer.self_attn, n) for n in PROJECTIONS[:4]]
        modules += [getattr(layer.mlp, n) for n in PROJECTIONS[4:]]
        for module, positions in zip(modules, dropped, strict=True):
            module.lora_dropout["default"].forward = by_hand(positions, 0.3)
    same(outcome(stock), mine, rel=5e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=IDS).logits, stock.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )


def by_hand(positions, share):
    def forward(x):
        keep = torch.ones(x.numel())
        keep[positions] = 0
        return x * keep.view(x.shape) / (1 - share) if torch.is_grad_enabled() else x

    return forward
