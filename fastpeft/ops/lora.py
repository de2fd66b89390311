"""The LoRA linear as one op: a frozen matmul and a trained low-rank path that reads the same input.

    S = x a^T,   y = x w^T + s S b^T + bias
    dS = s dy b,   dx = dy w + dS a,   da = dS^T x,   db = s dy^T S,   dbias = sum over rows of dy

Kept for backward: x as it came (its producer holds it anyway), S (R columns) and, with dropout, a seed. Neither a mask,
a dropped x, a float32 copy of x, nor anything of the size of w. Small calls are composed of plain ones instead (see
`_is_small`): those keep what autograd keeps, a few rows' copies of x in mixed dtypes or with dropout.
"""

import functools

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops.dropout import LEVELS, draw_seed, drop, keep_mask, threshold_of
from fastpeft.ops.lora_torch import LoRALinearTorch
from fastpeft.ops.lora_triton import LoRALinearTriton
from fastpeft.reference import lora as reference

# Small calls cost their dispatch, not their products: plain calls, whose backward is C++, then beat a Function, whose
# backward is Python (0.19 ms more a call). Where they cross, one thread, AMX CPU, forward + backward, PEFT's time over ours:
#   a, b in x's dtype    576 x 576: Function 0.97 / 1.04 / 1.00 at M = 256 / 512 / 1024, composed 1.02 / 1.49 / 1.04
#                        2048 x 2048: 0.88 / 0.95 / 1.09 at M = 64 / 256 / 1024, composed 1.05 / 1.00 / 1.13
#   float32 a, b over bfloat16, 576 x 576: Function 0.57 / 0.72 / 1.03 / 1.89 at M = 16 / 64 / 256 / 1024, composed 0.92 / 1.09
#                        at M = 16 / 64
# Both keep the same bytes where the dtypes agree; in mixed dtypes and with dropout composed calls keep copies of x.
COMPOSED_MULTIPLIES = 2**28  # M N K, dtypes alike, no dropout
COMPOSED_ROWS_MIXED = 64
COMPOSED_ROWS_DROPOUT = 16


_FUNCTIONS = {"torch": LoRALinearTorch, "triton": LoRALinearTriton}


def lora_linear(
    x: torch.Tensor,
    w: torch.Tensor,
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
    Dtypes:  x and w alike (float32, float16, bfloat16, float64 where no kernel runs); y as x. a, b and bias in any floating
             dtype: they are rounded to x's dtype for the products, their gradients come back in their own dtype.
             Sums in float32. Under autocast x, w and bias are taken in the autocast dtype, as F.linear does
    Grads:   x, a, b, bias; never w. First order only
    Dropout: on the low-rank path's input; dropout_p in [0, 1) is rounded to a multiple of 1/65536. The mask is a function
             of `seed`, drawn from torch's default CPU generator when None, and is drawn again in backward
    Units:   scale = alpha / R, or alpha / sqrt(R) for rsLoRA; no unit
    Raises:  ValueError where shapes, dtypes or devices disagree, or w requires a gradient; NotImplementedError where the
             named implementation cannot run
    Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, w, a, b, bias, dropout_p, autocast)
    threshold = threshold_of(dropout_p)
    if threshold and seed is None:
        seed = draw_seed()
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _run(chosen, x, w, a, b, bias, scale, seed or 0, threshold)
    return _run(chosen, x, w, a, b, bias, scale, seed or 0, threshold)


def _run(impl, x, w, a, b, bias, scale, seed, threshold):
    m = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if impl == "reference":
        keep = keep_mask(seed=seed, like=x, threshold=threshold) if threshold else None
        wide = functools.reduce(torch.promote_types, [t.dtype for t in (x, w, a, b, bias) if t is not None])
        inputs = [None if t is None else t.to(wide) for t in (x, w, a, b, bias)]
        y = reference.lora_linear(*inputs, scale=scale, dropout_p=threshold / LEVELS, keep=keep)
        return y.to(x.dtype)
    if m == 0 or (impl == "torch" and _is_small(m, x, w, a, threshold)):
        return _composed(x, w, a, b, bias, scale, seed, threshold)
    return _FUNCTIONS[impl].apply(x, w, a, b, bias, scale, seed, threshold)


def _is_small(m: int, x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, threshold: int) -> bool:
    if threshold:
        return m <= COMPOSED_ROWS_DROPOUT
    if a.dtype != x.dtype:
        return m <= COMPOSED_ROWS_MIXED
    return m * w.numel() <= COMPOSED_MULTIPLIES


def _composed(x, w, a, b, bias, scale, seed, threshold):
    """The same value by calls that autograd knows. The low-rank path runs in the wider of x's and a's dtypes."""
    y = F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    wide = torch.promote_types(x.dtype, a.dtype)
    s = F.linear(drop(x, seed, threshold).to(wide), a.to(wide)) * (scale / (1.0 - threshold / LEVELS))
    return y.add_(F.linear(s, b.to(wide)))


def _check(x, w, a, b, bias, dropout_p, autocast):
    n, k = w.shape if w.dim() == 2 else (None, None)
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
    tensors = [t for t in (w, a, b, bias) if t is not None]
    if any(t.device != x.device for t in tensors):
        devices = ", ".join(str(t.device) for t in (x, *tensors))
        raise ValueError(f"lora_linear: expected x, w, a, b and bias on one device, got {devices}")
    if not x.is_floating_point() or (x.dtype != w.dtype and not autocast) or not all(map(_floating, tensors)):
        raise ValueError(
            f"lora_linear: expected x and w of one floating dtype and floating a, b, bias, got x {x.dtype}, w {w.dtype}, "
            f"a {a.dtype}, b {b.dtype}; cast x to {w.dtype}, or run under torch.autocast"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"lora_linear: expected 0 <= dropout_p < 1, got {dropout_p}")
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lora_linear: expected a frozen w, got w.requires_grad=True; its gradient is never computed here"
        )


def _floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point()
