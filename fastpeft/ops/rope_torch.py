"""Rotary position embedding by library calls: what a CPU runs, and any device on request. Equations: rope.py.

Products go straight into the result: no rotated copy of x, no concatenation. Tables in x's own dtype, as transformers makes
them, take no conversion either; half precision is then rounded after each of the two products. With tables in float32 it is
widened by pieces and rounded once.
"""

import torch

from fastpeft.reference.rope import rows_of

_CHUNK = 2**17  # elements of 16 bits that are converted to float32 at once: what a core's cache holds
_UNCONVERTED = 2**19  # elements at once where nothing is converted


def rotate(xs, cos, sin, positions, offset, interleaved, inverse):
    """Each x [B, S, H, D] of `xs` rotated, contiguous; tables and positions as in rope.py."""
    b, s = xs[0].shape[:2]
    cos, sin = (rows_of(table, b, s, positions, offset)[:, :, None, :] for table in (cos, sin))
    return [_rotate(x, cos, sin, interleaved, inverse) for x in xs]


def _rotate(x, cos, sin, interleaved, inverse):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = 2 * cos.shape[-1]
    if columns < x.shape[-1]:
        y[..., columns:] = x[..., columns:]
    as_they_are = x.dtype.itemsize >= 4 or cos.dtype == x.dtype
    dtype, chunk, turn = (x.dtype, _UNCONVERTED, _turn_rows) if as_they_are else (torch.float32, _CHUNK, _turn_widened)
    cos, sin = cos.to(dtype), sin.to(dtype)
    row = x[:, :1].numel()
    if x.device.type != "cpu" or x.numel() <= chunk:
        turn(x, y, cos, sin, interleaved, inverse)
        return y
    step = max(1, chunk // row)
    for first in range(0, x.shape[1], step):
        part = slice(first, first + step)
        turn(x[:, part], y[:, part], cos[:, part], sin[:, part], interleaved, inverse)
    return y


def _turn_rows(x, y, cos, sin, interleaved, inverse):
    """Every column times its cosine at once, then the other half's sines on top."""
    half = cos.shape[-1]
    twice = cos.repeat_interleave(2, dim=-1) if interleaved else torch.cat([cos, cos], dim=-1)
    if 2 * half == x.shape[-1]:
        torch.mul(x, twice, out=y)
    else:
        torch.mul(x[..., : 2 * half], twice, out=y[..., : 2 * half])
    (x1, x2), (y1, y2) = _pair(x, half, interleaved), _pair(y, half, interleaved)
    sign = -1 if inverse else 1
    y1.addcmul_(x2, sin, value=-sign)
    y2.addcmul_(x1, sin, value=sign)


def _turn_widened(x, y, cos, sin, interleaved, inverse):
    """The same in float32, rounded once."""
    columns = 2 * cos.shape[-1]
    wide = x[..., :columns].float()
    turned = torch.empty_like(wide)
    _turn_rows(wide, turned, cos, sin, interleaved, inverse)
    y[..., :columns] = turned


def _pair(x, half, interleaved):
    return (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )
