"""Kinds of layers by their names."""

from __future__ import annotations

from symprune_lightning.callbacks.report.curves import kinds_of


def test_kinds_of_encoders_and_decoders_differ():
    names = ("encoder.layers.0.fc", "decoder.layers.0.fc", "head", "experts.2.up.1")
    kinds = kinds_of([{"name": name} for name in names])
    assert kinds == {
        "encoder.layers.0.fc": ("encoder.layers.fc", 0),
        "decoder.layers.0.fc": ("decoder.layers.fc", 0),
        "head": ("head", 0),
        "experts.2.up.1": ("experts.up", 2),
    }
    assert kinds_of([{"name": "0"}, {"name": "2"}]) == {"0": ("layer", 0), "2": ("layer", 2)}
