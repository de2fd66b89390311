"""Who is calling: somebody that runs the call, or somebody that only follows it."""

import functools
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft import backend
from fastpeft.ops.weights import QuantizedWeight

_READ = (torch.int64, torch.int32, torch.bool)

_F = TypeVar("_F", bound=Callable)


def constants(make: _F) -> _F:
    """functools.cache for a function that makes constant tensors; fake tensors get fake ones, by FakeTensorMode."""
    kept = functools.cache(make)
    fakes: WeakKeyDictionary = WeakKeyDictionary()

    @functools.wraps(make)
    def made(*key):
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if mode is None:
            return kept(*key)
        of_mode = fakes.setdefault(mode, {})
        if key not in of_mode:
            with _disable_current_modes():
                real = kept(*key)
            alike = [mode.from_tensor(tensor) for tensor in (real if isinstance(real, tuple) else (real,))]
            of_mode[key] = tuple(alike) if isinstance(real, tuple) else alike[0]
        return of_mode[key]

    return made


def traced(x: torch.Tensor) -> bool:
    """True while somebody follows the call instead of running it: torch.compile, fake tensors, meta tensors.

    In a rehearsal (backend.py) fake tensors run the call: what it allocates is what is asked for. Positions, labels and masks,
    which code reads where nobody traces, have no values there either.
    """
    if torch.compiler.is_compiling() or x.is_meta:
        return True
    return is_fake(x) and not (backend.rehearsing() and x.dtype not in _READ)


def is_fake(x: torch.Tensor) -> bool:
    """True for a tensor of FakeTensorMode: sizes without values."""
    return type(x) is not torch.Tensor and hasattr(x, "fake_mode")


def has_values(x: torch.Tensor) -> bool:
    """False for tensors of sizes alone: meta and fake ones."""
    return not x.is_meta and not is_fake(x)


def address(x: torch.Tensor) -> int:
    """Where x lies; of a fake tensor, which lies nowhere, what is as much its own."""
    return id(x.untyped_storage()) if is_fake(x) else x.data_ptr()


def transformed() -> bool:
    """True under torch.func's transforms, which take plain calls only."""
    return torch._C._are_functorch_transforms_active()


def written_out(w: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """A quantised weight as a plain tensor, also under torch.func and while tracing: no transform is taken of a frozen weight."""
    if traced(next(iter(w.tensors().values()))):
        from fastpeft.ops import custom

        return custom.dequantize(*custom.flatten(w), dtype)
    with torch._C._DisableFuncTorch():
        return w.dequantize(dtype)
