"""The two large products of a LoRA linear, over any base, by any of the algorithms that algorithms.py names.

    y  = x w^T + s b^T + bias            s = scale * x a^T, given
    dx = dy w + keep * (ds a)            ds = scale * dy b, given

Shapes:  x [M, K], dy [M, N], w [N, K] dense or quantised, a [R, K], b [N, R], s and ds [M, padded R]
Keeps:   nothing of W's size outlives a call; `in_loop` writes none, `panel` one panel, the others one
"""

import math

import torch
import torch.nn.functional as F

from fastpeft.ops.algorithms import Problem, algorithm_for
from fastpeft.ops.weights import FrozenWeight, QuantizedWeight

PANEL_BYTES = 16 * 2**20  # of dequantised rows: with the stored bytes and x they stay in 40 to 50 MB of L2


def kind_of(w: FrozenWeight) -> str:
    """ "dense", "nf4", "fp4" or "int8"."""
    return "dense" if isinstance(w, torch.Tensor) else w.quant_type


def choose_y(x: torch.Tensor, w: FrozenWeight, r: int, *, dropout: bool) -> str:
    """The algorithm for y = x w^T + s b^T + bias."""
    return _choose("y", x, w, r, dropout)


def choose_dx(dy: torch.Tensor, w: FrozenWeight, r: int, *, dropout: bool) -> str:
    """The algorithm for dx = dy w + keep * (ds a)."""
    return _choose("dx", dy, w, r, dropout)


def _choose(of, rows, w, r, dropout):
    n, k = w.shape
    problem = Problem(of, kind_of(w), rows.shape[0], n, k, r, rows.dtype, dropout)
    return algorithm_for(problem, rows.device, in_loop=decodes_in_loop(w, rows.dtype))


def decodes_in_loop(w: FrozenWeight, dtype: torch.dtype) -> bool:
    """True if a kernel can decode this weight inside its GEMM with inputs of `dtype`."""
    if kind_of(w) not in ("nf4", "fp4") or dtype not in (torch.float16, torch.bfloat16):
        return False
    from fastpeft.kernels.nf4_gemm import in_loop_supports

    return in_loop_supports(w.as_packed())


def product_y(x, w, s, a, b, bias, *, scale, precision, algorithm):
    """y [M, N] by `algorithm`; s is not read by "merge", which takes scale * b a itself (no dropout then)."""
    from fastpeft.kernels import lora as kernels

    if algorithm == "in_loop":
        from fastpeft.kernels.nf4_gemm import nf4_lora_gemm

        return nf4_lora_gemm(x, w.as_packed(), s, b, bias, precision=precision)
    bias_like_x = None if bias is None else bias.to(x.dtype)
    if algorithm == "merge":
        return F.linear(x, _merged(w, a, b, scale, x.dtype), bias_like_x)
    if algorithm == "panel":
        y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
        for start, rows in _panels(w, x.dtype):
            torch.mm(x, rows.t(), out=y[:, start : start + rows.shape[0]])
        if bias is not None:
            y += bias_like_x
    elif algorithm == "epilogue":
        return kernels.lora_epilogue(x, _expand(w, x.dtype), s, b, bias, precision=precision)
    else:
        y = F.linear(x, _expand(w, x.dtype), bias_like_x)
    return y.addmm_(s[:, : b.shape[1]], b.to(x.dtype).t())


def product_dx(dy, w, ds, a, b, *, scale, seed, threshold, precision, algorithm):
    """dx [M, K] by `algorithm`; ds is not read by "merge"."""
    from fastpeft.kernels import lora as kernels

    dropout = {"seed": seed, "threshold": threshold, "precision": precision}
    if algorithm == "in_loop":
        from fastpeft.kernels.nf4_gemm import nf4_lora_grad_x

        return nf4_lora_grad_x(dy, w.as_packed(), ds, a, **dropout)
    if algorithm == "merge":
        return dy @ _merged(w, a, b, scale, dy.dtype)
    if algorithm == "epilogue":
        return kernels.lora_grad_x(dy, _expand(w, dy.dtype), ds, a, **dropout)
    if threshold:
        raise ValueError(f"product_dx: expected 'epilogue' or 'in_loop' with dropout, got {algorithm!r}")
    if algorithm == "panel":
        dx = torch.zeros(dy.shape[0], w.shape[1], dtype=dy.dtype, device=dy.device)
        for start, rows in _panels(w, dy.dtype):
            dx.addmm_(dy[:, start : start + rows.shape[0]], rows)
    else:
        dx = dy @ _expand(w, dy.dtype)
    return dx.addmm_(ds[:, : a.shape[0]], a.to(dy.dtype))


def _expand(w: FrozenWeight, dtype: torch.dtype) -> torch.Tensor:
    return w.to(dtype) if isinstance(w, torch.Tensor) else w.dequantize(dtype, impl="triton")


def _merged(w: QuantizedWeight, a, b, scale, dtype):
    from fastpeft.kernels.nf4 import nf4_merge

    return nf4_merge(w.as_packed(), a, b, scale=scale, dtype=dtype)


def _panels(w: QuantizedWeight, dtype: torch.dtype):
    """(first row, [rows, K] in `dtype`) over all rows of w, one after another in the same memory."""
    n, k = w.shape
    step = _panel_step(w)
    height = min(n, max(1, PANEL_BYTES // (k * dtype.itemsize) // step) * step)
    out = torch.empty(height, k, dtype=dtype, device=w.device)
    for start in range(0, n, height):
        rows = min(height, n - start)
        yield start, _dequantized_rows(w, start, rows, out[:rows])


def _panel_step(w: QuantizedWeight) -> int:
    """Rows after which a block of absmax (and, nested, a block of blocks) begins anew; all rows where none does."""
    if w.quant_type == "int8":
        return 1
    n, k = w.shape
    unit = w.blocksize * (1 if w.nested is None else w.nested.blocksize)
    return min(n, math.lcm(k, unit) // k)


def _dequantized_rows(w, start, rows, out):
    if w.quant_type == "int8":
        from fastpeft.kernels.int8 import int8_dequantize

        part = slice(start, start + rows)
        return int8_dequantize(w.q[part], w.row_absmax[part], out.dtype, out=out)
    from fastpeft.kernels.nf4 import nf4_dequantize

    k = w.shape[1]
    first, last = start * k, (start + rows) * k
    whole = w.as_packed()
    block = first // w.blocksize
    part = whole._replace(
        packed=whole.packed[first // 2 : -(-last // 2)],
        absmax=whole.absmax[block : -(-last // w.blocksize)],
        shape=(rows, k),
    )
    if w.nested is not None:
        part = part._replace(nested_absmax=whole.nested_absmax[block // w.nested.blocksize :])
    return nf4_dequantize(part, out.dtype, out=out)
