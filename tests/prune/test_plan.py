import json
import math
import random

import pytest

from core.__main__ import main
from core.checkpoint import headers
from core.errors import DataError, PlanError
from core.prune import plan, scores
from core.runs import workspace

LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


def config_only(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_7B | fields))
    return folder


@pytest.fixture
def llama_7b(tmp_path):
    return config_only(tmp_path / "7b")


@pytest.mark.parametrize(
    ("file", "criterion", "expected"),
    [
        ("llama-1-7b/ppl.all_ppl_unsorted.csv", "ppl", [24, 26, 25, 10, 27, 13]),
        ("llama-1-7b/taylor.block_score_all.csv", "taylor+", [27, 24, 26, 25, 29, 28]),
        ("llama-1-7b/magnitude.block_score_all.csv", "magnitude", [9, 8, 10, 5, 7, 12]),
        ("Llama-2-7b-hf/ppl.all_ppl_unsorted.csv", "ppl", [11, 8, 24, 21, 12, 7]),
        ("Llama-2-7b-hf/taylor.block_score_all.csv", "taylor", [28, 27, 25, 29, 26, 24]),
    ],
)
def test_published_selections(real_dir, llama_7b, capsys, file, criterion, expected):
    path = real_dir / "published_scores" / file
    arguments = [str(path), "--criterion", criterion, "--count", "6"]
    assert main(["plan", *arguments]) == 0
    bare = json.loads(capsys.readouterr().out)
    assert bare["drop"] == expected
    assert bare["params"] is None
    assert main(["plan", *arguments, "--checkpoint", str(llama_7b)]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 5_524_115_456
    order = path.with_name(path.name.split(".")[0] + ".block_order.csv").read_text().split("\n")[0]
    everything = plan.choose(
        scores.load(path), criterion, count=31, protect_first=0, protect_last=0
    )
    assert list(everything.drop) == [int(b) for b in order.split(",")][:31]


@pytest.mark.parametrize(
    ("count", "left"), [(6, 5_524_115_456), (9, 4_916_965_376), (11, 4_512_198_656)]
)
def test_published_parameters(llama_7b, count, left):
    info = headers.inspect(llama_7b)
    assert info.parameters == 6_738_415_616
    chosen = plan.choose(None, "last", count=count, info=info)
    assert chosen.params == left
    assert chosen.drop == tuple(range(29, 29 - count, -1))
    assert plan.choose(None, "last", params=left + 1000, info=info).drop == chosen.drop
    assert plan.choose(None, "last", ratio=1 - left / 6_738_415_616, info=info).params == left


def test_published_parameters_of_the_13b_model(tmp_path):
    shape = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    info = headers.inspect(config_only(tmp_path / "13b", num_attention_heads=40, **shape))
    assert plan.choose(None, "last", count=8, info=info).params == 10_478_228_480


def test_nearest_reachable_ratio(llama_7b):
    info = headers.inspect(llama_7b)
    block = info.block_parameters[0]
    for ratio in (0.01, 0.1, 0.2, 0.35, 0.5):
        chosen = plan.choose(None, "last", ratio=ratio, info=info)
        errors = {k: abs(k * block / info.parameters - ratio) for k in range(1, 27)}
        assert len(chosen.drop) == min(errors, key=errors.get)
        assert chosen.ratio == pytest.approx(len(chosen.drop) * block / info.parameters)


def block_scores(values, **columns):
    table = {"ppl": tuple(values)} | {k: tuple(v) for k, v in columns.items()}
    return scores.BlockScores("test", len(values), table)


@pytest.mark.parametrize(
    ("blocks", "protected"),
    [
        (2, []),
        (3, [0, 2]),
        (11, [0, 10]),
        (12, [0, 1, 2, 3, 10, 11]),
        (126, [0, 1, 2, 3, 124, 125]),
    ],
)
def test_protection_defaults(blocks, protected):
    chosen = plan.choose(block_scores(range(blocks)), "ppl", count=1)
    assert list(chosen.protected) == protected
    assert chosen.drop[0] == min(set(range(blocks)) - set(protected))
    most = chosen.available
    assert most == min(blocks - len(protected), blocks - 1)
    assert len(plan.choose(block_scores(range(blocks)), "ppl", count=most).drop) == most
    with pytest.raises(PlanError, match=f"The maximum is {most} with"):
        plan.choose(block_scores(range(blocks)), "ppl", count=most + 1)


def test_more_than_available_by_ratio_or_parameters(llama_7b):
    info = headers.inspect(llama_7b)
    for request in ({"ratio": 0.9}, {"params": 100_000_000}):
        with pytest.raises(PlanError, match="The maximum is 26 with"):
            plan.choose(None, "last", info=info, **request)
    with pytest.raises(PlanError, match="is not smaller than"):
        plan.choose(None, "last", info=info, params=7_000_000_000)


@pytest.mark.parametrize(
    "request_", [{}, {"count": 1, "ratio": 0.1}, {"count": 0}, {"ratio": 1.0}, {"ratio": -0.1}]
)
def test_bad_requests(llama_7b, request_):
    with pytest.raises(PlanError):
        plan.choose(None, "last", info=headers.inspect(llama_7b), **request_)


def test_ratio_needs_a_checkpoint():
    with pytest.raises(PlanError, match="--checkpoint"):
        plan.choose(block_scores(range(6)), "ppl", ratio=0.2)


def test_random_is_seeded_and_the_same_under_any_protection():
    table = block_scores(range(20))
    first = plan.choose(table, "random", count=19, seed=3, protect_first=0, protect_last=0).drop
    inner = plan.choose(table, "random", count=14, seed=3).drop
    assert inner[:13] == tuple(b for b in first if 4 <= b < 18)[:13]
    orders = {plan.choose(table, "random", count=14, seed=s).drop for s in range(20)}
    assert len(orders) == 20


def test_angular_takes_the_best_range_between_the_protected(tmp_path):
    rng = random.Random(0)
    blocks = 14
    table = {(s, n): rng.random() for n in range(1, blocks + 1) for s in range(blocks - n + 1)}
    (tmp_path / "blocks.csv").write_text(
        "block,ppl\n" + "".join(f"{b},{b + 1}\n" for b in range(blocks))
    )
    (tmp_path / "angular.csv").write_text(
        "start,length,distance\n" + "".join(f"{s},{n},{d}\n" for (s, n), d in table.items())
    )
    loaded = scores.load(tmp_path)
    for count in range(1, 9):
        drop = plan.choose(loaded, "angular", count=count).drop
        assert len(drop) == count
        assert list(drop) == list(range(drop[0], drop[0] + count))
        assert drop[0] >= 4
        assert drop[-1] <= 11
        reachable = [table[s, count] for s in range(4, 12 - count + 1)]
        assert table[drop[0], count] == min(reachable)
    with pytest.raises(DataError, match="no taylor scores"):
        loaded.order("taylor")


def test_order_and_ties():
    table = block_scores([3.0, 1.0, math.inf, 1.0, 2.0])
    assert table.order("ppl") == (1, 3, 4, 0, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block,score\n0,1\n1,nan\n2,3\n", "block 1 .* NaN"),
        ("block,score\n0,1\n1,\n2,3\n", "block 1 .* missing"),
        ("block,score\n0,1\n2,3\n", "no row for block 1"),
        ("block,score\n0,1\n0,3\n", "twice"),
        ("block,score\n0,one\n", "not a number"),
        ("block,score\nx,1\n", "not a block number"),
        ("a,b\n0,1\n", "columns are a, b"),
        ("", "columns are none"),
    ],
)
def test_bad_scores(tmp_path, text, says):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        scores.load(tmp_path / "s.csv").order("ppl")


