from __future__ import annotations

import gc
from abc import abstractmethod
from dataclasses import dataclass

import pytest

from symprune_lightning.functional.patterns import NM, Pattern, Unstructured
from symprune_lightning.functional.refiners import MaskRefiner, R2DSnoT
from symprune_lightning.functional.registry import leaves, lookup, subclasses
from symprune_lightning.functional.scores import RIA, Score, Wanda


@pytest.fixture(autouse=True)
def _forget_classes():
    yield
    gc.collect()  # classes of one test are not subclasses in the next


@pytest.mark.parametrize("name", ["r2dsnot", "R2DSnoT", "R2-DSnoT", "r2_dsnot"])
def test_case_and_hyphens_do_not_count(name):
    assert lookup(MaskRefiner, name) == R2DSnoT()


def test_instances_pass_through():
    score = RIA(alpha=1.0)
    assert lookup(Score, score) is score


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"'wand' \(did you mean Wanda\?\); choose one of: .*RIA"):
        lookup(Score, "wand")


def test_user_classes_are_found():
    class Mine(RIA):
        pass

    assert isinstance(lookup(Score, "mine"), Mine)


def test_a_class_named_like_a_builtin_one_does_not_replace_it():
    class WANDA(RIA):
        pass

    with pytest.raises(ValueError, match="is the name of 2 Score classes") as raised:
        lookup(Score, "wanda")
    assert "symprune_lightning.functional.scores.Wanda" in str(raised.value)
    assert f"{__name__}.{WANDA.__qualname__}" in str(raised.value)
    assert lookup(Score, WANDA()) == WANDA()
    assert lookup(Score, "ria") == RIA()


def test_a_class_that_is_defined_again_replaces_itself():
    """As when a notebook cell is run twice; the old class is still referenced."""

    def define(alpha):
        @dataclass(frozen=True)
        class Mine(RIA):
            alpha: float

        Mine.__init__.__defaults__ = (alpha,)
        return Mine

    first, second = define(0.1), define(0.2)
    assert first in subclasses(Score)
    assert [c for c in leaves(Score) if c.__name__ == "Mine"] == [second]


def test_abstract_classes_are_no_choice():
    class Middle(Score):
        @abstractmethod
        def factor(self): ...

    @dataclass(frozen=True)
    class Concrete(Middle):
        def factor(self): ...

        def __call__(self, weight, statistics):
            return weight.abs()

    assert {Middle, Concrete} <= {*subclasses(Score)}
    assert Concrete in leaves(Score)
    assert Middle not in leaves(Score)
    assert isinstance(lookup(Score, "concrete"), Concrete)
    with pytest.raises(ValueError, match="no Score is called 'middle'") as raised:
        lookup(Score, "middle")
    assert "Middle" not in str(raised.value).split("choose one of")[1]


def test_required_arguments():
    assert lookup(Pattern, "unstructured") == Unstructured()
    with pytest.raises(ValueError, match=r"NM has required arguments \(n, m\): pass an instance"):
        lookup(Pattern, "nm")
    assert lookup(Pattern, NM(2, 4)) == NM(2, 4)


def test_errors_of_a_constructor_are_its_own():
    @dataclass(frozen=True)
    class Broken(Wanda):
        def __post_init__(self):
            raise TypeError("a mistake inside")

    with pytest.raises(TypeError, match="a mistake inside"):
        lookup(Score, "broken")
