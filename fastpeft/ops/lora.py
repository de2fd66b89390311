"""The LoRA linear as one op: a frozen matmul and a trained low-rank path that reads the same input.

    S = x a^T,   y = x w^T + s S b^T + bias
    dS = s dy b,   dx = dy w + dS a,   da = dS^T x,   db = s dy^T S,   dbias = sum over rows of dy

Kept for backward: x as it came (its producer holds it anyway), S (R columns) and, with dropout, a seed; `torch` on a CPU keeps
the mask beside S, a bit per element, which is faster than to draw it twice. Not a dropped x, a float32 copy of x, nor anything
of the size of w. Small calls are composed of plain ones instead (see `_is_small`): those keep what autograd keeps, a few rows'
copies of x in mixed dtypes or with dropout.
"""

import functools

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops import lora_torch, lora_triton
from fastpeft.ops.algorithms import composed_is_faster
from fastpeft.ops.dropout import LEVELS, draw_seed, drop, keep_mask, threshold_of
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.tracing import traced, transformed, written_out
from fastpeft.ops.weights import FrozenWeight
from fastpeft.reference import lora as reference

_PASSES = {"torch": lora_torch, "triton": lora_triton}


class LoRALinear(torch.autograd.Function):
    """Keeps x, S and the seed; w as it came, so that neither a cast nor a dequantised copy outlives a product."""

    @staticmethod
    def forward(ctx, x, w, a, b, bias, scale, seed, threshold, impl):
        rows = x.reshape(-1, x.shape[-1])
        y, s = _PASSES[impl].forward(rows, w, a, b, bias, scale, seed, threshold)
        _, _, need_a, need_b = ctx.needs_input_grad[:4]
        is_tensor = isinstance(w, torch.Tensor)
        ctx.save_for_backward(x if need_a else None, s if need_b else None, w if is_tensor else None, a, b)
        ctx.quantized = None if is_tensor else w
        ctx.impl, ctx.x_shape, ctx.settings = impl, x.shape, (scale, seed, threshold)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("lora_linear")
    def backward(ctx, grad):
        x, s, w, a, b = ctx.saved_tensors
        need_x, _, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dy = grad.reshape(-1, grad.shape[-1])
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        w = ctx.quantized if w is None else w
        dx, da, db = _PASSES[ctx.impl].backward(dy, rows, s, w, a, b, *ctx.settings, (need_x, need_a, need_b))
        dx = None if dx is None else dx.view(ctx.x_shape)
        dbias = lora_torch.sum_rows(dy, ctx.bias_dtype) if need_bias else None
        return dx, None, da, db, dbias, None, None, None, None


