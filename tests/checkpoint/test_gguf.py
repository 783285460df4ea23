"""GGUF headers: what is read, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from core.checkpoint import gguf, gguf_config
from core.errors import CheckpointError
from tests import gguf_files, tiny


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A tiny LLaMA as GGUF, with Q8_0 matrices."""
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.write(
        folder / "tiny.gguf", tiny.model("tied", intermediate_size=64), tiny.tokenizer(), "Q8_0"
    )


def test_header_equals_the_gguf_library(file):
    from gguf import GGUFReader

    found, theirs = gguf.read(file), GGUFReader(str(file))
    assert found.architecture == "llama"
    assert {t.name: (t.shape, t.storage, t.start, t.size) for t in found.tensors.values()} == {
        t.name: (tuple(map(int, reversed(t.shape))), t.tensor_type.name, t.data_offset, t.n_bytes)
        for t in theirs.tensors
    }
    assert set(found.metadata) == {key for key in theirs.fields if not key.startswith("GGUF.")}
    assert found.metadata["tokenizer.ggml.tokens"] == gguf.Length(320)
    assert found.get("embedding_length") == tiny.HIDDEN


def test_block_sizes_equal_the_gguf_library():
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, (number, values, width) in gguf.BLOCKS.items():
        kind = GGMLQuantizationType(number)
        assert (kind.name, GGML_QUANT_SIZES[kind]) == (name, (values, width))


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1
    return data.replace(old, new)


BAD = {
    "not GGUF at all": (lambda d: b"PK\3\4" + d[4:], "is not a GGUF file: it does not begin"),
    "empty": (lambda d: b"", "is not a GGUF file: it is empty"),
    "cut in the header": (lambda d: d[:900], "is truncated: its header"),
    "cut in the weights": (lambda d: d[:-1], "is truncated: it has"),
    "version 1": (lambda d: d[:4] + struct.pack("<I", 1) + d[8:], "is GGUF version 1"),
    "big-endian": (lambda d: d[:4] + struct.pack(">I", 3) + d[8:], "is big-endian"),
    "many entries": (
        lambda d: d[:16] + struct.pack("<Q", 1 << 60) + d[24:],
        "is a damaged GGUF file: it declares",
    ),
    "another architecture": (
        lambda d: _patched(d, struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 5) + b"gemma"),
        "of the architecture 'gemma', which is not supported. Supported: llama",
    ),
    "unknown quantization": (
        lambda d: _patched(d, struct.pack("<QQI", 32, 320, 8), struct.pack("<QQI", 32, 320, 39)),
        "stores 'token_embd.weight' as MXFP4, a quantization that is not read here",
    ),
    "unnamed quantization": (
        lambda d: _patched(d, struct.pack("<QQI", 32, 320, 8), struct.pack("<QQI", 32, 320, 99)),
        "as number 99",
    ),
    "a tensor too few": (
        lambda d: _patched(d, b"blk.0.ffn_up.weight", b"blk.9.ffn_up.weight"),
        "does not hold the tensor 'blk.0.ffn_up.weight'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_sentence(case, file, tmp_path):
    change, expected = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=expected):
        gguf_config.config_of(gguf.read(path))


def test_a_part_of_a_split_file_is_refused(file, tmp_path):
    part = tmp_path / "model-00001-of-00003.gguf"
    part.write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 1 of 3.*llama-gguf-split --merge"):
        gguf.read(part)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope__scaling__type": "longrope"}, "scales its rotary embeddings by 'longrope'"),
        ({"rope__scaling__attn_factor": 2.0}, "the rope scaling entry 'attn_factor'"),
        ({"feed_forward_length": [48, 48, 48, 48, 16]}, "gives every block its own"),
        ({"attention__key_length": 16}, "keys of 16, values of"),
        ({"block_count": None}, "in llama.block_count, None is not a whole number"),
        ({"block_count": 4}, "holds tensors that a llama checkpoint here has no place for"),
    ],
)
def test_what_transformers_would_ignore_is_refused(entries, expected, tmp_path):
    path = gguf_files.write(tmp_path / "x.gguf", tiny.model(), **entries)
    with pytest.raises(CheckpointError, match=expected):
        gguf_config.config_of(gguf.read(path))


@pytest.mark.parametrize(
    ("entries", "rope"),
    [
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 2.0,
                "rope__scaling__original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling_is_kept(entries, rope, tmp_path):
    path = gguf_files.write(tmp_path / "x.gguf", tiny.model(), **entries)
    found = gguf_config.config_of(gguf.read(path))["rope_parameters"]
    assert found == {"rope_theta": 10000.0, **rope}
