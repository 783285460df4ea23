"""A variant carries no code of others; trust_remote_code is advised for Depthcut's own alone."""

import json
import shutil

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.checkpoint import own_code
from core.errors import CheckpointError
from core.model.loading import load_model
from core.prune import depth
from core.retrain.rows import Row
from core.retrain.weights import merge_and_save
from core.runs.progress import Progress
from core.ui import runs

EVIL = "raise SystemExit('foreign code ran')\n"


def tainted(folder):
    """Add to a checkpoint what makes transformers run code of the folder if it is trusted."""
    for name in ("modeling_evil.py", "tokenizer_evil.py", "LICENSE.py", "configuration_evil.py"):
        (folder / name).write_text(EVIL)
    for name, add in {
        "config.json": {
            "auto_map": {"AutoModelForCausalLM": "evil/repo--modeling_evil.Evil"},
            "custom_pipelines": {"text-generation": {"impl": "modeling_evil.Pipe", "pt": ["Evil"]}},
        },
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenizer_evil.Evil", None]}},
        "generation_config.json": {"nested": {"auto_map": {"x": "modeling_evil.Evil"}, "kept": 1}},
        "preprocessor_config.json": {"auto_map": {"AutoProcessor": "modeling_evil.Evil"}, "a": 2},
    }.items():
        path = folder / name
        old = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(old | add))
    return folder


@pytest.fixture
def source(tiny_dir, tmp_path):
    return tainted(shutil.copytree(tiny_dir("gqa"), tmp_path / "source"))


def merged(folder, out):
    model = load_model(folder, torch.device("cpu"), torch.float32)
    rows = [Row((1, 5, 9, 7), (-100, 5, 9, 7))]
    how = {"dtype": torch.float32, "rows": rows, "device": torch.device("cpu"), "compute": None}
    merge_and_save(model, folder, out, **how)
    return out


class Log(Progress):
    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


def check_clean(folder, trusted):
    files = [p.name for p in folder.glob("*.py")]
    assert files == (["modeling_depthcut.py"] if trusted else [])
    texts = {p.name: p.read_text() for p in folder.glob("*.json")}
    assert not [name for name, text in texts.items() if "evil" in text.lower()]
    assert not [name for name, text in texts.items() if "custom_pipelines" in text]
    assert [n for n, text in texts.items() if "auto_map" in text] == ["config.json"] * trusted
    assert own_code.is_trusted(folder) is trusted
    assert own_code.foreign(folder) == []
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted)
    assert model.num_parameters() > 0
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("Ann").input_ids
    assert runs.trust(folder) == (", trust_remote_code=True" if trusted else "")
    assert ("modeling_depthcut.py" in runs.trust_note(folder)) is trusted


@pytest.mark.parametrize("how", ["prune", "width", "merge"])
def test_variants_leave_foreign_code_out(source, tmp_path, width, how):
    assert runs.trust(source) == ""
    assert "modeling_evil.py" in runs.trust_note(source)
    out = tmp_path / "out"
    if how == "prune":
        log = Log()
        depth.prune(source, (1,), out, progress=log)
        assert any("modeling_evil.py" in line for line in log.lines)
    elif how == "width":
        out = width(source, "wanda-sp", ratio=0.5)
    else:
        merged(source, out)
    check_clean(out, trusted=False)
    nested = json.loads((out / "generation_config.json").read_text()).get("nested", {"kept": 1})
    assert nested == {"kept": 1}
    if how != "merge":
        assert "trust_remote_code" not in (out / "README.md").read_text()


@pytest.mark.parametrize("how", ["prune", "width", "merge"])
def test_variants_of_blocks_of_different_shapes_get_our_own_file(tiny_gqa, tmp_path, width, how):
    source = tainted(shutil.copytree(width(tiny_gqa, "flap", ratio=0.5), tmp_path / "source"))
    (source / "modeling_depthcut.py").write_text(EVIL)
    assert not own_code.is_trusted(source)
    assert runs.trust(source) == ""
    out = tmp_path / "out"
    if how == "prune":
        depth.prune(source, (1,), out)
    elif how == "width":
        out = width(source, "flap", ratio=0.2)
    else:
        merged(source, out)
    check_clean(out, trusted=True)
    card = (out / "README.md").read_text() if how != "merge" else "modeling_depthcut.py"
    assert "modeling_depthcut.py" in card


def test_an_architecture_that_needs_its_own_code_is_refused(tiny_dir, tmp_path):
    folder = tainted(shutil.copytree(tiny_dir("gqa"), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "evil", "architectures": ["EvilForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="family 'evil' is not supported"):
        depth.prune(folder, (1,), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "auto_map and custom_pipelines of config.json" in own_code.foreign(folder)


def test_a_path_with_quotes_stays_a_string(tmp_path):
    folder = tiny.write(tmp_path / 'a") or print("b', "gqa")
    code = runs.loading_code(folder)
    compile(code, "x", "exec")
    assert json.dumps(str(folder)) in code
