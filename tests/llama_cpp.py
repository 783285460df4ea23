"""llama.cpp itself, through xllamacpp: next-token log-probabilities and tokens of a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest


class Engine:
    """One GGUF file in llama.cpp, on the CPU."""

    def __init__(self, file: Path) -> None:
        """Load the file; skips the test if xllamacpp is not installed."""
        library = pytest.importorskip(
            "xllamacpp", reason="xllamacpp is missing: NOT compared with llama.cpp itself"
        )
        options = library.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_parallel, options.n_gpu_layers = 256, 1, 0
        options.warmup, options.verbosity = False, -1
        options.cpuparams.n_threads = 2
        kinds = library.llama_flash_attn_type
        options.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.cache_type_k = options.cache_type_v = library.ggml_type.GGML_TYPE_F32
        self._server = library.Server(options)

    def next_token(self, ids: Sequence[int], count: int = 20) -> dict[int, float]:
        """Return the log-probabilities of the ``count`` likeliest next tokens."""
        ask = {"prompt": list(ids), "n_predict": 1, "n_probs": count, "temperature": 0}
        found = self._server.handle_completions(ask)
        listed = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {token["id"]: token["logprob"] for token in listed}

    def tokens(self, text: str) -> list[int]:
        """Return a text's token ids, with BOS if the file says so."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": False}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]


def assert_same(file: Path, folder: Path, ids: Sequence[int], text: str) -> None:
    """Assert that llama.cpp and torch agree on a GGUF file and a checkpoint.

    Both give the same 20 likeliest tokens after ``ids``, with log-probabilities within 0.01 in
    float32, and the same tokens of ``text``.
    """
    import torch

    from core.model.loading import load_model, load_tokenizer

    engine = Engine(file)
    with torch.no_grad():
        model = load_model(folder, torch.device("cpu"), torch.float32)
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    theirs = engine.next_token(ids)
    assert set(theirs) == set(ours.topk(20).indices.tolist())
    assert list(theirs.values()) == pytest.approx([ours[i].item() for i in theirs], abs=0.01)
    assert engine.tokens(text) == load_tokenizer(folder)(text)["input_ids"]
