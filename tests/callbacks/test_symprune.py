"""Arguments and settings of ``SymPrune``."""

from __future__ import annotations

import inspect

import pytest

from symprune_lightning import (
    RIA,
    CubicSchedule,
    DSnoT,
    PruningMethod,
    RunOptions,
    Score,
    SymPrune,
    prune_model,
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "later"}, "when is 'later'; choose one of"),
        ({"sparsity": 1.5}, "sparsity is 1.5, but it is the fraction of weights to prune"),
        ({"score": "nothing"}, "no Score is called"),
        ({"refine": "nothing"}, "no MaskRefiner is called"),
        ({"update": "nothing"}, "no WeightUpdate is called"),
        ({"solver": "nothing"}, "no LayerSolver is called"),
        ({"allocation": "nothing"}, "no AllocationMethod is called"),
        ({"calibration_order": "nothing"}, "calibration_order is 'nothing'; choose one of"),
        ({"pattern": "2/4"}, "pattern is .2/4.; write it as .N:M."),
        ({"group": "model"}, "use calibration_order='dense'"),
        ({"refine": {"re:.*": "dsnott"}}, "no MaskRefiner is called 'dsnott'"),
        ({"solver": "sparsegpt", "refine": "dsnot"}, "use refine=None and update=None"),
        ({"pattern": "2:4", "when": CubicSchedule(end=3)}, "a pattern has a fixed sparsity"),
        (
            {"when": CubicSchedule(end=3), "journal": "runs/a"},
            "journal= cannot be combined with CubicSchedule",
        ),
    ],
)
def test_invalid_arguments_are_refused_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        SymPrune(**options)


def test_settings_are_json_values():
    settings = SymPrune(RIA(alpha=1.0), refine={"re:.*": DSnoT(cycles=3)}, sparsity=0.25).settings
    assert settings["score"] == {"name": "RIA", "alpha": 1.0}
    assert (settings["sparsity"], settings["group"]) == (0.25, "output")
    assert "pattern" not in settings
    assert settings["refine"]["re:.*"][0]["cycles"] == 3


def test_settings_omit_what_a_pattern_replaces():
    settings = SymPrune(pattern="2:4", refine="exactswap", update="obsupdate").settings
    assert settings["pattern"] == {"name": "NM", "n": 2, "m": 4, "permute": False}
    assert settings["refine"] == {"re:.*": [{"name": "ExactSwap", "cycles": 50}]}
    assert settings["update"]["name"] == "OBSUpdate"
    assert not {"sparsity", "group"} & settings.keys()


def test_settings_omit_what_a_solver_replaces():
    settings = SymPrune(solver="sparsegpt").settings
    assert settings["solver"]["name"] == "SparseGPT"
    assert not {"score", "refine", "update"} & settings.keys()


def test_settings_of_a_score_of_the_users():
    class Own(Score):
        def __call__(self, weight, statistics):
            return weight.abs()

        def __repr__(self):
            return "Own()"

    assert SymPrune(Own()).settings["score"] == "Own()"


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_shared_defaults_agree():
    callback, function = defaults(SymPrune), defaults(prune_model)
    method = PruningMethod()
    settings = {name for name in vars(method) if name in function}
    assert settings == vars(method).keys()
    assert settings <= callback.keys()
    for name in callback.keys() & function.keys() - {"ignore"}:
        assert callback[name] == function[name], name
    # None, since a list in the signature would be written into the configuration files of the CLI
    assert callback["ignore"] is None
    assert function["ignore"] == method.ignore == ()
    assert SymPrune().method == PruningMethod.resolve(
        **{name: function[name] for name in settings - {"ignore"}}, ignore=[]
    )
    options = RunOptions()
    for name, value in vars(options).items():
        if name == "initial_sparsity":  # for callbacks that prune gradually
            continue
        assert function[name] == value, name
    resolved = PruningMethod.resolve(**{name: function[name] for name in settings})
    assert resolved == method
