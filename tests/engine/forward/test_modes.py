"""Changes that a forward makes to global state of torch do not leak out of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from symprune_lightning import prune_model
from symprune_lightning.engine.forward.modes import MODES, TorchModes
from tests.models import batches, build


class Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(
    get: Callable[[], Any], set_mode: Callable[[Any], object], value: Any
) -> Iterator[None]:
    before = get()
    set_mode(value)
    try:
        yield
    finally:
        set_mode(before)


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "sdpa_kernel with priority": lambda: sdpa_kernel(
        [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], set_priority=True
    ),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "device": lambda: torch.device("cpu"),
    "default device": lambda: setting(
        torch.get_default_device, torch.set_default_device, torch.device("cpu")
    ),
    "default dtype": lambda: setting(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"
    ),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 3),
    "cudnn flags": lambda: torch.backends.cudnn.flags(enabled=True, deterministic=True),
    "mkldnn flags": lambda: torch.backends.mkldnn.flags(enabled=False),
    "fastpath": lambda: setting(
        torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False
    ),
    "function mode": Functions,
    "dispatch mode": Dispatch,
}
CONTEXTS["anomaly"] = lambda: torch.autograd.set_detect_anomaly(True)


def state() -> list[Any]:
    return [
        *(get() for get, _ in MODES),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        len(torch.overrides._get_current_function_mode_stack()),
        len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
    ]


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_inside_the_forward(name, order):
    """The state is the context's after each wait, and the caller's after the run."""
    before, seen = state(), []

    def forward(model: torch.nn.Module, batch: dict[str, Any]) -> object:
        assert state() == inherited
        with CONTEXTS[name]():
            inside = state()
            output = model(**batch)
            seen.append(state() == inside)
        assert state() == inherited
        return output

    inherited: list[Any] = []

    def first(model: torch.nn.Module, batch: dict[str, Any]) -> object:
        if not inherited:
            inherited.extend(state())
        return forward(model, batch)

    model = build("llama")
    data = batches("llama")
    assert len(data) > 1
    result = prune_model(model, data, score="wanda", calibration_order=order, forward=first)
    assert state() == before
    assert len(result.masks) == 14
    assert not any(mask.is_inference() for mask in result.masks.values())
    # batches end in the middle of the forward, except for the first one
    assert all(seen)


def test_a_mode_that_a_forward_leaves_set():
    before = state()

    def forward(model: torch.nn.Module, batch: dict[str, Any]) -> object:
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.set_default_dtype(torch.float64)
        return model(**batch)

    prune_model(build("llama"), batches("llama"), score="wanda", forward=forward)
    assert state() == before


def test_modes_that_torch_refuses_to_read():
    """With torch's new API for one backend, its old one raises an error."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        modes = TorchModes()
        backend.fp32_precision = "ieee"
        modes.restore()
        assert backend.fp32_precision == "tf32"
        prune_model(build("llama"), batches("llama"), score="wanda")
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
