"""Real input: stories260k on WikiText-2 and on its own text, against a plain loop and lm-eval."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.__main__ import main

sys.path.append(str(Path(__file__).parent))
from test_perplexity import plain_loop
from test_tasks import evaluate, local_tasks

choices = local_tasks
"""A folder with a task of the tests' own."""


@pytest.mark.parametrize("bos", ["once", "window"])
def test_stories260k_on_wikitext2(real_dir, tmp_path, bos):
    folder, whole = real_dir / "stories260k", real_dir / "wikitext2_test.txt"
    text = tmp_path / "wikitext2_part.txt"
    text.write_text(whole.read_text(encoding="utf-8")[:16_000], encoding="utf-8")
    out = tmp_path / "out"
    argv = ["evaluate", folder, "--perplexity", text, "--window", "128,512", "--bos", bos]
    assert main([str(a) for a in [*argv, "--out", out, "--device", "cpu"]]) == 0
    with (out / "perplexity.csv").open(newline="") as handle:
        rows = {int(row["window"]): row for row in csv.DictReader(handle)}

    for window in (128, 512):
        expected, tokens = plain_loop(folder, text, window, bos)
        assert int(rows[window]["tokens"]) == tokens > 3_000
        assert float(rows[window]["ppl"]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def own(real_dir):
    """Four texts that stories260k wrote at temperature 1."""
    folder = real_dir / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    start = torch.full((4, 1), tokenizer.bos_token_id)
    written = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0,
        temperature=1.0, max_new_tokens=500, min_new_tokens=500, pad_token_id=0,
    )  # fmt: skip
    return tokenizer.batch_decode(written, skip_special_tokens=True)


def entropy(folder, text, tokens):
    """The mean entropy in nat of what the model predicts along a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids][:tokens]
    with torch.no_grad():
        likely = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    return -(likely.exp() * likely).sum(-1).mean().item()


def test_stories260k_on_text_sampled_from_itself(real_dir, tmp_path, own):
    """The loss on what a model wrote is the entropy of what it predicted, but for chance."""
    folder, argv = real_dir / "stories260k", []
    for number, text in enumerate(own):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
        argv += ["--perplexity", tmp_path / f"{number}.txt"]
    out = tmp_path / "out"
    argv = ["evaluate", folder, *argv, "--window", "440", "--device", "cpu", "--out", out]
    assert main([str(a) for a in argv]) == 0
    with (out / "perplexity.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    found = [float(row["ppl"]) for row in rows]
    assert [int(row["tokens"]) for row in rows] == [439] * len(own)
    expected = [plain_loop(folder, tmp_path / f"{n}.txt", 440, "once")[0] for n in range(len(own))]
    assert found == pytest.approx(expected, rel=1e-5)
    predicted = sum(entropy(folder, text, 440) for text in own) / len(own)
    loss = sum(map(math.log, found)) / len(found)
    assert loss == pytest.approx(predicted, abs=0.12)  # deviation of chance: 1.3 / sqrt(4 * 439)


TASK = """
task: own_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def harness_alone(folder, tasks, task_folder):
    """Return lm-eval's own results. Its command line, tested in test_tasks, would first index
    the thousands of tasks that it ships: 20 s, and none of them is asked here.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        "hf", f"pretrained={folder},dtype=float32", tasks=list(tasks), task_manager=manager,
        device="cpu", batch_size=4,
    )  # fmt: skip
    return found["results"]


def test_lm_eval_agrees_on_stories260k(real_dir, tmp_path, own, choices):
    folder = real_dir / "stories260k"
    data = choices / "own_text.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in own), encoding="utf-8")
    (choices / "own_text.yaml").write_text(TASK.format(data=data))
    options = ("--tasks", "own_text,colours", "--task-dir", choices, "--dtype", "float32")
    rows, _, _ = evaluate(folder, tmp_path / "out", *options)
    theirs = harness_alone(folder, ("own_text", "colours"), choices)
    assert [row["metric"] for row in rows] == [
        "word_perplexity", "byte_perplexity", "bits_per_byte", "acc", "acc_norm",
    ]  # fmt: skip
    for row in rows:
        found = theirs[row["task"]][f"{row['metric']},none"]
        assert float(row["value"]) == pytest.approx(found, rel=1e-6)
