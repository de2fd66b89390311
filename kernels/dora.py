"""DoRA: the rows' norms without forming B A, the gain's backward, and the two halves of a dropped input.

    W' = w + scale * b a,   norm(n) = ||W'(n, :)||,   gain = magnitude / norm       the norm carries no gradient
    z  = x W'^T,            y = gain * z + bias                                      (lora.py computes both)

    norm^2 = w_sq + 2 scale sum_r t b + scale^2 sum_rr' b gram b'                    dora_norm      reads t and b once
    t = w a^T                                                                        dora_products  reads w once
    w_sq(n) = sum_k w(n, k)^2                                                        row_squares    reads w once
    dz = gain * dy,   dmagnitude(n) = sum_m dy z / norm                              dora_backward  reads dy and z once

With dropout the base product of the dropped input counts too, as in Hugging Face PEFT:

    y  = (x - xd) w^T + gain * (xd W'^T) + bias,   xd = keep * x / (1 - p)           split_dropped     reads x once
    dx = u + keep / (1 - p) * (v - u),   u = dy w,   v = dz W'                       combine_dropped   reads u and v once

Shapes:  t [N, R], b [N, R], gram [R, R] = a a^T, w_sq, magnitude, norm, gain [N], w [N, K], a [R, K], dy, z [M, N],
         x, u, v [M, K]. Every M, N, K, R >= 1. Results come back freshly allocated and contiguous
Dtypes:  t, gram, w_sq, norm, gain, dmagnitude float32; b, magnitude, w, x any of float32, float16, bfloat16; dz as dy,
         dx as u, xd as x. t and gram are of a as the forward uses it, cast to x's dtype. Products and sums in float32
Zeros:   norm = max(||W'||, eps): a row of zeros has z = 0, so it gives y = bias and no gradient, and nothing is NaN
Dropout: keep is drawn from `seed` as in dropout.py: the mask that the LoRA kernels draw
Sums:    no atomics: equal inputs give equal bits
Source:  Liu et al. 2024, arXiv:2402.09353, sections 4.1 and 4.3
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile, kept_scale
from fastpeft.kernels.launch import launch, rows_contiguous, target_of
from fastpeft.kernels.lora_group import group_down
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import TileConfig, padded_rank, parts_along

# One pass over memory with no product: 16 bytes per lane and access, and few enough registers for full occupancy.
_SQUARES = TileConfig(block_m=1, block_n=8, block_k=256, block_r=1, num_warps=4, num_stages=1)
_BACKWARD = TileConfig(block_m=8, block_n=256, block_k=1, block_r=1, num_warps=4, num_stages=1)
_ELEMENTWISE = TileConfig(block_m=16, block_n=1, block_k=256, block_r=1, num_warps=4, num_stages=1)
# The products with gram run in float32 on the FMA pipe: small tiles. At R = 128, 64 rows by 32 ranks spill 2 registers on
# sm_120 and 50 on gfx1100, and 4096 rows make only 64 programs; 32 rows take 96 and 229 registers. 16 ranks want 128 rows:
# with 64, 0.65 of the bytes come in 16-byte loads, with 128 it is 0.87.
_NORM_ROWS = {16: 128, 32: 32}  # by the ranks of a chunk


@triton.jit(do_not_specialize=["N"])
def _dora_norm_kernel(
    t_ptr,
    b_ptr,
    gram_ptr,
    w_sq_ptr,
    magnitude_ptr,
    norm_ptr,
    gain_ptr,
    N,
    R,
    stride_tn,
    stride_bn,
    stride_br,
    scale,
    eps,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (cdiv(N, BLOCK_N),)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    rows = offs_n[:, None].to(tl.int64)

    acc = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask = mask_n[:, None] & (offs_r[None, :] < R)
        b = tl.load(b_ptr + rows * stride_bn + offs_r[None, :] * stride_br, mask=mask, other=0.0)
        t = tl.load(t_ptr + rows * stride_tn + offs_r[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_R]
        product = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)  # of b and gram's columns offs_r
        for other_first in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
            offs_q = other_first + tl.arange(0, BLOCK_R)
            mask_q = mask_n[:, None] & (offs_q[None, :] < R)
            left = tl.load(b_ptr + rows * stride_bn + offs_q[None, :] * stride_br, mask=mask_q, other=0.0)
            square = (offs_q[:, None] < R) & (offs_r[None, :] < R)
            gram = tl.load(gram_ptr + offs_q[:, None] * R + offs_r[None, :], mask=square, other=0.0)
            product = tl.dot(left.to(tl.float32), gram, product, input_precision="ieee")
        acc += tl.sum(b.to(tl.float32) * (2.0 * t + scale * product), axis=1)

    w_sq = tl.load(w_sq_ptr + offs_n, mask=mask_n, other=0.0)
    magnitude = tl.load(magnitude_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.maximum(w_sq + scale * acc, 0.0)), eps)  # rounding may make a tiny square negative
    tl.store(norm_ptr + offs_n, norm, mask=mask_n)
    tl.store(gain_ptr + offs_n, tl.div_rn(magnitude, norm), mask=mask_n)


@triton.jit(do_not_specialize=["N"])
def _row_squares_kernel(
    w_ptr,
    out_ptr,
    N,
    K,
    columns_per_part,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(N, BLOCK_N), parts of K); out [parts, N]
    pid_k = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_column = pid_k * columns_per_part
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    rows = tl.where(mask_n, offs_n, 0).to(tl.int64)
    w_ptrs = w_ptr + rows[:, None] * stride_wn + (first_column + offs_k)[None, :].to(tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(first_column, min(K, first_column + columns_per_part), BLOCK_K):
        w = tl.load(w_ptrs, mask=(offs_k < K - k)[None, :], other=0.0).to(tl.float32)
        acc += w * w
        w_ptrs += tl.cast(BLOCK_K, tl.int64) * stride_wk
    tl.store(out_ptr + pid_k.to(tl.int64) * N + offs_n, tl.sum(acc, axis=1), mask=mask_n)


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _dora_backward_kernel(
    dy_ptr,
    z_ptr,
    gain_ptr,
    norm_ptr,
    dz_ptr,
    dmagnitude_ptr,
    M,
    N,
    rows_per_part,
    stride_dym,
    stride_zm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (cdiv(N, BLOCK_N), parts of M); dmagnitude [parts, N]
    pid_m = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gain = tl.load(gain_ptr + offs_n, mask=mask_n, other=0.0)
    norm = tl.load(norm_ptr + offs_n, mask=mask_n, other=1.0)
    first_row = pid_m * rows_per_part
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    dy_ptrs = dy_ptr + rows * stride_dym + offs_n[None, :]
    z_ptrs = z_ptr + rows * stride_zm + offs_n[None, :]
    dz_ptrs = dz_ptr + rows * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        mask = (tl.arange(0, BLOCK_M) < M - row)[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        z = tl.load(z_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += dy * z
        tl.store(dz_ptrs, (dy * gain[None, :]).to(dz_ptr.dtype.element_ty), mask=mask)
        dy_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_dym
        z_ptrs += tl.cast(BLOCK_M, tl.int64) * stride_zm
        dz_ptrs += tl.cast(BLOCK_M, tl.int64) * N
    total = tl.div_rn(tl.sum(acc, axis=0), norm)
    tl.store(dmagnitude_ptr + pid_m.to(tl.int64) * N + offs_n, total, mask=mask_n)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _split_dropped_kernel(
    x_ptr,
    dropped_ptr,
    rest_ptr,
    M,
    K,
    stride_xm,
    kept,
    seed: tl.int64,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WITH_REST: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)); kept = 1 / (1 - p)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_K
    offs_k = first_column + tl.arange(0, BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m[:, None].to(tl.int64)
    x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
    keep = keep_tile(seed, offs_m, first_column, threshold, BLOCK_M, BLOCK_K)
    dropped = tl.where(keep, x.to(tl.float32) * kept, 0.0).to(x.dtype)
    tl.store(dropped_ptr + rows * K + offs_k[None, :], dropped, mask=mask)
    if WITH_REST:  # of the rounded half, so that the two halves' errors cancel in their sum
        rest = (x.to(tl.float32) - dropped.to(tl.float32)).to(x.dtype)
        tl.store(rest_ptr + rows * K + offs_k[None, :], rest, mask=mask)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _combine_dropped_kernel(
    u_ptr,
    v_ptr,
    dx_ptr,
    M,
    K,
    stride_um,
    stride_vm,
    kept,
    seed: tl.int64,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(M, BLOCK_M), cdiv(K, BLOCK_K)); kept = 1 / (1 - p)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1) * BLOCK_K
    offs_k = first_column + tl.arange(0, BLOCK_K)
    mask = (offs_m[:, None] < M) & (offs_k[None, :] < K)
    rows = offs_m[:, None].to(tl.int64)
    u = tl.load(u_ptr + rows * stride_um + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
    v = tl.load(v_ptr + rows * stride_vm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
    keep = keep_tile(seed, offs_m, first_column, threshold, BLOCK_M, BLOCK_K)
    dx = tl.where(keep, u + kept * (v - u), u)
    tl.store(dx_ptr + rows * K + offs_k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def dora_products(w: torch.Tensor, a: torch.Tensor, *, precision: str) -> torch.Tensor:
    """t [N, R] = w a^T in float32, rows PADDED_R apart: one read of w, which must be dense."""
    (t,) = group_down(w, [(a, 1.0, 0, 0)], precision=precision, dtype=torch.float32)
    return t[:, : a.shape[0]]


def dora_norm(
    t: torch.Tensor,
    b: torch.Tensor,
    gram: torch.Tensor,
    w_sq: torch.Tensor,
    magnitude: torch.Tensor,
    *,
    scale: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm [N] = max(||w + scale b a||, eps) and gain [N] = magnitude / norm, float32; all of gram is read per row tile.

    Where w + scale b a nearly cancels, the square keeps eps(float32) * ||w||^2 of error: norms below 3e-4 ||w|| are noise.
    """
    n, r = b.shape
    t = rows_contiguous(t)
    padded_r = padded_rank(r)
    block_r = min(padded_r, max(_NORM_ROWS))
    config = TileConfig(1, _NORM_ROWS[block_r], 1, block_r, num_warps=4, num_stages=1)
    norm, gain = torch.empty_like(w_sq), torch.empty_like(w_sq)
    launch(
        _dora_norm_kernel,
        (triton.cdiv(n, config.block_n),),
        config,
        t,
        b,
        gram.contiguous(),
        w_sq,
        magnitude,
        norm,
        gain,
        n,
        r,
        t.stride(0),
        b.stride(0),
        b.stride(1),
        scale,
        eps,
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
    )
    return norm, gain


