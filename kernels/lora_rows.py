"""A batch whose rows belong to different adapters: one launch per pass, whatever the number of adapters.

    s  = scales(l) * x a_l^T                for the rows m of adapter l            rows_down
    y += s b_l^T                            in place                               rows_up_add_
    ds = scales(l) * dy b_l                                                        rows_grad_s
    da_l = sum over the rows of l of ds^T x,   db_l = sum of dy^T s                rows_grad_a, rows_grad_b

Rows of the base (adapter -1) have s = ds = 0, are not touched by rows_up_add_, and add to no gradient; an adapter without
rows has zero gradients. dx = dy w + (ds a_l) is `rows_up_add_(dx, ds, a.transpose(1, 2), plan)`.

A `RowPlan` sorts the rows by adapter and cuts them into tiles of one adapter each. It is made once per batch from host
integers, without waiting for the device, and serves all layers. The tensors themselves stay in their order: kernels look
rows up in `order`, so the rows of an adapter need not be neighbours.

Shapes:  x [M, K], y, dy [M, N], a [L, RP, K], b [L, N, RP], scales [L], s, ds [M, RP]. RP is a power of two >= 16; an
         adapter of a smaller rank has zeros in its last rows of a and columns of b. Every M, N, K, L >= 1
Strides: any for a and b. x, y and dy may have any row stride; x and dy are copied if their last axis is not contiguous,
         y's must be
Dtypes:  x, y, dy, s alike: float32, float16, bfloat16; a, b in any of these: cast to x's dtype on load; scales float32
Sums:    in float32; no atomics: equal inputs give equal bits

`precision` as in lora.py. No dropout: the rows of a training batch share one adapter (lora.py).
Source:  Chen et al. 2023, Punica, arXiv:2310.18547; the same GEMM by segments
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_rows_plan import BASE, RowPlan, plan_rows
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import Target, TileConfig, family_of, parts_along

__all__ = ["BASE", "RowPlan", "plan_rows", "rows_down", "rows_grad_a", "rows_grad_b", "rows_grad_s", "rows_up_add_"]


@triton.jit(do_not_specialize=["M"])
def _rows_down_kernel(
    x_ptr,
    a_ptr,
    scales_ptr,
    s_ptr,
    order_ptr,
    tile_adapter_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    M,
    K,
    stride_xm,
    stride_al,
    stride_ar,
    stride_ak,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (tiles, parts of K, PADDED_R // BLOCK_R); s [parts, M, PADDED_R]
    tile = tl.program_id(0)
    pid_k = tl.program_id(1)
    adapter = tl.load(tile_adapter_ptr + tile)
    offs = tl.arange(0, BLOCK_M)
    valid = offs < tl.load(tile_rows_ptr + tile)
    rows = tl.load(order_ptr + tl.load(tile_first_ptr + tile) + offs, mask=valid, other=0).to(tl.int64)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    safe = tl.maximum(adapter, 0).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]  # lanes without a row read row 0 and are not stored
    a_ptrs = a_ptr + safe * stride_al + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :] * stride_ak

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    all_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(all_steps, tl.num_programs(1))
    last = tl.where(adapter < 0, 0, min((pid_k + 1) * steps, all_steps))  # the base's rows are written as zeros
    for step in range(pid_k * steps, last):
        k = step * BLOCK_K
        a_offset = tl.cast(k, tl.int64) * stride_ak
        if EVEN_K:
            x = tl.load(x_ptrs + k)  # [BLOCK_M, BLOCK_K]
            a = tl.load(a_ptrs + a_offset)  # [BLOCK_R, BLOCK_K]
        else:
            mask_k = offs_k[None, :] < K - k
            x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
            a = tl.load(a_ptrs + a_offset, mask=mask_k, other=0.0)
        acc = tl.dot(x, a.to(x.dtype).T, acc, input_precision=PRECISION)
    s = acc * tl.load(scales_ptr + safe)
    s_ptrs = s_ptr + (pid_k.to(tl.int64) * M + rows[:, None]) * PADDED_R + offs_r[None, :]
    tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _rows_up_add_kernel(
    y_ptr,
    s_ptr,
    b_ptr,
    order_ptr,
    tile_adapter_ptr,
    tile_first_ptr,
    tile_rows_ptr,
    N,
    stride_ym,
    stride_bl,
    stride_bn,
    stride_br,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (tiles of adapters, cdiv(N, BLOCK_N))
    tile = tl.program_id(0)
    adapter = tl.load(tile_adapter_ptr + tile).to(tl.int64)
    offs = tl.arange(0, BLOCK_M)
    valid = offs < tl.load(tile_rows_ptr + tile)
    rows = tl.load(order_ptr + tl.load(tile_first_ptr + tile) + offs, mask=valid, other=0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        offs_r = first_rank + tl.arange(0, BLOCK_R)
        s = tl.load(s_ptr + rows[:, None] * PADDED_R + offs_r[None, :])  # [BLOCK_M, BLOCK_R]
        b_offsets = offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
        b = tl.load(b_ptr + adapter * stride_bl + b_offsets, mask=mask_n, other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = tl.dot(s, b.to(s.dtype), acc, input_precision=PRECISION)
    y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    mask = valid[:, None] & mask_n
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rows_grad_kernel(
    x_ptr,
    ds_ptr,
    da_ptr,
    order_ptr,
    chunk_first_ptr,
    chunk_rows_ptr,
    K,
    stride_xm,
    stride_dac,
    stride_dar,
    stride_dak,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(K, BLOCK_K), chunks, PADDED_R // BLOCK_R); da(chunk, r, k) by strides
    chunk = tl.program_id(1)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_k = offs_k[None, :] < K
    count = tl.load(chunk_rows_ptr + chunk)
    order_ptrs = order_ptr + tl.load(chunk_first_ptr + chunk) + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for row in range(0, count, BLOCK_M):
        valid = tl.arange(0, BLOCK_M) < count - row
        rows = tl.load(order_ptrs + row, mask=valid, other=0).to(tl.int64)[:, None]
        mask = valid[:, None] if EVEN_K else valid[:, None] & mask_k
        x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        ds = tl.load(ds_ptr + rows * PADDED_R + offs_r[None, :], mask=valid[:, None], other=0.0)  # [BLOCK_M, BLOCK_R]
        acc = tl.dot(ds.T, x, acc, input_precision=PRECISION)
    offsets = chunk.to(tl.int64) * stride_dac + offs_r[:, None].to(tl.int64) * stride_dar
    da_ptrs = da_ptr + offsets + offs_k[None, :].to(tl.int64) * stride_dak
    tl.store(da_ptrs, acc.to(da_ptr.dtype.element_ty), mask=mask_k)


@triton.jit
def _sum_chunks_kernel(
    parts_ptr,
    out_ptr,
    chunks_before_ptr,
    K,
    stride_ol,
    stride_or,
    stride_ok,
    PADDED_R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # grid (cdiv(K, BLOCK_K), PADDED_R // BLOCK_R, L); parts [C, PADDED_R, K]; out(l, r, k) by strides
    adapter = tl.program_id(2)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None].to(tl.int64)
    mask = offs_k[None, :] < K
    part_ptrs = parts_ptr + offs_r * K + offs_k[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for chunk in range(tl.load(chunks_before_ptr + adapter), tl.load(chunks_before_ptr + adapter + 1)):
        acc += tl.load(part_ptrs + tl.cast(chunk, tl.int64) * PADDED_R * K, mask=mask, other=0.0)
    out_ptrs = (
        out_ptr + adapter.to(tl.int64) * stride_ol + offs_r * stride_or + offs_k[None, :].to(tl.int64) * stride_ok
    )
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def rows_down(x: torch.Tensor, a: torch.Tensor, scales: torch.Tensor, plan: RowPlan, *, precision: str) -> torch.Tensor:
    """s [M, RP] = scales(l) * x a_l^T for the rows of adapter l, zeros for the base's; in x's dtype."""
    x = rows_contiguous(x)
    (m, k), padded_r = x.shape, a.shape[1]
    target = target_of(x.device)
    config = _down_tile(target, plan.block_m, padded_r, x.dtype)
    tiles, tiles_r = plan.tile_rows.shape[0], triton.cdiv(padded_r, config.block_r)
    parts, _ = parts_along(k, config.block_k, tiles * tiles_r, target)
    s = torch.empty(m, padded_r, dtype=x.dtype, device=x.device)
    partial = s[None] if parts == 1 else torch.empty(parts, m, padded_r, dtype=torch.float32, device=x.device)
    launch(
        _rows_down_kernel,
        (tiles, parts, tiles_r),
        config,
        x,
        a,
        scales,
        partial,
        plan.order,
        plan.tile_adapter,
        plan.tile_first,
        plan.tile_rows,
        m,
        k,
        x.stride(0),
        *a.stride(),
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if parts > 1:
        sum_parts(partial, s)
    return s


def rows_grad_s(
    dy: torch.Tensor, b: torch.Tensor, scales: torch.Tensor, plan: RowPlan, *, precision: str
) -> torch.Tensor:
    """ds [M, RP] = scales(l) * dy b_l for the rows of adapter l, zeros for the base's: rows_down with b^T for a.

    b of another dtype is cast first: transposed float32 tiles would be loaded 4 bytes at a time on sm_80.
    """
    return rows_down(dy, b.to(dy.dtype).transpose(1, 2), scales, plan, precision=precision)


def rows_up_add_(y: torch.Tensor, s: torch.Tensor, b: torch.Tensor, plan: RowPlan, *, precision: str) -> torch.Tensor:
    """y [M, N] += s b_l^T for the rows of adapter l, in place, rounded once more; returns y. The base's rows stay."""
    n, padded_r = b.shape[1], b.shape[2]
    if y.stride(1) != 1 and n > 1:
        raise ValueError(f"rows_up_add_: expected y [M, N] with a contiguous last axis, got strides {y.stride()}")
    target = target_of(y.device)
    config = _up_tile(target, plan.block_m, padded_r, y.dtype)
    if plan.adapted_tiles:
        launch(
            _rows_up_add_kernel,
            (plan.adapted_tiles, triton.cdiv(n, config.block_n)),
            config,
            y,
            s,
            b,
            plan.order,
            plan.tile_adapter,
            plan.tile_first,
            plan.tile_rows,
            n,
            y.stride(0),
            *b.stride(),
            PADDED_R=padded_r,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            PRECISION=dot_precision(precision, y.dtype, target),
        )
    return y


