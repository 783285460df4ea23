"""Text generated token by token: stock ``generate`` with and without skipped blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from core.benchmark.generate import Clock
from core.checkpoint import chat
from core.errors import DataError, OptionError
from core.live.protocol import Generate
from core.live.replies import Begun, Reply, Token, Written
from core.live.store import Loaded
from core.live.whatif import NARROW
from core.model.memory import out_of_memory_explained, weight_bytes
from core.model.precision import dtype_name
from core.model.tokens import check_ids, embedded, pad_id
from core.prune.outlook import outlook
from core.runs.devices import MIB

Emit = Callable[[Reply], None]


class _Decoder:
    """Turns one row's tokens into text piece by piece; holds back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        self._from = 0

    def add(self, token: int) -> str:
        """Return the text that ``token`` adds.

        It is decoded with the tokens before it, because they determine its leading space.
        """
        self._ids.append(token)
        before = self._text(self._from, self._shown)
        now = self._text(self._from, len(self._ids))
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """Return the text held back so far."""
        before = self._text(self._from, self._shown)
        return self._text(self._from, len(self._ids))[len(before) :]

    def _text(self, first: int, last: int) -> str:
        return self._tokenizer.decode(self._ids[first:last], skip_special_tokens=True)


class _Stream:
    """Streamer for ``generate``: forwards tokens and records times."""

    def __init__(self, tokenizer: Any, rows: int, eos: list[int], emit: Emit, clock: Clock) -> None:
        self._decoders = [_Decoder(tokenizer) for _ in range(rows)]
        self._eos, self._emit, self._clock = set(eos), emit, clock
        self._prompt = True
        self.ended = [False] * rows
        self.tokens = [0] * rows
        self.first: Any = None

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt [rows, tokens], then one token per row [rows]."""
        if self._prompt:
            self._prompt = False
            return
        if self.first is None:
            self.first = self._clock.mark()
        ids = value.tolist()
        pieces = [self._piece(row, token) for row, token in enumerate(ids)]
        self._emit(Token(ids=tuple(ids), texts=tuple(pieces)))

    def _piece(self, row: int, token: int) -> str:
        if self.ended[row]:
            return ""
        self.tokens[row] += 1
        if token in self._eos:
            self.ended[row] = True
            return self._decoders[row].rest()
        return self._decoders[row].add(token)

    def end(self) -> None:
        """Send the text still held back."""
        rest = ["" if e else d.rest() for d, e in zip(self._decoders, self.ended, strict=True)]
        if any(rest):
            self._emit(Token(texts=tuple(rest)))


def prompt_ids(loaded: Loaded, ask: Generate) -> list[int]:
    """Return the prompt's tokens; raises `DataError` or `OptionError` if it cannot be used."""
    if not ask.prompt.strip():
        raise DataError("The prompt is empty.", "Enter a few words to continue.")
    tokenizer = loaded.tokenizer
    if ask.chat:
        template = chat.of_tokenizer(tokenizer)
        if template is None:
            raise OptionError(
                f"The tokenizer of {loaded.name} has no chat template.",
                "Send the prompt as plain text.",
            )
        text = template.render([{"role": "user", "content": ask.prompt}], prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(ask.prompt)
    check_ids([ids], embedded(loaded.view.model))
    context = loaded.info.context
    if context and len(ids) + ask.max_tokens > context:
        room = context - len(ids)
        way = f"Use --max-tokens {room} or fewer." if room > 0 else "Shorten the prompt."
        raise OptionError(
            f"{len(ids)} prompt tokens and {ask.max_tokens} new ones are more than the model's "
            f"context of {context}.",
            way,
        )
    return list(ids)


def _config(loaded: Loaded, ask: Generate) -> Any:
    """Return the generation settings; also set them on the model, which would add its own."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=ask.max_tokens,
        use_cache=True,
        eos_token_id=loaded.eos or None,
        pad_token_id=pad_id(loaded.tokenizer, embedded(loaded.view.model)),
        **_sampling(ask),
    )
    loaded.view.model.generation_config = config
    return config


def _sampling(ask: Generate) -> dict[str, Any]:
    if not ask.temperature:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": ask.temperature,
        "top_k": ask.top_k,
        "top_p": ask.top_p,
    }


@contextlib.contextmanager
def _threads_for(view: Any) -> Iterator[None]:
    """Compute with one thread on a CPU if the model is narrow (see `NARROW`)."""
    threads = torch.get_num_threads()
    if view.device.type == "cpu":
        torch.set_num_threads(1 if view.hidden_size <= NARROW else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def write(loaded: Loaded, ask: Generate, emit: Emit, stop: Callable[[], bool]) -> Written:
    """Continue the prompt without the blocks of ``skip``; return the measurements.

    Emits a `Begun`, then a `Token` for every step. ``stop`` is called before every token.

    Raises:
        PlanError: A block does not exist, or none would be left.
        DataError | OptionError: The prompt or its length cannot be used.
    """
    view = loaded.view
    removal = view.check_skip(ask.removal)
    ids = prompt_ids(loaded, ask)
    dtype = dtype_name(view.dtype)
    sizes: dict[str, Any] = {
        "batch": ask.batch,
        "context": len(ids) + ask.max_tokens,
        "dtype": dtype,
    }
    batch = torch.tensor([ids] * ask.batch, device=view.device)
    with view.skip(removal) as model, out_of_memory_explained("generating"), _threads_for(view):
        weights = list(model.parameters())  # of its current blocks; tied weights count once
        begun = Begun(
            device=str(view.device),
            dtype=dtype,
            parameters=sum(p.numel() for p in weights),
            weights_mib=weight_bytes(weights) / MIB,
            cache_mib=outlook(loaded.info, removal, **sizes).kv_bytes / MIB,
            prompt_tokens=len(ids),
            blocks=len(view.blocks),
        )
        emit(begun)
        if not loaded.warm:
            model.generate(batch[:1], max_new_tokens=2, pad_token_id=0)
            loaded.warm = True
        return _timed(loaded, ask, batch, emit, stop, begun)


def _timed(
    loaded: Loaded,
    ask: Generate,
    batch: torch.Tensor,
    emit: Emit,
    stop: Callable[[], bool],
    begun: Begun,
) -> Written:
    """Generate and return tokens, times, and on CUDA the peak memory of this model alone."""
    device = batch.device
    cuda = device.type == "cuda"
    config = _config(loaded, ask)
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    stream = _Stream(loaded.tokenizer, len(batch), loaded.eos, emit, clock)

    def ended(given: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((given.shape[0],), stop(), dtype=torch.bool, device=device)

    torch.manual_seed(ask.seed)
    clock.wait()
    start = clock.mark()
    loaded.view.model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        generation_config=config,
        streamer=stream,
        stopping_criteria=[ended],
    )
    end = clock.mark()
    clock.wait()
    seconds, tokens = clock.between_s(start, end), sum(stream.tokens)
    grown = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return Written(
        **vars(begun),
        tokens=tokens,
        seconds=seconds,
        first_token_s=clock.between_s(start, stream.first) if stream.first else None,
        tokens_per_s=tokens / seconds if seconds else None,
        ended=all(stream.ended),
        peak_mib=begun.weights_mib + grown / MIB if cuda else None,
    )
