"""Outside text is shown letter for letter: no call of a page may render it as Markdown or HTML."""

from __future__ import annotations

import ast
import json
import random
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from streamlit.testing.v1 import AppTest
from streamlit.testing.v1.element_tree import Block

from core.ui import say

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "app.py", *sorted((ROOT / "pages").glob("*.py")), *(ROOT / "core/ui").glob("*.py")]
FIRST = {"label", "body", "text", "help", "delta"}
RENDERED: dict[str, int] = {
    **dict.fromkeys(("markdown", "caption", "error", "warning", "info", "success", "toast"), 1),
    **dict.fromkeys(("title", "header", "subheader", "write", "spinner", "status", "table"), 1),
    **dict.fromkeys(("button", "checkbox", "toggle", "download_button", "link_button"), 1),
    **dict.fromkeys(("form_submit_button", "expander", "popover", "tabs", "html"), 1),
    **dict.fromkeys(("selectbox", "multiselect", "slider", "select_slider", "text_input"), 1),
    **dict.fromkeys(("text_area", "number_input"), 1),
    **dict.fromkeys(("pills", "segmented_control", "radio"), 2),
    "page_link": 0,
    "progress": 0,
    "metric": 3,
}
"""Methods of Streamlit that render Markdown -> how many of their first arguments they render."""
NUMBERS = {
    "size",
    "duration",
    "len",
    "block_ranges",
    "parameters",
    "strftime",
    "to_text",
    "rounded",
    "brief",
}
"""Functions whose result is made of digits and words of our own."""
ESCAPING = {
    *("plain", "code", "text_html", "sample_html", "pair_html", "example_html"),
    *("by_loss", "by_difference"),
}
"""Functions that escape what they are given."""
NOT_STREAMLIT = {
    *("say", "runs", "charts", "client", "scene", "by_content", "report", "merging", "generation"),
}
"""Objects whose methods happen to have such names."""
OWN = {ROOT / "core/ui/say.py"}


