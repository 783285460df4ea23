"""What dry runs say, and with them the planning table, against counted quantities of real runs.

Operations, bytes that are read and written, and bytes of tensors. The model is tiny: what is left
out of an estimate, such as attention beyond half of a square, weighs more here than in a large one.
"""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import addmm_flop, bmm_flop, mm_flop, sdpa_flop_count

from core import commands
from core.budget import command as budget_command
from core.checkpoint import headers
from core.evaluate import estimate as evaluating
from core.evaluate import shared_prefix
from core.generate import command as generate
from core.heal import command as heal_command
from core.importance import capacity, curve_command
from core.importance import command as importance
from core.model import decode
from core.model.loading import load_model
from core.model.streaming import StreamedView
from core.runs import run
from core.runs.dtypes import Formats
from core.runs.footprint import PROCESS_BYTES
from core.runs.spec import build
from core.search import command as search_command
from core.width import command as width_command

COMMON = {"calibration": "", "samples": 8, "length": 16}
HEALING = {"samples": 40, "length": 16}
WIDE = {"heal": "refit", "heal_samples": 40, "heal_length": 16}


class Counted(TorchDispatchMode):
    """Counts operations by the formulas of torch.utils.flop_counter, and bytes of live tensors.

    That module's own mode leaves out products that are added in place, attention on a CPU and
    solutions of linear systems.
    """

    def __init__(self):
        super().__init__()
        self.total, self.live, self.peak = 0.0, 0, 0
        self._storages = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ("linear", "matmul", "scaled_dot_product_attention"):  # in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        shapes = [a.shape for a in args if isinstance(a, torch.Tensor)]
        self.total += self._operations(name, shapes)
        for one in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(one, torch.Tensor):
                self._hold(one.untyped_storage())
        return found

    @staticmethod
    def _operations(name, shapes):
        if name == "mm":
            return mm_flop(*shapes)
        if name in ("addmm", "addmm_"):
            return addmm_flop(*shapes)
        if name in ("bmm", "baddbmm"):
            return bmm_flop(*shapes[-2:])
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return sdpa_flop_count(*shapes[:3])
        if name == "linalg_cholesky_ex":
            return shapes[0][-1] ** 3 / 3
        return 2 * shapes[1][-1] ** 2 * shapes[0][-1] if name == "cholesky_solve" else 0

    def _hold(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place in self._storages:
            return

        def release():
            self._storages.discard(place)
            self.live -= size

        self._storages.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, release)


@pytest.fixture
def spec_of(tiny_gqa, tmp_path, text):
    """A function that returns a command and its spec with these options."""

    def make(command, **options):
        known = commands.get(command)
        names = known.spec_class.__dataclass_fields__
        values = {"checkpoint": str(tiny_gqa), "out": str(tmp_path / "out"), "device": "cpu"}
        values = {key: value for key, value in values.items() if key in names}
        values |= {key: value for key, value in COMMON.items() if key in names} | options
        for key in ("calibration", "perplexity", "data", "prompts"):
            if key in names:
                values[key] = (text,) if key == "perplexity" else text
        if command == "curve":
            scores = tmp_path / "scores.csv"
            scores.write_text("block,score\n" + "".join(f"{i},{3 * i % 5}\n" for i in range(5)))
            values |= {"scores": str(scores), "criteria": ("ppl", "random")}
        return known, build(known.spec_class, values)

    return make


@pytest.mark.parametrize(
    ("command", "options", "low", "high"),
    [
        ("importance", {"metrics": ("ppl", "kl")}, 0.9, 1.05),
        ("importance", {"metrics": ("taylor",)}, 0.9, 1.05),
        ("importance", {"metrics": ("block-influence", "angular")}, 0.9, 1.1),
        # above the part that goes the other part of its block is shared
        ("importance", {"metrics": ("sublayers",)}, 1.0, 1.25),
        ("importance", {"metrics": ("sleb",)}, 1.0, 2.0),  # an upper bound, see greedy_flops
        ("search", {"counts": (1, 2)}, 0.85, 1.1),
        ("search", {"counts": (1, 2), "methods": ("greedy",), "heal": "refit", **HEALING},
         0.85, 1.15),
        ("budget", {"context": 16, "runs": 1, "check_plans": 0}, 0.95, 1.2),
        ("budget", {"context": 16, "runs": 1}, 0.95, 1.8),  # fewer plans, and smaller ones
        ("curve", {}, 0.9, 1.1),
        ("prune", {"drop": (2,), "heal": "refit", **HEALING}, 0.98, 1.02),
        ("prune", {"drop": (1, 3), "heal": "auto", **HEALING}, 0.98, 1.02),
        ("width", {"method": "llm-pruner", "ratio": 0.5}, 1.0, 1.2),  # blocks without gradients
        ("width", {"method": "flap", "ratio": 0.5}, 0.9, 1.1),
        ("width", {"method": "wanda-sp", "ratio": 0.5}, 0.9, 1.1),
        ("width", {"method": "flap", "ratio": 0.1, **WIDE}, 0.9, 1.2),  # as if blocks were whole
        ("evaluate", {"window": (32,), "token_view": 0, "fresh": True}, 0.9, 1.1),
        ("generate", {"prompt_tokens": 3, "max_tokens": 8, "check": "none", "samples": 20},
         0.9, 1.2),
        # the adapters themselves are not counted
        ("retrain", {"steps": 3, "cutoff": 32, "holdout": 8, "rank": 1}, 0.8, 1.2),
        ("retrain", {"steps": 3, "cutoff": 32, "holdout": 8, "method": "full"}, 0.8, 1.2),
    ],
)  # fmt: skip
def test_operations(command, options, low, high, spec_of):
    known, spec = spec_of(command, **options)
    said = known.load().dry_run(spec)
    with Counted() as counted:
        assert run.execute(known, spec) == 0
    ratio = (said["flops"] + said.get("heal_flops", 0.0)) / counted.total
    assert low < ratio < high, ratio


