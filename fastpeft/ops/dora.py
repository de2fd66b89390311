"""The DoRA linear: LoRA whose rows W + s B A are brought to a learned length.

    norm = ||w + s b a||_row,    gain = magnitude / max(norm, eps),    z = x_d w^T + s (x_d a^T) b^T
    y = gain * z + (x - x_d) w^T + bias                     x_d = drop(x) / (1 - p); x_d = x without dropout
    dz = gain * dy,   dS = s dz b,   da = dS^T x_d,   db = s dz^T S,   dmagnitude = sum over rows of dy * z / norm
    dx_d = dz w + dS a,   dx = dx_d, or with dropout dy w + keep / (1 - p) * (dx_d - dy w)

The norm is held constant in backward, as in the paper. It comes from three small sums, b a is never formed:

    norm^2 = w_sq + 2 s rowsum((w a^T) * b) + s^2 rowsum((b (a a^T)) * b),    w_sq = rowsum(w^2)

Kept for backward: x, S (R columns), z (N columns), gain [N] and with dropout a seed: no mask, no dropped x, nothing of w's size.
PEFT keeps twice z, and with dropout over a quantised base the dequantised w.
"""

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops import dora_torch, dora_triton
from fastpeft.ops.dora_torch import row_norm, row_squares
from fastpeft.ops.dropout import LEVELS, draw_seed, keep_mask, threshold_of
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.lora_group import Projection, check_projection
from fastpeft.ops.lora_torch import sum_rows
from fastpeft.ops.tracing import traced, transformed, written_out
from fastpeft.ops.weights import FrozenWeight
from fastpeft.reference import dora as reference

EPS = 1e-12
"""The least norm that a row is divided by: rows of zeros give zeros, not NaN."""


class DoRALinear(torch.autograd.Function):
    """Keeps x, S, z, gain, norm and the seed; w as it came, so that neither a cast nor a dequantised copy outlives a product."""

    @staticmethod
    def forward(ctx, x, w, a, b, magnitude, bias, w_sq, eps, scale, seed, threshold, impl):
        rows = x.reshape(-1, x.shape[-1])
        settings = (scale, seed, threshold)
        y, z, s, norm, gain = _PASSES[impl].forward(rows, w, a, b, magnitude, bias, w_sq, eps, *settings)
        need_a, need_b, need_m = ctx.needs_input_grad[2:5]
        x_, s, z = x if need_a else None, s if need_b else None, z if need_m else None
        ctx.save_for_backward(x_, s, z, w if isinstance(w, torch.Tensor) else None, a, b, gain, norm)
        ctx.quantized = None if isinstance(w, torch.Tensor) else w
        ctx.impl, ctx.settings, ctx.x_shape = impl, settings, x.shape
        ctx.magnitude_dtype, ctx.bias_dtype = magnitude.dtype, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("dora_linear")
    def backward(ctx, grad):
        x, s, z, w, a, b, gain, norm = ctx.saved_tensors
        need_x, _, *needs, need_bias = ctx.needs_input_grad[:6]
        w = ctx.quantized if w is None else w
        dy = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        passes = _PASSES[ctx.impl]
        dx, da, db, dm = passes.backward(dy, rows, s, z, w, a, b, gain, norm, *ctx.settings, (need_x, *needs))
        dx = None if dx is None else dx.view(ctx.x_shape)
        dm = None if dm is None else dm.to(ctx.magnitude_dtype)
        dbias = sum_rows(dy, ctx.bias_dtype) if need_bias else None
        return dx, None, da, db, dm, dbias, *[None] * 6


_PASSES = {"torch": dora_torch, "triton": dora_triton}


