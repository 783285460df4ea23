"""A report is one file with everything in it; the zip has the study's runs; bad input is said."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest
import study_helpers as made

from core.__main__ import main
from core.checkpoint import headers
from core.compare import headline
from core.report import build
from core.report import html as parts
from core.report.material import commands, gather
from core.runs import workspace
from core.runs.workspace import Workspace, read_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A workspace with a dense checkpoint, two cuts, a retrained one, and all that is measured."""
    root = tmp_path / "ws"
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(root))
    dense = made.checkpoint(tmp_path / "dense")
    total = headers.inspect(dense).parameters
    plan = {"protect_first": 1, "protect_last": 1}
    scored(made.run(root, "scores", "importance", 1, checkpoint=dense), dense)
    cut = made.pruned(root, "cut", dense, [2], 2, total, criterion="ppl", plan=plan)
    made.pruned(root, "more", dense, [2, 3], 3, total, criterion="ppl", plan=plan)
    (cut / ".run" / "heartbeat").touch()
    tuned = made.run(root, "tuned", "retrain", 4, checkpoint=cut, method="lora", data="demo")
    made.checkpoint(tuned / "merged")
    (tuned / "adapter").mkdir()
    (tuned / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    retrained(tuned)
    for at, (folder, ppl) in enumerate([(dense, 10.0), (cut, 13.0), (root / "more", 40.0),
                                        (tuned, 11.0)]):  # fmt: skip
        judged(made.run(root, f"judge{at}", "evaluate", 5 + at, checkpoint=folder), ppl)
    rows = [
        {"variant": n, "batch_size": b, "input_tokens": 12, "output_tokens": 8, "oom": False,
         "latency_s_mean": s * b, "latency_s_p50": s * b, "latency_s_std": 0.001, "runs": 9,
         "tokens_per_s": 8 / s, "peak_memory_mib": m * b, "per_token_s": s / 9}
        for n, s, m in (("dense", 1.0, 100.0), ("cut", 0.8, 80.0)) for b in (1, 4)
    ]  # fmt: skip
    paths = {"dense": str(dense), "cut": str(cut)}
    made.benchmark(root, "timed", 10, paths, rows, device_name="a <chip>", input_tokens=12, seed=7)
    return Workspace(), dense


def scored(folder, dense):
    blocks = [(b, 12.0 + b, 3.0 * b, 9.0 - b, 0.1 * b, 0.2 * b) for b in range(6)]
    columns = ("block", "ppl", "taylor", "magnitude", "block_influence", "relative_update")
    workspace.write_csv(folder / "blocks.csv", columns, blocks)
    rows = [(b, s, 2.0 + 0.1 * b + 0.01 * s) for b in range(-1, 6) for s in range(3)]
    workspace.write_csv(folder / "samples.csv", ("block", "sample", "nll"), rows)
    summary = {"dense_ppl": 10.5, "calibration": "demo", "samples": 3, "length": 64, "seed": 1234,
               "device": "cpu", "dtype": "float32", "tokens": 189, "metrics": ["ppl", "taylor"],
               "versions": {"depthcut": "9.8.7", "torch": "6.5.4"}}  # fmt: skip
    workspace.write_json(folder / "summary.json", summary)
    argv = ["python", "-m", "core", "importance", str(dense), "--out", "a folder"]
    spec = {"command": "importance", "spec": {"checkpoint": str(dense)}, "argv": argv, "cwd": ""}
    workspace.write_json(folder / ".run" / "spec.json", spec)


def judged(folder, ppl):
    columns = ("source", "window", "bos", "tokens", "ppl")
    workspace.write_csv(folder / "perplexity.csv", columns, [("text.txt", 64, "once", 999, ppl)])
    workspace.write_json(folder / "summary.json", {"device": "cpu", "dtype": "float32"})
    rows = [("piqa", "acc", 0.5 + ppl / 1000, 0.03, 40)]
    workspace.write_csv(
        folder / "tasks.csv", ("task", "metric", "value", "stderr", "samples"), rows
    )


def retrained(folder):
    lines = [{"step": n, "loss": 3.0 - n / 10, "lr": 0.1} for n in range(1, 6)]
    lines.append({"event": "eval", "step": 5, "heldout_loss": 2.4, "recovered": 0.5,
                  "heldout_loss_dense": 2.0, "heldout_loss_before": 2.8})  # fmt: skip
    text = "\n".join(json.dumps(line) for line in lines) + "\n"
    (folder / ".run" / "metrics.jsonl").write_text(text)
    workspace.write_json(folder / "summary.json", {
        "heldout_loss_dense": 2.0, "heldout_loss_before": 2.8, "heldout_loss_after": 2.4,
        "recovered": 0.5, "seed": 3, "device": "cpu", "compute_dtype": "float32",
        "heldout": {"rows": 2, "source": "demo", "tokens": 50},
        "data": {"source": "demo", "kind": "text"},
    })  # fmt: skip


def report(tmp_path, name, *more):
    out = tmp_path / "report.html"
    assert main(["report", str(name), "--out", str(out), *more]) == 0
    return out.read_text()


# ------------------------------------------------------------------------------------------ page


def test_everything_of_the_study_is_in_one_file_that_asks_nobody(lab, tmp_path, capsys):
    where, dense = lab
    text = report(tmp_path, dense)
    own = text.replace(re.search(r"<script>/\*\*.*?</script>", text, re.S)[0], "")
    assert len(own) < len(text) / 10  # plotly.js is there, once
    assert not re.search(r"""(src|href)=["'](?!#)""", own)
    for title in ("Checkpoint", "Findings", "Calibration and importance", "Plans and variants",
                  "Retraining", "Quality", "Speed and memory", "Published figures", "Versions",
                  "Reproduce"):  # fmt: skip
        assert f">{title}</h2>" in own
    assert "measured</span>" in own
    assert "estimated</span>" in own
    assert "published</span>" in own
    assert "9.8.7" in own
    assert "6.5.4" in own
    assert "demo, 3 x 64 tokens, seed 1234, cpu, float32" in own
    assert "50% of the gap was recovered" in own
    assert "a &lt;chip&gt;" in own
    assert "a <chip>" not in own
    assert "authors' repository" not in own
    assert "authors' repository" in html.unescape(own)
    printed = json.loads(capsys.readouterr().out)
    assert printed["variants"] == 4
    assert printed["findings"] == ["criteria-disagree", "verdict", "large-drop"]


class Reader(HTMLParser):
    """The elements of a page, and the text of each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1], []).append(data)


HOSTILE = """</script></style><!--<script>alert("1")</script>&amp;' onload=x"""


def test_hostile_text_stays_text_in_every_part():
    chart = go.Figure(go.Bar(x=[HOSTILE], y=[1], name=HOSTILE), {"title": {"text": HOSTILE}})
    rows = [{HOSTILE: HOSTILE, "list": [HOSTILE, 1], "kind": "measured", "no": None}]
    evidence = parts.facts({HOSTILE: HOSTILE}, HOSTILE)
    every = [
        parts.Paragraph(HOSTILE), parts.Heading(HOSTILE), *parts.table(rows, HOSTILE),
        parts.Tiles({HOSTILE: (HOSTILE, HOSTILE)}), parts.Figure(chart, HOSTILE, HOSTILE),
        parts.Code([HOSTILE, "ls"]), parts.Remark(HOSTILE, HOSTILE, evidence),
    ]  # fmt: skip
    page = parts.page(HOSTILE, every, [parts.Section("one", HOSTILE, every)], HOSTILE)
    found = Reader(page)
    assert [t for t, _ in found.tags].count("script") == 4  # two figures, plotly.js, our own
    assert [t for t, _ in found.tags].count("style") == 1
    assert not any("onload" in attributes for _, attributes in found.tags)
    once, twice = ("title", "h1", "h2", "a", "footer"), (
        "p", "h3", "caption", "th", "td", "dt", "dd", "small", "figcaption", "strong")  # fmt: skip
    for tag, times in {**dict.fromkeys(once, 1), **dict.fromkeys(twice, 2)}.items():
        assert found.texts[tag].count(HOSTILE) >= times, tag
    assert f"{HOSTILE}\nls" in found.texts["code"]
    assert f"{HOSTILE}, 1" in found.texts["td"]
    plots = [a for t, a in found.tags if t == "div" and a.get("class") == "plot"]
    assert [a["aria-label"] for a in plots] == [HOSTILE] * 2
    figures = [json.loads(t) for t in found.texts["script"] if t.startswith("{")]
    assert [f["data"][0]["name"] for f in figures] == [HOSTILE] * 2
    assert [f["layout"]["title"]["text"] for f in figures] == [HOSTILE] * 2


def test_a_run_named_like_markup_stays_text(lab, tmp_path):
    where, dense = lab
    scored(made.run(where.root, "<script>alert(1)<b>", "importance", 30, checkpoint=dense), dense)
    found = Reader(report(tmp_path, dense))
    assert "<script>alert(1)<b>" in found.texts["td"]
    assert "b" not in {tag for tag, _ in found.tags}
    assert not any("alert(1)<" in t for t in found.texts["script"])


def test_a_table_shows_only_columns_with_values_and_aligns_numbers():
    rows = [{"a": "x", "b": None, "n": 12345.6, "yes": True}, {"a": None, "b": "", "n": 0.12345}]
    (found,) = parts.table(rows, "Caption")
    assert found.columns == {"a": False, "n": True, "yes": False}
    cells = re.findall(r"<td[^>]*>.*?</td>", parts.page("t", [found], [], ""))
    none = '<span aria-label="none">-</span>'
    assert cells == [
        "<td>x</td>", '<td class="n">12,346</td>', "<td>yes</td>",
        f"<td>{none}</td>", '<td class="n">0.1235</td>', f"<td>{none}</td>",
    ]  # fmt: skip
    assert parts.table([], "Caption") == parts.table([{"a": None}], "Caption") == []


def test_plotly_is_in_a_page_with_charts_only():
    chart = parts.Figure(go.Figure(), "alt", "note")
    without, drawn = (parts.page("t", [], [parts.Section("s", "S", p)], "") for p in ([], [chart]))
    assert "Plotly.newPlot" not in without
    assert len(without) < 20_000
    assert drawn.count("plotly.js v") == 1


def test_the_figures_hold_what_the_files_hold(lab, tmp_path):
    _, dense = lab
    text = report(tmp_path, dense)
    specs = re.findall(r'<script type="application/json" class="figure">(.*?)</script>', text, re.S)
    figures = [json.loads(s) for s in specs]
    bars = [f for f in figures if f["data"][0]["type"] == "bar" and f["layout"]["yaxis"]
            .get("title", {}).get("text") == "perplexity without the block"]  # fmt: skip
    assert bars[0]["data"][0]["y"] == [12.0 + b for b in range(6)]
    names = {t["name"] for f in figures for t in f["data"] if t.get("name")}
    assert {"training loss", "held-out loss", "PPL+"} <= names
    assert any(n.startswith("published: ") for n in names)
    assert text.count('role="img" aria-label=') == len(figures)


def test_task_differences_carry_the_error_of_both(lab, tmp_path):
    _, dense = lab
    text = report(tmp_path, dense)
    row = re.search(r"<tr><td>piqa</td><td>PPL\+ \d+%</td>.*?</tr>", text)[0]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[3:] == [
        "as the task says",
        "0.513",
        "0.03",
        "0.003",
        f"{(2 * 0.03**2) ** 0.5:.4g}",
        "40",
    ]


def test_commands_come_oldest_first_and_ready_to_paste(lab):
    where, dense = lab
    found = gather(str(dense), where)
    lines = commands(found.runs)
    assert lines[0].endswith("--out 'a folder'")
    times = [r.started for r in found.runs]
    assert times == sorted(times)
    assert {r.id for r in found.runs} >= {"scores", "cut", "tuned", "timed", "judge0"}


def test_a_dense_checkpoint_alone_makes_a_report_that_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path / "empty"))
    text = report(tmp_path, made.checkpoint(tmp_path / "dense"))
    assert "The importance of the blocks has not been measured yet." in text
    assert "Nothing has been retrained yet." in text
    assert "No quality has been measured yet." in text
    assert "There are no runs yet." in text


