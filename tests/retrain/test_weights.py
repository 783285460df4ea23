"""Folders that are replaced as a whole: what a kill or a full disk leaves never stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

from core.retrain.weights import replace_folder


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "merged"

    def write(text):
        return lambda target: (target / "model.safetensors").write_text(text)

    replace_folder(folder, write("first"))
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    for left in (".merged.tmp", f".merged.{gone.pid}.abcdef.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("killed here")
    replace_folder(folder, write("second"))
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert (folder / "model.safetensors").read_text() == "second"

    def full(target):
        write("third")(target)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_folder(folder, full)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    assert (folder / "model.safetensors").read_text() == "second"


def test_a_link_in_the_place_of_a_folder_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine.txt").write_text("mine")
    (tmp_path / "merged").symlink_to(tmp_path / "elsewhere")
    replace_folder(tmp_path / "merged", lambda target: (target / "x").write_text("x"))
    assert not (tmp_path / "merged").is_symlink()
    assert (tmp_path / "elsewhere/mine.txt").read_text() == "mine"
