"""The DoRA linear by the fused kernels. Equations: dora.py; the passes have the signatures of dora_torch.py's."""

import torch

from fastpeft import backend
from fastpeft.ops.weights import dense


def row_squares(w: torch.Tensor) -> torch.Tensor:
    """rowsum(w^2) [N] of a dense w, in float32."""
    from fastpeft.kernels import dora as kernels

    return kernels.row_squares(w)


def forward(rows, w, a, b, magnitude, bias, w_sq, eps, scale, seed, threshold):
    """(y, z, s, norm, gain): y and z [M, N] by one epilogue, s [M, padded R], norm and gain [N] in float32."""
    from fastpeft.kernels import dora as kernels
    from fastpeft.kernels.lora import lora_down, lora_epilogue

    precision = backend.matmul_precision(rows.device)
    w_dense = dense(w, rows.dtype)
    w_sq = row_squares(w_dense) if w_sq is None else w_sq
    gram = a.float() @ a.float().t()
    t = kernels.dora_products(w_dense, a, precision=precision)
    norm, gain = kernels.dora_norm(t, b, gram, w_sq, magnitude, scale=scale, eps=eps)
    dropped, rest = rows, None
    if threshold:
        dropped, rest = kernels.split_dropped(rows, seed=seed, threshold=threshold)
    s = lora_down(dropped, a, scale=scale, seed=0, threshold=0, precision=precision)
    y, z = lora_epilogue(dropped, w_dense, s, b, bias, gain=gain, precision=precision)
    if rest is not None:
        y.addmm_(rest, w_dense.t())
    return y, z, s, norm, gain


def backward(dy, rows, s, z, w, a, b, gain, norm, scale, seed, threshold, needs):
    """(dx, da, db, dmagnitude), each None where `needs` = (x, a, b, magnitude) does not ask."""
    from fastpeft.kernels import dora as kernels
    from fastpeft.kernels import lora

    need_x, need_a, need_b, need_m = needs
    precision = backend.matmul_precision(dy.device)
    plain = {"seed": 0, "threshold": 0, "precision": precision}
    dx = da = db = dmagnitude = ds = None
    if need_m:
        dz, dmagnitude = kernels.dora_backward(dy, z, gain, norm)
    else:
        dz = (dy * gain).to(dy.dtype)
    if need_b:
        ds, db = lora.lora_grad_s_b(dz, b, s, scale=scale, threshold=0, precision=precision)
    elif need_x or need_a:
        ds = lora.lora_down(dz, b.t(), scale=scale, **plain)
    if need_x:
        w_dense = dense(w, dy.dtype)
        dx = lora.lora_grad_x(dz, w_dense, ds, a, **plain)
        if threshold:
            dx = kernels.combine_dropped(dy @ w_dense, dx, seed=seed, threshold=threshold)
    if need_a:
        dropped = kernels.drop_rows(rows, seed=seed, threshold=threshold) if threshold else rows
        da = lora.lora_grad_a(dropped, ds, a, **plain)
    return dx, da, db, dmagnitude
