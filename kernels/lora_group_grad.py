"""The backward of projections that share x: one pass over x for all gradients of a, one GEMM-shaped kernel for dx.

    dx   = sum_i dy_i w_i + keep_i * (ds_i a_i)         group_grad_x    adds all i in registers, rounds once
    da_i = ds_i^T (keep_i * x)                          group_grad_a    reads x once for all i

Members, shapes, strides, dtypes and precision as in lora_group.py.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_group_tiling import MAX_MEMBERS, PER_CALL, batches_of, filled, grad_a_tile, grad_x_tile
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import padded_rank, parts_along


@triton.jit(do_not_specialize=PER_CALL)
def _group_grad_a_kernel(
    x_ptr, ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr, da_ptr, M, K, R0, R1, R2, R3, rows_per_part, stride_xm,
    seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, seed3: tl.int64, threshold0, threshold1, threshold2, threshold3,
    PADDED_RS: tl.constexpr, DROPS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    # grid (cdiv(K, BLOCK_K), cdiv(M, rows_per_part)); rows_per_part % BLOCK_M == 0; da: parts of [R0 + R1 + ..., K]
    ds_ptrs = (ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr)
    ranks = (R0, R1, R2, R3)
    seeds = (seed0, seed1, seed2, seed3)
    thresholds = (threshold0, threshold1, threshold2, threshold3)
    first_column = tl.program_id(0) * BLOCK_K
    pid_m = tl.program_id(1)
    offs_k = first_column + tl.arange(0, BLOCK_K)
    mask_k = offs_k[None, :] < K

    accs = ()
    for i in tl.static_range(MEMBERS):
        accs += (tl.zeros((PADDED_RS[i], BLOCK_K), tl.float32),)
    first_row = pid_m * rows_per_part
    for row in range(first_row, min(M, first_row + rows_per_part), BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        rows = offs_m[:, None].to(tl.int64)
        mask = mask_m if EVEN_K else mask_m & mask_k
        x = tl.load(x_ptr + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        sums = ()
        for i in tl.static_range(MEMBERS):
            offsets = rows * PADDED_RS[i] + tl.arange(0, PADDED_RS[i])[None, :]
            ds = tl.load(ds_ptrs[i] + offsets, mask=mask_m, other=0.0)  # [BLOCK_M, PADDED_RS[i]]
            kept = x
            if DROPS[i]:
                kept = tl.where(keep_tile(seeds[i], offs_m, first_column, thresholds[i], BLOCK_M, BLOCK_K), x, 0.0)
            sums += (tl.dot(ds.T, kept, accs[i], input_precision=PRECISION),)
        accs = sums

    all_ranks = 0
    for i in tl.static_range(MEMBERS):
        all_ranks += ranks[i]
    da_ptrs = da_ptr + pid_m.to(tl.int64) * all_ranks * K + offs_k[None, :]
    for i in tl.static_range(MEMBERS):
        offs_r = tl.arange(0, PADDED_RS[i])[:, None]
        da = accs[i].to(da_ptr.dtype.element_ty)
        tl.store(da_ptrs + offs_r.to(tl.int64) * K, da, mask=(offs_r < ranks[i]) & mask_k)
        da_ptrs += ranks[i] * tl.cast(K, tl.int64)


@triton.jit
def _low_rank(
    acc, ds_ptr, a_ptr, rows, offs_k, K, R, PADDED_R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr
):
    """acc [rows, offs_k] + ds a, in chunks of BLOCK_R ranks."""
    for first_rank in tl.range(0, PADDED_R, BLOCK_R, num_stages=1):
        offs_r = first_rank + tl.arange(0, BLOCK_R)
        mask = (offs_r[:, None] < R) & (offs_k[None, :] < K)
        ds = tl.load(ds_ptr + rows[:, None] * PADDED_R + offs_r[None, :])
        a = tl.load(a_ptr + offs_r[:, None].to(tl.int64) * K + offs_k[None, :], mask=mask, other=0.0)
        acc = tl.dot(ds, a.to(ds.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=PER_CALL)
def _group_grad_x_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, w0_ptr, w1_ptr, w2_ptr, w3_ptr, ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr,
    a0_ptr, a1_ptr, a2_ptr, a3_ptr, add_ptr, dx_ptr, M, K, N0, N1, N2, N3, R0, R1, R2, R3,
    stride_dym0, stride_dym1, stride_dym2, stride_dym3, stride_wn0, stride_wn1, stride_wn2, stride_wn3,
    stride_wk0, stride_wk1, stride_wk2, stride_wk3,
    seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, seed3: tl.int64, threshold0, threshold1, threshold2, threshold3,
    PADDED_RS: tl.constexpr, BLOCK_RS: tl.constexpr, DROPS: tl.constexpr, MEMBERS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    # grid (cdiv(M, BLOCK_M) * cdiv(K, BLOCK_K),); PADDED_RS[i] == 0: no adapter; tiles in the order of _lora_gemm_kernel
    dy_ptrs, w_ptrs = (dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr), (w0_ptr, w1_ptr, w2_ptr, w3_ptr)
    ds_ptrs, a_ptrs = (ds0_ptr, ds1_ptr, ds2_ptr, ds3_ptr), (a0_ptr, a1_ptr, a2_ptr, a3_ptr)
    columns, ranks = (N0, N1, N2, N3), (R0, R1, R2, R3)
    strides_dym = (stride_dym0, stride_dym1, stride_dym2, stride_dym3)
    strides_wn = (stride_wn0, stride_wn1, stride_wn2, stride_wn3)
    strides_wk = (stride_wk0, stride_wk1, stride_wk2, stride_wk3)
    seeds = (seed0, seed1, seed2, seed3)
    thresholds = (threshold0, threshold1, threshold2, threshold3)
    pid = tl.program_id(0)
    tiles_in_group = GROUP_M * tl.cdiv(K, BLOCK_K)
    first_m = pid // tiles_in_group * GROUP_M
    group_m = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)
    first_column = pid % tiles_in_group // group_m * BLOCK_K
    offs_m = (first_m + pid % tiles_in_group % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = first_column + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    mask_k = offs_k[None, :] < K
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)  # rows past M read row 0 and are not stored

    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(MEMBERS):
        if DROPS[i]:  # between the loops: next to each other the masks of all members would be in registers together
            part = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            part = _low_rank(
                part, ds_ptrs[i], a_ptrs[i], rows, offs_k, K, ranks[i], PADDED_RS[i], BLOCK_RS[i], PRECISION
            )
            acc += tl.where(keep_tile(seeds[i], offs_m, first_column, thresholds[i], BLOCK_M, BLOCK_K), part, 0.0)
        dy_tile = dy_ptrs[i] + rows[:, None] * strides_dym[i] + offs_n[None, :]
        w_tile = w_ptrs[i] + offs_n[:, None].to(tl.int64) * strides_wn[i] + offs_k[None, :].to(tl.int64) * strides_wk[i]
        for n in range(0, columns[i], BLOCK_N):
            # dy tile [BLOCK_M, BLOCK_N], w tile [BLOCK_N, BLOCK_K]
            if EVEN_N:
                dy = tl.load(dy_tile)
                if EVEN_K:
                    w = tl.load(w_tile)
                else:
                    w = tl.load(w_tile, mask=mask_k, other=0.0)
            else:
                dy = tl.load(dy_tile, mask=offs_n[None, :] < columns[i] - n, other=0.0)
                w = tl.load(w_tile, mask=(offs_n[:, None] < columns[i] - n) & mask_k, other=0.0)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
            dy_tile += BLOCK_N
            w_tile += BLOCK_N * tl.cast(strides_wn[i], tl.int64)
    for i in tl.static_range(MEMBERS):  # after the loops the tiles of ds and a reuse their shared memory
        if PADDED_RS[i] and not DROPS[i]:
            acc = _low_rank(acc, ds_ptrs[i], a_ptrs[i], rows, offs_k, K, ranks[i], PADDED_RS[i], BLOCK_RS[i], PRECISION)
    offsets = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    mask = (offs_m[:, None] < M) & mask_k
    if ADD:
        acc += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def group_grad_a(
    x: torch.Tensor,
    ds: Sequence[torch.Tensor | None],
    members: Sequence[tuple[torch.Tensor, int, int] | None],
    *,
    precision: str,
) -> list[torch.Tensor | None]:
    """da_i [R_i, K] of each member (a_i, seed_i, threshold_i), in a_i's dtype; of a_i only shape and dtype are used."""
    x = rows_contiguous(x)
    results: list[torch.Tensor | None] = [None] * len(members)
    for batch in batches_of([0 if member is None else padded_rank(member[0].shape[0]) for member in members]):
        grads = _grad_a(x, [ds[i] for i in batch], [members[i] for i in batch], precision)
        for i, da in zip(batch, grads, strict=True):
            results[i] = da
    return results


