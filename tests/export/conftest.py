"""Variants to export, each made once, and llama.cpp to run them in."""

import importlib.util
import os

import pytest
import torch

torch.set_num_threads(1)

PARAGRAPH = (
    "Ärger über naïve Façades: ½ of 1,234.50 € - 日本語のテスト, 한국어, русский текст, עברית, "
    "العربية, हिन्दी; emoji 🦙👩‍👩‍👧 and\ttabs\n\n  two  spaces   three.\r\n"
    "It's we'll THEY'VE don't x=3.14159 [foo]_bar<baz> 你好，世界！ ﬁ ǅ ABCdef camelCase 007 "
    "\n \n end  "
)
"""Text on which pre-tokenizers differ."""


@pytest.fixture(scope="session")
def paragraph():
    return PARAGRAPH


@pytest.fixture(scope="session")
def llama_cpp():
    """A function that loads a GGUF file in llama.cpp; tests that need it skip without it."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp (llama.cpp) is not installed: nothing here is proved without it")
    from bench.llama_cpp import engine

    return engine


@pytest.fixture(scope="session")
def variant(tmp_path_factory):
    """A function from a checkpoint and a kind of cut to the folder; each is made once."""
    from core import commands
    from core.checkpoint import locate
    from core.prune import depth
    from core.runs import run
    from core.runs.spec import build

    made = {}
    locks = tmp_path_factory.mktemp("locks")

    def narrow(source, out, **options):
        values = {"checkpoint": str(source), "out": str(out), "device": "cpu", "samples": 8}
        command = commands.get("width")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEPTHCUT_LOCK_DIR", str(locks))
            spec = build(command.spec_class, values | {"length": 32} | options)
            assert run.execute(command, spec) == 0, (out / ".run/log.txt").read_text()

    def get(source, kind):
        if (str(source), kind) in made:
            return made[str(source), kind]
        folder = locate.open(str(source), need_tokenizer=False).folder
        out = tmp_path_factory.mktemp(kind) / f"{os.path.basename(source)}-{kind}"
        blocks = locate.at(folder).info.blocks
        if kind == "dense":
            out = folder
        elif kind == "depth":
            depth.prune(folder, [1, blocks - 2], out, name=str(source))
        elif kind == "uniform":
            narrow(source, out, method="random", ratio=0.5, layers=f"0:{blocks}")
        else:
            narrow(source, out, method="flap", ratio=0.3)
        made[str(source), kind] = out
        return out

    return get
