from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import symprune_lightning.functional

NEW_REFINER = '''
from dataclasses import dataclass

from symprune_lightning.functional.refiners.base import MaskRefiner


@dataclass(frozen=True)
class Mine(MaskRefiner):
    """Keep the mask."""

    def __call__(self, weight, mask, statistics, window=None):
        return mask.clone()
'''

CODE = """
from symprune_lightning.functional.refiners import MaskRefiner
from symprune_lightning.functional.registry import lookup

print(lookup(MaskRefiner, "mine"))
"""


def test_a_new_refiner_is_one_file(tmp_path):
    package = tmp_path / "symprune_lightning"
    shutil.copytree(Path(symprune_lightning.functional.__file__).parent, package / "functional")
    (package / "__init__.py").touch()
    (package / "functional" / "refiners" / "mine.py").write_text(NEW_REFINER)
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "Mine()", result.stderr
