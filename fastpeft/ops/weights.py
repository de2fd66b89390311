"""What a frozen weight [N, K] may be: a dense tensor, or quantised storage that can be written out as one."""

from typing import Protocol

import torch


class QuantizedWeight(Protocol):
    """Storage of a frozen weight [N, K]; NF4Weight (nf4.py) and Int8Weight (int8.py) are such."""

    shape: tuple[int, int]
    dtype: torch.dtype  # of the weight that was quantised
    device: torch.device

    def dequantize(self, dtype: torch.dtype | None = None, *, impl: str = "auto") -> torch.Tensor:
        """The weight as a fresh dense tensor [N, K]."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the storage holds, by name."""
        ...


FrozenWeight = torch.Tensor | QuantizedWeight


def dense(w: FrozenWeight, dtype: torch.dtype) -> torch.Tensor:
    """w [N, K] in `dtype`: itself if it is that already, else a fresh tensor that the caller lets go of after its product."""
    return w.to(dtype) if isinstance(w, torch.Tensor) else w.dequantize(dtype)
