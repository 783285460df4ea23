"""Batches of answers: prompts of similar length together, each batch recorded when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from core.data.diversity import loops
from core.errors import DataError, OutOfMemoryError
from core.generate.prompts import Prompts
from core.generate.spec import BATCH, GenerateSpec, temperature_of
from core.generate.tape import Answer, Tape
from core.model import decode, memory
from core.model.tokens import pad_id

if TYPE_CHECKING:
    from core.model.loading import Prepared
    from core.runs.progress import Progress

LOOK_EVERY = 8
"""New tokens between two looks for a loop or for the start of a next turn."""
TAIL = 24
"""Tokens that are decoded to find the start of a next turn."""


class Writer:
    """Lets a model answer prompts."""

    def __init__(
        self,
        spec: GenerateSpec,
        found: Prompts,
        tokenizer: Any,
        prepared: Prepared,
        progress: Progress,
    ) -> None:
        """Take the prompts; the model is loaded once something must be written."""
        self.spec, self.found, self.tokenizer = spec, found, tokenizer
        self.prepared, self.progress = prepared, progress
        self.batch = spec.batch or BATCH.get(prepared.device.type, BATCH["cpu"])
        self.temperature = temperature_of(spec, found.kind)
        self._done = 0

    def write(self, tape: Tape) -> None:
        """Write all answers that are not on ``tape``, longest prompts first."""
        prompts = self.found.found
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
        batches = [order[at : at + self.batch] for at in range(0, len(order), self.batch)]
        left = [batch for batch in batches if not all(i in tape.answers for i in batch)]
        self._done = len(prompts) - sum(map(len, left))
        if not left:
            return
        model = self.prepared.load(self.progress.log)
        ends = self._ends(model)
        for batch in left:
            began = time.perf_counter()
            answers = self._answers(model, batch, ends)
            tape.add(answers, time.perf_counter() - began)
            self._done += len(batch)
            self.progress.step(self._done, len(prompts), "Writing answers")

    def _ends(self, model: Any) -> set[int]:
        """Return the tokens that end an answer; raises `DataError` if one is needed and missing."""
        named = getattr(model.generation_config, "eos_token_id", None)
        found = {*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id}
        ends = {one for one in found if isinstance(one, int)}
        must_end = self.spec.check != "none" and self.found.kind != "text"
        if must_end and not ends and not self.found.stops:
            raise DataError(
                "This checkpoint's tokenizer has no end token, so an answer never ends.",
                "Set eos_token in tokenizer_config.json, or use --check none.",
            )
        return ends

    def _answers(self, model: Any, batch: Sequence[int], ends: set[int]) -> dict[int, Answer]:
        """Return the answers of one batch, in two halves if it does not fit into memory."""
        prompts = [self.found.found[number].ids for number in batch]
        pick: decode.Pick = decode.greedy
        if self.temperature:
            pick = decode.sampler(self.temperature, self.spec.seed, batch)
        try:
            with memory.out_of_memory_explained("writing answers"):
                written = decode.decode(
                    model,
                    prompts,
                    most=self.spec.max_tokens,
                    ends=ends,
                    pick=pick,
                    stop=self._stop,
                    pad=pad_id(self.tokenizer, model.get_input_embeddings().num_embeddings),
                    on_token=self.progress.check_cancel,
                )
        except OutOfMemoryError:
            if len(batch) == 1:
                raise
            memory.free_memory(self.prepared.device)
            half = len(batch) // 2
            self.progress.log(f"Out of memory: a batch of {len(batch)} is halved.")
            return self._answers(model, batch[:half], ends) | self._answers(
                model, batch[half:], ends
            )
        return {n: Answer(one.ids, one.why) for n, one in zip(batch, written, strict=True)}

    def _stop(self, _: int, ids: Sequence[int]) -> str:
        """Return why an answer ends here although its model goes on."""
        if len(ids) % LOOK_EVERY:
            return ""
        if self.found.stops:
            tail = self.tokenizer.decode(ids[-TAIL:], skip_special_tokens=True)
            if any(stop in tail for stop in self.found.stops):
                return "end"
        return "loop" if self.spec.check != "none" and loops(ids) else ""

    def text(self, number: int, ids: Sequence[int]) -> str:
        """Return an answer as text, without the next turn if its model began one.

        Tokens are decoded behind the prompt's last ones, which determine their leading space.
        """
        before = list(self.found.found[number].ids[-4:])
        known = self.tokenizer.decode(before, skip_special_tokens=True)
        whole = self.tokenizer.decode([*before, *ids], skip_special_tokens=True)
        text = whole[len(known) :] if whole.startswith(known) else whole
        for stop in self.found.stops:
            text = text.partition(stop)[0]
        return text if self.found.kind == "text" else text.strip()
