"""Tiny GGUF files, written with the gguf library as llama.cpp's converter writes them.

``write(path, model)`` stores a transformers model of `tests.tiny`; ``storages`` chooses how each
matrix is stored. K-quants, which the library cannot make, are random blocks with sane scales.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.checkpoint import gguf as header
from core.checkpoint.gguf_config import gguf_name, llama3_divisors

_SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Bytes of a K-quant's block where its half-precision scales begin."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows in llama.cpp's order: pairs of a rotation side by side."""
    half = weight.shape[0] // heads // 2
    rows = [
        weight[head * 2 * half + part * half + i]
        for head in range(heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return np.stack(rows)


def blocks(storage: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return random bytes that are valid blocks of a K-quant, [rows, bytes per row]."""
    _, values, width = header.BLOCKS[storage]
    rng = np.random.default_rng(seed)
    rows, count = shape[0], shape[1] // values
    found = rng.integers(0, 256, (rows, count, width), dtype=np.uint8)
    for at in _SCALES[storage]:
        scale = rng.uniform(2e-5, 1e-4, (rows, count, 1)).astype(np.float16)
        found[:, :, at : at + 2] = scale.view(np.uint8)
    return found.reshape(rows, count * width)


def write(
    path: Path,
    model: Any,
    tokenizer: Any = None,
    storages: Any = "F32",
    **entries: Any,
) -> Path:
    """Write a transformers model (and tokenizer) as GGUF.

    ``storages``: one name for all matrices, or a function of the tensor's transformers name.
    ``entries`` replace or add metadata of the architecture; None leaves one out.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    config = model.config
    family = "llama" if config.model_type == "mistral" else config.model_type
    rope = config.rope_parameters
    facts = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.value_length": config.head_dim if hasattr(config, "head_dim") else None,
        "rope.freq_base": float(rope["rope_theta"]),
        **{key.replace("__", "."): value for key, value in entries.items()},
    }
    writer = GGUFWriter(str(path), family)
    writer.add_name("Tiny")
    for key, value in facts.items():
        if isinstance(value, str):
            writer.add_string(f"{family}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{family}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{family}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer, config.vocab_size)
    if rope.get("rope_type") == "llama3":
        width = config.head_dim
        divisors = llama3_divisors(rope, rope["rope_theta"], width)
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if family == "llama" and part in name:
                values = permuted(values, heads)
        storage = storages if isinstance(storages, str) else storages(name)
        kind = GGMLQuantizationType[storage if values.ndim == 2 else "F32"]
        if kind.name in _SCALES:
            data = blocks(kind.name, values.shape, number)
        else:
            data = quants.quantize(values, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    import json

    table = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    special = {token["id"] for token in table["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([3 if i in special else 1 if i in by_id else 5 for i in range(size)])
    merges = table["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def as_f32(file: Path, target: Path) -> Path:
    """Write a GGUF file again with every tensor dequantized by the gguf library; same metadata."""
    import mmap
    import struct

    from gguf import GGMLQuantizationType, dequantize

    found = header.read(file)
    tensors = list(found.tensors.values())
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = tensors[0].name.encode()
        begin = data.find(struct.pack("<Q", len(first)) + first)  # the table of tensors
        table, offset = bytes(data[:begin]), 0
        for tensor in tensors:
            name, shape = tensor.name.encode(), tensor.shape[::-1]
            table += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape))
            table += struct.pack(f"<{len(shape)}QIQ", *shape, 0, offset)
            offset += -(-tensor.parameters * 4 // 32) * 32
        with target.open("wb") as out:
            out.write(table + bytes(-len(table) % 32))
            for tensor in tensors:
                raw = np.frombuffer(data[tensor.start : tensor.start + tensor.size], np.uint8)
                kind = GGMLQuantizationType[tensor.storage]
                rows = raw.reshape(-1, tensor.size // (tensor.parameters // tensor.shape[-1]))
                if kind.name == "F32":
                    values = raw.view(np.float32)
                elif kind.name == "F16":
                    values = raw.view(np.float16)
                else:
                    values = dequantize(rows, kind)
                values = values.astype(np.float32).tobytes()
                out.write(values + bytes(-len(values) % 32))
    return target
