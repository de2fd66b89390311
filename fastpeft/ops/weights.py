"""What a frozen weight [N, K] may be: a dense tensor, or quantised storage that can be written out as one."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol, TypeAlias, runtime_checkable

import torch

from fastpeft import backend


@runtime_checkable
class QuantizedWeight(Protocol):
    """Storage of a frozen weight [N, K]; NF4Weight (nf4.py) and Int8Weight (int8.py) are such."""

    shape: tuple[int, int]
    dtype: torch.dtype  # of the weight that was quantised
    device: torch.device
    quant_type: str  # "nf4", "fp4" or "int8"

    def dequantize(
        self, dtype: torch.dtype | None = None, *, impl: str = "auto", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weight as a dense tensor [N, K], fresh or in `out`."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the storage holds, by name."""
        ...


FrozenWeight: TypeAlias = torch.Tensor | QuantizedWeight


def dense(w: FrozenWeight, dtype: torch.dtype) -> torch.Tensor:
    """w [N, K] in `dtype`, for one product: a quantised weight's is overwritten by this thread's next call.

    On a CPU a fresh buffer costs as much as the dequantisation (its pages are mapped at the first touch), so there is one
    that stays, as large as the largest weight. Elsewhere the allocator hands out the same memory again by itself.
    """
    if isinstance(w, torch.Tensor):
        return w.to(dtype)
    if backend.type_of(w.device) != "cpu":
        return w.dequantize(dtype)
    return w.dequantize(dtype, out=_scratch.view(w.shape, dtype))


class _Scratch(threading.local):
    """One growing buffer per thread."""

    def __init__(self):
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def view(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if self.buffer.numel() < nbytes:
            self.buffer = torch.empty(nbytes, dtype=torch.uint8)
        return self.buffer[:nbytes].view(dtype).view(shape)


_scratch = _Scratch()


@contextlib.contextmanager
def own_scratch() -> Iterator[_Scratch]:
    """Inside, this thread's buffer, which is yielded, begins anew; afterwards it is the one from before."""
    before, _scratch.buffer = _scratch.buffer, torch.empty(0, dtype=torch.uint8)
    try:
        yield _scratch
    finally:
        _scratch.buffer = before
