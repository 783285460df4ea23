"""Counting, targets and dry runs against published numbers and plain arithmetic; bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core.__main__ import main
from core.checkpoint import headers, locate
from core.errors import OptionError, PlanError
from core.runs.device_lock import DeviceLock
from core.width import allocation, methods, plan
from core.width.units import units_of
from core.width.ways import Ways

ROOT = Path(__file__).parents[2]
UNIFORM = ("llm-pruner", "wanda-sp", "magnitude", "random")


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    """A folder with nothing but LLaMA-7B's config."""
    folder = tmp_path_factory.mktemp("llama") / "llama-7b"
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
        "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
        "vocab_size": 32000, "max_position_embeddings": 2048, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dry(capsys, *arguments):
    status = main([*map(str, arguments), "--out", "unused", "--dry-run"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    return json.loads(shown.out)


@pytest.mark.parametrize(
    ("arguments", "left", "heads", "neurons"),
    [
        (("llm-pruner", "--ratio", "0.25"), 5_422_977_024, 24, 8256),
        (("llm-pruner", "--ratio", "0.25", "--layers", "4:30"), 5_422_977_024, 24, 8256),
        (("llm-pruner", "--ratio", "0.6", "--layers", "3:31"), 3_350_188_032, 13, 4403),
        (("wanda-sp", "--ratio", "0.2"), 5_470_294_016, 26, 8807),
    ],
)
def test_published_counts_from_a_config_alone(llama_7b, capsys, arguments, left, heads, neurons):
    said = dry(capsys, "width", llama_7b, "--method", *arguments)
    assert said["parameters_before"] == 6_738_415_616
    assert said["parameters_after"] == left
    assert said["kind"] == "exact"
    block = said["blocks"][16]
    assert (block["heads"], block["neurons"]) == (heads, neurons)
    untouched = [b for b in range(32) if b not in said["layers"]]
    assert all(said["blocks"][b]["heads"] == 32 for b in untouched)


def test_six_blocks_of_llama_7b(llama_7b, capsys):
    said = dry(capsys, "prune", llama_7b, "--drop", "24,26,25,10,27,13")
    assert said["parameters_after"] == 5_524_115_456


def test_flap_of_a_config_is_an_estimate(llama_7b, capsys):
    said = dry(capsys, "width", llama_7b, "--method", "flap", "--ratio", "0.2")
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert said["kind"] == "estimated"
    assert said["blocks"] is None
    assert said["parameters_after"] == round(6_738_415_616 - 0.2 * blocks) + 32 * 2 * 4096


def test_a_dry_run_imports_no_torch(llama_7b):
    script = (
        "import sys; from core.__main__ import main\n"
        f"main(['width', '{llama_7b}', '--method', 'flap', '--ratio', '0.2', '--out', 'x', "
        "'--dry-run'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def by_hand(info, method, ratio, blocks):
    """Parameters left, counted anew from the definitions in METHODS."""
    left = info.parameters
    for block in blocks:
        shape = info.block_shapes[block]
        groups, neurons = shape["kv_heads"], shape["intermediate"]
        rep = shape["heads"] // groups
        if method == "wanda-sp":
            gone = int(ratio * groups), int(ratio * neurons)
        else:
            channels = groups * info.head_dim
            gone = (
                (channels - int(channels * (1 - ratio))) // info.head_dim,
                neurons - int(neurons * (1 - ratio)),
            )
        gone = min(gone[0], groups - 1), min(gone[1], neurons - 1)
        left -= gone[0] * (2 * rep + 2) * info.head_dim * info.hidden
        left -= gone[1] * 3 * info.hidden
    return left


@pytest.mark.parametrize("method", UNIFORM)
@pytest.mark.parametrize("target", [0.9, 0.77, 0.6])
def test_no_ratio_comes_nearer_to_a_target(method, target):
    info = locate.open("demo").info
    wanted = round(info.parameters * target)
    made = plan.make(info, methods.get(method), params=wanted)
    reachable = {by_hand(info, method, step / 5000, made.blocks) for step in range(5000)}
    assert abs(made.parameters - wanted) <= min(abs(r - wanted) for r in reachable)
    assert made.parameters == by_hand(info, method, made.ratio, made.blocks)
    again = plan.make(info, methods.get(method), ratio=made.ratio)
    assert again.parameters == made.parameters


def test_match_says_how_near(tiny_gqa, tiny_dir, capsys):
    variant = tiny_dir("gqa", num_hidden_layers=4)
    said = dry(capsys, "width", tiny_gqa, "--method", "wanda-sp", "--match", variant)
    wanted = headers.inspect(variant).parameters
    assert said["target"]["parameters"] == wanted
    assert said["target"]["difference"] == said["parameters_after"] - wanted
    assert abs(said["target"]["difference"]) <= 5 * (2 + 2) * 2 * 8 * 32


def test_every_block_keeps_a_head_and_a_neuron():
    info = locate.open("demo").info
    for method in UNIFORM:
        made = plan.make(info, methods.get(method), ratio=0.999)
        assert all(c.groups >= 1 and c.neurons >= 1 for c in made.counts.values())


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"ratio": 1.0}, OptionError, r"--ratio must be at least 0 and below 1, got 1\.0"),
        ({"ratio": -0.1}, OptionError, r"--ratio must be at least 0 and below 1, got -0\.1"),
        ({"ratio": 0.2, "layers": "4:99"}, OptionError, "has blocks 0 to 13"),
        ({"ratio": 0.2, "layers": "5:5"}, OptionError, "5:5 is empty"),
        ({"ratio": 0.2, "layers": "4..9"}, OptionError, "'4..9' is not a block or a range"),
        ({"ratio": 0.2, "layers": ","}, OptionError, "--layers , is empty"),
        ({"ratio": 0.2, "mlp_layers": "3,14"}, OptionError, "--mlp-layers 3,14 goes beyond"),
        (
            {"ratio": 0.2, "parts": "mlp", "attention_layers": "3"},
            OptionError,
            "--attention-layers 3 has no effect with --parts mlp",
        ),
        ({"ratio": 0.2, "ways": Ways(metric="ifv")}, OptionError, "--metric ifv has no effect on"),
        ({"ratio": 0.2, "ways": Ways(heads=3)}, OptionError, "--remove-heads 3 has no effect here"),
        ({"ratio": 0.2, "ways": Ways(round_to=512)}, PlanError, "from the 2 heads of 64 channels"),
        (
            {"ratio": 0.2, "ways": Ways(round_to=512), "parts": "mlp"},
            PlanError,
            "--round-to 512 leaves nothing to cut from the 256 neurons in the MLP of block 4",
        ),
        ({}, PlanError, "--match must be given. Got none"),
        ({"ratio": 0.2, "params": 9}, PlanError, "--match must be given. Got --ratio and --params"),
        ({"params": 10_000_000}, PlanError, "is not smaller than the model's 2,222,464 parameters"),
        ({"params": 5}, PlanError, "is out of reach"),
    ],
)
def test_bad_amounts_are_one_sentence(options, kind, sentence):
    info = locate.open("demo").info
    with pytest.raises(kind, match=sentence):
        plan.make(info, methods.get("llm-pruner"), **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"structure": "al-mm"}, "--structure al-mm needs the number of heads"),
        ({"structure": "al-mm", "heads": 15}, "--remove-heads 15 is more than the 14 heads"),
        ({"structure": "ul-mm", "heads": 6}, "cannot be divided evenly over 14 blocks"),
        ({"structure": "al-mm", "heads": 14}, r"alone removes 0\.1[0-9]* of the parameters"),
        ({"structure": "al-mm", "heads": 0, "ratio": 0.9}, "--ratio 0.9 is out of reach"),
        ({"structure": "ul-mm", "heads": 14, "parts": "mlp"}, "only the MLP may be cut"),
        ({"order": "vector"}, "--order vector has no effect on flap"),
        ({"ranking": "global"}, "--ranking global has no effect on flap"),
        ({"structure": "al-mm", "heads": 0, "params": 5}, "28 heads and one neuron in each of 14"),
    ],
)
def test_bad_variants_of_flap_are_one_sentence(options, sentence):
    info = locate.open("demo").info
    fields = ("order", "ranking", "structure", "heads")
    ways = Ways(**{k: options[k] for k in fields if k in options})
    rest = {k: v for k, v in options.items() if k not in fields}
    if "params" not in rest:
        rest.setdefault("ratio", 0.1)
    with pytest.raises((OptionError, PlanError), match=sentence):
        plan.make(info, methods.get("flap"), ways=ways, **rest)


