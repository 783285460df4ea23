"""What the width tests share: the command in this process, text, and masking instead of cutting."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch

sys.path.append(str(Path(__file__).parent))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file whose lines the tiny tokenizer makes 9 and more tokens of."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text(60, seed=3), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def width(tiny_dir, text, tmp_path_factory):
    """A function that runs the command and returns the folder; each wish is run once."""
    from core import commands
    from core.runs import run
    from core.runs.spec import build

    made = {}
    locks = tmp_path_factory.mktemp("locks")

    def get(source, method, **options):
        key = (str(source), method, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("width") / "out"
            values = {"checkpoint": str(source), "method": method, "out": str(out)}
            values |= {"calibration": text, "samples": 6, "length": 9, "device": "cpu"}
            command = commands.get("width")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DEPTHCUT_LOCK_DIR", str(locks))
                status = run.execute(command, build(command.spec_class, values | options))
            assert status == 0, (out / ".run" / "log.txt").read_text()
            made[key] = out
        return made[key]

    return get


@pytest.fixture(scope="session")
def record_of():
    """A function from a folder to its pruning.json."""
    return lambda folder: json.loads((folder / "pruning.json").read_text())
