"""Result files as dataclasses: what is written is read back; old and damaged files still open."""

from __future__ import annotations

import json

import study_helpers as made

from core.benchmark import results as benchmark
from core.benchmark.analytic import Rates
from core.evaluate import results as evaluate
from core.live import replies
from core.retrain import results as retrain
from core.runs.workspace import Workspace
from core.study import study


class Folder:
    """What of a run the writers need."""

    def __init__(self, folder):
        self.dir = folder

    def write_json(self, name, value):
        (self.dir / name).write_text(json.dumps({"schema": 1, **value}))

    def write_csv(self, name, columns, rows):
        from core.runs import workspace

        workspace.write_csv(self.dir / name, columns, rows)

    def write_text(self, name, text):
        (self.dir / name).write_text(text)


def test_evaluate_writes_the_keys_of_the_contract_and_reads_them_back(tmp_path):
    run = Folder(tmp_path)
    text = evaluate.Text(source="a.txt", window=128, bos="once", tokens=9, ppl=2.5, windows=3)
    asked = evaluate.Asked(task="piqa", scores=(("piqa", "acc", 0.5, None, 4),), shots={"piqa": 0})
    summary = evaluate.Summary(content="c", perplexity=(text,), tasks=(asked,), device="cpu")
    summary.write(run)
    assert evaluate.Summary.read(tmp_path) == summary
    assert [s.value for s in evaluate.Summary.read(tmp_path).tasks[0].rows] == [0.5]
    row = evaluate.TextRow(source="a.txt", window=128, bos="once", tokens=9, ppl=2.5)
    evaluate.TextRow.write(run, [row])
    header = (tmp_path / "perplexity.csv").read_text().splitlines()[0]
    assert header == "source,window,bos,tokens,ppl"
    assert evaluate.TextRow.read(tmp_path) == (row,)
    assert ",".join(evaluate.Score.columns()) == "task,metric,value,stderr,samples"


def test_samples_without_choices_have_no_keys_of_choices(tmp_path):
    plain = evaluate.Sample(task="t", index=0, metrics={"em": 1.0}, question="?", answer="yes")
    choice = evaluate.Sample(
        task="t", index=1, metrics={"acc": 1.0}, target=0, question="?", answer=0,
        choices=("a", "b"), loglikelihoods=(-1.0, -2.0),
    )  # fmt: skip
    evaluate.write_samples(Folder(tmp_path), [plain, choice])
    first, second = (
        json.loads(line) for line in (tmp_path / evaluate.SAMPLES).read_text().splitlines()
    )
    assert not {"choices", "loglikelihoods"} & set(first)
    assert second["choices"] == ["a", "b"]
    assert evaluate.read_samples(tmp_path) == (plain, choice)


def test_a_benchmark_of_another_version_is_read_for_what_it_has(tmp_path):
    rates = {"bandwidth_bytes_per_s": 2.0, "matmul_flops_per_s": 3, "of_a_later_version": 1}
    old = {"device": "cpu", "variants": [{"name": "a", "parameters": 7}], "rates": rates}
    (tmp_path / "summary.json").write_text(json.dumps(old))
    found = benchmark.Summary.read(tmp_path)
    assert found.rates == Rates(2.0, 3.0)
    assert (found.variants[0].parameters, found.variants[0].largest_batch) == (7, None)
    assert (found.threads, found.analytic) == (None, None)
    (tmp_path / "points.csv").write_text(
        "variant,batch_size,latency_s_mean,oom,colour\na,1,0.5,false,red\na,4,,true,\na,x,1,,\n"
    )
    one, four = benchmark.Point.read(tmp_path)  # the line without a batch size is left out
    assert (one.latency_s_mean, one.oom, four.latency_s_mean, four.oom) == (0.5, False, None, True)


def test_estimates_are_compared_with_what_was_measured():
    points = [
        benchmark.Point(variant="a", batch_size=1, latency_s_mean=1.0, estimated_latency_s=1.5),
        benchmark.Point(variant="a", batch_size=4, oom=True, estimated_latency_s=9.0),
    ]
    found = benchmark.accuracy(points)
    assert (found.latency.points, found.latency.worst_error_pct) == (1, 50.0)
    assert found.memory.points == 0


def test_metrics_are_told_apart_and_unreadable_lines_left_out():
    step = retrain.metric('{"step": 3, "loss": 2.5, "lr": 0.1}')
    assert (type(step), step.step, step.loss, step.memory_mib) == (retrain.Step, 3, 2.5, None)
    at = retrain.metric('{"event": "eval", "step": 4, "heldout_loss": 2.0, "recovered": 0.5}')
    assert (type(at), at.recovered) == (retrain.Evaluation, 0.5)
    seen = retrain.metric('{"event": "finding", "step": 4, "kind": "flat", "message": "Flat."}')
    assert (type(seen), seen.kind) == (retrain.Notice, "flat")
    for line in ("", "no", "[1]", '{"loss": 1}', '{"event": "other", "step": 1}'):
        assert retrain.metric(line) is None


def test_the_table_of_further_evaluation_is_found_by_either_name(tmp_path):
    assert retrain.read_measures(tmp_path) == ()
    line = "source,measure,dense,before,after,items\nheld out,loss,,3.0,2.0,9\n"
    (tmp_path / "judged.csv").write_text(line)
    (row,) = retrain.read_measures(tmp_path)
    assert (row.dense, row.before, row.after, row.items) == (None, 3.0, 2.0, 9)
    assert retrain.measures_file(tmp_path).name == "judged.csv"


def test_damaged_results_break_no_study(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "ws"))
    dense = made.checkpoint(tmp_path / "dense")
    for number, command in enumerate(("evaluate", "benchmark", "retrain")):
        for place, text in enumerate(
            ("{", "[]", '{"perplexity": 3, "variants": [1], "heldout": 0}')
        ):
            folder = made.run(
                tmp_path / "ws", f"{command}{place}", command, number, checkpoint=dense
            )
            (folder / "summary.json").write_text(text)
            for name in ("perplexity.csv", "tasks.csv", "points.csv", "runs.csv"):
                (folder / name).write_bytes(b"\xff\x00,\n\x80")
    found = study(Workspace(), str(dense))
    assert (found.quality, found.tasks, found.benchmarks) == ((), (), ())


def test_replies_go_over_the_wire_as_before():
    waiting = replies.to_event(replies.Waiting(why="loading demo"))
    assert waiting == {"event": "waiting", "for": "loading demo"}
    part = replies.Part(ppl=2.5, windows=8, of=210)
    assert replies.to_event(part) == {
        "event": "part", "ppl": 2.5, "windows": 8, "of": 210, "dense_ppl": None, "stderr": None
    }  # fmt: skip
    whole = replies.Measured(ppl=2.5, windows=210, of=210, device="cpu")
    event = json.loads(json.dumps(replies.to_event(whole)))
    assert event["event"] == "done"
    assert replies.from_event("perplexity", event) == whole
    assert replies.from_event("perplexity", replies.to_event(part)) == part
    status = replies.Status(models=("demo",), held=True)
    assert replies.from_event("status", json.loads(json.dumps(replies.to_event(status)))) == status
    assert replies.from_event("stop", {"event": "done"}) == replies.Done()
