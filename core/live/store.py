"""Loaded models within a memory budget; least recently used models are evicted first."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.checkpoint import chat, headers, locate, quantized
from core.checkpoint.vocabulary import text_of
from core.data import sources
from core.data.calibration import calibration_rows
from core.data.evaluation import evaluation_tokens, windows_of
from core.errors import OptionError, OutOfMemoryError
from core.live.protocol import Perplexity
from core.live.whatif import WhatIf
from core.model import loading, memory, precision
from core.model.blocks import BlockView
from core.model.tokens import embedded
from core.runs.devices import MIB

USUAL_S = 1.2
"""Seconds that a perplexity may take by default, for the rate measured when a model was loaded."""
QUICK_S = 0.25
"""The same for a quick one, so that its figure is on the page within half a second."""
LEAST_TOKENS, QUICK_TOKENS = 1024, 256
"""The fewest tokens of a perplexity and of a quick one, however slow the model: eight windows of
128, and two, which are compared with the dense model's on the same ones and soon followed by more.
Chosen."""
SMALL, QUICK_SMALL = 1.2e11, 1.5e10
"""Operations that a perplexity and a quick one may always take: about a second and a tenth of one
on two cores, and all of the demo's text even if the machine was busy when it was loaded."""
PROBE = {"cpu": 1.4e11, "cuda": 3e13, "mps": 1e12}
"""Operations whose time gives the rate: half a second on one core."""
PROBE_WINDOW = 64
STATES_MIB = 256
"""Hidden states that a text may keep on a CPU, however small the model."""
TEXTS = 4
"""Number of texts for which a model keeps hidden states and answers."""


