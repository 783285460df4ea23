"""Sizes and block numbers as people read them."""

from __future__ import annotations

import math

import pytest

from core.words import block_ranges, brief, by_blocks, duration, parameters, rounded, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1,023 B"),
        (1536, "1.50 KiB"),
        (8.476 * 2**20, "8.48 MiB"),
        (9.997 * 2**20, "10.0 MiB"),
        (60 * 2**20, "60.0 MiB"),
        (99.97 * 2**20, "100 MiB"),
        (1000 * 2**20, "1,000 MiB"),
        (12894.6 * 2**20, "12.6 GiB"),
        (2048 * 2**30, "2.00 TiB"),
        (5000 * 2**40, "5,000 TiB"),
        (-3 * 2**20, "-3.00 MiB"),
    ],
)
def test_sizes_have_three_digits_in_the_unit_that_reads_best(count, text):
    assert size(count) == text


def test_parameters_are_short_or_exact_as_long_as_they_fit():
    counts = (32_096, 2_222_464, 134_515_008, 70_553_706_496)
    assert [parameters(n) for n in counts] == ["32,096", "2.222 M", "134.5 M", "70.55 B"]
    exact = [parameters(n, exact=True) for n in counts]
    assert exact == ["32,096", "2,222,464", "134,515,008", "70.55 B"]


def test_block_ranges_name_every_block_once():
    assert block_ranges([]) == ""
    assert block_ranges([3]) == "3"
    assert block_ranges([8, 0, 1, 2, 9, 5, 1]) == "0 to 2, 5, 8 to 9"


def test_methods_with_the_same_blocks_are_named_together():
    allowed = {"PPL+": (1, 2), "FLAP": (0, 1, 2, 3), "LLM-Pruner": (1, 2), "by hand": ()}
    assert by_blocks(allowed) == "PPL+, LLM-Pruner in blocks 1 to 2; FLAP in 0 to 3"
    assert by_blocks({"by hand": ()}) == ""


def test_durations_read_the_same_everywhere():
    spans = (0.4, 59.4, 59.6, 185, 3599, 7800, 100_000, 266_400, math.inf)
    assert [duration(seconds) for seconds in spans] == [
        "0 s", "59 s", "1 min 0 s", "3 min 5 s", "59 min 59 s", "2 h 10 min", "27 h 46 min",
        "3 days 2 h", "forever",
    ]  # fmt: skip


def test_numbers_have_four_digits_and_no_exponent():
    found = [rounded(value) for value in (0.012345, 1.5, 64.386, 1234.5, 9999.6, 15990.4, 1.4e9)]
    assert found == ["0.01235", "1.5", "64.39", "1,234", "10,000", "15,990", "1,400,000,000"]
    assert [brief(value) for value in (0.00012, 0.1104, 1.0, 14.16, 2000.4)] == [
        "0.12 ms", "110 ms", "1 s", "14.2 s", "2,000 s",
    ]  # fmt: skip
