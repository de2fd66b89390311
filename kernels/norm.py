"""RMSNorm and LayerNorm with a residual added on the way, rows that fit into one tile; norm_wide.py has longer ones.

    h = x + residual, rounded to x's dtype;  h = x without one
    hat = (h - mean(h)) * rstd,  rstd = 1 / sqrt(var(h) + eps)                            LayerNorm ("centred")
    hat = h * rstd,              rstd = 1 / sqrt(mean(h^2) + eps)                         RMSNorm
    y = hat * (w + offset) + bias

    g = dy * (w + offset),   dh' = rstd * (g - hat * mean(g * hat) - mean(g) if centred) + dh
    dw = sum over rows of dy * hat,   dbias = sum over rows of dy

Shapes:  x, residual [M, K], rows of any stride; w, bias [K] or None -> y, h [M, K], mean, rstd [M], fresh and contiguous;
         dy, dh [M, K] or None -> dh' [M, K], dw, dbias [K]. M, K >= 1
Dtypes:  x, residual, h, dh' alike, y and dy alike, w, bias: each any of float32, float16, bfloat16; mean, rstd, sums float32
Traffic: forward reads x (and residual) once, writes y (and h) once; backward reads h, dy (and dh) once, writes dh' once.
         dw and dbias add one float32 row per part of M, written and read once
Sums:    no atomics: a program adds its rows in order, partial_sums.py the parts; equal inputs give equal bits
Source:  Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch, rows_contiguous, target_of
from fastpeft.kernels.norm_wide import wide_backward, wide_forward
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import PROGRAMS_PER_PROCESSOR, Target, TileConfig

# The longest row that one tile holds. Backward keeps h, dy, w and dw at once: 16 elements of each per lane at 8192.
_WIDEST = 16384
_WIDEST_BACKWARD = 8192
_TILE_ELEMENTS = 2048  # short rows share a program: two accesses of 16 bytes per lane of 4 warps


@triton.jit
def _scale(w_ptr, offs_k, mask_k, offset, HAS_WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr):
    """w + offset [BLOCK_K] in float32; ones without a weight."""
    if HAS_WEIGHT:
        return tl.load(w_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32) + offset
    else:
        return tl.full((BLOCK_K,), 1.0, tl.float32)


@triton.jit(do_not_specialize=["M"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    K,
    stride_xm,
    stride_rm,
    eps,
    offset,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M),)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    mask = mask_m[:, None] & mask_k[None, :]
    rows = offs_m[:, None].to(tl.int64)
    x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_rm + offs_k[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows * K + offs_k[None, :], x, mask=mask)
    h = x.to(tl.float32)
    if CENTRED:
        mean = tl.sum(h, axis=1) / K
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        h = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1) / K + eps))
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    y = h * rstd[:, None] * _scale(w_ptr, offs_k, mask_k, offset, HAS_WEIGHT, BLOCK_K)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows * K + offs_k[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    w_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dw_ptr,
    dbias_ptr,
    M,
    K,
    rows_per_part,
    stride_dym,
    stride_dhm,
    stride_hm,
    offset,
    CENTRED: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (parts of M,); dw, dbias [parts, K]
    part = tl.program_id(0)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    scale = _scale(w_ptr, offs_k, mask_k, offset, HAS_WEIGHT, BLOCK_K)[None, :]
    dw = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    first_row = part * rows_per_part
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_k[None, :]
        rows = offs_m[:, None].to(tl.int64)
        dy = tl.load(dy_ptr + rows * stride_dym + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + rows * stride_hm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        if CENTRED:
            h -= tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        hat = h * rstd  # [BLOCK_M, BLOCK_K]; not zero past K, where dy is
        if NEED_W:
            dw += dy * hat
        if NEED_BIAS:
            dbias += dy
        if NEED_X:
            g = dy * scale
            d = g - hat * (tl.sum(g * hat, axis=1) / K)[:, None]
            if CENTRED:
                d -= (tl.sum(g, axis=1) / K)[:, None]
            d *= rstd
            if HAS_DH:
                d += tl.load(dh_ptr + rows * stride_dhm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + rows * K + offs_k[None, :], d.to(dx_ptr.dtype.element_ty), mask=mask)
    out = part.to(tl.int64) * K + offs_k
    if NEED_W:
        tl.store(dw_ptr + out, tl.sum(dw, axis=0), mask=mask_k)
    if NEED_BIAS:
        tl.store(dbias_ptr + out, tl.sum(dbias, axis=0), mask=mask_k)


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    w: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    offset: float,
    centred: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """(y in `dtype`, h or None without a residual, mean or None unless centred, rstd) as the module's docstring says."""
    m, k = x.shape
    x, residual = rows_contiguous(x), None if residual is None else rows_contiguous(residual)
    w, bias = None if w is None else w.contiguous(), None if bias is None else bias.contiguous()
    y = torch.empty(m, k, dtype=dtype, device=x.device)
    h = None if residual is None else torch.empty(m, k, dtype=x.dtype, device=x.device)
    rstd = torch.empty(m, dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centred else None
    if m == 0:
        return y, h, mean, rstd
    if k > _WIDEST:
        wide_forward(x, residual, w, bias, y, h, mean, rstd, eps=eps, offset=offset)
        return y, h, mean, rstd
    config = _tile(k, target_of(x.device))
    launch(
        _norm_kernel,
        (triton.cdiv(m, config.block_m),),
        config,
        x,
        residual,
        w,
        bias,
        y,
        h,
        mean,
        rstd,
        m,
        k,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        offset,
        CENTRED=centred,
        HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=w is not None,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
    )
    return y, h, mean, rstd


def norm_backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    w: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    *,
    offset: float,
    bias_dtype: torch.dtype | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dh', dw, dbias), each None where `needs` = (x, w, bias) does not ask; dw in w's dtype, dbias in `bias_dtype`."""
    need_x, need_w, need_bias = needs
    m, k = h.shape
    dy, h, dh = rows_contiguous(dy), rows_contiguous(h), None if dh is None else rows_contiguous(dh)
    w = None if w is None else w.contiguous()
    dx = torch.empty(m, k, dtype=h.dtype, device=h.device) if need_x else None
    out_dtypes = w.dtype if need_w else None, bias_dtype if need_bias else None
    if m == 0:
        sums = [None if dtype is None else torch.zeros(k, dtype=dtype, device=h.device) for dtype in out_dtypes]
        return dx, *sums
    if k > _WIDEST_BACKWARD:
        dw, dbias = wide_backward(dy, dh, h, w, mean, rstd, dx, offset=offset, need_w=need_w, need_bias=need_bias)
    else:
        config = _tile(k, target_of(h.device))
        parts, rows_per_part = _parts(m, config.block_m, need_w or need_bias, target_of(h.device))
        dw, dbias = (
            torch.empty(parts, k, dtype=torch.float32, device=h.device) if need else None
            for need in (need_w, need_bias)
        )
        launch(
            _norm_backward_kernel,
            (parts,),
            config,
            dy,
            dh,
            h,
            w,
            mean,
            rstd,
            dx,
            dw,
            dbias,
            m,
            k,
            rows_per_part,
            dy.stride(0),
            0 if dh is None else dh.stride(0),
            h.stride(0),
            offset,
            CENTRED=mean is not None,
            HAS_DH=dh is not None,
            HAS_WEIGHT=w is not None,
            NEED_X=need_x,
            NEED_W=need_w,
            NEED_BIAS=need_bias,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
        )
    return dx, *[_summed(parts, dtype) for parts, dtype in zip((dw, dbias), out_dtypes)]


def _summed(parts: torch.Tensor | None, dtype: torch.dtype | None) -> torch.Tensor | None:
    if parts is None:
        return None
    out = torch.empty(parts.shape[1], dtype=dtype, device=parts.device)
    sum_parts(parts.unsqueeze(1), out.unsqueeze(0))
    return out


def _parts(m: int, block_m: int, summing: bool, target: Target) -> tuple[int, int]:
    """Programs, and rows of each: a tile each, or where rows are summed as many as keep the processors busy."""
    tiles = triton.cdiv(m, block_m)
    if not summing:
        return tiles, block_m
    each = triton.cdiv(tiles, PROGRAMS_PER_PROCESSOR * target.processors)
    return triton.cdiv(tiles, each), each * block_m


def _tile(k: int, target: Target) -> TileConfig:
    """Whole rows; 16 elements per lane, 32 in the widest."""
    block_k = triton.next_power_of_2(k)
    block_m = max(1, _TILE_ELEMENTS // block_k)
    lanes = 64 if target.arch.startswith("gfx9") else 32
    num_warps = min(512 // lanes, max(1, block_m * block_k // (16 * lanes)))
    return TileConfig(block_m=block_m, block_n=1, block_k=block_k, block_r=1, num_warps=num_warps, num_stages=1)
