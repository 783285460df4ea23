"""What the tests of the live process share."""

from __future__ import annotations

import math
import time

import torch

from core.data.evaluation import evaluation_windows, token_stream
from core.live import client
from core.live.replies import Token
from core.model import loading

CPU = torch.device("cpu")


def naive_perplexity(folder, windows):
    """Perplexity by one plain pass of stock transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(windows)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].log_softmax(-1)
    nll = -logits.gather(2, ids[:, 1:, None]).double()
    return math.exp(nll.mean().item())


def windows_of(folder, source, window, bos):
    """The windows that evaluate judges by."""
    tokenizer = loading.load_tokenizer(folder)
    ids = token_stream(str(source), tokenizer)
    return evaluation_windows(ids, window, bos, tokenizer.bos_token_id)


def until(true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def texts(events):
    return "".join(e.texts[0] for e in events if isinstance(e, Token))


def ask(record, folder, **values):
    return client.answer(record, "perplexity", {"checkpoint": str(folder), **values})
