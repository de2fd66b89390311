"""The LoRA linear by the fused kernels: what a GPU runs.

Equations and what is kept: lora.py.
"""

import torch
from torch.autograd.function import once_differentiable

from fastpeft import backend
from fastpeft.ops.dropout import LEVELS
from fastpeft.ops.lora_torch import save_for_backward, sum_rows


class LoRALinearTriton(torch.autograd.Function):
    """The fused kernels: four passes, each over one large tensor, with sums in float32 and no atomics."""

    @staticmethod
    def forward(ctx, x, w, a, b, bias, scale, seed, threshold):
        from fastpeft.kernels import lora as kernels

        rows = x.reshape(-1, x.shape[-1])
        precision = backend.matmul_precision(x.device)
        s = kernels.lora_down(rows, a, scale=scale, seed=seed, threshold=threshold, precision=precision)
        y = kernels.lora_epilogue(rows, w.to(x.dtype), s, b, bias, precision=precision)
        save_for_backward(ctx, x, s, w, a, b)
        ctx.scale, ctx.seed, ctx.threshold, ctx.precision = scale, seed, threshold, precision
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        from fastpeft.kernels import lora as kernels

        x, s, w, a, b = ctx.saved_tensors
        need_x, _, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dy = grad.reshape(-1, grad.shape[-1])
        dx = da = db = dbias = None
        dropout = {"seed": ctx.seed, "threshold": ctx.threshold, "precision": ctx.precision}
        if need_b:
            ds, db = kernels.lora_grad_s_b(dy, b, s, scale=ctx.scale, threshold=ctx.threshold, precision=ctx.precision)
        elif need_x or need_a:  # ds alone: the kernel of S, with dy for x and b^T for a
            c = ctx.scale / (1.0 - ctx.threshold / LEVELS)
            ds = kernels.lora_down(dy, b.t(), scale=c, seed=0, threshold=0, precision=ctx.precision)
        if need_x:
            dx = kernels.lora_grad_x(dy, w.to(dy.dtype), ds, a, **dropout).view(ctx.x_shape)
        if need_a:
            da = kernels.lora_grad_a(x.reshape(-1, x.shape[-1]), ds, a, **dropout)
        if need_bias:
            dbias = sum_rows(dy, ctx.bias_dtype)
        return dx, None, da, db, dbias, None, None, None