STREAMING = {
    "importance": importance, "curve": curve_command, "search": search_command,
    "budget": budget_command, "width": width_command, "prune": heal_command,
    "evaluate": evaluating,
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("importance", {"metrics": ("magnitude", "taylor", "sublayers")}),
        ("curve", {}),
        ("search", {"counts": (1, 2)}),
        ("search", {"counts": (1, 2), "methods": ("greedy",), "heal": "refit", **HEALING}),
        ("budget", {"context": 16, "runs": 1}),
        ("width", {"method": "llm-pruner", "ratio": 0.5}),
        ("width", {"method": "flap", "ratio": 0.5}),
        ("width", {"method": "wanda-sp", "ratio": 0.5}),
        ("width", {"method": "flap", "ratio": 0.5, **WIDE}),
        ("prune", {"drop": (1, 3), "heal": "auto", **HEALING}),
        ("evaluate", {"window": (32,), "token_view": 0, "fresh": True}),
    ],
)
def test_bytes_read_block_by_block(command, options, spec_of, monkeypatch):
    """Some passes leave out embedding and head, or a block that went: fewer bytes than said.

    A block that is read ahead and then not needed may be read or not, as threads happen to run.
    """

    def decide(*arguments):
        return dataclasses.replace(capacity.decide(*arguments), way="streams")

    monkeypatch.setattr(STREAMING[command], "decide", decide)
    read, close = [], StreamedView.close
    monkeypatch.setattr(
        StreamedView, "close", lambda self: (read.append(self.source.bytes_read), close(self))
    )
    known, spec = spec_of(command, **options)
    said = known.load().dry_run(spec)["read_bytes"]
    assert run.execute(known, spec) == 0
    assert 0.95 < said / sum(read) < 1.7


@pytest.mark.parametrize(
    ("command", "options", "file"),
    [
        ("prune", {"drop": (2,)}, "model.safetensors"),
        ("prune", {"drop": (2,), "heal": "refit", **HEALING}, "model.safetensors"),
        ("width", {"method": "wanda-sp", "ratio": 0.5}, "model.safetensors"),
        ("quantize", {"bits": 8}, "model.safetensors"),
        ("quantize", {"bits": 4}, "model.safetensors"),
        ("export", {"format": "gguf", "type": "f32"}, "*.gguf"),
        ("export", {"format": "gguf", "type": "f16"}, "*.gguf"),
        (
            "retrain",
            {"steps": 1, "cutoff": 32, "holdout": 8, "method": "full"},
            "model.safetensors",
        ),
    ],
)
def test_bytes_written(command, options, file, spec_of, tmp_path):
    known, spec = spec_of(command, **options)
    said = known.load().dry_run(spec)
    assert run.execute(known, spec) == 0
    (written,) = (tmp_path / "out").rglob(file)
    header = 8 + int.from_bytes(written.read_bytes()[:8], "little")
    size = written.stat().st_size - (0 if written.suffix == ".gguf" else header)
    assert said["written_bytes"] == pytest.approx(
        size, rel=0.1 if written.suffix == ".gguf" else 0.01
    )


def test_an_imported_gguf_file_is_as_large_as_said(spec_of, tiny_gqa, tmp_path):
    known, spec = spec_of("export", format="gguf", type="f32", out=str(tmp_path / "x.gguf"))
    known.load().write_file(spec)
    known, spec = spec_of("import", source=str(tmp_path / "x.gguf"), dtype="float32")
    said = known.load().dry_run(spec)
    assert said["read_bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert run.execute(known, spec) == 0
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert said["written_bytes"] == pytest.approx(written, rel=0.1)


def test_memory_of_generating(spec_of, tiny_gqa):
    _, spec = spec_of("generate", max_tokens=64, batch=16)
    info = headers.inspect(tiny_gqa)
    said = generate.footprint(spec, info, [32] * 16, "float32").memory_bytes - PROCESS_BYTES["cpu"]
    model = load_model(tiny_gqa, torch.device("cpu"), torch.float32)
    prompts = torch.randint(3, 320, (16, 32), generator=torch.Generator().manual_seed(0)).tolist()
    with Counted() as counted:
        written = decode.decode(model, prompts, most=64, ends=())
    assert all(len(one.ids) == 64 for one in written)
    assert 1.0 < said / counted.peak < 1.2


def test_memory_of_questions(spec_of, tiny_gqa):
    _, spec = spec_of("evaluate", limit=8)
    info = headers.inspect(tiny_gqa)
    taken = evaluating.tasks_footprint(spec, info, Formats("float32", "float32"), 0.0)
    model = load_model(tiny_gqa, torch.device("cpu"), torch.float32)
    draw = torch.Generator().manual_seed(0)
    asked = [torch.randint(3, 320, (101,), generator=draw).tolist() for _ in range(8)]
    requests = [(one[:90], one[90:]) for one in asked]
    with Counted() as counted:
        list(shared_prefix.answers(model, requests, context=256, rows=8))
    assert 1.0 < (taken.memory_bytes - PROCESS_BYTES["cpu"]) / counted.peak < 2.0