def test_any_list_of_blocks_for_each_part(llama_7b, capsys):
    options = ("--method", "llm-pruner", "--ratio", "0.25")
    chosen = ("--attention-layers", "4:30", "--mlp-layers", "3,5,8-10")
    said = dry(capsys, "width", llama_7b, *options, *chosen)
    assert said["attention_layers"] == list(range(4, 30))
    assert said["mlp_layers"] == [3, 5, 8, 9, 10]
    assert said["layers"] == list(range(3, 30))
    assert said["variant"] == "attention of 26 and MLP of 5 blocks"
    heads = {b["block"] for b in said["blocks"] if b["heads"] == 24}
    neurons = {b["block"] for b in said["blocks"] if b["neurons"] == 8256}
    assert heads == set(range(4, 30))
    assert neurons == {3, 5, 8, 9, 10}
    head, neuron = 4 * 128 * 4096, 3 * 4096
    assert said["parameters_after"] == 6_738_415_616 - 26 * 8 * head - 5 * 2752 * neuron
    only = dry(capsys, "width", llama_7b, *options, "--parts", "mlp", "--layers", "4:30")
    assert only["parameters_after"] == 6_738_415_616 - 26 * 2752 * neuron
    assert (only["variant"], only["attention_layers"]) == ("MLP only", [])