def name_of(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


class Scope:
    """What the names of one function are assigned to."""

    def __init__(self, function: ast.AST) -> None:
        self.values: dict[str, list[ast.expr | None]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._note(target, node.value)
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
                self._note(node.target, node.value)
            elif isinstance(node, (ast.For, ast.comprehension)):
                self._note(node.target, None)
            elif isinstance(node, ast.NamedExpr):
                self._note(node.target, node.value)
            elif isinstance(node, ast.arg):
                self.values.setdefault(node.arg, []).append(None)

    def _note(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            pairs = value.elts if isinstance(value, (ast.Tuple, ast.List)) else None
            for place, one in enumerate(target.elts):
                self._note(one, pairs[place] if pairs else value)
        elif isinstance(target, ast.Name):
            self.values.setdefault(target.id, []).append(value)

    def safe(self, node: ast.expr | None, depth: int = 0) -> bool:
        """Whether nothing from outside can be in this text unescaped."""
        if node is None or depth > 8:
            return False
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.Name) and not node.id.isupper():
            values = self.values.get(node.id)
            return bool(values) and all(self.safe(v, depth + 1) for v in values)
        if isinstance(node, (ast.Name, ast.Attribute)):
            return name_of(node).isupper()
        if isinstance(node, ast.Subscript):
            return name_of(node.value).isupper()
        if isinstance(node, ast.Call):
            if name_of(node.func) == "get" and isinstance(node.func, ast.Attribute):
                return all(map(self.safe, (node.func.value, *node.args[1:])))
            return name_of(node.func) in NUMBERS | ESCAPING | {"range"}
        if isinstance(node, ast.JoinedStr):
            return all(self.safe(v, depth) for v in node.values)
        if isinstance(node, ast.FormattedValue):
            spec = node.format_spec
            numeric = isinstance(spec, ast.JoinedStr) and spec.values
            last = spec.values[-1] if numeric else None
            if isinstance(last, ast.Constant) and str(last.value)[-1] in "dfge%,":
                return True
            return self.safe(node.value, depth)
        if isinstance(node, ast.IfExp):
            return self.safe(node.body, depth) and self.safe(node.orelse, depth)
        if isinstance(node, ast.BoolOp):
            return all(self.safe(v, depth) for v in node.values)
        if isinstance(node, ast.BinOp):
            return self.safe(node.left, depth) and self.safe(node.right, depth)
        if isinstance(node, (ast.List, ast.Tuple)):
            return all(self.safe(v, depth) for v in node.elts)
        return False


def unsafe_calls(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    functions = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]
    scope_of = {}
    for function in functions:  # the innermost function comes last
        scope = Scope(function)
        scope_of |= {id(node): scope for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        method, owner = node.func.attr, name_of(node.func.value)
        if method not in RENDERED or owner in NOT_STREAMLIT:
            continue
        scope = scope_of[id(node)]
        keywords = {k.arg: k.value for k in node.keywords}
        arguments = [*node.args[: RENDERED[method]]]
        arguments += [v for k, v in keywords.items() if k in FIRST]
        if RENDERED[method] == 2 and "format_func" in keywords:
            how = keywords["format_func"]
            body = how.body if isinstance(how, ast.Lambda) else None
            named = name_of(how) == "plain" or (
                isinstance(how, ast.Attribute) and name_of(how.value).isupper()
            )
            arguments = [*node.args[:1], *([] if named else [body])]
        if not all(scope.safe(a) for a in arguments):
            shown = ast.unparse(node)
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {shown[:110]}")
    return found


def loose_references(path: Path) -> list[str]:
    """Uses of Streamlit functions for sentences other than calls; `unsafe_calls` misses those."""
    tree = ast.parse(path.read_text())
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and name_of(node.value) == "st"
        and node.attr in RENDERED
        and id(node) not in called
    ]


def test_every_text_on_a_page_is_our_own_or_escaped():
    found = [
        line
        for path in FILES
        if path not in OWN
        for line in (*unsafe_calls(path), *loose_references(path))
    ]
    assert not found, "Use core.ui.say or plain(...):\n" + "\n".join(found)


# ------------------------------------------------------------------------------- what is rendered

IMAGE = "![x](http://127.0.0.1:9/x.png)"
HOSTILE = IMAGE + '<img src="http://127.0.0.1:9/y.png">[a](http://127.0.0.1:9/)$x$:red[y]`z`**b**'
TRICKY = [
    HOSTILE, "# heading", "- item", "+ item", "12. item", "3) item", "> quote", "---", "===", "***",
    "    indented", "\tindented", "a\n\n# b", "a  \nb", "a\\", "\\*a*", "&amp; &#33;", "a & b",
    "<b>x</b>", "<http://127.0.0.1:9/>", "<!-- x -->", "1 < 2 > 0", "a|b\n-|-\nc|d", "~~a~~ ~b~",
    "_a_ __b__ a_b_c snake_case_name", "*a* a*b*c", "``` x ```", "`a", "$5 and $6", "$$x$$",
    "[a]: http://127.0.0.1:9/", "[a][b] ![a][b] ![a]", ":material/home: :smile: :streamlit:",
    ":::note", "::x[y]", "hub:org/name:test:text", "C:\\x\\*", "[^1]", "- [ ] x", "", " ", "é_ü_",
]  # fmt: skip


def shown_by_commonmark(markdown: str) -> str:
    """What an independent Markdown implementation shows; markup of any kind raises."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    blocks = parser.parse(markdown)
    assert [t.type for t in blocks] in ([], ["paragraph_open", "inline", "paragraph_close"])
    pieces = []
    for token in (blocks[1].children or []) if blocks else []:
        assert token.type in ("text", "text_special"), (markdown, token.type)
        pieces.append(token.content)
    return "".join(pieces)


@pytest.mark.parametrize("text", TRICKY)
def test_plain_text_is_shown_letter_for_letter(text):
    wanted = " ".join(re.sub(r"[\r\n\t]+", " ", text).split())
    markdown = say.plain(text)
    assert not re.search(r":(?:\w+:|material/)", markdown)  # shortcodes work on escaped text too
    found = shown_by_commonmark(markdown).replace("\u2060", "")
    assert " ".join(found.split()) == wanted
    # Before and after our own words too, and twice in a row.
    found = shown_by_commonmark(f"Run {markdown}: done, {markdown}.").replace("\u2060", "")
    assert " ".join(found.split()) == " ".join(f"Run {wanted}: done, {wanted}.".split())


def test_plain_text_by_chance():
    rng = random.Random(12)
    letters = "\\`*_{}[]()#+-!|<>$~:&;= ab1.\n/'\"^@"
    for _ in range(3000):
        text = "".join(rng.choices(letters, k=rng.randint(1, 24)))
        wanted = " ".join(text.split())
        found = shown_by_commonmark(say.plain(text)).replace("\u2060", "")
        assert " ".join(found.split()) == wanted, text


@pytest.mark.parametrize("text", ["a", "`a`", "``", " a ", "a`b``c", "*a*\n<b>", HOSTILE])
def test_code_is_shown_letter_for_letter(text):
    (token,) = MarkdownIt("commonmark").parse(f"Run {say.code(text)}.")[1].children[1:2]
    assert token.type == "code_inline"
    assert token.content == text.replace("\n", " ")


def everything(node):
    """Yield every message that a page sent to the browser."""
    for child in node.children.values():
        if isinstance(child, Block):
            if child.proto is not None:
                yield child.proto
            yield from everything(child)
        else:
            yield child.proto


def rendered_text(proto):
    """Yield the strings of a message that the browser renders as Markdown or HTML."""
    plain_fields = {"id", "raw_value", "value", "default", "placeholder", "url", "json", "data"}
    plain_fields |= {"set_value", "raw_values", "element_id", "user_key", "query_param_key", "spec"}
    kind = type(proto).__name__
    if kind in ("Code", "Arrow", "PlotlyChart", "Text"):
        return
    if kind in ("Selectbox", "MultiSelect", "Slider"):
        plain_fields.add("options")
    for field, value in proto.ListFields():
        if field.name in plain_fields:
            continue
        values = value if isinstance(value, (list, tuple)) or field.is_repeated else [value]
        for one in values:
            if isinstance(one, str):
                yield one
            elif hasattr(one, "ListFields"):
                yield from rendered_text(one)


def hostile_run(root, name, command="importance", **status):
    """Write a run whose every text would make the browser fetch an image."""
    book = root / name / ".run"
    book.mkdir(parents=True)
    text = HOSTILE
    spec = {"checkpoint": text, "calibration": text, "method": text, "name": "ablation"}
    (book / "spec.json").write_text(json.dumps({"command": command, "spec": spec, "argv": [text]}))
    (book / "name.json").write_text(json.dumps({"name": text}))
    status = {"state": "failed", "error": text, "hint": text, "device": text, **status}
    status |= {"started": 1.0, "finished": 2.0, "progress": {"message": text, "done": 1}}
    (book / "status.json").write_text(json.dumps(status))
    (book / "log.txt").write_text(text)


PAGES = ["app", "checkpoint", "importance", "prune", "retrain", "evaluate", "compare", "playground",
         "presentation", "jobs"]  # fmt: skip


@pytest.mark.parametrize("model", ["hostile", "demo"])
@pytest.mark.parametrize("page", PAGES)
def test_no_page_renders_what_comes_from_outside(tmp_path, monkeypatch, page, model):
    monkeypatch.setenv("DEPTHCUT_WORKSPACE", str(tmp_path))
    for number, command in enumerate(("importance", "retrain", "evaluate", "recipe", "prune")):
        hostile_run(tmp_path, f"{command}-{number}", command)
    hostile_run(tmp_path, "no-such-1", IMAGE)
    (tmp_path / "active.json").write_text(json.dumps({"active": "", "recent": [HOSTILE, IMAGE]}))
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=90)
    at.query_params["model"] = HOSTILE if model == "hostile" else "demo"
    for name in ("criterion", "run", "drop", "b", "plan", "text", "columns", "prompt", "point",
                 "ppl_by", "published", "seed", "removed", "skill_run", "flip_task"):  # fmt: skip
        at.query_params[name] = HOSTILE
    at.run()
    if page != "app":
        at.switch_page(f"pages/{page}.py").run()
    texts = [text for proto in everything(at._tree) for text in rendered_text(proto)]
    assert len(texts) > 10
    exceptions = [e.value for e in at.exception]
    assert not exceptions
    for text in texts:
        if "127.0.0.1:9" in text and not text.lstrip().startswith(("<div", "<p", "<span")):
            for token in MarkdownIt("commonmark").parseInline(text)[0].children:
                assert token.type not in ("image", "link_open", "html_inline"), text
        elif "127.0.0.1:9" in text:
            assert "<img" not in text, text
