"""Pages speak of fields, not of flags."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from core.commands import COMMANDS
from core.runs import flags

ROOT = Path(__file__).parents[2]
OF_OTHERS = {"--num_fewshot", "--apply_chat_template", "--fewshot_as_multiturn"}


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("Try a smaller --lr, or --dtype float32.",
         "Try a smaller 'Learning rate', or 'Precision: float32'."),
        ("--samples 20: 12 rows have 128 tokens.", "'Samples: 20': 12 rows have 128 tokens."),
        ("Both --steps and --epochs are given.", "Both 'Steps' and 'Epochs' are given."),
        ("Try --method continued (and LoRA).", "Try 'Method: continued' (and LoRA)."),
        ("Give another --out, or wait.", "Give another folder, or wait."),
        ("vllm serve x --enable-lora", "vllm serve x --enable-lora"),
        ("a--lr", "a--lr"),
        ("--layers 3:3 is empty.", "'Blocks: 3:3' is empty."),
        ("--no-largest-batch", "'Largest batch'"),
    ],
)  # fmt: skip
def test_a_flag_is_called_by_its_field(told, shown):
    assert flags.in_words(told) == shown


def test_no_help_text_has_flags_or_commas_for_what_is_clicked():
    for command in COMMANDS.values():
        for field in dataclasses.fields(command.spec_class):
            text = flags.about(field)
            assert set(re.findall(r"(?<![\w-])--[a-z]\S*?(?=[\W]|$)", text)) <= OF_OTHERS, text
            assert not (field.metadata["choices"] and "commas" in text)


def test_no_page_writes_a_flag_into_a_sentence():
    """Strings of pages have none; those of other modules go through `say`, which replaces them."""
    found = []
    for path in [*ROOT.glob("pages/*.py"), *ROOT.glob("core/ui/*.py"), ROOT / "app.py"]:
        tree = ast.parse(path.read_text())
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            if name.startswith("st.") and name != "st.code":
                text = ast.unparse(call.args[0]) if call.args else ""
                if re.search(r"['\" (]--[a-z]", text):
                    found.append(f"{path.name}: {text}")
    assert not found
