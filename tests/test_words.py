"""Sizes and block numbers as people read them."""

from __future__ import annotations

import pytest

from core.words import block_ranges, by_blocks, memory


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (512, "512 B"),
        (1536, "1.5 KiB"),
        (8.476 * 2**20, "8.5 MiB"),
        (99.94 * 2**20, "99.9 MiB"),
        (1000 * 2**20, "1,000 MiB"),
        (12894.6 * 2**20, "12.6 GiB"),
        (2000 * 2**30, "2,000.0 GiB"),
        (-3 * 2**20, "-3.0 MiB"),
    ],
)
def test_memory_in_the_unit_that_reads_best(size, text):
    assert memory(None if size is None else size / 2**20) == text


def test_block_ranges_name_every_block_once():
    assert block_ranges([]) == ""
    assert block_ranges([3]) == "3"
    assert block_ranges([8, 0, 1, 2, 9, 5, 1]) == "0 to 2, 5, 8 to 9"


def test_methods_with_the_same_blocks_are_named_together():
    allowed = {"PPL+": (1, 2), "FLAP": (0, 1, 2, 3), "LLM-Pruner": (1, 2), "by hand": ()}
    assert by_blocks(allowed) == "PPL+, LLM-Pruner in blocks 1 to 2; FLAP in 0 to 3"
    assert by_blocks({"by hand": ()}) == ""
