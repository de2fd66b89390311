"""RMSNorm and LayerNorm, with a residual added on the way.

    h = x + residual;  h = x without one
    rms_norm:    hat = h * rstd,              rstd = 1 / sqrt(mean(h^2) + eps),    y = hat * (weight + offset)
    layer_norm:  hat = (h - mean(h)) * rstd,  rstd = 1 / sqrt(var(h) + eps),       y = hat * weight + bias
    g = dy * (weight + offset),   dx = dresidual = rstd * (g - hat * mean(g * hat) [- mean(g)]) + dh
    dweight = sum over rows of dy * hat,   dbias = sum over rows of dy

Kept for backward: h, which is x without a residual, and rstd (and mean): one number a row. No float32 copy of x.
"""

from dataclasses import dataclass

import torch

from fastpeft import backend
from fastpeft.ops import norm_torch, norm_triton
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.tracing import traced, transformed
from fastpeft.reference import norm as reference

PASSES = {"torch": norm_torch, "triton": norm_triton}


def rows_of(x: torch.Tensor | None) -> torch.Tensor | None:
    """[M, K] of [..., K]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Normed:
    """What an output y of rms_norm was made from. Who keeps y for backward can keep h instead, which is kept anyway."""

    h: torch.Tensor
    weight: torch.Tensor | None
    settings: tuple

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """These rows of y [M, K], bit for bit."""
        eps, offset, dtype, impl = self.settings
        y, *_ = PASSES[impl].forward(rows_of(self.h)[rows], None, self.weight, None, eps, offset, False, dtype)
        return y


def normed(y: torch.Tensor) -> Normed | None:
    """What y was made from, if it is rms_norm's own output, which autograd lets nobody change; None for any other tensor."""
    return getattr(y, _NORMED, None)


_NORMED = "_fastpeft_normed"


class _Norm(torch.autograd.Function):
    """Both norms; (y, h) with a residual, y without."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, offset, centred, dtype, impl):
        y, h, mean, rstd = PASSES[impl].forward(
            rows_of(x), rows_of(residual), weight, bias, eps, offset, centred, dtype
        )
        h = None if h is None else h.view(x.shape)
        ctx.save_for_backward(x if h is None else h, weight, mean, rstd)
        ctx.settings = offset, None if bias is None else bias.dtype, impl
        ctx.set_materialize_grads(False)
        y = y.view(x.shape)
        return y if h is None else (y, h)

    @staticmethod
    @first_order_only("rms_norm and layer_norm")
    def backward(ctx, dy, dh=None):
        h, weight, mean, rstd = ctx.saved_tensors
        offset, bias_dtype, impl = ctx.settings
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], *ctx.needs_input_grad[2:4]
        dx, dw, dbias = dh, None, None
        if dy is not None:
            dx, dw, dbias = PASSES[impl].backward(
                rows_of(dy), rows_of(dh), rows_of(h), weight, mean, rstd, offset, bias_dtype, needs
            )
            dx = None if dx is None else dx.view(h.shape)
        return *[dx if need else None for need in ctx.needs_input_grad[:2]], dw, dbias, *[None] * 5


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = h / sqrt(mean(h^2) + eps) * (weight + offset), h = x; with `residual` (y, h) of h = x + residual.

    Shapes:  x, residual [..., K], weight [K] or None -> y, h [..., K], contiguous
    Offset:  what is added to the weight, 1 in Gemma; nothing without a weight
    Dtypes:  x and residual alike, float32, float16, bfloat16 (`torch` and `reference` also float64), h as x, weight any;
             y in `dtype`, None: x's. Statistics and products in float32 (float64 for float64); y is rounded once
    Grads:   x, residual, weight, through y and h. First order only
    Raises:  ValueError where shapes, dtypes or devices disagree
    Source:  Zhang and Sennrich 2019, arXiv:1910.07467
    """
    _check("rms_norm", x, residual, weight, None, eps)
    return _run(x, residual, weight, None, eps, offset, False, x.dtype if dtype is None else dtype, impl)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias, h = x; with `residual` (y, h) of h = x + residual.

    Shapes:  x, residual [..., K], weight, bias [K] or None -> y, h [..., K], contiguous
    Dtypes:  as rms_norm's; y in x's dtype
    Grads:   x, residual, weight, bias, through y and h. First order only
    Raises:  ValueError where shapes, dtypes or devices disagree
    Source:  Ba et al. 2016, arXiv:1607.06450
    """
    _check("layer_norm", x, residual, weight, bias, eps)
    return _run(x, residual, weight, bias, eps, 0.0, True, x.dtype, impl)


def _run(x, residual, weight, bias, eps, offset, centred, dtype, impl):
    chosen = backend.resolve(impl, x.device, x.dtype)
    if chosen == "reference" or (transformed() and chosen == "torch"):
        return _composed(x, residual, weight, bias, eps, offset, centred, dtype)
    if traced(x):
        from fastpeft.ops.norm_custom import norm

        y, h, *_ = norm(x, residual, weight, bias, eps, offset, centred, dtype, chosen)
        return y if residual is None else (y, h)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, residual, weight, bias)
    ):
        result = _Norm.apply(x, residual, weight, bias, eps, offset, centred, dtype, chosen)
        if residual is None and not centred:
            setattr(result, _NORMED, Normed(x, weight, (eps, offset, dtype, chosen)))
        return result
    if chosen == "torch" and residual is None and not centred and norm_torch.is_small(x, dtype):
        return norm_torch.small_rms_norm(x, weight, eps, offset)
    y, h, _, _ = PASSES[chosen].forward(rows_of(x), rows_of(residual), weight, bias, eps, offset, centred, dtype)
    return y.view(x.shape) if h is None else (y.view(x.shape), h.view(x.shape))


def _composed(x, residual, weight, bias, eps, offset, centred, dtype):
    """The reference in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else x + residual
    weight, bias = (None if tensor is None else tensor.to(wide) for tensor in (weight, bias))
    if centred:
        y = reference.layer_norm(h.to(wide), weight, bias, eps=eps)
    else:
        y = reference.rms_norm(h.to(wide), weight, eps=eps, offset=offset)
    y = y.to(dtype)
    return y if residual is None else (y, h)


def _check(op, x, residual, weight, bias, eps):
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(f"{op}: expected floating x [..., K] with K > 0, got {tuple(x.shape)} {x.dtype}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: expected eps of zero or more, got {eps}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: expected residual {tuple(x.shape)} {x.dtype} as x, got {tuple(residual.shape)} {residual.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.shape != x.shape[-1:] or not tensor.is_floating_point()):
            raise ValueError(
                f"{op}: expected floating {name} [K={x.shape[-1]}], got {tuple(tensor.shape)} {tensor.dtype}"
            )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: expected {name} on {x.device} as x, got {tensor.device}")
