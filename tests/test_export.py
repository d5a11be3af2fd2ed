from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from symprune_lightning.export import MANIFEST, check_destination, save_checkpoint
from tests.models import build


def left_over(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_an_earlier_checkpoint_of_ours_is_replaced(tmp_path):
    for turn in (1, 2):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": turn}, {})
        assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"turn": turn}
    assert not left_over(tmp_path)


def test_files_of_others_are_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=rf"no {MANIFEST} says"):
        save_checkpoint(tmp_path, build("llama"), None, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_while_writing_leaves_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": 1}, {})
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": object()}, {})
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"turn": 1}
    assert not left_over(tmp_path)


def test_missing_folders_are_made_and_the_mode_is_usual(tmp_path):
    path = save_checkpoint(tmp_path / "a" / "b", build("llama"), None, {}, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        check_destination(tmp_path / "file" / "deeper")


def test_folder_that_cannot_be_written_to(tmp_path):
    """As another user: to root every folder is writable."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys\n"
        "from symprune_lightning.export import check_destination\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        f"try: check_destination({str(folder / 'out')!r})\n"
        "except PermissionError as error: sys.exit(f'said: {error}')\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert "said: cannot write to" in run.stderr, run.stderr
    assert "choose another" in run.stderr


def test_mount_points_are_refused_at_once():
    with pytest.raises((PermissionError, FileExistsError), match=r"mount point|holds files"):
        check_destination("/proc")
    if Path("/dev/shm").is_dir() and not any(Path("/dev/shm").iterdir()):
        with pytest.raises(PermissionError, match="is a mount point"):
            check_destination("/dev/shm")


def test_earlier_checkpoint_is_back_if_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": 1}, {})
    rename = Path.rename

    def failing(self, target):
        if self.name == ".out.partial" and Path(target).name == "out":
            raise OSError("no room for a name")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no room"):
        save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": 2}, {})
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == {"turn": 1}
    assert not left_over(tmp_path)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """The limit on file sizes makes writing fail as a full disk does."""
    save_checkpoint(tmp_path / "out", build("llama"), None, {"turn": 1}, {})
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")}
    code = (
        "import resource, signal\n"
        "from symprune_lightning.export import save_checkpoint\n"
        "from tests.models import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        f"save_checkpoint({str(tmp_path / 'out')!r}, build('llama'), None, {{'turn': 2}}, {{}})\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: cannot write the checkpoint {tmp_path / 'out'}: ")
    assert last.endswith("Nothing there has changed")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("*.*")} == before
    assert not left_over(tmp_path)
