from __future__ import annotations

import pytest
import torch

from symprune_lightning.engine.forward.offload import OffloadedTensor
from symprune_lightning.engine.prune import prune_model
from tests.models import LANGUAGE, batches, build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_restored(tmp_path, dtype):
    x = torch.randn(3, 4, 5).to(dtype)
    view, before = x[1:], x.clone()
    offloaded = OffloadedTensor(x, tmp_path / "new")
    assert x.untyped_storage().nbytes() == 0
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_size == before.numel() * before.element_size()
    offloaded.restore()
    assert torch.equal(x, before)
    assert torch.equal(view, before[1:])
    assert not list((tmp_path / "new").iterdir())
    x.zero_()
    offloaded.restore()  # has no effect any more
    assert not x.any()


def test_offloading_a_cpu_tensor_to_the_cpu_has_no_effect():
    x = torch.randn(3)
    offloaded = OffloadedTensor(x, "cpu")
    assert x.untyped_storage().nbytes() == 12
    offloaded.restore()


@pytest.mark.parametrize("order", ["layer", "block", "dense"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_masks_do_not_depend_on_offloading(name, order, tmp_path):
    options = {"score": "ria", "calibration_order": order}
    model, other = build(name), build(name)
    expected = prune_model(model, batches(name), **options)
    result = prune_model(other, batches(name), offload=tmp_path, **options)
    assert all(torch.equal(result.masks[n], mask) for n, mask in expected.masks.items())
    assert not list(tmp_path.iterdir())
    x = batches(name)[0]
    assert torch.equal(model(**x).logits, other(**x).logits)


def test_files_are_removed_after_an_error(tmp_path):
    model = build("llama")

    def fail(*_):
        raise RuntimeError("boom")

    model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        prune_model(model, batches(), offload=tmp_path)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prune_model(build("llama"), batches(), offload=tmp_path / "file" / "folder")
