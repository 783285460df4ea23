"""Specs: command line, saved JSON and widgets' dictionaries give the same thing."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from dataclasses import dataclass

import numpy as np
import pytest

from core import __main__ as cli
from core import commands
from core.errors import OptionError
from core.runs import spec
from core.runs.spec import option


@dataclass(frozen=True, kw_only=True)
class Everything:
    """One field of every kind."""

    where: str = option(positional=True, help="Place.")
    more: tuple[str, ...] = option((), positional=True, help="More places.")
    out: str = option(help="Folder.")
    count: int = option(3, help="Count.", low=1, high=9)
    rate: float = option(1e-4, help="Rate, in %.", unit="1/s", low=0)
    limit: int | None = option(None, help="Limit.")
    cap: int | None = option(7, help="Cap.")
    blocks: tuple[int, ...] = option((), help="Blocks.", low=0)
    sizes: tuple[int, ...] = option((1, 4), help="Sizes.")
    rates: tuple[float, ...] = option((), help="Rates.")
    tasks: tuple[str, ...] = option((), help="Tasks.")
    source: tuple[str, ...] = option((), help="Sources.", repeat=True)
    kind: str = option("a", help="Kind.", choices=("a", "b"))
    fast: bool = option(False, help="Fast.")
    careful: bool = option(True, help="Careful.")


def from_argv(spec_class, argv):
    parser = argparse.ArgumentParser(exit_on_error=False)
    spec.add_arguments(parser, spec_class)
    return spec.from_namespace(spec_class, parser.parse_args(argv))


def test_command_line_gives_the_values_that_were_typed():
    typed = """
        here there --out o --count 4 --rate 2e-3 --limit 5 --cap none --blocks 3,5,7-9 --sizes 16
        --rates .5,1 --tasks a,b --source one,two --source three --kind b --fast --no-careful
    """
    given = from_argv(Everything, typed.split())
    assert given == Everything(
        where="here",
        more=("there",),
        out="o",
        count=4,
        rate=0.002,
        limit=5,
        cap=None,
        blocks=(3, 5, 7, 8, 9),
        sizes=(16,),
        rates=(0.5, 1.0),
        tasks=("a", "b"),
        source=("one,two", "three"),
        kind="b",
        fast=True,
        careful=False,
    )
    assert from_argv(Everything, ["p", "--out", "o"]) == Everything(where="p", out="o")


ODD = [
    {"where": "-dash", "out": "-o"},
    {"where": "a b'c", "out": "", "limit": -3, "rate": 1e-300},
    {"where": "w", "out": "o", "cap": None, "sizes": (), "source": ("-s", "x,y z")},
    {"where": "w", "out": "o", "more": ("m", "-n"), "blocks": (9, 1, 4), "careful": False},
]


@pytest.mark.parametrize("values", ODD)
def test_argv_round_trip_of_awkward_values(values):
    wanted = Everything(**values)
    assert from_argv(Everything, spec.to_arguments(wanted)) == wanted
    assert spec.build(Everything, json.loads(json.dumps(spec.to_dict(wanted)))) == wanted


def some_value(kind, meta, rng):
    if meta["choices"]:
        return rng.choice(meta["choices"])
    if kind is int:
        low = int(meta["low"] if meta["low"] is not None else -5)
        return rng.randint(low, int(meta["high"] if meta["high"] is not None else low + 50))
    if kind is float:
        low = meta["low"] if meta["low"] is not None else -1.0
        return rng.uniform(low, meta["high"] if meta["high"] is not None else low + 3.0)
    return rng.choice(["demo", "a folder/with space", "-odd", "it's.txt", "hub:a/b:train"])


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_every_command_round_trips(name):
    command = commands.COMMANDS[name]
    spec_class, rng = command.spec_class, random.Random(name)
    hints = spec.hints_of(spec_class)
    for _ in range(25):
        values = {}
        for field in dataclasses.fields(spec_class):
            kind, many, _ = spec.kind_of(hints[field.name])
            if field.default is not dataclasses.MISSING and rng.random() < 0.4:
                continue
            if kind is bool:
                values[field.name] = rng.random() < 0.5
            elif many:
                values[field.name] = tuple(
                    some_value(kind, field.metadata, rng) for _ in range(rng.randint(1, 3))
                )
            else:
                values[field.name] = some_value(kind, field.metadata, rng)
        wanted = spec.build(spec_class, values)
        parser = cli._parser(command)
        read = spec.from_namespace(spec_class, cli._parse(parser, spec.to_arguments(wanted)))
        assert read == wanted
        assert spec.build(spec_class, json.loads(json.dumps(spec.to_dict(wanted)))) == wanted


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_every_option_is_described(name):
    spec_class = commands.COMMANDS[name].spec_class
    assert spec_class.__doc__.strip().splitlines()[0].endswith(".")
    for field in dataclasses.fields(spec_class):
        assert len(field.metadata["help"]) > 3, field.name
    assert spec_class.__dataclass_params__.frozen
    cli._parser(commands.COMMANDS[name]).format_help()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--count x", ["--count", "'x'", "whole number"]),
        ("--count 0", ["--count", "0", "minimum is 1"]),
        ("--count 10", ["--count", "10", "maximum is 9"]),
        ("--rate fast", ["--rate", "'fast'", "a number"]),
        ("--rate nan", ["--rate", "nan", "a number"]),
        ("--rate inf", ["--rate", "inf"]),
        ("--blocks 3,x", ["--blocks", "'x'", "range"]),
        ("--blocks 8-3", ["--blocks", "'8-3'", "reversed"]),
        ("--blocks 1-999999999999", ["--blocks", "too long"]),
        ("--blocks -3", ["--blocks", "-3", "minimum is 0"]),
        ("--kind c", ["--kind", "'c'", "a, b"]),
    ],
)
def test_errors_name_flag_and_value(argv, words):
    flag, value = argv.split()
    with pytest.raises(OptionError) as caught:
        from_argv(Everything, ["w", "--out", "o", f"{flag}={value}"])
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "Missing required options: WHERE, --out."),
        ({"where": "w", "out": "o", "speed": 1}, "Unknown option: speed"),
        ({"where": "w", "out": "o", "count": "3"}, "--count: invalid value '3'. Expected a "),
        ({"where": "w", "out": "o", "count": 2.5}, "--count: invalid value '2.5'. Expected a "),
        ({"where": "w", "out": "o", "count": True}, "--count: invalid value 'True'. Expected a "),
        ({"where": "w", "out": "o", "count": None}, "--count: invalid value 'None'. Expected a "),
        (
            {"where": "w", "out": "o", "rate": float("nan")},
            "--rate: invalid value 'nan'. Expected a number",
        ),
        ({"where": 3, "out": "o"}, "WHERE: invalid value '3'. Expected a string"),
        ({"where": "w", "out": "o", "fast": "yes"}, "--fast: invalid value 'yes'. Expected true"),
        ({"where": "w", "out": "o", "blocks": 3}, "--blocks: invalid value '3'. Expected a "),
        ({"where": "w", "out": "o", "blocks": "3"}, "--blocks: invalid value '3'. Expected a "),
        ({"where": "w", "out": "o", "tasks": ["a,b"]}, "--tasks: 'a,b' contains a comma"),
    ],
)
def test_dictionaries_are_checked_too(values, words):
    with pytest.raises(OptionError, match=".*") as caught:
        spec.build(Everything, values)
    assert words in str(caught.value)


def test_widgets_values_become_plain_ones(tmp_path):
    built = spec.build(
        Everything,
        {
            "where": tmp_path,
            "out": "o",
            "count": np.int64(4),
            "rate": 1,
            "limit": 5.0,
            "blocks": [np.int32(2)],
            "rates": np.array([0.5]),
        },
    )
    assert built.where == str(tmp_path)
    assert built.rate == 1.0
    assert [type(v) for v in (built.count, built.rate, built.limit)] == [int, float, int]
    assert [type(v) for v in (*built.blocks, *built.rates)] == [int, float]
    json.dumps(spec.to_dict(built))


def test_defaults_are_left_out_and_percent_signs_survive_help():
    assert spec.to_arguments(Everything(where="w", out="o")) == ["w", "--out", "o"]
    parser = argparse.ArgumentParser()
    spec.add_arguments(parser, Everything)
    text = " ".join(parser.format_help().split())
    assert "Rate, in %. (1/s) Default: 0.0001." in text