@pytest.mark.parametrize("name", ["cut", "scores", "timed"])
def test_any_run_of_a_study_stands_for_it(lab, name):
    where, dense = lab
    assert gather(name, where).study.dense.id == str(dense)
    assert gather(str(where.root / name), Workspace(where.root.parent)).study.dense.id == str(dense)


def test_a_workspace_folder_with_one_study_will_do_with_two_it_will_not(lab, tmp_path, capsys):
    where, dense = lab
    assert gather(str(where.root), Workspace(tmp_path / "other")).study.dense.id == str(dense)
    second = made.checkpoint(tmp_path / "second", 4)
    made.run(where.root, "stranger", "importance", 99, checkpoint=second)
    assert main(["report", str(where.root), "--out", str(tmp_path / "x.html")]) == 2
    assert "contains 2 studies" in capsys.readouterr().err


def test_a_recipe_folder_has_its_steps_and_its_own_command(lab, tmp_path):
    where, dense = lab
    chain = made.run(where.root, "chain", "recipe", 20, checkpoint=dense)
    scored(made.run(chain, "scores", "importance", 21, checkpoint=dense), dense)
    found = gather(str(chain), where)
    assert [r.id for r in found.runs] == ["chain", "chain/scores"]
    everything = gather(str(dense), where)
    assert {"chain", "chain/scores", "cut"} <= {r.id for r in everything.runs}


