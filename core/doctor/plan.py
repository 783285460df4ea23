"""The checks in the order in which they run: the most important first; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from core.width import methods


@dataclass(frozen=True)
class Check:
    """One check: `core.doctor.checks` or `paths` has its function under the same name."""

    name: str
    title: str
    limit_s: float = 90.0
    """After this long it counts as hanging."""
    needs: tuple[str, ...] = ()
    """Libraries besides torch, transformers and safetensors, as they are imported."""
    only_cuda: bool = False
    gpus: int = 1
    """It takes this many, if it takes any."""

    @property
    def function(self) -> str:
        """Name of the function, and after a colon its argument."""
        head, _, argument = self.name.partition(":")
        return head.replace("-", "_") + (f":{argument}" if argument else "")


TRAINING = ("peft", "accelerate")
TASKS = ("lm_eval", "datasets")
PACKAGES = {"lm_eval": "lm-eval"}
"""Import name -> name of the package, if they differ."""

CHECKS = (
    Check("arithmetic", "Matrix products"),
    Check("importance", "Importance, all metrics, float32"),
    Check("perplexity", "Perplexity of a text"),
    Check("live", "Live what-if perplexity and text"),
    Check("lora", "LoRA, hand-written layers, merged", needs=TRAINING),
    Check("continued", "Continued pretraining with distillation", needs=TRAINING),
    Check("kept", "LoRA on the dense model's kept distributions", needs=TRAINING),
    Check("streamed", "Scores with the weights read block by block"),
    Check("healing", "Healing a cut"),
    Check("budget", "What versions of blocks cost"),
    Check("generate", "Training text that the model writes"),
    Check("partial", "Partial fine-tuning with kept states", needs=TRAINING),
    Check("quantized-base", "LoRA on a model in 8 bits", needs=(*TRAINING, "torchao")),
    Check("importance:bfloat16", "Importance, all metrics, bfloat16"),
    *(
        Check(f"width:{method.name}", f"Width pruning, {method.label}")
        for method in methods.METHODS.values()
    ),
    Check("recompute", "LoRA, activations recomputed, --dtype auto", needs=TRAINING),
    Check("benchmark", "Benchmark", limit_s=150.0),
    Check("compiled", "Benchmark, compiled", limit_s=150.0, only_cuda=True),
    Check("tasks", "Zero-shot tasks", needs=TASKS),
    Check("own-process", "Healing a cut, in a separate process", only_cuda=True),
    Check(
        "several", "Importance, and training with split weights, by two processes, a GPU each",
        300.0, needs=TRAINING, only_cuda=True, gpus=2,
    ),
    Check("refusal", "A device that does not exist is refused"),
    Check("utilisation", "Utilisation reported by the driver", only_cuda=True),
    Check(
        "seven-billion", "A 7B model within the memory of a 24 GiB card", 120.0,
        needs=("peft",), only_cuda=True,
    ),
)  # fmt: skip
NAMES = tuple(check.name for check in CHECKS)
