"""Contracts of all methods of the package, those of the future included.

Every non-abstract subclass of a base class is tested with its default arguments, or with those of
``EXAMPLES``.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_args

import pytest
import torch

from symprune_lightning.functional.allocation import (
    MAX_SPARSITY,
    Allocation,
    AllocationMethod,
    LayerInfo,
)
from symprune_lightning.functional.patterns import NM, Pattern, Unstructured
from symprune_lightning.functional.refiners import DSnoT, ExactSwap, MaskRefiner, R2DSnoT
from symprune_lightning.functional.registry import leaves, lookup
from symprune_lightning.functional.scores import LpRIA, Score, StochRIA, Symmetric, Wanda
from symprune_lightning.functional.solvers import ADMM, LayerSolver
from symprune_lightning.functional.statistics import Moments, Need, Statistics
from symprune_lightning.functional.update import MaskedCG, WeightUpdate

BASES = (Score, MaskRefiner, WeightUpdate, LayerSolver, AllocationMethod, Pattern)

EXAMPLES = [
    # classes with required arguments
    NM(2, 4),
    NM(1, 4),
    # options that change what is computed or needed
    DSnoT(reference=True),
    DSnoT(same_sign=True, p_var=0.5),
    ExactSwap(cycles=2),
    LpRIA(p=0.0),
    LpRIA(p=torch.inf),
    R2DSnoT(guard="gram"),
    R2DSnoT(guard="mean", threshold=0.0, grow_relative=True, gamma1=0.1),
    StochRIA(alpha=0.0),
    StochRIA(equal_count=True),
    Symmetric(form="sum"),
    Unstructured(0.3, "layer"),
    Unstructured(0.7, "input"),
]
"""Instances that are tested besides the default instance of every class."""

SHAPES = [(1, 4), (3, 8), (8, 64), (20, 12), (5, 300)]
DTYPES = [torch.float32, torch.float64]
ROW_PATTERNS = [Unstructured(0.5), Unstructured(0.29), NM(2, 4), NM(1, 4)]


def classes(base):
    return [c for c in leaves(base) if c.__module__.startswith("symprune_lightning.")]


def instances(base):
    examples = [example for example in EXAMPLES if isinstance(example, base)]
    listed = {type(example) for example in examples}
    constructed = []
    for cls in classes(base):
        try:
            constructed.append(cls())
        except TypeError:
            assert cls in listed, f"add an instance of {cls.__name__} to EXAMPLES"
    return constructed + examples


CLASSES = [cls for base in BASES for cls in classes(base)]


def data(shape, dtype=torch.float32, seed=0):
    """Return a weight and complete statistics of a layer."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    x = torch.randn(4, 160, columns, generator=generator, dtype=torch.float64)
    x += torch.randn(columns, generator=generator) + 0.3 * x.roll(1, dims=2)
    flat = x.flatten(0, 1)
    statistics = Statistics(
        layer="block.0.linear",
        input=Moments.of(x),
        output=Moments.of(flat.to(dtype) @ weight.T),
        sequence_variance=x.var(1, correction=0).mean(0),
        gram=flat.T @ flat / len(flat),
        column_sum=weight.abs().sum(0),
        output_gradient=torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1,
    )
    return weight, statistics


def tolerance(method):
    """Conjugate gradients amplify rounding in the weights, though not in their error."""
    return {"rtol": 1e-2, "atol": 1e-2} if isinstance(method, MaskedCG | ADMM) else {}