def test_an_imported_checkpoint_outside_the_workspace_is_where_it_is_used(lab):
    where, dense = lab
    made.run(dense.parent, dense.name, "import", 0, source="model.gguf")
    found = gather(str(dense), where)
    assert len(found.study.variants) == 4
    assert found.verdict.take is not None


# ------------------------------------------------------------------------------------- big numbers


def test_the_headline_is_measured_over_dense(lab):
    where, dense = lab
    found = gather(str(dense), where)
    first, second = headline.stops(found.scene)
    assert (first.ppl, first.speed, first.memory) == pytest.approx((1.3, 1 / 0.8, 0.8))
    assert first.cost == "measured"
    assert (first.retrained_ppl, first.retrained_by) == (pytest.approx(1.1), "LoRA")
    # Two standard errors of each mean, by hand.
    shares = [2 * 0.001 / s / 9**0.5 for s in (1.0, 0.8)]
    assert first.noise == pytest.approx((shares[0] ** 2 + shares[1] ** 2) ** 0.5)
    assert second.ppl == pytest.approx(4.0)
    assert second.cost == "estimated"
    assert second.speed is None  # nothing is known of the device, so nothing is said
    assert found.verdict.sentence in build.page(found)
    assert build.tiles(found.verdict.of("cut"))["Speed"][0] == "1.25 x"
    assert build.tiles(found.verdict.of("cut"))["Memory"] == (
        "80%",
        "of the dense model's, measured",
    )


