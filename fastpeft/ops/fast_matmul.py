"""float32 products on a CPU through oneDNN: an explicit choice around a training step, never a setting left behind.

PyTorch's "medium" precision allows oneDNN, and allows it to compute in bfloat16. Without AMX it computes in float32, and on AMD
CPUs faster than MKL (at M >= 256 2.1-2.3x on a Zen 5, whose vector units are twice as wide, 1.12-1.21x on a Zen 4; products of a
few rows are slower: `small_products`). So it is refused where there is AMX, and elsewhere one measured product decides, once a
process: if its error is not float32's, nothing changes.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

FLOAT32_ERROR = 1e-5
"""Largest relative error of a product that still counts as float32: 100 times its rounding, 1/400 of bfloat16's."""


_entered: list[torch.device] = []
"""One entry per `fast_float32_matmul` that is open: inside one, the setting is its own and not the user's."""


class Float32Path(NamedTuple):
    """Whether float32 products may go through oneDNN here, and why or why not."""

    allowed: bool
    why: str


def float32_path(device: torch.device) -> Float32Path:
    """What `fast_float32_matmul` will do for a model on `device`."""
    if device.type != "cpu":
        return Float32Path(False, f"the model is on {device.type}, not on a CPU")
    now = torch.get_float32_matmul_precision()
    if now != "highest" and not (_entered and now == "medium"):
        return Float32Path(False, f"torch.set_float32_matmul_precision({now!r}) is set already")
    return _onednn()


@contextlib.contextmanager
def fast_float32_matmul(device: torch.device) -> Iterator[bool]:
    """Send float32 products on a CPU to oneDNN while inside, if they stay float32 there; yields whether it is on.

    PyTorch has one such setting for the whole process; it is put back at the end, also where this is entered inside itself.
    """
    before = torch.get_float32_matmul_precision()
    allowed = float32_path(device).allowed
    if not allowed:
        yield False
        return
    _entered.append(device)
    try:
        torch.set_float32_matmul_precision("medium")
        yield True
    finally:
        _entered.pop()
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def small_products() -> Iterator[None]:
    """Send float32 products to MKL again while inside, if `fast_float32_matmul` is what sends them to oneDNN.

    For many products of a few rows, which oneDNN is slower at: PyTorch's flash kernel, [4, 9 heads on 3, 256, 64], causal, one
    thread of a Zen 4, takes 8.2 + 18.7 ms forward and backward with MKL, 10.8 + 28.9 ms with oneDNN.
    """
    if not _entered or torch.get_float32_matmul_precision() != "medium":
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision("medium")


def entered() -> bool:
    """Whether some `fast_float32_matmul` is open."""
    return bool(_entered)


@functools.cache
def _onednn() -> Float32Path:
    if not torch.backends.mkldnn.is_available():
        return Float32Path(False, "this PyTorch has no oneDNN")
    if _has_amx():
        return Float32Path(False, "this CPU has AMX, with which oneDNN would compute in bfloat16")
    error = _product_error()
    if not error < FLOAT32_ERROR:
        return Float32Path(False, f"oneDNN's relative error here is {error:.0e}, which is not float32's")
    return Float32Path(True, f"relative error {error:.0e}, as float32 has")


def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _product_error() -> float:
    """Relative rms error of one [128, 256] x [256, 128] product through oneDNN; the random state is not touched."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((128, 256), (256, 128)))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        product = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return ((product - exact).norm() / exact.norm()).item()
