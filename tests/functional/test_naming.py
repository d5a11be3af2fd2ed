from __future__ import annotations

import gc

import pytest

from symprune_lightning.functional.naming import by_name
from symprune_lightning.functional.refiners import MaskRefiner, R2DSnoT
from symprune_lightning.functional.scores import RIA, Score


@pytest.mark.parametrize("name", ["r2dsnot", "R2DSnoT", "R2-DSnoT", "r2_dsnot"])
def test_case_and_hyphens_do_not_count(name):
    assert by_name(MaskRefiner, name) == R2DSnoT()


def test_instances_pass_through():
    score = RIA(alpha=1.0)
    assert by_name(Score, score) is score


def test_unknown_name_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no Score is called 'wand'; there are: .*RIA.*, Wanda"):
        by_name(Score, "wand")


def test_a_class_of_the_users_own_is_found():
    class Mine(RIA):
        pass

    assert isinstance(by_name(Score, "mine"), Mine)
    del Mine
    gc.collect()
