"""The gradient of a bias that is broadcast: ds summed over whatever shares an element, without ds of all heads in memory.

    dbias(b', h', i', j) = sum over b, h, i that read this element of ds(b, h, i, j)

One program owns one tile of the result and walks batches, heads and, where the bias is one row, queries, in order: two products
more per tile of scores than the dq kernel, and no scratch. A bias of the scores' full shape gets its gradient from dq's.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.attention_call import AttentionCall, empty_aligned
from fastpeft.kernels.attention_scores import (
    factor_of,
    kept,
    load_rows,
    load_turned,
    query_interval,
    rope_of,
    score_tile,
    terms_of,
)
from fastpeft.kernels.attention_tiling import choose_attention
from fastpeft.kernels.launch import dot_precision, launch, target_of


@triton.jit(do_not_specialize=["sq", "sk", "padded_sq", "left", "right", "max_distance", "seed", "threshold"])
def _attention_dbias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dbias_ptr,
    bias_ptr,
    distances_ptr,
    slopes_ptr,
    padding_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    sq,
    sk,
    padded_sq,
    B,
    H,
    batches,
    heads,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_dob,
    stride_dom,
    stride_doh,
    stride_dbb,
    stride_dbh,
    stride_dbm,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_sb,
    stride_pb,
    stride_rb,
    stride_rm,
    scale,
    softcap,
    left,
    right,
    max_distance,
    seed: tl.int64,
    threshold,
    kept_share,
    G: tl.constexpr,
    TERMS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (tiles of Sq or 1, cdiv(Sk, BLOCK_N), batches * heads of the result)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    own_b, own_h = tl.program_id(2) // heads, tl.program_id(2) % heads
    begin_b, end_b, begin_h, end_h = own_b, own_b + 1, own_h, own_h + 1
    if batches == 1:
        begin_b, end_b = own_b * 0, own_b * 0 + B
    if heads == 1:
        begin_h, end_h = own_h * 0, own_h * 0 + H
    begin_m = tl.program_id(0) * BLOCK_M
    end_m = begin_m + BLOCK_M
    if ONE_ROW:
        begin_m, end_m = begin_m * 0, sq
    factor = factor_of(scale, softcap)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b32 in tl.range(begin_b, end_b, num_stages=1):
        b = tl.cast(b32, tl.int64)
        for h32 in tl.range(begin_h, end_h, num_stages=1):
            h = tl.cast(h32, tl.int64)
            row = (b * H + h) * padded_sq
            terms = terms_of(
                b,
                h,
                bias_ptr,
                distances_ptr,
                slopes_ptr,
                stride_bb,
                stride_bh,
                stride_bm,
                stride_sb,
                max_distance,
                TERMS,
            )
            rope = rope_of(b, cos_ptr, sin_ptr, stride_rb, stride_rm)
            k = load_turned(
                k_ptr + b * stride_kb + h // G * stride_kh, first_n, stride_kn, sk, rope, D, BLOCK_N, BLOCK_D, True
            )
            v = load_rows(v_ptr + b * stride_vb + h // G * stride_vh, first_n, stride_vn, sk, D, BLOCK_N, BLOCK_D, True)
            for m in tl.range(begin_m, end_m, BLOCK_M, num_stages=1):
                offs_m = m + tl.arange(0, BLOCK_M)
                beside, low, high = query_interval(offs_m, rows_ptr, sq, sk, left, right)
                if (tl.min(low, 0) < first_n + BLOCK_N) & (tl.max(high, 0) > first_n):
                    q = load_turned(
                        q_ptr + b * stride_qb + h * stride_qh, m, stride_qm, sq, rope, D, BLOCK_M, BLOCK_D, True
                    )
                    do = load_rows(
                        do_ptr + b * stride_dob + h * stride_doh, m, stride_dom, sq, D, BLOCK_M, BLOCK_D, True
                    )
                    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < sq, other=float("inf"))
                    delta = tl.load(delta_ptr + row + offs_m, mask=offs_m < sq, other=0.0)
                    s, _ = score_tile(
                        q, k, terms, scale, softcap, beside, m, offs_n, sq, sk, TERMS, True, False, PRECISION
                    )
                    p = tl.exp2(s * factor - lse[:, None])
                    p = tl.where((offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]), p, 0.0)
                    if padding_ptr is not None:
                        attend = tl.load(padding_ptr + b * stride_pb + offs_n, mask=offs_n < sk, other=0)
                        p = tl.where((attend != 0)[None, :], p, 0.0)
                    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                    if threshold is not None:
                        keep = kept(seed, ((b * H + h) * sq).to(tl.int32), offs_m, first_n, threshold, BLOCK_M, BLOCK_N)
                        dp = tl.where(keep, dp * kept_share, 0.0)
                    acc += p * (dp - delta[:, None])
    dbias_ptr += own_b.to(tl.int64) * stride_dbb + own_h.to(tl.int64) * stride_dbh
    if ONE_ROW:
        total = tl.sum(acc, 0).to(dbias_ptr.dtype.element_ty)
        tl.store(dbias_ptr + offs_n, total, mask=offs_n < sk)
    else:
        offs_m = begin_m + tl.arange(0, BLOCK_M)
        ptrs = dbias_ptr + offs_m[:, None].to(tl.int64) * stride_dbm + offs_n[None, :]
        mask = (offs_m < sq)[:, None] & (offs_n < sk)[None, :]
        tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


def attention_dbias(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    call: AttentionCall,
    *,
    shape: tuple[int, int, int, int],
    precision: str,
) -> torch.Tensor:
    """dbias of `shape` [B or 1, H or 1, Sq or 1, Sk] in the bias's dtype."""
    batch, sq, heads, d = q.shape
    sk, target = k.shape[1], target_of(q.device)
    config = choose_attention("dbias", target, D=d, dtype=q.dtype, call=call)
    dbias = empty_aligned(shape, call.bias.dtype, q.device)
    one_row = shape[2] == 1
    launch(
        _attention_dbias_kernel,
        (1 if one_row else triton.cdiv(sq, config.block_m), triton.cdiv(sk, config.block_n), shape[0] * shape[1]),
        config,
        q,
        k,
        v,
        do,
        lse,
        delta,
        dbias,
        *call.tensors,
        call.rows,
        sq,
        sk,
        lse.shape[2],
        batch,
        heads,
        shape[0],
        shape[1],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dbias.stride()[:3],
        *call.strides,
        *call.numbers,
        G=heads // k.shape[2],
        TERMS=call.terms,
        ONE_ROW=one_row,
        D=d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_k,
        PRECISION=dot_precision(precision, q.dtype, target),
    )
    return dbias