def tensors_of(*values):
    """All tensors in tensors and (nested) dataclasses."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from tensors_of(*vars(value).values())


class unmodified:  # noqa: N801
    """Context in which the tensors of the arguments must keep their values."""

    def __init__(self, *values):
        self.tensors = list(tensors_of(*values))
        self.before = [x.clone() for x in self.tensors]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for x, before in zip(self.tensors, self.before, strict=True):
            assert torch.equal(x, before), "an input was modified"


def with_only(statistics, needs):
    """Drop the statistics that are not in `needs`."""
    return dataclasses.replace(statistics, **dict.fromkeys({*get_args(Need)} - {*needs}))


def assert_needs_are_honest(method, call, statistics):
    """`call` uses all declared statistics, and no others.

    Args:
        method: Has ``needs``.
        call: Maps statistics to a tuple of results.
        statistics: With everything.
    """
    assert {*method.needs} <= {*get_args(Need)}
    declared = call(with_only(statistics, method.needs))
    for one, other in zip(declared, call(statistics), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), "uses more than it needs"
    for need in method.needs:
        with pytest.raises(ValueError, match=f"statistic '{need}'"):
            call(with_only(statistics, method.needs - {need}))


@pytest.mark.parametrize("cls", CLASSES)
def test_class(cls):
    """Frozen dataclass with documentation and reference, that can be selected by name."""
    assert "__dataclass_params__" in vars(cls), "every class needs the decorator itself"
    assert cls.__dataclass_params__.frozen
    # a dataclass without a docstring gets its signature for one
    documentation = vars(cls).get("__doc__") or ""
    assert not documentation.startswith(f"{cls.__name__}(")
    assert inspect.cleandoc(documentation).splitlines()[0].strip()
    assert isinstance(cls.reference_url, str)
    assert cls.reference_url == "" or cls.reference_url.startswith(("https://", "http://"))
    assert "reference_url" not in {field.name for field in dataclasses.fields(cls)}
    base = next(base for base in BASES if issubclass(cls, base))
    if cls in {type(example) for example in EXAMPLES if isinstance(example, NM)}:
        with pytest.raises(ValueError, match="pass an instance"):
            lookup(base, cls.__name__)
    else:
        assert lookup(base, cls.__name__.lower()) == cls()
        assert hash(cls()) == hash(cls())


def test_every_base_has_classes():
    assert {base for base in BASES if not classes(base)} == set()
    assert len(CLASSES) == len(set(CLASSES)) >= 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", instances(Score), ids=repr)
class TestScore:
    @pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (7, 3)])
    def test_values(self, score, shape, dtype):
        """Same shape and dtype, finite, at least 0, 0 for zero weights, independent of signs."""
        weight, statistics = data(shape, dtype)
        weight[0] = 0
        with unmodified(weight, statistics):
            values = score(weight, statistics)
        assert values.shape == weight.shape
        assert values.dtype == dtype
        assert values.isfinite().all()
        assert (values >= 0).all()
        assert (values[weight == 0] == 0).all()
        assert (values[weight != 0] > 0).all()
        assert torch.equal(values, score(-weight, statistics))

    def test_needs(self, score, dtype):
        weight, statistics = data((6, 8), dtype)
        assert_needs_are_honest(score, lambda s: (score(weight, s),), statistics)

    def test_row_factors(self, score, dtype):
        weight, statistics = data((6, 8), dtype)
        factor = score(weight, statistics) / weight.abs()
        per_row = torch.allclose(factor, factor[:, :1].expand_as(factor))
        assert per_row == (
            score.same_within_rows == "Magnitude" or type(score).__name__ == "Magnitude"
        )


@pytest.mark.parametrize("score", [s for s in instances(Score) if s.by_rows], ids=repr)
def test_scores_by_rows(score):
    weight, statistics = data((20, 12))
    whole = score(weight, dataclasses.replace(statistics, column_sum=None))
    parts = [score(part, statistics) for part in weight.split(7)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("score", [s for s in instances(Score) if s.by_rows], ids=repr)
def test_scores_by_rows_of_rows_that_are_almost_zero(score):
    weight, statistics = data((20, 12))
    weight[3] *= 1e-12
    statistics = dataclasses.replace(statistics, column_sum=weight.abs().sum(0))
    assert torch.equal(score(weight[3:4], statistics), score(weight, statistics)[3:4])


def test_by_rows_is_declared_with_the_score():
    class Renamed(Wanda):
        pass

    class Relative(Wanda):
        def __call__(self, weight, statistics):
            return weight.abs() / weight.abs().sum(0)

    assert Renamed.by_rows
    assert not Relative.by_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("refiner", instances(MaskRefiner), ids=repr)
class TestMaskRefiner:
    @pytest.mark.parametrize("pattern", ROW_PATTERNS, ids=repr)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_budget(self, refiner, shape, pattern, dtype):
        for seed in range(3):
            weight, statistics = data(shape, dtype, seed)
            mask = pattern.mask(Wanda()(weight, statistics))
            with unmodified(weight, mask, statistics):
                refined = refiner(weight, mask, statistics, pattern.swap_window())
            assert refined.dtype == torch.bool
            assert refined.shape == mask.shape
            assert torch.equal(pattern.groups(refined).sum(1), pattern.groups(mask).sum(1))
            assert refined.data_ptr() != mask.data_ptr()

    @pytest.mark.parametrize("pattern", ROW_PATTERNS, ids=repr)
    def test_zero_weights_stay_pruned(self, refiner, pattern, dtype):
        weight, statistics = data((16, 64), dtype)
        weight[:, ::5] = 0
        mask = pattern.mask(Wanda()(weight, statistics)) & (weight != 0)
        refined = refiner(weight, mask, statistics, pattern.swap_window())
        assert not (refined & (weight == 0)).any()
        assert torch.equal(pattern.groups(refined).sum(1), pattern.groups(mask).sum(1))

    @pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
    def test_rows_are_independent_and_something_is_swapped(self, refiner, pattern, dtype):
        weight, statistics = data((12, 64), dtype)
        mask, window = pattern.mask(Wanda()(weight, statistics)), pattern.swap_window()
        whole = refiner(weight, mask, statistics, window)
        assert (whole != mask).any()
        for rows in (slice(0, 1), slice(3, 10)):
            part = refiner(weight[rows], mask[rows], statistics, window)
            assert torch.equal(part, whole[rows])

    @pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
    def test_needs(self, refiner, pattern, dtype):
        weight, statistics = data((6, 64), dtype)
        mask, window = pattern.mask(weight.abs()), pattern.swap_window()
        call = lambda s: (refiner(weight, mask, s, window),)  # noqa: E731
        assert_needs_are_honest(refiner, call, statistics)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", instances(WeightUpdate), ids=repr)
class TestWeightUpdate:
    @pytest.mark.parametrize("pattern", ROW_PATTERNS, ids=repr)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values(self, update, shape, pattern, dtype):
        """Same shape and dtype, finite, 0 where pruned, and with a lower error."""
        weight, statistics = data(shape, dtype)
        mask = pattern.mask(Wanda()(weight, statistics))
        with unmodified(weight, mask, statistics):
            updated = update(weight, mask, statistics)
        assert updated.shape == weight.shape
        assert updated.dtype == dtype
        assert updated.isfinite().all()
        assert (updated[~mask] == 0).all()
        masked = statistics.squared_error(weight.masked_fill(mask, 0)).sum()
        assert statistics.squared_error(weight - updated).sum() <= masked

    def test_rows_are_independent(self, update, dtype):
        weight, statistics = data((12, 64), dtype)
        mask = Unstructured(0.5).mask(weight.abs())
        whole = update(weight, mask, statistics)
        for rows in (slice(0, 1), slice(3, 10)):
            part = update(weight[rows], mask[rows], statistics)
            torch.testing.assert_close(part, whole[rows], **tolerance(update))

    def test_needs(self, update, dtype):
        weight, statistics = data((6, 16), dtype)
        mask = Unstructured(0.5).mask(weight.abs())
        assert_needs_are_honest(update, lambda s: (update(weight, mask, s),), statistics)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", instances(LayerSolver), ids=repr)
class TestLayerSolver:
    @pytest.mark.parametrize("pattern", instances(Pattern), ids=repr)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_budget(self, solver, shape, pattern, dtype):
        weight, statistics = data(shape, dtype)
        with unmodified(weight, statistics):
            updated, mask = solver(weight, statistics, pattern)
        assert updated.shape == mask.shape == weight.shape
        assert updated.dtype == dtype
        assert mask.dtype == torch.bool
        assert updated.isfinite().all()
        assert torch.equal(updated != 0, mask)
        grouped = pattern.groups(~mask)
        assert (grouped.sum(1) == pattern.num_pruned(grouped.shape[1])).all()

    @pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
    def test_rows_are_independent(self, solver, pattern, dtype):
        weight, statistics = data((12, 64), dtype)
        whole = solver(weight, statistics, pattern)
        for rows in (slice(0, 1), slice(3, 10)):
            updated, mask = solver(weight[rows], statistics, pattern)
            torch.testing.assert_close(updated, whole[0][rows], **tolerance(solver))
            assert torch.equal(mask, whole[1][rows])

    def test_needs(self, solver, dtype):
        weight, statistics = data((6, 16), dtype)
        call = lambda s: solver(weight, s, Unstructured(0.5))  # noqa: E731
        assert_needs_are_honest(solver, call, statistics)

    def test_shape_that_cannot_have_the_pattern(self, solver, dtype):
        weight, statistics = data((6, 6), dtype)
        with pytest.raises(ValueError, match="2:4 does not divide 6 inputs"):
            solver(weight, statistics, NM(2, 4))


@pytest.mark.parametrize("allocation", instances(Allocation), ids=repr)
class TestAllocation:
    def layers(self, allocation, sizes):
        infos = []
        for i, (groups, group_size) in enumerate(sizes):
            weight, statistics = data((groups, group_size), seed=i)
            with unmodified(weight, statistics):
                metric = allocation.layer_metric(weight, statistics)
            depth = i / max(1, len(sizes) - 1)
            infos.append(LayerInfo(f"layer{i}", groups, group_size, i, depth, metric))
        return infos

    @pytest.mark.parametrize("sizes", [[(9, 30)], [(3, 20), (40, 70), (1, 2), (17, 33)]])
    @pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.95])
    def test_budget(self, allocation, sizes, sparsity):
        layers = self.layers(allocation, sizes)
        sparsities = allocation(layers, sparsity)
        assert list(sparsities) == [layer.name for layer in layers]
        assert all(0 <= s <= MAX_SPARSITY for s in sparsities.values())
        target = sum(layer.num_pruned(sparsity) for layer in layers)
        pruned = sum(layer.num_pruned(sparsities[layer.name]) for layer in layers)
        assert target <= pruned <= target + sum(layer.groups for layer in layers)

    def test_needs(self, allocation):
        weight, statistics = data((9, 30))
        call = lambda s: (repr(allocation.layer_metric(weight, s)).encode(),)  # noqa: E731
        as_tensors = lambda s: tuple(torch.tensor(list(x)) for x in call(s))  # noqa: E731
        assert_needs_are_honest(allocation, as_tensors, statistics)


@pytest.mark.parametrize("shape", [*SHAPES, (24, 40)])
@pytest.mark.parametrize("pattern", instances(Pattern), ids=repr)
class TestPattern:
    def test_round_trip(self, pattern, shape):
        x = torch.arange(shape[0] * shape[1]).reshape(shape)
        grouped = pattern.groups(x)
        assert grouped.ndim == 2
        assert torch.equal(grouped.flatten().sort().values, x.flatten())
        assert torch.equal(pattern.ungroup(grouped, x.shape), x)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_mask(self, pattern, shape, dtype):
        score, _ = data(shape, dtype)
        with unmodified(score):
            mask = pattern.mask(score)
        assert mask.dtype == torch.bool
        assert mask.shape == shape
        zeros = pattern.groups(~mask).sum(1)
        group_size = pattern.groups(mask).shape[1]
        assert (zeros == pattern.num_pruned(group_size)).all()
        assert pattern.sparsity * group_size - 1 < zeros[0] <= pattern.sparsity * group_size + 1e-6
        for kept, values in zip(pattern.groups(mask), pattern.groups(score), strict=True):
            if kept.any() and not kept.all():
                assert values[~kept].max() <= values[kept].min()

    def test_swaps_in_the_window_keep_the_budget(self, pattern, shape):
        if pattern.group == "input":
            with pytest.raises(ValueError, match="breaks the budget"):
                pattern.swap_window()
            return
        mask = pattern.mask(data(shape)[0])
        size = pattern.swap_window() or shape[1]
        windows = mask.reshape(-1, size)
        for shift in range(1, size):
            swapped = windows.roll(shift, dims=1).reshape(shape)
            assert torch.equal(pattern.groups(swapped).sum(1), pattern.groups(mask).sum(1))


def test_unmodified_notices_changes():
    _, statistics = data((2, 4))
    with pytest.raises(AssertionError, match="an input was modified"), unmodified(statistics):
        statistics.input.total[0] += 1
