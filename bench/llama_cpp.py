"""llama.cpp in this process, through xllamacpp, asked for what torch can be asked for too."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Engine:
    """A GGUF file loaded by llama.cpp; its server answers on the loopback address only."""

    address: str

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with what the file says is added around it."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._post("/tokenize", body)["tokens"]

    def top(self, ids: Sequence[int], count: int) -> dict[int, float]:
        """Return the most probable next tokens and their log-probabilities (natural)."""
        # Probabilities come with text only, which neither the end of a text nor half a character
        # is; so a bias has a plain letter chosen, which what is reported does not contain.
        letter = self.tokenize("a")[-1]
        answer = self._complete(ids, 1, n_probs=count, logit_bias=[[letter, 10_000.0]])
        found = answer["completion_probabilities"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in found}

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return the next ``count`` tokens, each the most probable one."""
        return self._complete(ids, count)["tokens"]

    def logprob(self, ids: Sequence[int], following: int) -> float:
        """Return the log-probability of one token after ``ids``.

        A bias makes llama.cpp choose it; what it reports is the probability without the bias.
        """
        answer = self._complete(ids, 1, n_probs=1, logit_bias=[[following, 10_000.0]])
        found = answer["completion_probabilities"][0]
        assert found["id"] == following, found
        return found["logprob"]

    def nll(self, ids: Sequence[int], start: int = 1) -> float:
        """Return the mean negative log-likelihood of ``ids`` from ``start`` on, in nats."""
        places = range(start, len(ids))
        return -sum(self.logprob(ids[:at], ids[at]) for at in places) / len(places)

    def _complete(self, ids: Sequence[int], count: int, **more: Any) -> dict[str, Any]:
        body = {"prompt": list(ids), "n_predict": count, "temperature": 0, "return_tokens": True}
        return self._post("/completion", {**body, "cache_prompt": True, **more})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)


@contextlib.contextmanager
def engine(path: Path, context: int = 512, threads: int = 1) -> Iterator[Engine]:
    """Load a GGUF file in llama.cpp, computing in float32 as far as it can."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel = context, 1
    params.warmup = params.ui = params.fit_params = False
    params.verbosity = -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    try:
        loaded = Engine(server.listening_address)
        # Ended before its loop has begun, a server never ends; a completion waits for the loop.
        loaded._complete(loaded.tokenize("a")[-1:], 1)
        yield loaded
    finally:
        del server
