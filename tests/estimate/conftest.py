"""What tests of estimates share."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text(400, seed=3), encoding="utf-8")
    return str(path)
