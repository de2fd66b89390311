"""A trained float32 linear over a half-precision input, which is kept for backward as it came.

    y = x.to(w.dtype) w^T + bias,   dx = (dy w).to(x.dtype),   dw = dy^T x,   dbias = sum dy

Plain code keeps the widened copy of x: twice its bytes.
"""

import torch
import torch.nn.functional as F

from fastpeft.ops.tracing import traced, transformed


class _WidenedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias):
        ctx.save_for_backward(x, w)
        return F.linear(x.to(w.dtype), w, bias)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = (rows @ w).to(x.dtype).view(x.shape) if need_x else None
        dw = rows.t() @ x.reshape(-1, x.shape[-1]).to(w.dtype) if need_w else None
        return dx, dw, rows.sum(0) if need_bias else None


def widened_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y = x.to(w.dtype) w^T + bias

    Shapes:  x [..., K], w [N, K], bias [N] -> y [..., N]
    Dtypes:  w and bias alike; x any; y in w's
    Grads:   x, w, bias
    Raises:  ValueError where the shapes disagree
    """
    if x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"widened_linear: expected x [..., K={w.shape[1]}], got {tuple(x.shape)}")
    plain = x.dtype == w.dtype or traced(x) or transformed() or torch.is_autocast_enabled(x.device.type)
    return F.linear(x.to(w.dtype), w, bias) if plain else _WidenedLinear.apply(x, w, bias)
