"""The rule for precision: what every kind of device does with every checkpoint, without torch."""

from __future__ import annotations

import pytest

from core.runs import devices, dtypes

CPU_PLAIN = ("cpu", dtypes.native_formats("cpu"))
CPU_BF16 = ("cpu", dtypes.native_formats("cpu", cpu_bfloat16=True))
PASCAL = ("cuda:0", dtypes.native_formats("cuda", capability=(6, 1)))
VOLTA = ("cuda:0", dtypes.native_formats("cuda", capability=(7, 0)))
TURING = ("cuda:1", dtypes.native_formats("cuda", capability=(7, 5)))
AMPERE = ("cuda:0", dtypes.native_formats("cuda", capability=(8, 0)))
HOPPER = ("cuda:0", dtypes.native_formats("cuda", capability=(9, 0)))
UNKNOWN = ("cuda:0", dtypes.native_formats("cuda"))
APPLE = ("mps", dtypes.native_formats("mps"))


@pytest.mark.parametrize(
    ("device", "declared", "computed"),
    [
        (CPU_PLAIN, "bfloat16", "float32"),
        (CPU_PLAIN, "float16", "float32"),
        (CPU_BF16, "bfloat16", "bfloat16"),
        (CPU_BF16, "float16", "float32"),
        (PASCAL, "bfloat16", "float32"),
        (PASCAL, "float16", "float32"),
        (VOLTA, "float16", "float16"),
        (TURING, "bfloat16", "float16"),
        (TURING, "float16", "float16"),
        (AMPERE, "bfloat16", "bfloat16"),
        (AMPERE, "float16", "bfloat16"),
        (HOPPER, "bfloat16", "bfloat16"),
        (UNKNOWN, "float16", "bfloat16"),
        (APPLE, "bfloat16", "bfloat16"),
        *(
            (device, wide, "float32")
            for device in (CPU_PLAIN, CPU_BF16, TURING, AMPERE, APPLE)
            for wide in ("float32", "float64", "float8_e4m3fn")
        ),
    ],
)
def test_auto_computes_the_same_whatever_the_model_is_for(device, declared, computed):
    whole = dtypes.choose("auto", declared, *device, "whole")
    assert whole == dtypes.Formats(computed, computed)
    blocks = dtypes.choose("auto", declared, *device, "blocks")
    assert blocks.arithmetic == computed
    assert dtypes.BYTES[blocks.weights] <= dtypes.BYTES[whole.weights]


def test_scoring_keeps_bfloat16_weights_small_on_a_cpu_that_widens_them():
    found = dtypes.choose("auto", "bfloat16", *CPU_PLAIN, "blocks")
    assert found == dtypes.Formats("bfloat16", "float32")


@pytest.mark.parametrize("asked", dtypes.COMPUTED)
@pytest.mark.parametrize("device", [CPU_PLAIN, CPU_BF16, TURING, AMPERE])
def test_an_explicit_precision_is_taken(asked, device):
    for purpose in ("whole", "training", "adapters"):
        found = dtypes.choose(asked, "bfloat16", *device, purpose)
        narrow = asked == "float16" and purpose == "training"  # AdamW needs float32 weights
        assert found == dtypes.Formats("float32" if narrow else asked, asked)
    assert dtypes.choose(asked, "bfloat16", *device, "blocks").weights == asked


@pytest.mark.parametrize(
    ("device", "declared", "whole", "adapters"),
    [
        (CPU_PLAIN, "bfloat16", ("float32", "float32"), ("float32", "float32")),
        (CPU_BF16, "bfloat16", ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
        (CPU_BF16, "float16", ("float32", "float32"), ("float32", "float32")),
        (CPU_BF16, "float32", ("float32", "float32"), ("float32", "float32")),
        (TURING, "bfloat16", ("float32", "float32"), ("float32", "float32")),
        (AMPERE, "bfloat16", ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
        (AMPERE, "float16", ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
        (AMPERE, "float32", ("float32", "bfloat16"), ("float32", "bfloat16")),
    ],
)
def test_training_never_takes_float16_by_itself(device, declared, whole, adapters):
    assert dtypes.choose("auto", declared, *device, "training") == dtypes.Formats(*whole)
    assert dtypes.choose("auto", declared, *device, "adapters") == dtypes.Formats(*adapters)


def test_gradients_are_not_computed_in_float16():
    assert dtypes.for_gradients("float16") == "float32"
    assert dtypes.for_gradients("bfloat16") == "bfloat16"
    assert dtypes.for_gradients("float32") == "float32"


def test_an_estimate_asks_about_the_device(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    assert dtypes.expected("auto", "bfloat16", "cpu").weights == "float32"
    assert dtypes.expected("auto", "bfloat16", "cpu", "blocks").weights == "bfloat16"
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    assert dtypes.expected("auto", "bfloat16", "cpu").weights == "bfloat16"
    monkeypatch.setattr(devices, "cuda_capability", {0: (8, 0), 1: (7, 5)}.get)
    assert dtypes.expected("auto", "bfloat16", "cuda").weights == "bfloat16"
    assert dtypes.expected("auto", "bfloat16", "cuda:1").weights == "float16"
