"""What the tests of the rotary embedding draw: shapes, tables, and the float64 value with its gradients."""

import torch

from fastpeft.reference.rope import apply_rope as formula
from fastpeft.reference.rope import rows_of

# B, S, H, H_kv, D, R
SHAPES = {
    "aligned": (2, 16, 4, 2, 16, 16),
    "odd": (3, 7, 5, 1, 33, 10),
    "one": (1, 1, 1, 1, 2, 2),
    "partial": (2, 9, 3, 3, 80, 20),
    "whole-odd-half": (1, 33, 2, 1, 26, 26),
    "long": (1, 65, 3, 1, 128, 128),
}
ROWS = 97


def table(columns: int, dtype=torch.float32, rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(rows, columns) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(shape, dtype, device, *, transposed: bool = False):
    """q and k with a gradient, and gradients of their rotations; transposed: as transformers keeps them, heads first."""
    b, s, h, h_kv, d, _ = SHAPES[shape]
    tensors = [torch.randn(b, s, heads, d).to(device, dtype) for heads in (h, h_kv, h, h_kv)]
    if transposed:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    q, k, dq, dk = tensors
    return q.requires_grad_(), k.requires_grad_(), dq, dk


def in_dtype(dtype, q, k, dq, dk, cos, sin, *, positions=None, offset=0, interleaved=False):
    """q', k', dq, dk by the formula in `dtype`."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k)]
    cos, sin = (rows_of(part.to(dtype), *q.shape[:2], positions, offset) for part in (cos, sin))
    outputs = [formula(x, cos, sin, interleaved=interleaved) for x in inputs]
    grads = torch.autograd.grad(outputs, inputs, [dq.to(dtype), dk.to(dtype)])
    return [tensor.detach() for tensor in (*outputs, *grads)]
