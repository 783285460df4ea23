"""One timed generation: forced length, the paper's sampling, time to first token."""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch

from core.benchmark.protocol import PROMPT, TOP_K, TOP_P
from core.errors import RunError
from core.model.tokens import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Tokens:
    """A stopping criterion that never stops and records when it is called: at most so often."""

    def __init__(self, clock: Clock, most: int) -> None:
        self.clock, self.most = clock, most
        self.marks: list[Any] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if len(self.marks) < self.most:
            self.marks.append(self.clock.mark())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


class Clock:
    """Time on one device: CUDA events, or the wall clock once the device is idle."""

    now = staticmethod(time.perf_counter)
    """The clock of devices without events."""

    def __init__(self, device: torch.device) -> None:
        """Measure on ``device``."""
        self.device = device

    def wait(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def mark(self) -> Any:
        """Return a time mark on the device."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        self.wait()
        return self.now()

    def between_s(self, first: Any, last: Any) -> float:
        """Return the seconds between two marks; on CUDA, call `wait` first."""
        if self.device.type == "cuda":
            return float(first.elapsed_time(last)) / 1000.0
        return float(last - first)


def force_length(model: PreTrainedModel, output_tokens: int, *, compiled: bool = False) -> Any:
    """Return a generation config for exactly ``output_tokens`` new tokens, and set it on the model.

    It has no end token, so that nothing ends early and no time is spent on suppressing one.
    ``compiled``: with a static cache, and steps compiled by torch.compile as transformers does it,
    which a CUDA device replays as graphs.
    """
    from transformers import GenerationConfig

    static: dict[str, Any] = {}
    if compiled:
        from transformers import CompileConfig

        how = CompileConfig()
        how._compile_all_devices = True  # by itself, transformers compiles on GPUs only
        static = {"cache_implementation": "static", "compile_config": how}
    config = GenerationConfig(
        **static,
        max_new_tokens=output_tokens,
        do_sample=True,
        top_k=TOP_K,
        top_p=TOP_P,
        use_cache=True,
        pad_token_id=0,
    )
    model.generation_config = config
    return config


def prompt_ids(tokenizer: Any, vocab: int, input_tokens: int) -> list[int]:
    """Return ``input_tokens`` ids: the paper's prompt, repeated or truncated.

    Without a tokenizer, they are a fixed sequence through the vocabulary. Raises `DataError` if the
    tokenizer gives an id outside of it.
    """
    ids = [(7 + 31 * n) % vocab for n in range(input_tokens)]
    if tokenizer is not None:
        text = tokenizer.encode(PROMPT)
        ids = [text[n % len(text)] for n in range(input_tokens)]
        check_ids([ids], vocab)
    return ids


def timed(model: PreTrainedModel, ids: torch.Tensor, config: Any) -> tuple[float, float]:
    """Generate once and return (total seconds, seconds to the first token).

    Args:
        model: The model, on the device of ``ids``.
        ids: Prompts ``[batch, tokens]``.
        config: From `force_length`.

    Raises:
        RunError: The output does not have the forced length.
    """
    clock, start, marks, end = _generate(model, ids, config, 1)
    return clock.between_s(start, end), clock.between_s(start, marks[0])


def stepwise(model: PreTrainedModel, ids: torch.Tensor, config: Any) -> tuple[float, list[float]]:
    """Generate once and return (seconds to the first token, seconds of each further step).

    Arguments and errors are those of `timed`.
    """
    clock, start, marks, _ = _generate(model, ids, config, config.max_new_tokens)
    steps = [clock.between_s(one, other) for one, other in itertools.pairwise(marks)]
    return clock.between_s(start, marks[0]), steps


def _generate(
    model: PreTrainedModel, ids: torch.Tensor, config: Any, most: int
) -> tuple[Clock, Any, list[Any], Any]:
    """Generate; return the clock and the marks of start, the first ``most`` tokens, and end."""
    from transformers import StoppingCriteriaList

    clock = Clock(ids.device)
    tokens = _Tokens(clock, most)
    clock.wait()
    start = clock.mark()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([tokens]),
        )
    end = clock.mark()
    clock.wait()
    wanted = ids.shape[1] + config.max_new_tokens
    if output.shape[1] != wanted:
        raise RunError(
            f"The output has {output.shape[1]} tokens instead of the forced {wanted}.",
            "This model's generate() ignores max_new_tokens, so it cannot be compared.",
        )
    return clock, start, tokens.marks, end


def tiny_model(
    blocks: int, device: torch.device, dtype: torch.dtype, width: int = 32
) -> PreTrainedModel:
    """Return a LLaMA with random weights and tiny blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(2, width // 32),
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def import_and_settle(device: torch.device) -> None:
    """Load and run a tiny model, so that libraries do not count towards a model's memory."""
    from core.model.loading import load_model

    model = tiny_model(1, device, torch.float32)
    timed(model, torch.ones(1, 4, dtype=torch.long, device=device), force_length(model, 3))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load_model(folder, device, torch.float32, check=False)
