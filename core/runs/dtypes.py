"""The one rule for precision: what weights are held in and what is computed in; no torch.

Every command asks `choose`, through `core.model.precision` if it computes and through `expected`
if it only estimates, so that ``--dtype auto`` means the same everywhere and two commands give the
same number on the same device.

``auto`` computes in the checkpoint's format if the device has instructions for it:

- float32 checkpoints are computed in float32 everywhere.
- A CPU computes bfloat16 checkpoints in bfloat16 if it has instructions for it (AVX-512 BF16 or
  AMX), else in float32, which is several times faster there than emulated bfloat16. float16
  checkpoints are computed in float32. The processor decides, not a timing, so that a machine
  always gives the same numbers. Measured with SmolLM2-135M on one core of a Zen 4: perplexity
  takes 0.55 times as long in bfloat16, generating as long for one sequence and 1.45 times as
  long for 16.
- A GPU computes 16-bit checkpoints in bfloat16 if it can (compute capability 8.0 and above,
  Apple), because float16 overflows beyond 65,504, which activations of some LLaMA models reach.
- Turing and Volta GPUs (7.x) have no bfloat16 but are built for float16: they compute in float16.
  float32 would take twice the memory and several times as long. Overflow cannot pass unnoticed:
  weights, losses and gradients are checked for values that are not finite.
- Older GPUs compute in float32.

Training follows the same rule. What is trained (adapters, or all weights) and the optimiser's state
are float32 whatever is computed in, and a GPU that computes in bfloat16 trains in it for any
checkpoint. On one core of a Zen 4, LoRA on SmolLM2 in bfloat16 takes a third of float32's time.

Gradients are not computed in float16 unless asked: small ones become zero there. Training and
Taylor scores take float32 instead (`for_gradients`). A training with ``--dtype float16`` scales its
loss, and the weights that it trains are float32: steps smaller than float16 resolves would be lost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from core.runs import devices

BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2,
    "uint8": 1, "bool": 1,
}  # fmt: skip
"""Bytes of an element, by transformers' name of its format."""
COMPUTED = ("float32", "bfloat16", "float16")
"""The formats that ``--dtype`` can ask for."""
DTYPE_BYTES = {name: BYTES[name] for name in COMPUTED}

Purpose = Literal["whole", "blocks", "training", "adapters"]
"""What the model is for.

whole: passes through the stock model, whose weights are held as they are computed in (evaluation,
live model, benchmark). blocks: scoring block by block, where the weights stay as small as they are
and one block at a time is widened (importance, curve, width). training: all weights are trained.
adapters: LoRA, whose frozen weights are not.
"""


@dataclass(frozen=True)
class Formats:
    """What weights are held in, and what is computed in."""

    weights: str
    arithmetic: str


def computable(name: str) -> str:
    """Return ``name`` if it can be computed in, else float32."""
    return name if name in COMPUTED else "float32"


def choose(
    asked: str, declared: str, device: str, native: Collection[str], purpose: Purpose = "whole"
) -> Formats:
    """Return the formats for one model on one device.

    Args:
        asked: ``--dtype``: auto, or one of `COMPUTED`, which is then taken for both, except that
            "blocks" still widens on a CPU without instructions for it, and weights in "training"
            are float32 if they compute in float16.
        declared: The format that the checkpoint is stored in.
        device: ``cpu``, ``cuda:K``, ``mps``, or only the kind.
        native: The 16-bit formats that the device has instructions for (`native_formats`).
        purpose: See `Purpose`.
    """
    on_cpu = device.partition(":")[0] == "cpu"
    if asked == "float16" and purpose == "training":
        return Formats("float32", "float16")
    if asked != "auto":
        widened = purpose == "blocks" and on_cpu
        return Formats(asked, _computed(asked, on_cpu, native) if widened else asked)
    if purpose in ("training", "adapters"):
        frozen = _computed(declared, on_cpu, native)
        # What is trained is float32: an optimiser's steps are smaller than 16 bits resolve.
        if "bfloat16" not in native or (on_cpu and frozen == "float32"):
            return Formats("float32", "float32")
        return Formats(frozen if purpose == "adapters" else "float32", "bfloat16")
    computed = _computed(declared, on_cpu, native)
    if purpose == "blocks" and on_cpu and declared == "bfloat16":
        return Formats("bfloat16", computed)
    return Formats(computed, computed)


def _computed(held: str, on_cpu: bool, native: Collection[str]) -> str:
    """Return what weights held in ``held`` are computed in."""
    if computable(held) == "float32":
        return "float32"
    if on_cpu:
        return "bfloat16" if held == "bfloat16" and "bfloat16" in native else "float32"
    return next((half for half in ("bfloat16", "float16") if half in native), "float32")


def for_gradients(arithmetic: str) -> str:
    """Return the format that gradients are computed in if everything else takes ``arithmetic``."""
    return "float32" if arithmetic == "float16" else arithmetic


def native_formats(
    kind: str, *, capability: tuple[int, int] | None = None, cpu_bfloat16: bool = False
) -> frozenset[str]:
    """Return the 16-bit formats that a device has instructions for.

    ``capability`` is a GPU's CUDA compute capability; None (not known) counts as a present one.
    """
    if kind == "cpu":
        return frozenset({"bfloat16"} if cpu_bfloat16 else ())
    if kind == "cuda" and capability is not None and capability < (8, 0):
        return frozenset({"float16"} if capability >= (7, 0) else ())
    return frozenset({"bfloat16", "float16"})


def expected(asked: str, declared: str, device: str, purpose: Purpose = "whole") -> Formats:
    """Return `choose` for a device name as ``--device`` has it, for estimates; torch-free."""
    name = devices.resolve(device)
    kind, _, index = name.partition(":")
    native = native_formats(
        kind,
        capability=devices.cuda_capability(int(index or 0)) if kind == "cuda" else None,
        cpu_bfloat16=kind == "cpu" and devices.cpu_has_bfloat16(),
    )
    return choose(asked, declared, name, native, purpose)