@dataclass
class Loaded:
    """One model, ready to answer."""

    name: str
    folder: Path
    info: headers.CheckpointInfo
    view: BlockView
    tokenizer: Any
    eos: list[int]
    """Tokens that end a text, from the checkpoint's generation settings."""
    weight_bytes: int
    texts: OrderedDict[tuple[Any, ...], WhatIf] = field(default_factory=OrderedDict)
    totals: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """Number of windows in the whole text, by the same keys."""
    warm: bool = False
    """Whether it has generated before; the first generation is slower."""
    tokens_per_s: float = 0.0
    """Rate of a perplexity, measured when first used; 0 before."""

    @property
    def bytes(self) -> int:
        """Memory of the weights and of the states kept for texts."""
        return self.weight_bytes + sum(text.state_bytes for text in self.texts.values())

    def tokens_in(self, seconds: float, least: int, operations: float = 0.0) -> int:
        """Return the number of tokens that take this long, or these operations if that is more.

        At least ``least``. The rate is measured once, so that all answers of a model are over the
        same windows.
        """
        if not self.tokens_per_s:
            self.tokens_per_s = self._rate()
        worth = int(operations / (2 * self.info.parameters))
        return max(least, worth, int(self.tokens_per_s * seconds))

    def _rate(self) -> float:
        """Measure the tokens per second of the whole model on tokens of no meaning."""
        most = PROBE.get(self.view.device.type, PROBE["cpu"]) / (2 * self.info.parameters)
        window = min(PROBE_WINDOW, self.info.context or PROBE_WINDOW)
        count = max(1, min(64, int(most / window)))
        ids = torch.arange(count * window) % embedded(self.view.model)
        probe = WhatIf(self.view, ids.view(count, window).tolist(), 0)
        probe.answer(())  # memory is allocated and kernels are chosen at the first time
        probe.forget()
        began = time.perf_counter()
        probe.answer(())
        return count * window / (time.perf_counter() - began)

    def _room(self, room_bytes: float) -> float:
        """Return the memory for one text's states: on a CPU, others need it too."""
        if self.view.device.type != "cpu":
            return room_bytes
        return min(room_bytes, max(STATES_MIB * MIB, self.weight_bytes))

    def text(self, ask: Perplexity, room_bytes: float) -> tuple[WhatIf, int, int]:
        """Return a question's text, its number of windows, and that of the whole text.

        Questions about the beginning of a text share its states with those about more of it.
        Raises `DataError` or `OptionError` if the text cannot be used.
        """
        usual = 0 if ask.samples else self.tokens_in(USUAL_S, LEAST_TOKENS, SMALL)
        most = max(ask.tokens or usual, usual)
        how: tuple[Any, ...] = (ask.window, ask.seed)
        if ask.samples is None:
            how = (ask.window, ask.bos, most, ask.spread)
        source = text_of(ask.source, self.folder)
        key = (source, sources.stamp(source), ask.samples, ask.join, ask.chat_template, *how)
        if key not in self.texts:
            windows, total = _windows(ask, source, self.tokenizer, self.info.context, most)
            self.texts[key] = WhatIf(self.view, windows, self._room(room_bytes))
            self.totals[key] = total
            while len(self.texts) > TEXTS:
                self.totals.pop(self.texts.popitem(last=False)[0], None)
        self.texts.move_to_end(key)
        text = self.texts[key]
        wanted = ask.tokens or usual
        if ask.quick and not ask.samples:
            wanted = self.tokens_in(QUICK_S, QUICK_TOKENS, QUICK_SMALL)
        count = text.windows if ask.samples else max(1, wanted // ask.window)
        return text, min(count, text.windows), self.totals[key]


def _windows(
    ask: Perplexity, source: str, tokenizer: Any, context: int, most: int
) -> tuple[list[list[int]], int]:
    """Return the windows of up to ``most`` tokens, and the number of windows in the whole text."""
    if context and ask.window > context:
        raise OptionError(
            f"--window: {ask.window} tokens are more than the model's context of {context}.",
            f"The maximum is {context}.",
        )
    if ask.samples is not None:
        rows = calibration_rows(
            source,
            tokenizer,
            ask.samples,
            ask.window,
            ask.seed,
            join=ask.join,
            chat=chat.for_text(ask.chat_template, tokenizer),
        )
        return rows, len(rows)
    streams, _ = evaluation_tokens(source, tokenizer, ask.join)
    windows = windows_of(streams, ask.window, ask.bos, tokenizer.bos_token_id)
    order = spread(len(windows)) if ask.spread else range(len(windows))
    return [windows[at] for at in order[: max(1, most // ask.window)]], len(windows)


def spread(count: int) -> list[int]:
    """Return 0 to ``count`` - 1 in an order whose every beginning is spread over all of them.

    Sorted by their binary digits read backwards (van der Corput's sequence): 0, 4, 2, 6, 1, ...
    """
    digits = max(1, (count - 1).bit_length())
    backwards = (int(f"{at:0{digits}b}"[::-1], 2) for at in range(2**digits))
    return [at for at in backwards if at < count]


class Store:
    """Models on one device; `get` loads missing ones, evicting the least recently used."""

    def __init__(
        self,
        device: torch.device,
        dtype: str,
        budget_mib: float,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Hold models on ``device`` in ``dtype`` (a name, or auto) within ``budget_mib``."""
        self.device, self.dtype, self.budget_mib, self._log = device, dtype, budget_mib, log
        self._models: OrderedDict[tuple[str, Any], Loaded] = OrderedDict()

    @property
    def used_mib(self) -> float:
        """Memory of all models and their hidden states."""
        return sum(m.bytes for m in list(self._models.values())) / MIB

    @property
    def names(self) -> list[str]:
        """Names of the loaded models, least recently used first."""
        return [m.name for m in list(self._models.values())]

    def room_bytes(self) -> float:
        """Return the memory for new states: half of what is free, so another text has room."""
        return max(0.0, (self.budget_mib - self.used_mib) * MIB / 2)

    def get(self, name: str, check: Callable[[], None] = lambda: None) -> Loaded:
        """Return the model of a checkpoint, loading it if necessary.

        ``check`` is called before loading and may raise.

        Raises:
            CheckpointError: It does not exist or cannot be read.
            OutOfMemoryError: It alone is larger than the budget or the device.
        """
        checkpoint = locate.open(name, quantized=True)
        key = (str(checkpoint.folder.resolve()), checkpoint.state)
        if key not in self._models:
            for old in [k for k in self._models if k[0] == key[0]]:  # its files have changed
                del self._models[old]
            check()
            self._models[key] = self._load(name, checkpoint)
        self._models.move_to_end(key)
        return self._models[key]

    def _load(self, name: str, checkpoint: locate.Checkpoint) -> Loaded:
        folder, info = checkpoint.folder, checkpoint.info
        decided = precision.decide(self.dtype, self.device, info.dtype)
        prepared = loading.Prepared(name, folder, self.device, decided)
        width = prepared.dtype.itemsize
        needed = quantized.stored_bytes(info.parameters, info.quantization, width) / MIB
        self._make_room(name, needed, prepared.dtype.itemsize)
        try:
            model = prepared.load(self._log)
        except OutOfMemoryError:
            self.clear()
            model = prepared.load(self._log)
        view = BlockView(model)
        eos = _ids(getattr(model.generation_config, "eos_token_id", None))
        weights = memory.weight_bytes(model.parameters())
        return Loaded(name, folder, info, view, loading.load_tokenizer(folder), eos, weights)

    def _make_room(self, name: str, needed_mib: float, itemsize: int) -> None:
        if needed_mib > self.budget_mib:
            raise OutOfMemoryError(
                f"{name} needs {needed_mib:,.0f} MiB, but the live model may use only "
                f"{self.budget_mib:,.0f}.",
                "Start it with a larger --memory"
                + (", or use --dtype bfloat16." if itemsize > 2 else "."),
            )
        if self.used_mib + needed_mib > self.budget_mib:
            for held in self._models.values():
                for text in held.texts.values():
                    text.forget_states()
        while self._models and self.used_mib + needed_mib > self.budget_mib:
            _, oldest = self._models.popitem(last=False)
            self._log(f"Unloaded {oldest.name} to make room for {name}.")
        memory.free_memory(self.device)

    def clear(self) -> None:
        """Free all models."""
        self._models.clear()
        memory.free_memory(self.device)


def _ids(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