def rows_grad_a(
    x: torch.Tensor, ds: torch.Tensor, plan: RowPlan, *, dtype: torch.dtype | None = None, precision: str
) -> torch.Tensor:
    """da [L, RP, K], da_l = ds^T x over the rows of adapter l, in `dtype`, x's by default."""
    da = torch.empty(plan.adapters, ds.shape[1], x.shape[1], dtype=dtype or x.dtype, device=x.device)
    _rows_grad(x, ds, da, plan, precision)
    return da


def rows_grad_b(
    dy: torch.Tensor, s: torch.Tensor, plan: RowPlan, *, dtype: torch.dtype | None = None, precision: str
) -> torch.Tensor:
    """db [L, N, RP], db_l = dy^T s over the rows of adapter l, in `dtype`, dy's by default: rows_grad_a, transposed."""
    db = torch.empty(plan.adapters, dy.shape[1], s.shape[1], dtype=dtype or dy.dtype, device=dy.device)
    _rows_grad(dy, s, db.transpose(1, 2), plan, precision)
    return db


def _rows_grad(x, ds, da, plan, precision):
    """Write da [L, RP, K], of any strides: directly where every adapter is one chunk, else by partial sums of chunks."""
    x = rows_contiguous(x)
    (adapters, padded_r, k), chunks = da.shape, plan.chunk_rows.shape[0]
    target = target_of(x.device)
    config = _grad_tile(target, padded_r, x.dtype)
    parts = da if chunks == adapters else torch.empty(chunks, padded_r, k, dtype=torch.float32, device=x.device)
    launch(
        _rows_grad_kernel,
        (triton.cdiv(k, config.block_k), chunks, triton.cdiv(padded_r, config.block_r)),
        config,
        x,
        ds,
        parts,
        plan.order,
        plan.chunk_first,
        plan.chunk_rows,
        k,
        x.stride(0),
        *parts.stride(),
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if chunks == adapters:
        return
    config = TileConfig(1, 1, 128, min(padded_r, 16), num_warps=4, num_stages=1)
    launch(
        _sum_chunks_kernel,
        (triton.cdiv(k, config.block_k), triton.cdiv(padded_r, config.block_r), adapters),
        config,
        parts,
        da,
        plan.chunks_before,
        k,
        *da.stride(),
        PADDED_R=padded_r,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
    )


def _down_tile(target: Target, block_m: int, padded_r: int, dtype: torch.dtype) -> TileConfig:
    if target.arch in ("interpreter", "generic"):
        return TileConfig(block_m, 1, 64, min(padded_r, 32), 4, 2)
    stages = 2 if target.arch.startswith("gfx") else 4
    if dtype == torch.float32:
        return TileConfig(block_m, 1, 64 if block_m == 16 else 32, min(padded_r, 32), 2 if block_m == 16 else 4, 3)
    block_r = min(padded_r, 64)
    if block_r <= 16:
        return TileConfig(block_m, 1, 256 if block_m == 16 else 128, block_r, 2 if block_m == 16 else 4, stages)
    return TileConfig(block_m, 1, 128 if block_m < 64 else 64, block_r, 4, stages)


def _up_tile(target: Target, block_m: int, padded_r: int, dtype: torch.dtype) -> TileConfig:
    if target.arch in ("interpreter", "generic"):
        return TileConfig(block_m, 32, 1, min(padded_r, 32), 4, 1)
    block_n = 32 if dtype == torch.float32 else 128
    return TileConfig(block_m, block_n, 1, min(padded_r, 64), 4, 1)


def _grad_tile(target: Target, padded_r: int, dtype: torch.dtype) -> TileConfig:
    if target.arch in ("interpreter", "generic"):
        return TileConfig(32, 1, 32, min(padded_r, 32), 4, 2)
    stages = 2 if target.arch.startswith("gfx") else 4
    if family_of(target.arch) == "gfx1100" and dtype != torch.float32:
        # 64 sums per lane: 192 to 242 registers. 128 sums spill 420 at R = 128 and 370 at R = 64
        return TileConfig(32, 1, 256 if padded_r <= 16 else 128, min(padded_r, 64), 4, stages)
    if dtype == torch.float32:
        return TileConfig(32, 1, 64, min(padded_r, 32), 4, min(stages, 3))
    return TileConfig(32, 1, 256 if padded_r <= 64 else 128, min(padded_r, 128), 4, stages)