def test_rounded_widths_of_llama_7b(llama_7b, capsys):
    options = ("--method", "wanda-sp", "--ratio", "0.2", "--round-to", "256")
    said = dry(capsys, "width", llama_7b, *options)
    block = said["blocks"][0]  # 26 heads of 128 and 8807 neurons without rounding
    assert (block["heads"], block["neurons"]) == (26, 8704)
    assert said["round_to"] == 256
    assert said["variant"] == "multiples of 256"


def test_a_part_keeps_a_multiple_or_its_full_width():
    unit = units_of(locate.open("demo").info)[0]  # 2 groups of 64 channels, 256 neurons
    assert allocation.widths(unit, "attention", 128) == (2,)
    assert allocation.widths(unit, "attention", 64) == (1, 2)
    assert allocation.widths(unit, "mlp", 96) == (96, 192, 256)
    kept = [allocation.rounded(unit, "mlp", n, 96) for n in (1, 143, 144, 223, 224, 256)]
    assert kept == [96, 96, 192, 192, 256, 256]
    assert allocation.rounded(unit, "mlp", 0, None) == 1


@pytest.mark.parametrize("method", UNIFORM)
def test_a_target_is_met_as_nearly_as_rounding_allows(method):
    info = locate.open("demo").info
    wanted = round(0.8 * info.parameters)
    made = plan.make(info, methods.get(method), params=wanted, ways=Ways(round_to=32))
    assert all(c.neurons % 32 == 0 for c in made.counts.values())
    reached = {
        plan.make(info, methods.get(method), ratio=step / 500, ways=Ways(round_to=32)).parameters
        for step in range(500)
    }
    assert abs(made.parameters - wanted) == min(abs(r - wanted) for r in reached)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--ratio", "1.5"), "--ratio must be at least 0 and below 1, got 1.5"),
        (("--match", "nowhere/at/all"), "There is no folder nowhere/at/all"),
        (("--ratio", "0.2", "--length", "4096"), "exceed the model's context of 512"),
    ],
)
def test_bad_options_on_the_command_line(capsys, arguments, sentence):
    status = main(["width", "demo", "--method", "flap", *arguments, "--out", "unused", "--dry-run"])
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_bad_options_are_told_before_waiting_for_the_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_LOCK_DIR", str(tmp_path / "locks"))
    busy = DeviceLock("cpu", {"run": "another"})
    busy.acquire()
    out = ["--out", str(tmp_path / "x"), "--device", "cpu"]
    assert main(["width", "demo", "--method", "flap", "--ratio", "1.5", *out]) == 2
    found = capsys.readouterr().err
    assert "--ratio must be at least 0 and below 1, got 1.5" in found
    assert "Waiting" not in found
    busy.release()


def test_other_families_are_refused(tmp_path, capsys):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status = main(
        ["width", str(tmp_path), "--method", "random", "--ratio", "0.2", "--out", "x", "--dry-run"]
    )
    assert status == 2
    assert "'gpt2' is not supported" in capsys.readouterr().err