def test_a_look_starts_at_the_checkpoint_nearest_to_moderate_pruning():
    def stop(ratio, is_plan=False):
        return headline.Stop("a", "a", ratio, (1,), 1, 1.1, None, None, "unknown", is_plan=is_plan)

    sizes = [stop(0.05), stop(0.18), stop(0.2, is_plan=True), stop(0.5)]
    assert headline.start(sizes).ratio == 0.18
    assert headline.start(sizes[2:3]).ratio == 0.2


# ------------------------------------------------------------------------------------ zip, errors


def test_the_zip_holds_runs_without_weights_unless_asked(lab, tmp_path):
    where, dense = lab
    out, small, whole = (tmp_path / n for n in ("r.html", "small.zip", "whole.zip"))
    base = ["report", str(dense), "--out", str(out), "--overwrite", "--zip"]
    assert main([*base, str(small)]) == 0
    assert main([*base, str(whole), "--weights"]) == 0
    names = {n: zipfile.ZipFile(n).namelist() for n in (small, whole)}
    assert set(names[whole]) - set(names[small]) == {"tuned/adapter/adapter_model.safetensors"}
    assert {"report.html", "cut/pruning.json", "cut/.run/spec.json", "timed/points.csv"} <= set(
        names[small]
    )
    assert not any("heartbeat" in n for n in names[whole])
    assert zipfile.ZipFile(whole).read("tuned/adapter/adapter_model.safetensors") == b"weights"
    assert len(names[whole]) == len(set(names[whole]))
    zipfile.ZipFile(small).extractall(tmp_path / "elsewhere")
    assert read_run(tmp_path / "elsewhere" / "cut").command == "prune"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["DENSE", "--out", "taken.html"], "taken.html already exists. Give another file, or add"),
        (["DENSE", "--out", "."], "is a folder. Give a file to write."),
        (["DENSE", "--out", "a.html", "--zip", "a.html"], "are both"),
        (["DENSE", "--out", "a.html", "--weights"], "--weights needs --zip"),
        (["nowhere", "--out", "a.html"], "There is no folder nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    lab, tmp_path, monkeypatch, capsys, arguments, sentence
):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "taken.html").write_text("mine")
    line = [str(lab[1]) if a == "DENSE" else a for a in arguments]
    assert main(["report", *line]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["taken.html"]
    assert (folder / "taken.html").read_text() == "mine"


def test_neither_torch_nor_the_dashboard_is_loaded(lab, tmp_path):
    code = (
        "import sys; from core.__main__ import main; "
        f"assert main(['report', {str(lab[1])!r}, '--out', {str(tmp_path / 'o.html')!r}]) == 0; "
        "print(sorted({'torch', 'transformers', 'streamlit'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("[]"), done.stderr
