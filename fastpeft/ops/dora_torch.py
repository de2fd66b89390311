"""The DoRA linear by library calls: what a CPU runs, and any device on request. Equations and what is kept: dora.py.

A factor per row of w costs less than one per row of y where K < M, and is taken there; of 16 bits it would not survive the
rounding of w, so there gain * dy is made, by chunks of rows that stay in the cache while they are float32.
"""

import torch
import torch.nn.functional as F

from fastpeft.ops.dropout import LEVELS, keep_mask
from fastpeft.ops.weights import FrozenWeight, dense

_CHUNK = 2**17  # elements that are converted to float32 at once: what a core's cache holds beside their sources


def forward(rows, w, a, b, magnitude, bias, w_sq, eps, scale, seed, threshold):
    """(y [M, N], z [M, N], s [M, R], norm [N], gain [N]) of x [M, K]."""
    dtype = rows.dtype
    w_sq = row_squares(w) if w_sq is None else w_sq
    w = dense(w, dtype)
    norm = row_norm(w, a, b, scale, w_sq).clamp_min_(eps)
    gain = magnitude.to(norm.dtype) / norm
    dropped = _factors(rows, seed, threshold).mul_(rows) if threshold else rows
    z = F.linear(dropped, w)
    s = F.linear(dropped, a.to(dtype))
    z.addmm_(s, b.to(dtype).t(), alpha=scale)
    rest = F.linear(torch.sub(rows, dropped, out=dropped), w) if threshold else None
    return _scaled(z, gain, bias, rest), z, s, norm, gain


def backward(dy, rows, s, z, w, a, b, gain, norm, scale, seed, threshold, needs):
    """(dx, da, db, dmagnitude), each None where `needs` = (x, a, b, magnitude) does not ask."""
    need_x, need_a, need_b, need_m = needs
    dtype = dy.dtype
    dx = da = db = factors = None
    dmagnitude = _sum_of_products(dy, z) / norm if need_m else None
    if threshold and (need_x or need_a):
        like = dy.new_empty(dy.shape[0], a.shape[1]) if rows is None else rows
        factors = _factors(like, seed, threshold)
    on_w = dtype.itemsize >= 4 and w.shape[1] < dy.shape[0]
    dz = dy if on_w else _scaled(dy, gain)
    if need_x or need_a:
        ds = (dz @ ((b.to(gain.dtype) * gain[:, None]) if on_w else b).to(dtype)).mul_(scale)
    if need_x:
        w = dense(w, dtype)
        plain = dy @ w if threshold else None
        dx = dz @ (w * gain.to(dtype)[:, None] if on_w else w)
        dx.addmm_(ds, a.to(dtype))
        if threshold:
            dx = plain.addcmul_(dx.sub_(plain), factors)
    if need_a:
        da = (ds.t() @ (factors.mul_(rows) if threshold else rows)).to(a.dtype)
    if need_b:
        db = torch.empty_like(b).copy_((s.t() @ dz).t()).mul_(scale)
        if on_w:
            db.mul_(gain[:, None])
    return dx, da, db, dmagnitude


def _factors(like, seed, threshold):
    """keep / (1 - p), fresh."""
    return keep_mask(seed=seed, like=like, threshold=threshold).div_(1.0 - threshold / LEVELS)


def _chunks(rows: torch.Tensor) -> int:
    return max(1, _CHUNK // max(rows.shape[1], 1))


def _scaled(z, gain, bias=None, rest=None):
    """gain * z (+ bias) (+ rest) in z's dtype, computed in gain's: by chunks of rows that stay in the cache if that is wider."""
    if z.dtype == gain.dtype:
        y = z * gain if bias is None else torch.addcmul(bias.to(z.dtype), z, gain)
        return y if rest is None else y.add_(rest)
    y, step = torch.empty_like(z), _chunks(z)
    for part, out, i in zip(z.split(step), y.split(step), range(0, z.shape[0], step)):
        wide = part.to(gain.dtype).mul_(gain)
        if bias is not None:
            wide.add_(bias)
        if rest is not None:
            wide.add_(rest[i : i + step])
        out.copy_(wide)
    return y


def _sum_of_products(dy, z):
    """sum over rows of dy * z [N], in float32 or wider, by chunks of rows: nothing of their size is made."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    total = torch.zeros(dy.shape[1], dtype=wide, device=dy.device)
    for one, two in zip(dy.split(_chunks(dy)), z.split(_chunks(z))):
        total += (one.to(wide) * two.to(wide)).sum(0)
    return total


def row_squares(w: FrozenWeight) -> torch.Tensor:
    """w_sq [N] = rowsum(w^2) of a frozen weight, in float32 or wider: a constant of the layer, for `dora_linear`."""
    if isinstance(w, torch.Tensor):
        wide = torch.promote_types(w.dtype, torch.float32)
    else:
        w, wide = dense(w, torch.float32), torch.float32
    return torch.cat([part.to(wide).square().sum(1) for part in w.split(_chunks(w))])


def row_norm(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, w_sq: torch.Tensor) -> torch.Tensor:
    """||w + scale b a||_row [N] without forming b a, in w_sq's dtype. w is dense.

    w a^T is taken in w's dtype: of a 16-bit w it is rounded, a part in 2^9 of the cross term, which is small beside w_sq.
    """
    with torch.no_grad():
        cross = (w @ a.to(w.dtype).t()).to(w_sq.dtype).mul_(2.0 * scale)
        a, b = a.to(w_sq.dtype), b.to(w_sq.dtype)
        cross += (b @ (a @ a.t())).mul_(scale * scale)
        return (w_sq + (cross * b).sum(1)).clamp_min_(0).sqrt_()
