"""The norms of norm.py for rows that no tile holds: a program loops over the columns of one row. Equations: norm.py.

Traffic: forward reads x (and residual) twice, the second time what the row's first pass left in cache; backward reads h and
         dy twice. dw and dbias are sums over rows by tiles of columns, and read h and dy once more
Sums:    mean and variance in one pass, blocks merged as Chan et al. 1983 do, so that a large mean cancels nothing
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch, target_of
from fastpeft.kernels.tiling import TileConfig, parts_along

_ROW = TileConfig(block_m=1, block_n=1, block_k=4096, block_r=1, num_warps=8, num_stages=1)
_COLUMNS = TileConfig(block_m=8, block_n=1, block_k=256, block_r=1, num_warps=4, num_stages=1)


@triton.jit
def _norm_wide_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    K,
    stride_xm,
    stride_rm,
    eps,
    offset,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (M,)
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    x_row, residual_row, out = x_ptr + row * stride_xm, residual_ptr, row * K
    if HAS_RESIDUAL:
        residual_row += row * stride_rm
    mean, squares = 0.0, 0.0  # squares: of the distances from mean, if centred
    for k in range(0, K, BLOCK_K):
        mask = offs_k < K - k
        x = tl.load(x_row + k + offs_k, mask=mask, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_row + k + offs_k, mask=mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + out + k + offs_k, x, mask=mask)
        h = x.to(tl.float32)
        if CENTRED:
            count = tl.minimum(K - k, BLOCK_K).to(tl.float32)
            block_mean = tl.sum(h, axis=0) / count
            h = tl.where(mask, h - block_mean, 0.0)
            share = count / (k + count)
            delta = block_mean - mean
            mean += delta * share
            squares += delta * delta * k * share
        squares += tl.sum(h * h, axis=0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))
    tl.store(rstd_ptr + row, rstd)
    if CENTRED:
        tl.store(mean_ptr + row, mean)
    for k in range(0, K, BLOCK_K):
        mask = offs_k < K - k
        x = tl.load(x_row + k + offs_k, mask=mask, other=0.0)
        if HAS_RESIDUAL:  # again, since another lane may have stored what this one would load
            residual = tl.load(residual_row + k + offs_k, mask=mask, other=0.0)
            x = (x.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        y = (x.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(w_ptr + k + offs_k, mask=mask, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            y += tl.load(bias_ptr + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + out + k + offs_k, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_wide_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    K,
    stride_dym,
    stride_dhm,
    stride_hm,
    offset,
    CENTRED: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (M,)
    row = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    dy_row, h_row = dy_ptr + row * stride_dym, h_ptr + row * stride_hm
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRED:
        mean = tl.load(mean_ptr + row)
    along, total = 0.0, 0.0  # sums of g * hat and of g
    for k in range(0, K, BLOCK_K):
        mask = offs_k < K - k
        g = tl.load(dy_row + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(w_ptr + k + offs_k, mask=mask, other=0.0).to(tl.float32) + offset
        h = tl.load(h_row + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        along += tl.sum(g * ((h - mean) * rstd), axis=0)
        if CENTRED:
            total += tl.sum(g, axis=0)
    along, total = along / K, total / K
    for k in range(0, K, BLOCK_K):
        mask = offs_k < K - k
        g = tl.load(dy_row + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(w_ptr + k + offs_k, mask=mask, other=0.0).to(tl.float32) + offset
        h = tl.load(h_row + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        d = (g - (h - mean) * rstd * along - total) * rstd
        if HAS_DH:
            d += tl.load(dh_ptr + row * stride_dhm + k + offs_k, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * K + k + offs_k, d.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _norm_column_sums_kernel(
    dy_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    dw_ptr,
    dbias_ptr,
    M,
    K,
    rows_per_part,
    stride_dym,
    stride_hm,
    CENTRED: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(K, BLOCK_K), parts of M); dw, dbias [parts, K]
    part = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    dw = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first_row = part * rows_per_part
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_k[None, :]
        rows = offs_m[:, None].to(tl.int64)
        dy = tl.load(dy_ptr + rows * stride_dym + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_BIAS:
            dbias += dy
        if NEED_W:
            h = tl.load(h_ptr + rows * stride_hm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                h -= tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
            dw += dy * (h * tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None])
    out = part.to(tl.int64) * K + offs_k
    if NEED_W:
        tl.store(dw_ptr + out, tl.sum(dw, axis=0), mask=mask_k)
    if NEED_BIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, axis=0), mask=mask_k)


def wide_forward(x, residual, w, bias, y, h, mean, rstd, *, eps: float, offset: float) -> None:
    """Write y, h, mean and rstd, which norm.py has just allocated; all contiguous along K."""
    m, k = x.shape
    launch(
        _norm_wide_kernel,
        (m,),
        _ROW,
        x,
        residual,
        w,
        bias,
        y,
        h,
        mean,
        rstd,
        k,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        CENTRED=mean is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=w is not None,
        HAS_BIAS=bias is not None,
        BLOCK_K=_ROW.block_k,
    )


def wide_backward(
    dy, dh, h, w, mean, rstd, dx, *, offset: float, need_w: bool, need_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Write dx, unless it is None; (dw, dbias) [parts, K] in float32, None where not needed."""
    m, k = h.shape
    if dx is not None:
        launch(
            _norm_wide_backward_kernel,
            (m,),
            _ROW,
            dy,
            dh,
            h,
            w,
            mean,
            rstd,
            dx,
            k,
            dy.stride(0),
            0 if dh is None else dh.stride(0),
            h.stride(0),
            offset,
            CENTRED=mean is not None,
            HAS_DH=dh is not None,
            HAS_WEIGHT=w is not None,
            BLOCK_K=_ROW.block_k,
        )
    if not (need_w or need_bias):
        return None, None
    tiles = triton.cdiv(k, _COLUMNS.block_k)
    parts, rows_per_part = parts_along(m, _COLUMNS.block_m, tiles, target_of(h.device))
    dw, dbias = (
        torch.empty(parts, k, dtype=torch.float32, device=h.device) if need else None for need in (need_w, need_bias)
    )
    launch(
        _norm_column_sums_kernel,
        (tiles, parts),
        _COLUMNS,
        dy,
        h,
        mean,
        rstd,
        dw,
        dbias,
        m,
        k,
        rows_per_part,
        dy.stride(0),
        h.stride(0),
        CENTRED=mean is not None,
        NEED_W=need_w,
        NEED_BIAS=need_bias,
        BLOCK_M=_COLUMNS.block_m,
        BLOCK_K=_COLUMNS.block_k,
    )
    return dw, dbias
