"""The gradients of LoRA's two small matrices, and dS on the way: each large tensor is read once.

    ds = c * dy b,   db = dy^T s               lora_grad_s_b  one pass over dy
    da = ds^T (keep * x)                       lora_grad_a    one pass over x

Shapes, strides, dtypes and precision as in lora.py. Rows are split over programs; partial sums in float32 are added by
`sum_parts` in a fixed order.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile, kept_scale
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import choose, padded_rank, parts_along


@triton.jit(do_not_specialize=["M", "rows_per_part"])
def _lora_grad_s_b_kernel(
    dy_ptr,
    b_ptr,
    s_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    rows_per_part,
    stride_dym,
    stride_bn,
    stride_br,
    stride_dbp,
    stride_dbr,
    stride_dbn,
    scale,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(N, BLOCK_N), cdiv(M, rows_per_part), PADDED_R // BLOCK_R); rows_per_part % BLOCK_M == 0
    # ds [cdiv(N, BLOCK_N), M, PADDED_R]; db(part, r, n) by strides, r < R
    pid_n = tl.program_id(0)
    pid_m = tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    b_offsets = offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br
    b = tl.load(b_ptr + b_offsets, mask=mask_n[:, None] & mask_r[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    b = b.to(dy_ptr.dtype.element_ty)

    # db^T = s^T dy, not dy^T s: with dy^T as the left operand sm_80 stages it through registers instead of cp.async.
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    first_row = pid_m * rows_per_part
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    dy_ptrs = dy_ptr + rows * stride_dym + offs_n[None, :]
    s_ptrs = s_ptr + rows * PADDED_R + offs_r[None, :]
    ds_ptrs = ds_ptr + (pid_n.to(tl.int64) * M + rows) * PADDED_R + offs_r[None, :]
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        mask_m = (tl.arange(0, BLOCK_M) < M - row)[:, None]
        mask = mask_m if EVEN_N else mask_m & mask_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_N]
        s = tl.load(s_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_R]
        ds = tl.dot(dy, b, input_precision=PRECISION) * scale
        db = tl.dot(s.T, dy, db, input_precision=PRECISION)
        tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask_m)
        dy_ptrs += BLOCK_M * stride_dym
        s_ptrs += BLOCK_M * PADDED_R
        ds_ptrs += BLOCK_M * PADDED_R

    db_offsets = (
        pid_m.to(tl.int64) * stride_dbp
        + offs_r[:, None].to(tl.int64) * stride_dbr
        + offs_n[None, :].to(tl.int64) * stride_dbn
    )
    tl.store(db_ptr + db_offsets, db.to(db_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_part", "seed", "threshold"])
def _lora_grad_a_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    M,
    K,
    R,
    rows_per_part,
    stride_xm,
    seed: tl.int64,
    threshold,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(K, BLOCK_K), cdiv(M, rows_per_part), PADDED_R // BLOCK_R); rows_per_part % BLOCK_M == 0; da [parts, R, K]
    first_column = tl.program_id(0) * BLOCK_K
    pid_m = tl.program_id(1)
    offs_k = first_column + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k[None, :] < K

    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first_row = pid_m * rows_per_part
    rows = (first_row + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    x_ptrs = x_ptr + rows * stride_xm + offs_k[None, :]
    ds_ptrs = ds_ptr + rows * PADDED_R + offs_r[None, :]
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        mask = mask_m if EVEN_K else mask_m & mask_k
        x = tl.load(x_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        ds = tl.load(ds_ptrs, mask=mask_m, other=0.0)  # [BLOCK_M, BLOCK_R]
        if DROPOUT:
            x = tl.where(keep_tile(seed, offs_m, first_column, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        acc = tl.dot(ds.T, x, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_M * stride_xm
        ds_ptrs += BLOCK_M * PADDED_R

    da_rows = pid_m.to(tl.int64) * R + offs_r[:, None]
    mask = (offs_r[:, None] < R) & mask_k
    tl.store(da_ptr + da_rows * K + offs_k[None, :], acc.to(da_ptr.dtype.element_ty), mask=mask)


def lora_grad_s_b(
    dy: torch.Tensor, b: torch.Tensor, s: torch.Tensor, *, scale: float, threshold: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """ds [M, RP] = c * dy b in dy's dtype, and db [N, R] = dy^T s in b's dtype (s carries c already)."""
    dy = rows_contiguous(dy)
    m, n = dy.shape
    r, padded_r = b.shape[1], padded_rank(b.shape[1])
    target = target_of(dy.device)
    config = choose("grad_s_b", target, M=m, N=n, R=r, dtype=dy.dtype)
    tiles_n, tiles_r = triton.cdiv(n, config.block_n), triton.cdiv(padded_r, config.block_r)
    parts, rows_per_part = parts_along(m, config.block_m, tiles_n * tiles_r, target)
    ds = torch.empty(m, padded_r, dtype=dy.dtype, device=dy.device)
    db = torch.empty(n, r, dtype=b.dtype, device=dy.device)
    ds_parts = ds[None] if tiles_n == 1 else torch.empty(tiles_n, m, padded_r, dtype=torch.float32, device=dy.device)
    db_parts = db.t()[None] if parts == 1 else torch.empty(parts, r, n, dtype=torch.float32, device=dy.device)
    launch(
        _lora_grad_s_b_kernel,
        (tiles_n, parts, tiles_r),
        config,
        dy,
        b,
        s,
        ds_parts,
        db_parts,
        m,
        n,
        r,
        rows_per_part,
        dy.stride(0),
        b.stride(0),
        b.stride(1),
        db_parts.stride(0),
        db_parts.stride(1),
        db_parts.stride(2),
        kept_scale(scale, threshold),
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        EVEN_N=n % config.block_n == 0,
        PRECISION=dot_precision(precision, dy.dtype, target),
    )
    if tiles_n > 1:
        sum_parts(ds_parts, ds)
    if parts > 1:
        sum_parts(db_parts, db.t())
    return ds, db


def lora_grad_a(
    x: torch.Tensor, ds: torch.Tensor, a: torch.Tensor, *, seed: int, threshold: int, precision: str
) -> torch.Tensor:
    """da [R, K] = ds^T (keep * x), in a's dtype; of a itself only the shape and dtype are used."""
    x = rows_contiguous(x)
    m, k = x.shape
    r, padded_r = a.shape[0], padded_rank(a.shape[0])
    target = target_of(x.device)
    config = choose("grad_a_dropout" if threshold else "grad_a", target, M=m, N=k, R=r, dtype=x.dtype)
    tiles_k, tiles_r = triton.cdiv(k, config.block_k), triton.cdiv(padded_r, config.block_r)
    parts, rows_per_part = parts_along(m, config.block_m, tiles_k * tiles_r, target)
    da = torch.empty(r, k, dtype=a.dtype, device=x.device)
    da_parts = da[None] if parts == 1 else torch.empty(parts, r, k, dtype=torch.float32, device=x.device)
    launch(
        _lora_grad_a_kernel,
        (tiles_k, parts, tiles_r),
        config,
        x,
        ds,
        da_parts,
        m,
        k,
        r,
        rows_per_part,
        x.stride(0),
        seed,
        threshold,
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        DROPOUT=threshold > 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if parts > 1:
        sum_parts(da_parts, da)
    return da
