"""Lets these tests make runs as the tests of the comparison do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "compare"))
