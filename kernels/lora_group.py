"""Projections of one input (q, k, v; gate, up), each with a LoRA of its own: x is read once, and dx is written once.

    s_i  = c_i * (keep_i * x) a_i^T                     group_down      reads x once for all i
    dx   = sum_i dy_i w_i + keep_i * (ds_i a_i)         group_grad_x    adds all i in registers, rounds once
    da_i = ds_i^T (keep_i * x)                          group_grad_a    reads x once for all i

The projections' own outputs y_i, ds_i and db_i come from lora.py: they share no large tensor.

Members: MAX_MEMBERS and MAX_COLUMNS padded ranks per launch; what is more takes launches of its own. Ranks, scales, seeds
         and thresholds differ freely. A member without an adapter is None, or has None for ds and a
Shapes:  x [M, K], a_i [R_i, K], w_i [N_i, K], dy_i [M, N_i], s_i and ds_i [M, padded_rank(R_i)] contiguous, zeros past
         column R_i. Every M, N_i, K, R_i >= 1. The results of one call may be views of one allocation, each contiguous
Strides: any for w. x and dy may have any row stride; they, where the last axis is not contiguous, and a are copied
Dtypes:  x, w, s, dy alike: float32, float16, bfloat16. a in any of these: cast to x's dtype on load. Sums in float32
Dropout: each member draws its own mask from its seed (dropout.py); threshold 0 keeps all and costs nothing
Sums:    no atomics: equal inputs give equal bits

c and `precision` as in lora.py. Pointers are passed member by member: stacking the a_i would copy them at every step.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fastpeft.kernels.dropout import keep_tile, kept_scale
from fastpeft.kernels.launch import dot_precision, launch, rows_contiguous, target_of
from fastpeft.kernels.lora_group_grad import group_grad_a, group_grad_x
from fastpeft.kernels.lora_group_tiling import PER_CALL, batches_of, down_tile, filled
from fastpeft.kernels.partial_sums import sum_parts
from fastpeft.kernels.tiling import padded_rank, parts_along

__all__ = ["group_down", "group_grad_a", "group_grad_x"]

_SUM_COLUMNS = 16  # every s_i is a whole number of these, so that one `sum_parts` adds them all


@triton.jit(do_not_specialize=PER_CALL)
def _group_down_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, a3_ptr, s_ptr, M, K, R0, R1, R2, R3, stride_xm, scale0, scale1, scale2, scale3,
    seed0: tl.int64, seed1: tl.int64, seed2: tl.int64, seed3: tl.int64, threshold0, threshold1, threshold2, threshold3,
    PADDED_RS: tl.constexpr, DROPS: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    # grid (cdiv(M, BLOCK_M), parts of K); s: parts of [M, PADDED_RS[0]], [M, PADDED_RS[1]], ... one after the other
    a_ptrs = (a0_ptr, a1_ptr, a2_ptr, a3_ptr)
    ranks = (R0, R1, R2, R3)
    scales = (scale0, scale1, scale2, scale3)
    seeds = (seed0, seed1, seed2, seed3)
    thresholds = (threshold0, threshold1, threshold2, threshold3)
    pid_k = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.where(offs_m < M, offs_m, 0).to(tl.int64)  # rows past M read row 0 and are not stored
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]

    accs = ()
    for i in tl.static_range(MEMBERS):
        accs += (tl.zeros((BLOCK_M, PADDED_RS[i]), tl.float32),)
    all_steps = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(all_steps, tl.num_programs(1))
    for step in range(pid_k * steps, min((pid_k + 1) * steps, all_steps)):
        k = step * BLOCK_K
        mask_k = offs_k[None, :] < K - k
        if EVEN_K:
            x = tl.load(x_ptrs + k)  # [BLOCK_M, BLOCK_K]
        else:
            x = tl.load(x_ptrs + k, mask=mask_k, other=0.0)
        sums = ()
        for i in tl.static_range(MEMBERS):
            offs_r = tl.arange(0, PADDED_RS[i])[:, None]
            mask = offs_r < ranks[i] if EVEN_K else (offs_r < ranks[i]) & mask_k
            a = tl.load(a_ptrs[i] + offs_r.to(tl.int64) * K + offs_k[None, :] + k, mask=mask, other=0.0)
            kept = x
            if DROPS[i]:
                kept = tl.where(keep_tile(seeds[i], offs_m, k, thresholds[i], BLOCK_M, BLOCK_K), x, 0.0)
            sums += (tl.dot(kept, a.to(x.dtype).T, accs[i], input_precision=PRECISION),)
        accs = sums

    columns = 0
    for i in tl.static_range(MEMBERS):
        columns += PADDED_RS[i]
    s_ptrs = s_ptr + pid_k.to(tl.int64) * M * columns
    for i in tl.static_range(MEMBERS):
        offsets = offs_m[:, None].to(tl.int64) * PADDED_RS[i] + tl.arange(0, PADDED_RS[i])[None, :]
        s = (accs[i] * scales[i]).to(s_ptr.dtype.element_ty)
        tl.store(s_ptrs + offsets, s, mask=offs_m[:, None] < M)
        s_ptrs += tl.cast(M, tl.int64) * PADDED_RS[i]


def group_down(
    x: torch.Tensor,
    members: Sequence[tuple[torch.Tensor, float, int, int] | None],
    *,
    precision: str,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor | None]:
    """s_i [M, RP_i] of each member (a_i, scale_i, seed_i, threshold_i), in `dtype`, x's by default; None for None."""
    x = rows_contiguous(x)
    results: list[torch.Tensor | None] = [None] * len(members)
    for batch in batches_of([0 if member is None else padded_rank(member[0].shape[0]) for member in members]):
        sums = _down(x, [members[i] for i in batch], precision, dtype or x.dtype)
        for i, s in zip(batch, sums, strict=True):
            results[i] = s
    return results


def _down(x, members, precision, dtype):
    m, k = x.shape
    adapters = [member[0].contiguous() for member in members]
    padded = tuple(padded_rank(a.shape[0]) for a in adapters)
    drops = tuple(member[3] > 0 for member in members)
    columns, target = sum(padded), target_of(x.device)
    config = down_tile(target, m, columns, x.dtype, max(a.element_size() for a in adapters), any(drops))
    tiles_m = triton.cdiv(m, config.block_m)
    parts, _ = parts_along(k, config.block_k, tiles_m, target)
    s = torch.empty(m * columns, dtype=dtype, device=x.device)
    partial = s if parts == 1 else torch.empty(parts, m * columns, dtype=torch.float32, device=x.device)
    launch(
        _group_down_kernel,
        (tiles_m, parts),
        config,
        x,
        *filled(adapters, None),
        partial,
        m,
        k,
        *filled([a.shape[0] for a in adapters]),
        x.stride(0),
        *filled([kept_scale(scale, threshold) for _, scale, _, threshold in members], 0.0),
        *filled([seed for _, _, seed, _ in members]),
        *filled([threshold for _, _, _, threshold in members]),
        PADDED_RS=padded,
        DROPS=drops,
        MEMBERS=len(members),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        PRECISION=dot_precision(precision, x.dtype, target),
    )
    if parts > 1:
        sum_parts(partial.view(parts, -1, _SUM_COLUMNS), s.view(-1, _SUM_COLUMNS))
    return [part.view(m, -1) for part in s.split([m * r for r in padded])]
