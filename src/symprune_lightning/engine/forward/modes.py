"""Modes that torch keeps per thread or process, and that a forward may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch
from torch.utils import deterministic

Accessor = tuple[Callable[[], Any], Callable[[Any], object]]
"""Reads a mode, and sets it."""


def _attribute(owner: object, name: str) -> Accessor:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _autocast(device: str) -> list[Accessor]:
    return [
        (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
        (partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
    ]


def _stream() -> Any:
    """Return the current stream of the current CUDA device; ``None`` without one."""
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.current_stream() if is_initialized else None


_cuda, _cudnn, _mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn

MODES: list[Accessor] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    *_autocast("cpu"),
    *_autocast("cuda"),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _attribute(deterministic, "fill_uninitialized_memory"),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda mode: torch.set_anomaly_enabled(*mode),
    ),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(
        _attribute(owner, "fp32_precision")
        for backend in (_cudnn, _mkldnn)
        for owner in (backend, backend.conv, backend.rnn)
    ),
    _attribute(_cuda.matmul, "fp32_precision"),
    _attribute(_mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined]
    _attribute(_cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _attribute(_cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    (_cuda.fp16_bf16_reduction_math_sdp_allowed, _cuda.allow_fp16_bf16_reduction_math_sdp),
    (torch._C._get_sdp_priority_order, torch._C._set_sdp_priority_order),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    *(_attribute(_cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    *(_attribute(_mkldnn, name) for name in ("enabled", "deterministic")),
    # flags of dispatch modes, which a mode restores in the order of exits
    *(_attribute(dispatch, name) for name in dir(dispatch) if name.startswith("_is_in_")),
    (_stream, torch.cuda.set_stream),  # and the device that it is on
]
"""Modes that hold one value each."""


class TorchModes:
    """The modes of the moment at which it is created."""

    def __init__(self) -> None:
        self._values = _read_all()
        self._device = _default_device()
        self._function_modes = _function_modes()
        self._dispatch_modes = list(dispatch._get_current_dispatch_mode_stack())

    def restore(self) -> None:
        """Set the modes that have changed since."""
        _restore_stack(
            _function_modes(), self._function_modes, overrides._pop_mode, overrides._push_mode
        )
        _restore_stack(
            dispatch._get_current_dispatch_mode_stack(),
            self._dispatch_modes,
            dispatch._pop_mode,
            dispatch._push_mode,
        )
        if _default_device() is not self._device:
            torch._GLOBAL_DEVICE_CONTEXT.device_context = self._device
        if _read_all() == self._values:
            return
        for (get, set_mode), value in zip(MODES, self._values, strict=True):
            if value is not None and _read(get) != value:  # setting one may have changed another
                set_mode(value)


@contextmanager
def isolated_modes() -> Iterator[None]:
    """Restore all modes at the end of a context in which other code runs."""
    modes = TorchModes()
    grad = torch.is_grad_enabled()
    # This guard saves the autograd state of the thread and restores it, whatever its value is by
    # then. Entering it enables gradients.
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        torch._C._set_grad_enabled(grad)
        try:
            yield
        finally:
            modes.restore()


def _read_all() -> list[Any]:
    try:
        return [get() for get, _ in MODES]
    except RuntimeError:
        return [_read(get) for get, _ in MODES]


def _read(get: Callable[[], Any]) -> Any:
    """Return a mode; ``None`` if torch refuses, as where its old and new precision API disagree."""
    try:
        return get()
    except RuntimeError:
        return None


def _function_modes() -> list[Any]:
    return list(overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def _default_device() -> Any:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _restore_stack(
    now: list[Any], before: list[Any], pop: Callable[[], object], push: Callable[[Any], object]
) -> None:
    """Pop the modes above those that both stacks share, and push the missing ones."""
    shared = 0
    while shared < min(len(now), len(before)) and now[shared] is before[shared]:
        shared += 1
    for _ in now[shared:]:
        pop()
    for mode in before[shared:]:
        push(mode)
