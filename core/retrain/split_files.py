"""Files of a model that is split among processes (`core.retrain.sharded`): none holds all of it.

`load` builds the model without weights, splits it, and has every process read its rows of each
tensor from the safetensors files. `write` gathers one tensor at a time and writes it before the
next; the files are those that one process writes, apart from their division into files.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from core.checkpoint import locate
from core.checkpoint.tensors import SINGLE, TensorEntry
from core.errors import CheckpointError
from core.model.loading import is_finite, not_finite
from core.model.memory import out_of_memory_explained
from core.model.precision import dtype_name
from core.model.streaming import Weights, skeleton, stored_bytes
from core.prune import staging
from core.prune.depth import header_bytes
from core.retrain import sharded
from core.runs.ranks import Ranks

FILE_BYTES = 5 * 10**9
"""Most bytes of a file, unless a tensor alone is larger; as transformers divides a checkpoint."""
PIECE_BYTES = 2**24
"""Of a gathered tensor, what is copied at once when it is written: 16 MiB. Chosen."""


def load(
    folder: Path, ranks: Ranks, device: torch.device, dtype: torch.dtype, *, trained: bool
) -> Any:
    """Return the model of a checkpoint folder, split among the processes, in eval mode.

    Weights, buffers and settings are those of `core.model.loading.load_model`, but each process
    reads only its own rows. ``trained`` says whether the weights will have gradients.

    Raises, in every process, what is wrong in any of them:
        CheckpointError: The folder cannot be read as a causal language model, or is quantized.
        RunError: A file cannot be read.
        NotFiniteError: A weight tensor contains NaN or infinity; the message names it.
        OutOfMemoryError: A device has too little memory.
    """
    model: Any = sharded.agreed(ranks, lambda: _unread(folder, dtype, device))
    model.requires_grad_(trained)
    sharded.split(model, ranks, device)

    def fill() -> None:
        with out_of_memory_explained(f"loading {folder.name}"):
            _give_memory(model, device)
            read(model, folder)
        broken = [n for n, w in model.named_parameters() if not is_finite(sharded.local(w))]
        if broken:
            raise not_finite(broken, dtype)

    sharded.agreed(ranks, fill)
    return model


def _unread(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model with shapes in place of weights; its output matrix is that of the files."""
    model: Any = skeleton(folder, dtype, device)
    tied = locate.at(folder).info.tied
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    elif model.lm_head.weight is model.model.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight), False)
    if model.config.tie_word_embeddings and not tied:
        model.config.tie_word_embeddings = False  # as `load_model`
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _give_memory(model: Any, device: torch.device) -> None:
    """Replace the shapes that a split model consists of by this process's parts, not yet filled."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in made:
                own = torch.empty_like(sharded.local(weight), device=device)
                part = sharded.made_part(own, weight)
                made[id(weight)] = nn.Parameter(part, weight.requires_grad)
            module._parameters[name] = made[id(weight)]


@torch.no_grad()
def read(model: Any, folder: Path) -> None:
    """Read this process's rows of every weight of a split model from a folder's safetensors.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
        RunError: a file cannot be read.
    """
    weights = dict(model.named_parameters())
    held = sharded.local(next(iter(weights.values())))
    source = Weights(folder, held.dtype, held.device)
    for name, weight in weights.items():
        shape = source.entry(name).shape
        if shape != weight.shape:
            raise CheckpointError(
                f"The tensor {name} in {folder} has the shape {list(shape)}, but config.json "
                f"implies {list(weight.shape)}.",
                "Give a checkpoint whose config.json matches its weights.",
            )
        rows = sharded.rows_of(weight)
        assert rows
        if rows.start < rows.stop:
            sharded.local(weight).copy_(source.rows(name, rows.start, rows.stop))


def write(model: Any, folder: Path, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
    """Write a split model as a checkpoint in ``dtype`` (None: its own); the first process writes.

    All processes call it; each has one whole tensor at a time.
    """
    sharded.release(model)
    weights = dict(model.named_parameters())
    held = dtype or next(iter(weights.values())).dtype
    if not ranks.is_first:
        for weight in weights.values():
            sharded.whole(weight.detach())
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = dtype_name(held)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    entries = [_entry(name, weight, held) for name, weight in weights.items()]
    files = _divided(entries)
    for file, some in files.items():
        with (folder / file).open("wb") as out:
            out.write(header_bytes([(one.name, one) for one in some], {"format": "pt"}))
            for one in some:
                whole = sharded.whole(weights[one.name].detach())
                for piece in _pieces(whole):
                    out.write(stored_bytes(piece.to(held)))
    if len(files) > 1:
        file_of = {one.name: file for file, some in files.items() for one in some}
        staging.write_index(folder, file_of, sum(one.end for one in entries))


def _entry(name: str, weight: Any, dtype: torch.dtype) -> TensorEntry:
    size = weight.numel() * dtype.itemsize
    return TensorEntry(name, "", dtype_name(dtype), tuple(weight.shape), 0, size)


def _divided(entries: Iterable[TensorEntry]) -> dict[str, list[TensorEntry]]:
    """Return which tensors each file has, by its name."""
    files: list[list[TensorEntry]] = []
    size = 0
    for one in entries:
        if not files or size + one.end > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(one)
        size += one.end
    if len(files) == 1:
        return {SINGLE: files[0]}
    stem, _, kind = SINGLE.partition(".")
    names = (f"{stem}-{number:05d}-of-{len(files):05d}.{kind}" for number in itertools.count(1))
    return dict(zip(names, files, strict=False))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in pieces of rows, of about `PIECE_BYTES`."""
    if not tensor.dim():
        yield tensor
        return
    yield from tensor.split(max(1, PIECE_BYTES * len(tensor) // max(1, tensor.nbytes)))


def write_optimiser(optimiser: Any, path: Path, ranks: Ranks) -> None:
    """Write the whole state of an optimiser as torch.save does; the first process writes.

    All processes call it; each has one whole tensor at a time. The file is made with room for all
    tensors, which are filled in afterwards: no memory of the size of the state is touched.
    """
    state = optimiser.state_dict()
    values = [
        (number, name, value)
        for number, held in state["state"].items()
        for name, value in held.items()
    ]
    if not ranks.is_first:
        for *_, value in values:
            sharded.whole(value)
        return
    places: dict[Any, dict[str, Any]] = {}
    for number, name, value in values:
        is_tensor = isinstance(value, Tensor)
        place = torch.empty(value.shape, dtype=value.dtype) if is_tensor else value
        places.setdefault(number, {})[name] = place
    with torch.serialization.skip_data():
        torch.save({"state": places, **{k: v for k, v in state.items() if k != "state"}}, path)
    del places
    records = torch._C.PyTorchFileReader(str(path))
    with path.open("r+b") as out:
        tensors = (value for *_, value in values if isinstance(value, Tensor))
        for number, value in enumerate(tensors):  # torch numbers them in the order of the pickle
            out.seek(records.get_record_offset(f"data/{number}"))
            for piece in _pieces(sharded.whole(value)):
                out.write(stored_bytes(piece))


def load_optimiser(optimiser: Any, path: Path) -> None:
    """Load this process's part of a whole state into an optimiser; only that part is read."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    taken = {
        number: {name: _part_like(value, weights[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": taken})


def _part_like(value: Any, weight: Any) -> Any:
    """Return this process's part of a whole state of ``weight``; other states as they are."""
    rows = sharded.rows_of(weight)
    if rows is None or not isinstance(value, Tensor) or value.shape != weight.shape:
        return value
    return sharded.made_part(value[rows].to(weight.device, copy=True), weight)
