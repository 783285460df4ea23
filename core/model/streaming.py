"""A model larger than memory: its blocks are read from safetensors when they are computed.

A `StreamedView` is a `BlockView` whose layers hold shapes only. `StreamedView.layer` reads the
weights of the block that is asked for and drops those of the block before, while a thread reads
ahead in the direction in which blocks are asked for. At most two blocks are in memory, the one that
computes and the next, and each weight is read once per pass. The embedding is looked up in pieces,
and the output matrix is read when it is used; then no block is in memory.

Weights are read with plain reads into memory of their own, not through a mapped file: mapped pages
would count as the process's memory for as long as the kernel keeps them.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from core.checkpoint import locate
from core.checkpoint.tensors import TensorEntry, TensorIndex
from core.errors import CheckpointError, RunError
from core.model.blocks import BlockView
from core.model.loading import (
    REFUSALS,
    is_finite,
    model_class,
    not_finite,
    quiet,
    reason,
    settings_of,
)
from core.runs.devices import GIB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIGNMENT = 64
"""Bytes; where each tensor starts in a block's memory."""
TABLE_BYTES = 32 * 2**20
"""Bytes of the embedding that are looked up in at once."""

LARGE_BYTES = 2**22
"""Memory of at least this many bytes goes back to the system when it is freed."""
_M_MMAP_THRESHOLD = -3

Loaded = dict[str, Tensor]


