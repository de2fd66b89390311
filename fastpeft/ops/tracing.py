"""Who is calling: somebody that runs the call, or somebody that only follows it."""

import torch

from fastpeft.ops.weights import QuantizedWeight


def traced(x: torch.Tensor) -> bool:
    """True while somebody follows the call instead of running it: torch.compile, fake tensors, meta tensors."""
    return torch.compiler.is_compiling() or x.is_meta or (type(x) is not torch.Tensor and hasattr(x, "fake_mode"))


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