def lora_linear(
    x: torch.Tensor,
    w: FrozenWeight,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """y = x w^T + scale * (drop(x) a^T) b^T + bias, with w frozen.

    Shapes:  x [..., K], w [N, K], a [R, K], b [N, R], bias [N] or None -> y [..., N]; any strides
    Weights: w is a tensor, an NF4Weight (NF4 or FP4) or an Int8Weight; a quantised one counts as its dequantised values
    Dtypes:  x and a dense w alike (float32, float16, bfloat16, float64 where no kernel runs); y as x. a, b and bias in any
             floating dtype: they are rounded to x's dtype for the products, their gradients come back in their own dtype.
             Sums in float32. Under autocast x, w and bias are taken in the autocast dtype, as F.linear does
    Grads:   x, a, b, bias; never w. First order only
    Dropout: on the low-rank path's input; dropout_p in [0, 1) is rounded to a multiple of 1/65536. The mask is a function
             of `seed`, drawn from torch's default CPU generator when None
    Tracing: torch.compile, fake and meta tensors see the operators of custom.py; torch.func's transforms see plain calls
    Units:   scale = alpha / R, or alpha / sqrt(R) for rsLoRA; no unit
    Raises:  ValueError where shapes, dtypes or devices disagree, or w requires a gradient; NotImplementedError where the
             named implementation cannot run
    Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1; Dettmers et al. 2023, arXiv:2305.14314
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, w, a, b, bias, dropout_p, autocast)
    threshold = threshold_of(dropout_p)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _run(chosen, x, w, a, b, bias, scale, seed, threshold)
    return _run(chosen, x, w, a, b, bias, scale, seed, threshold)


def _run(impl, x, w, a, b, bias, scale, seed, threshold):
    if impl != "reference" and traced(x):
        return _traced(impl, x, w, a, b, bias, scale, seed, threshold)
    if seed is None:
        seed = draw_seed() if threshold else 0
    if impl == "reference":
        return _reference(x, w, a, b, bias, scale, seed, threshold)
    m = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if m == 0 or transformed() or (impl == "torch" and _is_small(m, x, w, a, threshold)):
        return _composed(x, w, a, b, bias, scale, seed, threshold)
    return LoRALinear.apply(x, w, a, b, bias, scale, seed, threshold, impl)


def step_by(algorithm: str, x, w, a, b, bias, scale, seed, threshold):
    """y by the named way of the `torch` implementation, "function" or "composed": for measurements of both."""
    if algorithm == "composed":
        return _composed(x, w, a, b, bias, scale, seed, threshold)
    return LoRALinear.apply(x, w, a, b, bias, scale, seed, threshold, "torch")


def _traced(impl, x, w, a, b, bias, scale, seed, threshold):
    from fastpeft.ops import custom

    if threshold:
        seed = custom.draw_seed() if seed is None else torch.tensor(seed)
    tensors, described = custom.flatten(w)
    y, _ = custom.lora_linear(x, tensors, a, b, bias, seed if threshold else None, scale, threshold, described, impl)
    return y


def _reference(x, w, a, b, bias, scale, seed, threshold):
    keep = keep_mask(seed=seed, like=x, threshold=threshold) if threshold else None
    w = w if isinstance(w, torch.Tensor) else w.dequantize(x.dtype, impl="reference")
    wide = functools.reduce(torch.promote_types, [t.dtype for t in (x, w, a, b, bias) if t is not None])
    inputs = [None if t is None else t.to(wide) for t in (x, w, a, b, bias)]
    return reference.lora_linear(*inputs, scale=scale, dropout_p=threshold / LEVELS, keep=keep).to(x.dtype)


def _is_small(m: int, x: torch.Tensor, w: FrozenWeight, a: torch.Tensor, threshold: int) -> bool:
    if not isinstance(w, torch.Tensor):
        return False  # plain calls would keep the dequantised w
    return composed_is_faster(m, *w.shape, a.shape[0], x.dtype, a.dtype, threshold > 0)


def _composed(x, w, a, b, bias, scale, seed, threshold):
    """The same value by calls that autograd knows. The low-rank path runs in the wider of x's and a's dtypes."""
    w = w.to(x.dtype) if isinstance(w, torch.Tensor) else written_out(w, x.dtype)
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    wide = torch.promote_types(x.dtype, a.dtype)
    s = F.linear(drop(x, seed, threshold).to(wide), a.to(wide)) * (scale / (1.0 - threshold / LEVELS))
    return y.add_(F.linear(s, b.to(wide)))


def _check(x, w, a, b, bias, dropout_p, autocast):
    n, k = w.shape if len(w.shape) == 2 else (None, None)
    r = a.shape[0] if a.dim() == 2 else None
    shapes = (
        n is not None
        and x.dim() >= 1
        and x.shape[-1] == k
        and r is not None
        and r >= 1
        and tuple(a.shape) == (r, k)
        and tuple(b.shape) == (n, r)
        and (bias is None or tuple(bias.shape) == (n,))
    )
    if not shapes:
        got = {"x": x, "w": w, "a": a, "b": b, "bias": bias}
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in got.items() if t is not None)
        hint = "; is b transposed?" if r is not None and tuple(b.shape) == (r, n) != (n, r) else ""
        raise ValueError(
            f"lora_linear: expected x [..., K], w [N, K], a [R, K], b [N, R], bias [N], got {listed}{hint}"
        )
    quantized = not isinstance(w, torch.Tensor)
    tensors = [t for t in (w, a, b, bias) if t is not None]
    if any(t.device != x.device for t in tensors):
        devices = ", ".join(str(t.device) for t in (x, *tensors))
        raise ValueError(f"lora_linear: expected x, w, a, b and bias on one device, got {devices}")
    same = x.dtype == w.dtype or autocast or quantized
    if not x.is_floating_point() or not same or not all(t.dtype.is_floating_point for t in tensors):
        raise ValueError(
            f"lora_linear: expected x and w of one floating dtype and floating a, b, bias, got x {x.dtype}, w {w.dtype}, "
            f"a {a.dtype}, b {b.dtype}; cast x to {w.dtype}, or run under torch.autocast"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: expected 0 <= dropout_p < 1, got {dropout_p}")
    if not quantized and w.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lora_linear: expected a frozen w, got w.requires_grad=True; its gradient is never computed here"
        )
