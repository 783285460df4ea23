"""The import rules of docs/architecture.md hold, and the page is complete.

``python tests/test_architecture.py`` prints what the table would say of the code as it is.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
COMPUTING = {"torch", "transformers", "peft", "accelerate", "datasets", "lm_eval"}
"""Libraries that take seconds to import; the dashboard never does."""
ROW = re.compile(r"^\| (\d+) \| `([^`]+)` \| (.+?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    code = [p for folder in ("core", "pages") for p in (ROOT / folder).rglob("*.py")]
    return {module_of(path): path for path in [*code, ROOT / "app.py"]}


def room_of(module: str) -> str:
    """Return the folder or loose file of a module, as the page writes it."""
    parts = module.split(".")
    if parts[0] != "core":
        return "app.py" if parts[0] == "app" else f"{parts[0]}/"
    if len(parts) == 1:
        return "core/__init__.py"
    folder = ROOT / "core" / parts[1]
    return f"core/{parts[1]}/" if folder.is_dir() else f"core/{parts[1]}.py"


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield each imported module and whether importing the file imports it too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in modules() else str(node.module) for n in names]
        yield from ((name, id(node) not in lazy) for name in names)


@functools.cache
def rooms() -> dict[str, set[str]]:
    """Return room -> the rooms it imports, also within functions and for types only."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        used = {room_of(name) for name, _ in imports(path) if name in modules()}
        found.setdefault(room_of(module), set()).update(used - {room_of(module)})
    return found


@functools.cache
def computes(module: str) -> bool:
    """Whether importing the module imports one of `COMPUTING`."""
    for name, at_once in imports(modules()[module]):
        if at_once and (name.split(".")[0] in COMPUTING or (name in modules() and computes(name))):
            return True
    return False


def with_torch(room: str) -> set[str]:
    names = [m for m in modules() if room_of(m) == room and computes(m)]
    return {Path(modules()[m]).name for m in names}


@functools.cache
def table() -> dict[str, tuple[int, set[str], set[str]]]:
    """Return room -> floor, the rooms it may import, and its files that import torch."""
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))

    def listed(text: str) -> set[str]:
        return set(re.findall(r"`([^`]+)`", text))

    return {room: (int(floor), listed(ours), listed(torch)) for floor, room, _, ours, torch in rows}


def test_the_page_names_every_folder_and_nothing_else():
    assert set(table()) == set(rooms()) - {"core/__init__.py"}


@pytest.mark.parametrize("room", sorted(set(rooms()) - {"core/__init__.py"}))
def test_a_folder_imports_what_the_page_allows(room):
    floor, allowed, torch = table()[room]
    assert rooms()[room] - {"core/__init__.py"} == allowed
    assert all(table()[name][0] < floor for name in allowed), "an import must run downwards"
    assert with_torch(room) == torch


def test_only_pages_and_ui_import_streamlit():
    users = {
        room_of(module)
        for module, path in modules().items()
        if any(name.split(".")[0] == "streamlit" for name, _ in imports(path))
    }
    assert users == {"app.py", "pages/", "core/ui/"}
    for path in (ROOT / "core" / "ui").glob("*.py"):
        helper = path.name in ("__init__.py", "access.py", "state.py")
        assert helper or any(name.startswith("streamlit") for name, _ in imports(path)), path


def test_modules_that_the_page_calls_light_load_without_torch():
    light = [m for m in modules() if m.startswith("core.") and not computes(m)]
    light = [m for m in light if not m.startswith("core.ui") and m != "core.__main__"]
    code = f"import sys, {', '.join(light)}\nprint({COMPUTING!r} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def floors() -> dict[str, int]:
    @functools.cache
    def floor(room: str) -> int:
        below = rooms()[room] - {"core/__init__.py"}
        return 1 + max(map(floor, below), default=0)

    return {room: floor(room) for room in rooms() if room != "core/__init__.py"}


if __name__ == "__main__":
    for room, floor in sorted(floors().items(), key=lambda row: (-row[1], row[0])):
        ours = ", ".join(f"`{name}`" for name in sorted(rooms()[room] - {"core/__init__.py"}))
        torch = ", ".join(f"`{name}`" for name in sorted(with_torch(room)))
        print(f"| {floor} | `{room}` | ... | {ours or '-'} | {torch or '-'} |")
