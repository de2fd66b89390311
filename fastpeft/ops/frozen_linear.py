"""The linear over a frozen weight alone, dense or quantised: what a module computes while its adapters are off or merged.

    y = x w^T + bias,   dx = dy w

A quantised w is written out for each product and let go; nothing is kept for backward.
"""

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.tracing import traced, transformed, written_out
from fastpeft.ops.weights import FrozenWeight, dense


class _FrozenLinear(torch.autograd.Function):
    """Over a quantised weight, which it keeps by reference."""

    @staticmethod
    def forward(ctx, x, w, bias, in_loop):
        ctx.w, ctx.in_loop, ctx.bias_dtype = w, in_loop, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(x.dtype)
        if not in_loop:
            return F.linear(x, dense(w, x.dtype), bias)
        from fastpeft.kernels.nf4_gemm import nf4_lora_gemm

        precision = backend.matmul_precision(x.device)
        y = nf4_lora_gemm(x.reshape(-1, x.shape[-1]), w.as_packed(), None, None, bias, precision=precision)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("frozen_linear")
    def backward(ctx, dy):
        need_x, _, need_bias, _ = ctx.needs_input_grad
        dx = dbias = None
        rows = dy.reshape(-1, dy.shape[-1])
        if need_x:
            dx = (rows @ dense(ctx.w, dy.dtype)).view(*dy.shape[:-1], ctx.w.shape[1])
        if need_bias:
            dbias = rows.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, None, dbias, None


def frozen_linear(
    x: torch.Tensor, w: FrozenWeight, bias: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """y = x w^T + bias, with w frozen.

    Shapes:  x [..., K], w [N, K], bias [N] or None -> y [..., N]
    Dtypes:  x and a dense w alike; a quantised w is dequantised to x's dtype
    Grads:   x and bias; never w
    Raises:  ValueError where the shapes disagree
    """
    if x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"frozen_linear: expected x [..., K={w.shape[1]}], got {tuple(x.shape)}")
    if isinstance(w, torch.Tensor):
        return F.linear(x, w, bias)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if traced(x) or transformed() or x.numel() == 0:
        return F.linear(x, written_out(w, x.dtype), None if bias is None else bias.to(x.dtype))
    return _FrozenLinear.apply(x, w, bias, _decodes_in_loop(x, w, impl))


def _decodes_in_loop(x: torch.Tensor, w: FrozenWeight, impl: str) -> bool:
    if backend.resolve(impl, x.device, x.dtype) != "triton":
        return False
    from fastpeft.ops.lora_gemm import choose_y

    return choose_y(x.reshape(-1, x.shape[-1]), w, 1, dropout=False) == "in_loop"
