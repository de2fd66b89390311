"""Rotary position embedding by library calls: what a CPU runs, and any device on request. Equations: rope.py.

Products go straight into the halves of the result: no rotated copy of x, no concatenation.
"""

import torch

from fastpeft.reference.rope import rows_of

_CHUNK = 2**17  # elements of 16 bits that are converted to float32 at once: what a core's cache holds


def rotate(xs, cos, sin, positions, offset, interleaved, inverse):
    """Each x [B, S, H, D] of `xs` rotated, contiguous; tables and positions as in rope.py."""
    b, s = xs[0].shape[:2]
    cos, sin = (rows_of(table, b, s, positions, offset)[:, :, None, :] for table in (cos, sin))
    return [_rotate(x, cos, sin, interleaved, inverse) for x in xs]


def _rotate(x, cos, sin, interleaved, inverse):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = cos.shape[-1]
    y[..., 2 * half :] = x[..., 2 * half :]
    if x.dtype.itemsize >= 4:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        _turn(_pair(x, half, interleaved), _pair(y, half, interleaved), cos, sin, inverse)
        return y
    cos, sin = cos.float(), sin.float()
    step = max(1, _CHUNK // max(1, x[:, :1].numel())) if x.device.type == "cpu" else max(1, x.shape[1])
    for first in range(0, x.shape[1], step):
        part = slice(first, first + step)
        wide = x[:, part, :, : 2 * half].float()
        turned = torch.empty_like(wide)
        halves = _pair(wide, half, interleaved), _pair(turned, half, interleaved)
        _turn(*halves, cos[:, part], sin[:, part], inverse)
        y[:, part, :, : 2 * half] = turned
    return y


def _pair(x, half, interleaved):
    return (
        (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2])
        if interleaved
        else (x[..., :half], x[..., half : 2 * half])
    )


def _turn(source, target, cos, sin, inverse):
    (x1, x2), (y1, y2) = source, target
    sign = -1 if inverse else 1
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=sign)
