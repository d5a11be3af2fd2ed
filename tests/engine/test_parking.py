from __future__ import annotations

import pytest
import torch

from symprune_lightning.engine.parking import park
from symprune_lightning.engine.prune import prune_model
from tests.models import LANGUAGE, batches, build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_go_and_come_back(tmp_path, dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    view, before = x[1:], x.clone()
    back = park(x, tmp_path / "new")
    assert x.untyped_storage().nbytes() == 0
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size == before.numel() * before.element_size()
    back()
    assert torch.equal(x, before)
    assert torch.equal(view, before[1:])
    assert not list((tmp_path / "new").iterdir())


def test_on_the_cpu_there_is_nothing_to_move_to_the_cpu():
    x = torch.randn(3)
    back = park(x, "cpu")
    assert x.untyped_storage().nbytes() == 12
    back()


@pytest.mark.parametrize("schedule", ["layer", "block", "dense"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_masks_do_not_depend_on_it(name, schedule, tmp_path):
    options = {"score": "ria", "schedule": schedule}
    model, other = build(name), build(name)
    expected = prune_model(model, batches(name), **options)
    result = prune_model(other, batches(name), offload=tmp_path, **options)
    assert all(torch.equal(result.masks[n], mask) for n, mask in expected.masks.items())
    assert not list(tmp_path.iterdir())
    x = batches(name)[0]
    assert torch.equal(model(**x).logits, other(**x).logits)


def test_nothing_is_left_behind_after_an_error(tmp_path):
    model = build("llama")

    def fail(*_):
        raise RuntimeError("the dog ate it")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the dog ate it"):
        prune_model(model, batches(), offload=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prune_model(build("llama"), batches(), offload=tmp_path / "file" / "folder")