def dora_linear(
    x: torch.Tensor,
    w: FrozenWeight,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    w_sq: torch.Tensor | None = None,
    eps: float = EPS,
    impl: str = "auto",
) -> torch.Tensor:
    """y = gain * (x_d w^T + scale (x_d a^T) b^T) + (x - x_d) w^T + bias, gain = magnitude / max(||w + scale b a||_row, eps).

    Shapes:  x [..., K], w [N, K], a [R, K], b [N, R], magnitude [N], bias [N] or None -> y [..., N]
    Weights: w is a tensor or a quantised weight; w_sq = row_squares(w), computed anew where it is None
    Dtypes:  as lora_linear's; magnitude and the norm in float32 or wider, whatever x is
    Grads:   x, a, b, magnitude, bias; never w, never through the norm. First order only
    Dropout: x_d = drop(x) / (1 - p) also in the scaled part of the base product, as in PEFT; x_d = x without dropout
    Units:   scale = alpha / R, no unit
    Raises:  ValueError where shapes, dtypes or devices disagree, or w requires a gradient; NotImplementedError where the
             named implementation cannot run
    Source:  Liu et al. 2024, arXiv:2402.09353
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, w, a, b, magnitude, bias, dropout_p, w_sq, autocast)
    threshold = threshold_of(dropout_p)
    if not autocast:
        return _run(chosen, x, w, a, b, magnitude, bias, scale, seed, threshold, w_sq, eps)
    x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return _run(chosen, x, w, a, b, magnitude, bias, scale, seed, threshold, w_sq, eps)


def _run(impl, x, w, a, b, magnitude, bias, scale, seed, threshold, w_sq, eps):
    if impl != "reference" and traced(x):
        from fastpeft.ops import custom

        keep = None
        if threshold:
            keep = custom.keep_mask(x, custom.draw_seed() if seed is None else torch.tensor(seed), threshold)
        return _composed(x, w, a, b, magnitude, bias, w_sq, eps, scale, keep, threshold)
    if seed is None:
        seed = draw_seed() if threshold else 0
    if impl == "reference":
        w = w if isinstance(w, torch.Tensor) else w.dequantize(x.dtype, impl="reference")
        keep = keep_mask(seed=seed, like=x, threshold=threshold) if threshold else None
        wide = x.dtype
        for tensor in (w, a, b, magnitude, bias):
            wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
        inputs = [None if tensor is None else tensor.to(wide) for tensor in (x, w, a, b, magnitude, bias)]
        y = reference.dora_linear(*inputs, scale=scale, dropout_p=threshold / LEVELS, keep=keep, eps=eps)
        return y.to(x.dtype)
    if transformed():
        keep = keep_mask(seed=seed, like=x, threshold=threshold) if threshold else None
        return _composed(x, w, a, b, magnitude, bias, w_sq, eps, scale, keep, threshold)
    return DoRALinear.apply(x, w, a, b, magnitude, bias, w_sq, eps, scale, seed, threshold, impl)


def _composed(x, w, a, b, magnitude, bias, w_sq, eps, scale, keep, threshold):
    """The same value by calls that autograd and tracers know; they keep what they keep."""
    w = w.to(x.dtype) if isinstance(w, torch.Tensor) else written_out(w, x.dtype)
    w_sq = row_squares(w) if w_sq is None else w_sq
    gain = magnitude.to(w_sq.dtype) / row_norm(w, a.detach(), b.detach(), scale, w_sq).clamp_min(eps)
    dropped = x
    if threshold:
        dropped = x * (keep / (1.0 - threshold / LEVELS))
    wide = torch.promote_types(x.dtype, a.dtype)
    low_rank = F.linear(F.linear(dropped.to(wide), a.to(wide)), b.to(wide)) * scale
    y = (F.linear(dropped, w) + low_rank) * gain
    if threshold:
        y = y + F.linear(x - dropped, w)
    return (y if bias is None else y + bias).to(x.dtype)


def _check(x, w, a, b, magnitude, bias, dropout_p, w_sq, autocast):
    if a is None or b is None:
        raise ValueError("dora_linear: expected a [R, K] and b [N, R], got None")
    check_projection("dora_linear", x, Projection(w, a, b, bias, dropout_p=dropout_p), autocast)
    for name, tensor in (("magnitude", magnitude), ("w_sq", w_sq)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (w.shape[0],) or not tensor.is_floating_point() or tensor.device != x.device:
            raise ValueError(
                f"dora_linear: expected floating {name} [N={w.shape[0]}] on {x.device}, got {tuple(tensor.shape)} "
                f"{tensor.dtype} on {tensor.device}"
            )
