"""Tensors that say they are on ``cuda:0``, and are computed on the CPU.

Operations on tensors of both devices raise an error, as CUDA's do.

Every copy to the host is counted, since a real GPU waits for it.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = (
    aten._to_copy.default,
    aten.copy_.default,
    aten.to.device,
    aten.to.dtype_layout,
)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")

host_copies: list[str] = []
"""Names of the operations that copied to the host."""


class PretendedTensor(torch.Tensor):
    """A tensor on the pretended device; ``elem`` is the CPU tensor that holds its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor, requires_grad: bool = False) -> PretendedTensor:
        tensor: PretendedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=requires_grad,
        )
        tensor.elem = elem
        return tensor

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendedTensor({self.elem!r})"

    def tolist(self) -> Any:
        host_copies.append("tolist")
        return self.elem.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy: use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes factory functions create pretended tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def build_guard(folder: Path) -> None:
    """Compile the device guard, and load it into this process."""
    root, library = Path(torch.__file__).parent, folder / "guard.so"
    source = Path(__file__).with_name("guard.cpp")
    flags = ["-O1", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}"]
    links = [f"-L{root / 'lib'}", "-lc10", "-o", str(library)]
    subprocess.run(["g++", *flags, str(source), *links], check=True)
    ctypes.CDLL(str(library))


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that there is a device ``cuda:0``."""
    lazy_init, tensor = torch.cuda._lazy_init, torch.tensor

    def to_device(data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        made = tensor(data, dtype=dtype, **kwargs)
        return made if device is None else made.to(device)

    torch.cuda._lazy_init = lambda: None
    torch.tensor = torch.as_tensor = to_device  # type: ignore[assignment]
    try:
        with _Mode():
            yield
    finally:
        torch.cuda._lazy_init = lazy_init
        torch.tensor = torch.as_tensor = tensor  # type: ignore[assignment]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    pretended = any(isinstance(x, PretendedTensor) for x in tensors)
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if pretended and func not in COPIES:
        _check_devices(name, args, tensors)
    if name == "aten::_local_scalar_dense" or (
        func in COPIES and pretended and device is not None and device.type == "cpu"
    ):
        host_copies.append(name)
    if name in ("aten::pin_memory", "aten::_pin_memory"):
        return args[0]
    if name == "aten::is_pinned":
        return False
    output = _compute(func, args, kwargs, device)
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    if func._schema.is_mutable and "out" in kwargs:
        return kwargs["out"]
    is_on_gpu = pretended if device is None else device.type == "cuda"
    return tree_map(_pretend, output) if is_on_gpu else output


def _check_devices(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raise the error that CUDA does for tensors on two devices; scalars may be on the CPU."""
    on_cpu = [
        x
        for x in tensors
        if not isinstance(x, PretendedTensor) and x.device.type != "meta" and x.dim() > 0
    ]
    first = args[0] if args else None
    if name in INDEXING and isinstance(first, PretendedTensor):  # indices may be on the CPU
        values = args[2] if len(args) > 2 else None
        on_cpu = [x for x in on_cpu if x is values]
    if on_cpu:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got cuda:0 and cpu, "
            f"{[tuple(x.shape) for x in on_cpu]}"
        )


def _compute(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None
) -> Any:
    args, kwargs = tree_map(
        lambda x: x.elem if isinstance(x, PretendedTensor) else x, (args, dict(kwargs))
    )
    if device is not None and device.type == "cuda":
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return func(*args, **kwargs)


def _pretend(x: Any) -> Any:
    is_plain = isinstance(x, Tensor) and not isinstance(x, PretendedTensor)
    return PretendedTensor(x) if is_plain and x.device.type == "cpu" else x