def row_squares(w: torch.Tensor) -> torch.Tensor:
    """w_sq [N] = sum_k w(n, k)^2 in float32: one read of w [N, K], which may have any strides."""
    n, k = w.shape
    config = _SQUARES
    tiles_n = triton.cdiv(n, config.block_n)
    parts, columns_per_part = parts_along(k, config.block_k, tiles_n, target_of(w.device))
    out = torch.empty(n, dtype=torch.float32, device=w.device)
    partial = out[None] if parts == 1 else torch.empty(parts, n, dtype=torch.float32, device=w.device)
    launch(
        _row_squares_kernel,
        (tiles_n, parts),
        config,
        w,
        partial,
        n,
        k,
        columns_per_part,
        w.stride(0),
        w.stride(1),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    if parts > 1:
        sum_parts(partial[:, None], out[None])
    return out


def dora_backward(
    dy: torch.Tensor, z: torch.Tensor, gain: torch.Tensor, norm: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz [M, N] = gain * dy in dy's dtype, and dmagnitude [N] = sum_m dy z / norm in float32: one pass over dy and z."""
    dy, z = rows_contiguous(dy), rows_contiguous(z)
    m, n = dy.shape
    config = _BACKWARD
    tiles_n = triton.cdiv(n, config.block_n)
    # A tile is 4 KiB of each tensor: eight programs per processor, not two, have enough of them in flight.
    target = target_of(dy.device)
    parts, rows_per_part = parts_along(m, config.block_m, tiles_n, target._replace(processors=4 * target.processors))
    dz = torch.empty(m, n, dtype=dy.dtype, device=dy.device)
    dmagnitude = torch.empty(n, dtype=torch.float32, device=dy.device)
    partial = dmagnitude[None] if parts == 1 else torch.empty(parts, n, dtype=torch.float32, device=dy.device)
    launch(
        _dora_backward_kernel,
        (tiles_n, parts),
        config,
        dy,
        z,
        gain,
        norm,
        dz,
        partial,
        m,
        n,
        rows_per_part,
        dy.stride(0),
        z.stride(0),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    if parts > 1:
        sum_parts(partial[:, None], dmagnitude[None])
    return dz, dmagnitude


def drop_rows(x: torch.Tensor, *, seed: int, threshold: int) -> torch.Tensor:
    """xd [M, K] = keep * x / (1 - p), p = threshold / 65536, scaled, in x's dtype."""
    return _split(x, seed, threshold, with_rest=False)[0]


def split_dropped(x: torch.Tensor, *, seed: int, threshold: int) -> tuple[torch.Tensor, torch.Tensor]:
    """xd [M, K] = keep * x / (1 - p) and x - xd, in x's dtype: one read of x. Their sum is x but for one rounding."""
    return _split(x, seed, threshold, with_rest=True)


def _split(x, seed, threshold, *, with_rest):
    x = rows_contiguous(x)
    m, k = x.shape
    config = _ELEMENTWISE
    dropped = torch.empty(m, k, dtype=x.dtype, device=x.device)
    rest = torch.empty_like(dropped) if with_rest else None
    launch(
        _split_dropped_kernel,
        (triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k)),
        config,
        x,
        dropped,
        rest,
        m,
        k,
        x.stride(0),
        kept_scale(1.0, threshold),
        seed,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        WITH_REST=with_rest,
    )
    return dropped, rest


def combine_dropped(u: torch.Tensor, v: torch.Tensor, *, seed: int, threshold: int) -> torch.Tensor:
    """dx [M, K] = u where an element was dropped, u + (v - u) / (1 - p) where it was kept, in u's dtype."""
    u, v = rows_contiguous(u), rows_contiguous(v)
    m, k = u.shape
    config = _ELEMENTWISE
    dx = torch.empty(m, k, dtype=u.dtype, device=u.device)
    launch(
        _combine_dropped_kernel,
        (triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k)),
        config,
        u,
        v,
        dx,
        m,
        k,
        u.stride(0),
        v.stride(0),
        kept_scale(1.0, threshold),
        seed,
        threshold,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
    )
    return dx