def _grad_a(x, ds, members, precision):
    m, k = x.shape
    ranks = [member[0].shape[0] for member in members]
    dtypes = {member[0].dtype for member in members}
    padded = tuple(padded_rank(r) for r in ranks)
    drops = tuple(threshold > 0 for _, _, threshold in members)
    target = target_of(x.device)
    config = grad_a_tile(target, sum(padded), x.dtype, any(drops))
    tiles_k = triton.cdiv(k, config.block_k)
    parts, rows_per_part = parts_along(m, config.block_m, tiles_k, target)
    da = torch.empty(sum(ranks), k, dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32, device=x.device)
    partial = da if parts == 1 else torch.empty(parts, *da.shape, dtype=torch.float32, device=x.device)
    launch(
        _group_grad_a_kernel,
        (tiles_k, parts),
        config,
        x,
        *filled(ds, None),
        partial,
        m,
        k,
        *filled(ranks),
        rows_per_part,
        x.stride(0),
        *filled([seed for _, seed, _ in members]),
        *filled([threshold for _, _, threshold in members]),
        PADDED_RS=padded,
        DROPS=drops,
        MEMBERS=len(members),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if parts > 1:
        sum_parts(partial, da)
    return [part.to(a.dtype) for part, (a, _, _) in zip(da.split(ranks), members, strict=True)]


def group_grad_x(
    members: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]],
    *,
    precision: str,
    add: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """dx [M, K] = add + sum over the members (dy_i, w_i, ds_i, a_i, seed_i, threshold_i), in `dtype`, dy's by default.

    The sum stays in float32 registers until its only rounding. Where the weights cannot all be dense at once, call with
    some of the members and dtype=float32, and pass the result as `add` [M, K] (contiguous, any dtype) to the next call.
    """
    dtype = dtype or members[0][0].dtype
    for first in range(0, len(members), MAX_MEMBERS):
        last = first + MAX_MEMBERS >= len(members)
        add = _grad_x(members[first : first + MAX_MEMBERS], precision, add, dtype if last else torch.float32)
    return add


