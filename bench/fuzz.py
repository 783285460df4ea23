"""Damaged input for every reader of files from outside: ``python -m bench.fuzz --minutes 5``.

Each reader gets valid files, mutated: bytes flipped, cut and repeated, numbers replaced by huge and
non-finite ones, values in JSON replaced by ones of other types, columns dropped. A reader may
return or raise a `DepthcutError`. Any other exception, more than `MOST_SECONDS` of computing or
more than `MOST_BYTES` of Python objects is a failure: it is printed with its seed, and the exit
status is 1. ``tests/test_fuzz.py`` runs the same readers for seconds.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gzip
import importlib
import io
import json
import os
import random
import re
import shutil
import socket
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import DepthcutError

MOST_SECONDS = 2.0
MOST_BYTES = 96 << 20
RESULTS = (
    "core.benchmark.results", "core.evaluate.results", "core.prune.results",
    "core.prune.score_results", "core.recipes.results", "core.retrain.results",
    "core.width.results",
)  # fmt: skip
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 63, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("inf"), float("-inf"), float("nan"), "", " ", "a", "\ud800", "\0", "a" * 300, "9" * 5000,
    "../x", "/etc/passwd", "~nobody-here", "model.layers.999999999999.x", "<img src=x>", "1", "inf",
    [], [[]], {}, [None], [1] * 1000, {"a": {}}, [{}], {"model_type": 1},
)  # fmt: skip
NUMBERS = (
    b"0", b"-1", b"3e8", b"300000000", b"2000000000", b"1e999", b"-1e999", b"Infinity", b"NaN",
    b"inf", b"nan", b"9" * 30, b"9" * 5000, b"0.5", b"1_0", b"", b"null", b'"7"', b"[]",
)  # fmt: skip
SNIPPETS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b",", b'"', b"{", b"}", b"[" * 100_000,
    b'{"a":' * 2000, b"\\ud800", b"\xed\xa0\x80", b",," * 500, b"\x80" * 20, b"=", b"\x1a",
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """One kind of file: valid content, and how it is read from a folder."""

    name: str
    file: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], Any]
    beside: tuple[tuple[str, bytes], ...] = ()
    """Other files of the folder, left whole."""


# --------------------------------------------------------------------------------------- mutations


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """Return ``seed`` with one to four mutations."""
    data = seed
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        data = draw.choice((_json, _json, _json, _number, _bytes, _lines))(data, draw)
    return data


def _json(data: bytes, draw: random.Random) -> bytes:
    """Replace, remove or repeat a value somewhere in a JSON document (or in a line of them)."""
    lines = data.split(b"\n") if data.startswith(b"{") and b"}\n{" in data else [data]
    place = draw.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except (ValueError, RecursionError):
        return _bytes(data, draw)
    spots = list(_spots(value))
    if not spots:
        return json.dumps(draw.choice(NASTY)).encode()
    holder, key = draw.choice(spots)
    kind = draw.random()
    if kind < 0.15:
        del holder[key]
    elif kind < 0.25 and isinstance(holder, dict):
        holder[draw.choice(("x", "", "model.layers.1.x", "9" * 5000))] = holder.pop(key)
    elif kind < 0.35:
        other, name = draw.choice(spots)
        holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other))
    else:
        holder[key] = draw.choice(NASTY)
    lines[place] = json.dumps(value).encode()
    return b"\n".join(lines)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


def _number(data: bytes, draw: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?", data))
    if not found:
        return _bytes(data, draw)
    one = draw.choice(found)
    return data[: one.start()] + draw.choice(NUMBERS) + data[one.end() :]


def _bytes(data: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:first]
    if kind == 1:
        return data[:first] + data[last:]
    if kind == 2:
        return data[:last] + data[first:last] * draw.choice((1, 3)) + data[last:]
    if kind == 3:
        return data[:first] + draw.choice(SNIPPETS) + data[first:]
    return data[:first] + bytes([draw.randrange(256)]) + data[first + 1 :]


def _lines(data: bytes, draw: random.Random) -> bytes:
    lines = data.split(b"\n")
    kind, place = draw.randrange(4), draw.randrange(len(lines))
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(place, draw.choice(lines))
    elif kind == 2:
        draw.shuffle(lines)
    else:
        cells = lines[place].split(b",")
        cells[draw.randrange(len(cells))] = draw.choice((*NUMBERS, *SNIPPETS))
        lines[place] = b",".join(cells)
    return b"\n".join(lines)


# ----------------------------------------------------------------------------------------- readers


def example(hint: Any) -> Any:
    """Return a value of an annotated type, for a valid result file."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return example(next(kind for kind in inner if kind is not type(None)))
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {f.name: example(hints[f.name]) for f in dataclasses.fields(hint) if f.init}
        return hint(**fields)  # type: ignore[operator]
    if origin in (tuple, list):
        kinds = inner[:1] * 2 if origin is list or inner[1:] == (...,) else inner
        return origin(example(kind) for kind in kinds)
    if origin is dict:
        return {"a": example(inner[1]), "b": example(inner[1])}
    return {int: 3, float: 0.25, bool: True, str: "demo"}.get(hint, {})