class Weights:
    """Reads tensors of a checkpoint folder; counts the bytes it reads."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Read the headers; tensors come as ``dtype`` on ``device``."""
        self.folder, self.dtype, self.device = folder, dtype, device
        self.entries = TensorIndex.read(folder).entries
        self.bytes_read = 0

    def entry(self, name: str) -> TensorEntry:
        """Return where a tensor is; raises `CheckpointError` if it is missing."""
        if name not in self.entries:
            raise CheckpointError(
                f"The tensor {name} is missing from the weights in {self.folder}.",
                "Give a checkpoint whose config.json matches its weights.",
            )
        return self.entries[name]

    def raw(self, names: Iterable[str]) -> Loaded:
        """Return tensors as they are stored, in memory that goes back to the system with them."""
        wanted = {name: self.entry(name) for name in names}
        places, size = {}, 0
        for name, entry in wanted.items():
            places[name] = size
            size += -(-(entry.end - entry.start) // ALIGNMENT) * ALIGNMENT
        memory = _memory(max(size, 1))
        found = {}
        # in the order of the file's bytes, each file opened once
        order = sorted(wanted, key=lambda name: (wanted[name].file, wanted[name].start))
        for name in order:
            entry, at = wanted[name], places[name]
            self._fill(entry, memoryview(memory)[at : at + entry.end - entry.start], entry.start)
            found[name] = torch.frombuffer(
                memory, dtype=getattr(torch, entry.dtype), count=entry.parameters, offset=at
            ).view(entry.shape)
        return found

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows of a matrix, as ``dtype`` on the device."""
        entry = self.entry(name)
        width = (entry.end - entry.start) // entry.shape[0]
        memory = bytearray((last - first) * width)
        self._fill(entry, memoryview(memory), entry.start + first * width)
        stored = torch.frombuffer(memory, dtype=getattr(torch, entry.dtype))
        return stored.view(last - first, *entry.shape[1:]).to(self.device, self.dtype)

    def _fill(self, entry: TensorEntry, target: memoryview, start: int) -> None:
        """Read a tensor's bytes from byte ``start`` of its file."""
        done = 0
        try:
            with (self.folder / entry.file).open("rb", buffering=0) as handle:
                handle.seek(start)
                while done < len(target):
                    count = handle.readinto(target[done:])
                    if not count:
                        raise CheckpointError(
                            f"{entry.file} ends within the tensor {entry.name}.",
                            "It changed while it was read; give an intact copy.",
                        )
                    done += count
        except OSError as error:
            raise RunError(
                f"Cannot read {self.folder / entry.file}: {error.strerror}.",
                "Check the disk, then run it again.",
            ) from error
        self.bytes_read += done


def _memory(size: int) -> mmap.mmap:
    """Return memory that goes back to the system when it is freed, in pages of 2 MiB if it can.

    In small pages, or shared ones as `mmap` makes by default, reading takes two to four times as
    long, since the kernel hands over each page on its own.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows
        return mmap.mmap(-1, size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def stored_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes as a safetensors file has them."""
    whole = save({"": tensor.contiguous().cpu()})
    return memoryview(whole)[8 + int.from_bytes(whole[:8], "little") :]  # behind the file's header


def return_large_memory() -> None:
    """Make the system take large tensors' memory back as soon as they are freed.

    glibc keeps what is freed below other memory. Blocks that come and go beside small results that
    stay would leave holes, and the process would grow with every block.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


class StreamedView(BlockView):
    """Views a checkpoint in a folder as blocks that are read when they are needed."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Read shapes and the final norm; weights come as ``dtype`` on ``device``.

        ``log`` is told at the end how much was read. Raises `CheckpointError` for quantized
        weights, which cannot be read block by block, and for what
        `core.model.loading.load_model` refuses.
        """
        return_large_memory()
        self._log = log
        super().__init__(skeleton(folder, dtype, device))
        self.source = Weights(folder, dtype, device)
        tied = locate.at(folder).info.tied
        self._head_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        self._empty = [dict(layer.named_parameters()) for layer in self.blocks]
        self._resident: int | None = None
        self._head: Tensor | None = None
        self._checked: set[str] = set()
        self._changes: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._ahead: tuple[int, Future[Loaded]] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        _put(self.final_norm, self._usable("model.norm.", self.source.raw(["model.norm.weight"])))

    @property
    def device(self) -> torch.device:
        """The device that blocks are computed on."""
        return self.source.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that weights are held in."""
        return self.source.dtype

    @property
    def head_weight(self) -> Tensor:
        """The output matrix, [vocabulary, hidden]; it stays until a block is asked for."""
        if self._head is None:
            self._drop()  # a block and the matrix need not be in memory together
            with torch.inference_mode(False), torch.no_grad():  # of use with gradients too
                found = self._usable("", self.source.raw([self._head_name]))
            self._head = found[self._head_name]
        return self._head

    def embed(self, ids: Tensor) -> Tensor:
        """Return embeddings [rows, tokens, hidden] of token ids; the table is read in pieces."""
        name = "model.embed_tokens.weight"
        entry = self.source.entry(name)
        vocabulary, width = entry.shape
        out = torch.empty(*ids.shape, width, dtype=self.dtype, device=self.device)
        step = max(1, TABLE_BYTES * vocabulary // max(1, entry.end - entry.start))
        for first in range(0, vocabulary, step):
            last = min(first + step, vocabulary)
            here = (ids >= first) & (ids < last)
            if bool(here.any()):
                table = self.source.rows(name, first, last)
                self._check(f"{name}, rows {first} to {last - 1}", table)
                out[here] = table[ids[here] - first]
        return out

    def embedder(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what embeds parts of ``ids``; it holds the embeddings of all that occur there."""
        occurs = torch.zeros(int(ids.max()) + 1, dtype=torch.bool, device=ids.device)
        occurs[ids.flatten()] = True
        table, place = self.embed(occurs.nonzero()[:, 0]), occurs.cumsum(0) - 1
        return lambda some: table[place[some]]

    def layer(self, block: int) -> nn.Module:
        """Return a decoder layer with its weights, until another block is asked for."""
        if self._resident != block:
            before = self._resident
            self._drop()
            self._head = None
            with torch.inference_mode(False), torch.no_grad():
                found = self._usable(f"model.layers.{block}.", self._taken(block))
                _put(self.blocks[block], found)
            self._resident = block
            step = -1 if before is not None and block < before else 1
            if 0 <= block + step < len(self):
                following = block + step
                self._ahead = (
                    following,
                    self._reader.submit(self.source.raw, self._names(following)),
                )
        return self.blocks[block]

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its name in the checkpoint; it alone is read."""
        return self._usable("", self.source.raw([name]))[name]

    @contextlib.contextmanager
    def replacing(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Change weights of these names as they are read, until the context ends."""
        try:
            self._drop()
            self._changes = changes
            yield
        finally:
            self._drop()
            self._changes = {}

    def rest(self) -> None:
        """Drop all weights; what computes next reads them again."""
        self._drop()
        self._head = None
        self._discard()

    def close(self) -> None:
        """End the reading thread and drop all weights."""
        self.rest()
        self._reader.shutdown()
        self._log(f"Read {self.source.bytes_read / GIB:.2f} GiB of weights.")

    def _names(self, block: int) -> list[str]:
        return [f"model.layers.{block}.{name}" for name in self._empty[block]]

    def _taken(self, block: int) -> Loaded:
        """Return a block's stored tensors: what was read ahead, or read now."""
        if self._ahead is not None and self._ahead[0] == block:
            _, future = self._ahead
            self._ahead = None
            return future.result()
        self._discard()
        return self.source.raw(self._names(block))

    def _discard(self) -> None:
        if self._ahead is not None:
            _, future = self._ahead
            self._ahead = None
            if not future.cancel():
                future.exception()

    def _drop(self) -> None:
        """Give the resident block's memory back."""
        if self._resident is not None:
            _put(self.blocks[self._resident], self._empty[self._resident])
            self._resident = None

    def _usable(self, prefix: str, stored: Loaded) -> Loaded:
        """Return stored tensors by their names without ``prefix``, on the device, checked once."""
        found = {}
        for name in list(stored):
            tensor = stored.pop(name).to(self.device, self.dtype)
            self._check(name, tensor)
            if name in self._changes:
                tensor = self._changes[name](tensor).to(self.device, self.dtype)
            found[name.removeprefix(prefix)] = tensor
        return found

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._checked:
            if not is_finite(tensor):
                raise not_finite([name], tensor.dtype)
            self._checked.add(name)


def loaded_partly(
    folder: Path, blocks: Sequence[int], dtype: torch.dtype, device: torch.device
) -> BlockView:
    """Return a model in memory that has only ``blocks`` of a checkpoint folder, in this order.

    It is as fast as that many blocks are; what it predicts means nothing. Raises what
    `StreamedView` raises.
    """
    view = BlockView(skeleton(folder, dtype, device))
    source, model = Weights(folder, dtype, device), view.model
    embedding: Any = model.get_input_embeddings()

    def read(prefix: str, module: nn.Module) -> None:
        for name, _ in list(module.named_parameters()):
            raw = source.raw([f"{prefix}{name}"])
            _put(module, {name: raw[f"{prefix}{name}"].to(device, dtype)})

    for number in blocks:
        read(f"model.layers.{number}.", view.blocks[number])
    read("model.embed_tokens.", embedding)
    read("model.norm.", view.final_norm)
    if locate.at(folder).info.tied:
        model.lm_head.weight = embedding.weight
    else:
        read("lm_head.", model.lm_head)
    view.shorten(blocks)
    return view


def _put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module these parameters, by their names within it."""
    for name, tensor in tensors.items():
        path, _, own = name.rpartition(".")
        owner = module.get_submodule(path)
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
        owner._parameters[own] = parameter


def skeleton(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Return the model of a checkpoint folder with shapes in place of weights.

    The rotary embedding is real and on ``device``. Raises `CheckpointError` for quantized weights
    and for a configuration that transformers refuses.
    """
    checkpoint = locate.at(folder, need_weights=True)
    if checkpoint.info.quantization:
        raise CheckpointError(
            f"{folder} has quantized weights, which cannot be read block by block.",
            "Give the checkpoint that it was made from.",
        )
    config = dict(checkpoint.config)
    quiet()
    chosen, settings = model_class(config), settings_of(config)
    make: Callable[..., Any] = getattr(chosen, "_from_config", None) or chosen.from_config
    try:
        with torch.device("meta"):
            model = make(settings, dtype=dtype, attn_implementation="sdpa")
        body: Any = model.model
        body.rotary_emb = type(body.rotary_emb)(model.config).to(device)
    except REFUSALS as error:
        raise CheckpointError(
            f"Cannot build {folder}: {reason(error)}",
            "Run 'python -m core inspect' to see what is wrong.",
        ) from error
    return model.eval().requires_grad_(False)