def _grad_x(members, precision, add, dtype):
    dys = [rows_contiguous(member[0]) for member in members]
    ws = [member[1] for member in members]
    adapters = [None if member[3] is None else member[3].contiguous() for member in members]
    ranks = [0 if a is None else a.shape[0] for a in adapters]
    padded = tuple(padded_rank(r) if r else 0 for r in ranks)
    drops = tuple(member[5] > 0 and r > 0 for member, r in zip(members, ranks, strict=True))
    (m, _), k = dys[0].shape, ws[0].shape[1]
    target = target_of(dys[0].device)
    config = grad_x_tile(target, m, k, max(*ranks, 1), dys[0].dtype, sum(drops), add is not None)
    dx = torch.empty(m, k, dtype=dtype, device=dys[0].device)
    launch(
        _group_grad_x_kernel,
        (triton.cdiv(m, config.block_m) * triton.cdiv(k, config.block_n),),
        config,
        *filled(dys, None),
        *filled(ws, None),
        *filled([member[2] for member in members], None),
        *filled(adapters, None),
        add,
        dx,
        m,
        k,
        *filled([w.shape[0] for w in ws]),
        *filled(ranks),
        *filled([dy.stride(0) for dy in dys]),
        *filled([w.stride(0) for w in ws]),
        *filled([w.stride(1) for w in ws]),
        *filled([member[4] for member in members]),
        *filled([member[5] for member in members]),
        PADDED_RS=padded,
        BLOCK_RS=tuple(min(r, config.block_r) for r in padded),
        DROPS=drops,
        MEMBERS=len(members),
        ADD=add is not None,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_n,
        BLOCK_N=config.block_k,
        GROUP_M=config.group_m,
        EVEN_N=all(w.shape[0] % config.block_k == 0 for w in ws),
        EVEN_K=k % config.block_n == 0,
        PRECISION=dot_precision(precision, dys[0].dtype, target),
    )
    return dx