def test_layouts_from_elsewhere_agree(tmp_path):
    values = [5.0, 2.0, 4.0, 1.0, 3.0, 9.0]
    layouts = {
        "a.csv": ("block,score", "{b},{v}"),
        "b.csv": ("block_name,block_score", "model.layers.{b},{v}"),
        "c.csv": ("removed_block,ppl_bookcorpus,params", "{b}.0,{v},7.0"),
    }
    for name, (header, row) in layouts.items():
        rows = [row.format(b=b, v=v) for b, v in reversed(list(enumerate(values)))]
        extra = ["model.norm.weight,0.1", "lm_head.weight,0.1"] if name == "b.csv" else []
        (tmp_path / name).write_text("\n".join([header, *rows, *extra]) + "\n")
        assert scores.load(tmp_path / name).order("ppl") == (3, 1, 4, 2, 0, 5)


def test_a_run_brings_its_checkpoint(tiny_gqa, tmp_path, capsys):
    run = tmp_path / "run"
    (run / ".run").mkdir(parents=True)
    workspace.write_json(run / ".run" / "spec.json", {"spec": {"checkpoint": str(tiny_gqa)}})
    (run / "blocks.csv").write_text(
        "block,ppl,taylor,magnitude,block_influence,relative_update\n"
        "0,9,1,1,,\n1,3,4,1,,\n2,2,3,1,,\n3,4,2,1,,\n4,5,1,1,,\n"
    )
    assert main(["plan", str(run), "--criterion", "taylor", "--ratio", "0.3"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["drop"] == [3, 2]
    assert said["keep"] == [0, 1, 4]
    assert said["protected"] == [0, 4]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_gqa, dtype=torch.float32)
    block = sum(p.numel() for p in model.model.layers[2].parameters())
    assert said["params"] == sum(p.numel() for p in model.parameters()) - 2 * block
    assert main(["plan", str(run), "--criterion", "block-influence", "--count", "1"]) == 2
    assert "ppl, taylor, magnitude" in capsys.readouterr().err
    assert main(["plan", str(run), "--criterion", "nonsense", "--count", "1"]) == 2


def test_scores_of_another_model(tiny_gqa):
    with pytest.raises(PlanError, match="7 blocks, but the checkpoint has 5"):
        plan.choose(block_scores(range(7)), "ppl", count=1, info=headers.inspect(tiny_gqa))


def test_greedy_order_is_followed_as_it_was_searched(tmp_path):
    workspace.write_csv(tmp_path / "blocks.csv", ("block", "ppl"), [(b, 2.0) for b in range(14)])
    rows = [(1, 5, 2.1), (2, 2, 2.2), (3, 9, 2.4)]
    workspace.write_csv(tmp_path / "greedy.csv", ("round", "block", "ppl"), rows)
    found = scores.load(tmp_path)
    assert "sleb" in found.available
    chosen = plan.choose(found, "sleb", count=3)
    assert (chosen.drop, chosen.available) == ((5, 2, 9), 3)
    assert chosen.protected == (0, 13)  # what the search itself keeps
    with pytest.raises(PlanError, match="--count 4 exceeds the number of removable blocks"):
        plan.choose(found, "sleb", count=4)
    with pytest.raises(DataError, match="removed block 2, which is protected here"):
        plan.choose(found, "sleb", count=2, protect_first=4)
    (tmp_path / "greedy.csv").unlink()
    with pytest.raises(DataError, match="has no greedy order"):
        plan.choose(scores.load(tmp_path), "sleb", count=1)
