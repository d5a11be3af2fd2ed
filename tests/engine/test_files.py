"""Atomic writes of files and directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from symprune_lightning.engine.files import atomic_directory, atomic_file


@pytest.mark.parametrize("whole", [atomic_directory, atomic_file])
def test_an_error_keeps_the_earlier_contents(tmp_path, whole):
    path = tmp_path / "it"
    for text in ("old", "new"):
        try:
            with whole(path) as partial:
                (partial if whole is atomic_file else partial / "a").write_text(text)
                if text == "new":
                    raise RuntimeError
        except RuntimeError:
            pass
    assert (path if whole is atomic_file else path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


VICTIM = """
import os, sys
from pathlib import Path
from symprune_lightning.engine.files import atomic_directory
from tests.killing import dying_at
dying = dying_at(int(sys.argv[2]))
os.fsync = dying(os.fsync)
Path.rename = dying(Path.rename)
with atomic_directory(Path(sys.argv[1])) as partial:
    (partial / "deep").mkdir()
    for name in ("a", "deep/b"):
        (partial / name).write_text(sys.argv[3])
"""


def test_a_killed_write_leaves_one_complete_version(tmp_path):
    """SIGKILL at every flush and every rename: four flushes, two renames, one flush."""
    seen = set()
    for calls in range(1, 9):
        folder = tmp_path / str(calls) / "it"
        folder.parent.mkdir()
        with atomic_directory(folder) as partial:
            (partial / "a").write_text("old")
        command = [sys.executable, "-c", VICTIM, str(folder), str(calls), "new"]
        killed = subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert killed == (calls < 8)
        # the next write cleans up, also if it fails itself
        with pytest.raises(RuntimeError), atomic_directory(folder):
            raise RuntimeError
        text = (folder / "a").read_text()
        assert (folder / "deep" / "b").is_file() == (text == "new")
        assert os.listdir(folder.parent) == ["it"]
        seen.add(text)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_permissions_of_any_new_file(tmp_path, mask):
    """Those that safetensors writes can be read by their owner only."""
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a.safetensors") as tmp:
            save_file({"x": torch.zeros(1)}, tmp)
        with atomic_directory(tmp_path / "folder") as folder:
            save_file({"x": torch.zeros(1)}, folder / "b.safetensors")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(before)
    plain = (tmp_path / "plain").stat().st_mode
    for name in ("a.safetensors", "folder/b.safetensors"):
        assert (tmp_path / name).stat().st_mode == plain
