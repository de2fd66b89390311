"""The norms as operators of torch.library, for torch.compile, fake tensors and meta tensors.

fastpeft::norm           (y, h, mean, rstd); h and mean of no elements where there is none. Differentiable in x, residual,
                         weight and bias, through y and h
fastpeft::norm_backward  (dx, dw, dbias), of no elements where not asked for
"""

import torch
from torch.library import custom_op

from fastpeft.ops.norm import PASSES, rows_of


@custom_op("fastpeft::norm", mutates_args=())
def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
    dtype: torch.dtype,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, h, mean, rstd = PASSES[impl].forward(rows_of(x), rows_of(residual), weight, bias, eps, offset, centred, dtype)
    h = x.new_empty(0) if h is None else h.view(x.shape)
    return y.view(x.shape), h, rstd.new_empty(0) if mean is None else mean.view(-1), rstd.view(-1)


@norm.register_fake
def _(x, residual, weight, bias, eps, offset, centred, dtype, impl):
    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device=x.device)

    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.numel() // x.shape[-1]
    h = empty(0, dtype=x.dtype) if residual is None else empty(x.shape, dtype=x.dtype)
    return (
        empty(x.shape, dtype=dtype),
        h,
        empty(rows if centred else 0, dtype=wide),
        empty(rows, dtype=wide),
    )


@custom_op("fastpeft::norm_backward", mutates_args=())
def norm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    bias_dtype: torch.dtype | None,
    needs: list[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (None if tensor is None else tensor.unsqueeze(1) for tensor in (mean, rstd))
    dx, dw, dbias = PASSES[impl].backward(
        rows_of(dy), rows_of(dh), rows_of(h), weight, mean, rstd, offset, bias_dtype, needs
    )
    dx = None if dx is None else dx.view(h.shape)
    return tuple(h.new_empty(0) if grad is None else grad for grad in (dx, dw, dbias))


@norm_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, offset, bias_dtype, needs, impl):
    columns = h.shape[-1:]
    wanted = ((h.shape, h.dtype), (columns, None if weight is None else weight.dtype), (columns, bias_dtype))
    return tuple(
        torch.empty(shape, dtype=dtype, device=h.device) if need else h.new_empty(0)
        for need, (shape, dtype) in zip(needs, wanted)
    )


def _keep(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.offset, centred, _, ctx.impl = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, mean if centred else None, rstd)
    ctx.has_residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, dh, *_):
    h, weight, mean, rstd = ctx.saved_tensors
    need_inputs = ctx.needs_input_grad[:2]
    needs = [any(need_inputs), *[bool(need) for need in ctx.needs_input_grad[2:4]]]
    dh = dh if ctx.has_residual else None
    dx, dw, dbias = dh, None, None
    if dy is not None:
        grads = norm_backward(dy, dh, h, weight, mean, rstd, ctx.offset, ctx.bias_dtype, needs, ctx.impl)
        dx, dw, dbias = (grad if need else None for grad, need in zip(grads, needs))
    return *[dx if need else None for need in need_inputs], dw, dbias, *[None] * 5


norm.register_autograd(_differentiate, setup_context=_keep)