class _Files:
    """Takes what a result writes."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.data[name] = json.dumps({"schema": 1, **value}).encode()

    def write_csv(self, name: str, columns: Any, rows: Any) -> None:
        lines = [",".join(map(str, row)) for row in (columns, *rows)]
        self.data[name] = "\n".join(lines).encode()


def _result_kinds() -> list[type]:
    from core.runs.results import CsvRow, JsonResult

    kinds = []
    for module in map(importlib.import_module, RESULTS):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, CsvRow | JsonResult):
                kinds.append(kind)
    return [k for k in dict.fromkeys(kinds) if k not in (CsvRow, JsonResult)]


def _results() -> Iterator[Reader]:
    from core.runs.results import JsonResult

    for kind in _result_kinds():
        files = _Files()
        if issubclass(kind, JsonResult):
            example(kind).write(files)
        else:
            kind.write(files, [example(kind)] * 3)  # type: ignore[attr-defined]
        ((file, data),) = files.data.items()
        name = f"{kind.__module__.removeprefix('core.')}.{kind.__name__}"
        yield Reader(f"result {name}", file, (data,), functools.partial(_result, kind))


def _result(kind: Any, folder: Path) -> None:
    found = kind.read(folder)
    for one in found if isinstance(found, tuple) else [found] if found else []:
        for name in dir(one):  # also what is derived
            value = getattr(one, name)
            if name == "to_dict":
                value()


CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "eos_token_id": [1],
    "dtype": "float32",
}
OWN_SHAPES = CONFIG | {
    "model_type": "depthcut_llama",
    "layer_num_attention_heads": [2, 2, 2],
    "layer_num_key_value_heads": [2, 2, 2],
    "layer_intermediate_size": [12, 12, 12],
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 15, "content": "</s>", "special": True, "single_word": False,
                      "lstrip": False, "rstrip": False, "normalized": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {chr(97 + i): i for i in range(15)}, "unk_token": "a"},
}  # fmt: skip


PIECES = b"\x0a\x05\x0a\x01a\x15\x00" * 9
"""Of a sentencepiece model."""
IDS = b'input_ids\n"1,2"\n'


def _weights() -> tuple[bytes, bytes]:
    """Return the header and the bytes of the tensors that `CONFIG` describes."""
    from core.checkpoint import families

    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in families.expected_shapes(CONFIG).items():
        size = 4 * families.count(shape)
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return json.dumps(table).encode(), bytes(end)


def _whole_weights() -> bytes:
    header, tensors = _weights()
    return struct.pack("<Q", len(header)) + header + tensors


def _checkpoint(folder: Path) -> None:
    from core.checkpoint import families, headers, locate
    from core.checkpoint.drop import Removal
    from core.prune import depth
    from core.prune.plan import choose
    from core.width.units import units_of

    found = locate.at(folder)
    headers.check_tokenizer(found.info, needed=False)
    found.info.to_dict()
    families.without_blocks(found.config, [0])
    if found.info.blocks > 1:
        depth.make_record(folder, found.info, Removal((0,))).to_text()
        choose(None, "last", ratio=0.2, info=found.info)
    units_of(found.info)
    locate.open(str(folder), need="headers", need_tokenizer=False)


def _header(folder: Path) -> None:
    """Put the mutated header in front of whole tensors."""
    header = (folder / "header").read_bytes()
    _, tensors = _weights()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + tensors)
    _checkpoint(folder)


def _tokenizer(folder: Path) -> None:
    from core.checkpoint.tokenizer import tokenizer_info
    from core.study.tokenizers import tokenizer_key

    tokenizer_key(folder)
    tokenizer_info(folder)


def _file_tokenizer(folder: Path) -> None:
    from core.retrain.encoders import FileTokenizer

    FileTokenizer(folder).encode("a b </s>")


def _scores(folder: Path) -> None:
    from core.prune import scores
    from core.prune.plan import choose

    path = folder / "blocks.csv"
    for source in (path, folder):
        found = scores.load(source)
        for criterion in found.available:
            try:
                choose(found, criterion if criterion != "score" else "ppl", count=1).to_dict()
            except DepthcutError:
                continue


def _plan(folder: Path) -> None:
    from core.checkpoint import locate
    from core.heal.command import PruneSpec, dry_run

    locate.open("demo")
    dry_run(PruneSpec(checkpoint="demo", plan=str(folder / "plan.json"), out=str(folder / "out")))


class _Encoder:
    bos_token_id = 1

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [len(word) for word in text.split()]


def _text(folder: Path) -> None:
    from core.data import calibration, evaluation, sources

    (path,) = folder.glob("data.*")
    rows = functools.partial(
        calibration.calibration_rows,
        tokenizer=_Encoder(),
        samples=2,
        length=2,
        seed=0,
        or_fewer=True,
    )
    for read in (
        sources.kind_of,
        sources.rows_of,
        sources.text_rows,
        sources.instruction_rows,
        sources.chat_rows,
        evaluation.evaluation_stream,
        sources.describe,
        rows,
    ):
        try:
            read(str(path))
        except DepthcutError:
            continue


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    rows = {"text": ["a b c", "d e f"], "n": [1, 2], "input_ids": [[1, 2], [3, 4]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), buffer)
    return buffer.getvalue()


def _workspace(folder: Path) -> None:
    from core import commands
    from core.retrain import history
    from core.runs.spec import build
    from core.runs.workspace import Workspace
    from core.study import study
    from core.study.names import names

    book = folder / "prune-1" / ".run"
    book.mkdir(parents=True)
    for path in [p for p in folder.iterdir() if p.is_file()]:
        path.rename(book / path.name)
    where = Workspace(folder)
    for record in where.runs():
        for name in ("id", "name", "error", "hint", "device", "waiting_for", "started", "finished",
                     "progress", "eta_s", "is_live"):  # fmt: skip
            getattr(record, name)
        record.log_tail()
        record.metrics()
        where.children(record)
        history.comparison([record], names([record]).run)
        history.same_parent([record], record)
        try:
            build(commands.get(record.command).spec_class, record.spec)
        except DepthcutError:
            continue
    study(where, "demo")


def _live(folder: Path) -> None:
    from core.live import protocol
    from core.runs.spec import build

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(2)
        data = (folder / "question").read_bytes()[:100_000]
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        try:
            for message in protocol.lines(theirs):
                kind = str(message.pop("ask", ""))
                message.pop("secret", None)
                build(protocol.QUESTIONS.get(kind, protocol.Generate), message)
        except (ValueError, OSError):
            pass  # what the server answers with "wrong secret", and the client with "gone"


def _names(folder: Path) -> None:
    from core.checkpoint import locate
    from core.prune import scores
    from core.runs.workspace import Workspace

    name = (folder / "name").read_bytes().decode("utf-8", "surrogateescape")
    for read in (
        lambda: locate.open(name, need="headers"),
        lambda: scores.load(name),
        lambda: Workspace(folder).find(name),
    ):
        try:
            read()
        except DepthcutError:
            continue


def _arguments(folder: Path) -> None:
    from core import __main__, commands
    from core.runs.spec import from_namespace

    words = (folder / "words").read_bytes().decode("utf-8", "surrogateescape").split(" ")
    command = commands.get(words[0])
    parser = __main__._parser(command)
    if not {"-h", "--help"} & set(words):
        from_namespace(command.spec_class, __main__._parse(parser, words[1:]))


def readers() -> list[Reader]:
    """Return every reader; building their valid files takes a moment."""
    config = json.dumps(CONFIG).encode()
    own = json.dumps(OWN_SHAPES).encode()
    tokenizer = json.dumps(TOKENIZER).encode()
    header, _ = _weights()
    whole = _whole_weights()
    index = json.dumps(
        {"metadata": {"total_size": 9}, "weight_map": {n: "a.safetensors" for n in
         json.loads(header) if n != "__metadata__"}}
    ).encode()  # fmt: skip
    spec = {"command": "prune", "argv": ["python"], "cwd": "/", "schema": 1,
            "spec": {"checkpoint": "demo", "drop": [3], "out": "x", "plan": None}}  # fmt: skip
    status = {"schema": 1, "state": "running", "pid": 999_999_999, "pid_started": 1.5,
              "host": socket.gethostname(), "device": "cpu", "created": 1e9, "finished": None,
              "files": ["config.json"], "error": "", "hint": "",
              "progress": {"done": 1, "total": 4, "message": "MiB", "since": 1.0, "at": 2.0,
                           "first": 0}}  # fmt: skip
    done = status | {"state": "done", "finished": 2e9}
    book = (("spec.json", json.dumps(spec).encode()), ("status.json", json.dumps(done).encode()))
    angular = b"start,length,distance\n0,1,0.5\n1,1,0.25\n0,2,0.5\n"
    greedy = b"round,block,ppl\n1,2,3.5\n2,0,4.5\n"
    blocks = b"block,ppl,taylor,magnitude\n0,3.5,1,2\n1,2.5,,3\n2,4.5,1e3,4\n"
    published = b"block_name,block_score\nmodel.layers.1.x,2\nmodel.layers.0.x,1\nlm_head,3\n"
    plan = json.dumps({"schema": 1, "drop": [3, 2], "criterion": "ppl", "protected": [0],
                       "blocks": 14, "ratio": 0.25}).encode()  # fmt: skip
    lines = b'{"text": "a b c"}\n{"text": "d e f"}\n'
    asked = b'{"instruction": "a", "input": "", "output": "b"}\n{"input_ids": [1, 2]}\n'
    array = b'[{"text": "a b c", "n": [1, {"b": null}]},\n {"text": "d e f"}]'
    shard = b'{"version": 1,\n "data": [{"text": "a b"}]}'
    chats = (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}',
        b'{"prompt": "a", "completion": [{"role": "assistant", "content": [{"text": "b"}]}]}',
    )
    question = b'{"secret": "s", "ask": "perplexity", "checkpoint": "demo", "skip": [3, 5]}\n'
    prompt = b'{"secret": "s", "ask": "generate", "checkpoint": "demo", "prompt": "a", "top_k": 3}'
    words = (
        b"prune demo --drop 3,5-7 --out x",
        b"plan x.csv --criterion ppl --ratio 0.25 --protect-first 2",
        b"curve demo --scores x --counts 1-8 --out x --samples 3",
        b"benchmark demo --batch-sizes 1,4 --output-tokens 8-9 --out x",
        b"recipe drop-one demo --out x --seed 3 --ratio 0.5",
    )
    names = (b"demo", b"org/model@main", b"~/x", b"workspace/prune-1", b"../../etc/passwd")
    weights = ("model.safetensors", whole)
    metric = b'{"step": 1, "loss": 2.5, "lr": 0.1}\n{"event": "eval", "step": 1}\n'
    return [
        Reader("config.json alone", "config.json", (config, own), _checkpoint),
        Reader("config.json", "config.json", (config, own), _checkpoint, (weights,)),
        Reader("safetensors header", "header", (header,), _header, (("config.json", config),)),
        Reader("safetensors file", weights[0], (whole,), _checkpoint, (("config.json", own),)),
        Reader(
            "safetensors index",
            "model.safetensors.index.json",
            (index,),
            _checkpoint,
            (("a.safetensors", whole), ("config.json", config)),
        ),
        Reader("tokenizer.json", "tokenizer.json", (tokenizer,), _tokenizer),
        Reader(
            "tokenizer.json, used",
            "tokenizer.json",
            (tokenizer,),
            _file_tokenizer,
            (("config.json", config),),
        ),
        Reader(
            "tokenizer_config.json",
            "tokenizer_config.json",
            (b'{"eos_token": {"content": "</s>"}, "model_max_length": 64}',),
            _file_tokenizer,
            (("config.json", config), ("tokenizer.json", tokenizer)),
        ),
        Reader("vocab.json", "vocab.json", (b'{"a": 0, "b": 1}',), _tokenizer),
        Reader("tokenizer.model", "tokenizer.model", (PIECES,), _tokenizer),
        Reader(
            "pruning.json",
            "pruning.json",
            (json.dumps({"schema": 1, "method": "depth", "source": "demo", "dropped": [3],
                         "original_blocks": [0, 1, 2], "plan": {"drop": [3]},
                         "lineage": [{"method": "depth", "dropped": [1]}]}).encode(),),
            _checkpoint,
            (weights, ("config.json", config)),
        ),
        Reader("scores", "blocks.csv", (blocks, published), _scores),
        Reader("angular.csv", "angular.csv", (angular,), _scores, (("blocks.csv", blocks),)),
        Reader("greedy.csv", "greedy.csv", (greedy,), _scores, (("blocks.csv", blocks),)),
        Reader("plan", "plan.json", (plan,), _plan),
        Reader("text .txt", "data.txt", (b"a b c\n\nd e f\n",), _text),
        Reader("text .jsonl", "data.jsonl", (lines, asked), _text),
        Reader("text .csv", "data.csv", (b"text,n\na b,1\nc d,2\n", IDS), _text),
        Reader("text .json", "data.json", (array, shard), _text),
        Reader("text chats", "data.jsonl", chats, _text),
        Reader("text .tsv", "data.tsv", (b"text\tn\na b\t1\n'c d'\t2\n",), _text),
        Reader("text .json.gz", "data.json.gz", (gzip.compress(array, mtime=0),), _text),
        Reader("text .parquet", "data.parquet", (_parquet(),), _text),
        Reader("spec.json", "spec.json", (book[0][1],), _workspace, book[1:]),
        Reader("status.json", "status.json", (json.dumps(status).encode(), book[1][1]), _workspace,
               book[:1]),
        Reader("launch.json", "launch.json", (b'{"pid": 7, "pid_started": 1.5}',), _workspace,
               (book[0], ("status.json", b'{"state": "starting"}'))),
        Reader("name.json", "name.json", (b'{"schema": 1, "name": "x"}',), _workspace, book),
        Reader("metrics.jsonl", "metrics.jsonl", (metric,), _workspace, book),
        Reader("live question", "question", (question, prompt), _live),
        Reader("name of a checkpoint", "name", names, _names),
        Reader("command line", "words", words, _arguments),
        *_results(),
    ]  # fmt: skip


# --------------------------------------------------------------------------------------- the trial


@dataclass(frozen=True)
class Failure:
    """What a reader did with an input that it must not do."""

    reader: str
    seed: int
    what: str
    where: str
    """Last line of ours in the traceback."""
    data: bytes


def trial(reader: Reader, seed: int, folder: Path, *, memory: bool = True) -> Failure | str:
    """Read one mutated file; return the failure, else read or refused."""
    draw = random.Random(f"{reader.name} {seed}")
    data = mutated(draw.choice(reader.seeds), draw)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in reader.beside:
        (folder / name).write_bytes(content)
    (folder / reader.file).write_bytes(data)
    began = time.process_time()
    if memory:
        tracemalloc.start()
    try:
        reader.read(folder)
        outcome = "read"
    except DepthcutError as error:
        str(error).encode()  # printed, and shown on a page
        outcome = "refused"
    except (Exception, SystemExit) as error:
        return Failure(reader.name, seed, f"{type(error).__name__}: {error}"[:200], _ours(), data)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Failure(reader.name, seed, f"{type(error).__name__}: {error}"[:200], _ours(), data)
    finally:
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        tracemalloc.stop()
    took = time.process_time() - began
    if took > MOST_SECONDS:
        return Failure(reader.name, seed, f"took {took:.1f} s", "", data)
    if peak > MOST_BYTES:
        return Failure(reader.name, seed, f"took {peak >> 20} MiB", "", data)
    return outcome


def _ours() -> str:
    frames = [f for f in traceback.extract_tb(sys.exc_info()[2]) if "/core/" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def main() -> int:
    """Try mutated files for some minutes; print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Readers whose name contains this.")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    every = [reader for reader in readers() if options.only in reader.name]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures: dict[tuple[str, str, str], Failure] = {}
    end, seed = time.monotonic() + 60 * options.minutes, options.first_seed
    with tempfile.TemporaryDirectory() as root:
        os.environ["DEPTHCUT_WORKSPACE"] = root
        while time.monotonic() < end:
            for reader in every:
                found = trial(reader, seed, Path(root) / "fuzz")
                if isinstance(found, Failure):
                    counts[reader.name]["failed"] += 1
                    failures.setdefault((found.reader, found.where, found.what[:40]), found)
                else:
                    counts[reader.name][found] += 1
            seed += 1
    for name, count in counts.items():
        print(f"{name:40} read {count['read']:6} refused {count['refused']:6} "
              f"failed {count['failed']:6}")  # fmt: skip
    for one in failures.values():
        print(f"\n{one.reader}, seed {one.seed}: {one.what} at {one.where}\n  {one.data[:300]!r}")
    total = sum(sum(count.values()) for count in counts.values())
    print(f"\n{total} inputs, {sum(c['failed'] for c in counts.values())} failed.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
