"""How products are taken while training: mixed precision, and the fast float32 path of a CPU."""

import contextlib
from collections.abc import Iterator

import torch

FLOAT32_ERROR = 1e-5
"""Largest relative error of a product that still counts as float32: 100 times its rounding, 1/400 of bfloat16's."""


@contextlib.contextmanager
def fast_float32_matmul(device: torch.device) -> Iterator[bool]:
    """Send float32 products on a CPU to oneDNN while inside, if they stay float32 there; yields whether it is on.

    PyTorch's "medium" precision allows oneDNN, and allows it to compute in bfloat16. Without AMX it computes in float32, and
    on AMD CPUs more than twice as fast as MKL (2.1-2.3x at M >= 256 on a Zen 5; products of a few rows are slower, so it is
    on for training and evaluation only). One measured product decides: if its error is not float32's, nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu" or before != "highest":
        yield False
        return
    try:
        torch.set_float32_matmul_precision("medium")
        exact_enough = _product_error() < FLOAT32_ERROR
        if not exact_enough:
            torch.set_float32_matmul_precision(before)
        yield exact_enough
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager:
    """bfloat16 autocast on `device`, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def _product_error() -> float:
    """Relative rms error of one [128, 256] x [256, 128] float32 product; the random state is not touched."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((128, 256), (256, 128)))
    exact = a.double() @ b.double()
    return ((a @ b - exact).norm() / exact.norm()).item()
