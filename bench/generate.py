"""New tokens per second of ``generate`` against transformers: ``python -m bench.generate``.

The same prompts, in the same batches, with greedy decoding. transformers' own ``generate`` computes
a batch until its last row has ended; ours lets rows leave, and keeps room for keys and values
instead of copying them at every token. Both count the tokens of answers only. Run it on a quiet
machine; ``--checkpoint`` and ``--prompts`` are those of ``generate``.
"""

from __future__ import annotations

import argparse
import time

import torch

from core.checkpoint import locate
from core.generate import prompts as reading
from core.generate.spec import GenerateSpec
from core.generate.writing import Writer
from core.model import decode, loading
from core.model.tokens import pad_id
from core.retrain.encoders import ModelTokenizer, config_eos
from core.runs.progress import SILENT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--prompts", default="demo")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine")
    given = parser.parse_args()
    clock = time.process_time if given.processor_time else time.perf_counter
    spec = GenerateSpec(
        checkpoint=given.checkpoint, prompts=given.prompts, out="", samples=given.samples,
        max_tokens=given.max_tokens, batch=given.batch, temperature=0.0, check="none",
    )  # fmt: skip
    checkpoint = locate.open(given.checkpoint)
    tokenizer = loading.load_tokenizer(checkpoint.folder)
    encoder = ModelTokenizer(tokenizer, config_eos(checkpoint.folder))
    info = checkpoint.info
    found = reading.read(spec, encoder, vocab=info.vocab, context=info.context)
    prepared = loading.prepare(spec, checkpoint)
    model = prepared.load(SILENT.log)
    ends = Writer(spec, found, tokenizer, prepared, SILENT)._ends(model)
    order = sorted((prompt.ids for prompt in found.found), key=len, reverse=True)
    batches = [order[at : at + given.batch] for at in range(0, len(order), given.batch)]
    pad = pad_id(tokenizer, model.get_input_embeddings().num_embeddings)

    def ours(batch: list[tuple[int, ...]]) -> int:
        written = decode.decode(model, batch, most=given.max_tokens, ends=ends, pad=pad)
        return sum(len(one.ids) for one in written)

    @torch.inference_mode()
    def stock(batch: list[tuple[int, ...]]) -> int:
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(row)) + [*row] for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        out = model.generate(
            ids.to(prepared.device), attention_mask=mask.to(prepared.device), do_sample=False,
            max_new_tokens=given.max_tokens, eos_token_id=sorted(ends) or None, pad_token_id=pad,
        )  # fmt: skip
        rows = out[:, width:].tolist()
        return sum(next((i for i, t in enumerate(row) if t in ends), len(row)) for row in rows)

    ours(batches[-1]), stock(batches[-1])
    rates: dict[str, list[float]] = {"generate": [], "transformers": []}
    for _ in range(given.repeats):  # in turn, so that both see the same machine
        for name, write in (("generate", ours), ("transformers", stock)):
            began = clock()
            tokens = sum(map(write, batches))
            rates[name].append(tokens / (clock() - began))
    middle = {name: sorted(found)[len(found) // 2] for name, found in rates.items()}
    print(f"{len(order)} prompts of {given.prompts}, batches of {given.batch}, "
          f"up to {given.max_tokens} tokens, {given.checkpoint}, {prepared.device}")  # fmt: skip
    for name, rate in middle.items():
        print(f"{name:14} {rate:8.1f} new tokens/s")
    print(f"{'ratio':14} {middle['generate'] / middle['transformers']:8.2f}")


if __name__ == "__main__":
    main()
