"""o = softmax(s) v without a score in memory, and the log-sum-exp of every row.

    m, l, acc over key tiles:  p = exp2(s - m),  l = sum p,  acc = p v,   rescaled whenever m grows
    o = acc / ((1 - dropout) l),   lse = m + log2 l

Reads q once, k and v once per query tile that sees them; writes o and lse once. A sink is where m and l start. A row without a
visible key has o = 0 and lse = +inf, which makes its weights 0 in the backward.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.attention_call import AttentionCall
from fastpeft.kernels.attention_scores import (
    LOG2E,
    factor_of,
    interval_range,
    kept,
    load_rows,
    load_turned,
    query_interval,
    rope_of,
    score_tile,
    store_rows,
    terms_of,
    tile_range,
    within_keys,
)
from fastpeft.kernels.attention_tiling import choose_attention
from fastpeft.kernels.launch import dot_precision, launch, target_of


@triton.jit
def _tiles(
    acc,
    total,
    m,
    q,
    k_ptr,
    v_ptr,
    stride_kn,
    stride_vn,
    begin,
    end,
    first_m,
    interval,
    sq,
    sk,
    terms,
    rope,
    padding_ptr,
    scale,
    softcap,
    seed,
    row_of_head,
    threshold,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    GUARDED: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(acc, total, m) after the key tiles in [begin, end)."""
    beside, low, high = interval
    offs_m = first_m + tl.arange(0, BLOCK_M)
    factor = factor_of(scale, softcap)
    for n in tl.range(begin, end, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        offs_n = n + tl.arange(0, BLOCK_N)
        k = load_turned(k_ptr, n, stride_kn, sk, rope, D, BLOCK_N, BLOCK_D, MASKED and not EVEN)
        s, _ = score_tile(
            q, k, terms, scale, softcap, beside, first_m, offs_n, sq, sk, TERMS, MASKED and not EVEN, False, PRECISION
        )
        if MASKED:
            s = tl.where((offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]), s, float("-inf"))
        if padding_ptr is not None:
            attend = tl.load(padding_ptr + offs_n, mask=offs_n < sk, other=0)
            s = tl.where((attend != 0)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        shift = m_new
        if GUARDED:  # of a row that has seen no key, -inf - -inf would be NaN
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * factor - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        m = m_new
        if threshold is not None:
            p = tl.where(kept(seed, row_of_head, offs_m, n, threshold, BLOCK_M, BLOCK_N), p, 0.0)
        v = load_rows(v_ptr, n, stride_vn, sk, D, BLOCK_N, BLOCK_D, MASKED and not EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, total, m


@triton.jit(do_not_specialize=["sq", "sk", "padded_sq", "left", "right", "max_distance", "seed", "threshold"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    sinks_ptr,
    bias_ptr,
    distances_ptr,
    slopes_ptr,
    padding_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    valid_ptr,
    sq,
    sk,
    padded_sq,
    H,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_om,
    stride_oh,
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(Sq, BLOCK_M) * B * H,)
    tiles_m = tl.cdiv(sq, BLOCK_M)
    pid_m = tiles_m - 1 - tl.program_id(0) % tiles_m  # of causal rows the longest first
    head = tl.program_id(0) // tiles_m
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first_m = pid_m * BLOCK_M
    offs_m = first_m + tl.arange(0, BLOCK_M)
    k_ptr += b * stride_kb + h // G * stride_kh
    v_ptr += b * stride_vb + h // G * stride_vh
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
    if padding_ptr is not None:
        padding_ptr += b * stride_pb
    interval = query_interval(offs_m, rows_ptr, sq, sk, left, right)
    if rows_ptr is not None:
        begin, full_begin, full_end, end = interval_range(interval[1], interval[2], sk, BLOCK_N, True)
    else:
        first = first_m + sk - sq
        last = tl.minimum(first_m + BLOCK_M, sq) - 1 + sk - sq
        begin, full_begin, full_end, end = tile_range(first, last, left, right, sk, BLOCK_N, True)
    if valid_ptr is not None:
        valid_ptr += 2 * b
    begin, full_begin, full_end, end = within_keys(begin, full_begin, full_end, end, valid_ptr, BLOCK_N)

    q = load_turned(q_ptr + b * stride_qb + h * stride_qh, first_m, stride_qm, sq, rope, D, BLOCK_M, BLOCK_D, not EVEN)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        total += 1.0
    hides: tl.constexpr = bias_ptr is not None or padding_ptr is not None  # what may hide keys of a full tile
    row_of_head = head * sq
    if left is not None or rows_ptr is not None:
        acc, total, m = _tiles(
            acc, total, m, q, k_ptr, v_ptr, stride_kn, stride_vn, begin, tl.minimum(full_begin, end), first_m, interval, sq,
            sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head, threshold, True, EVEN, True, TERMS, PRECISION, D,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, m = _tiles(
        acc, total, m, q, k_ptr, v_ptr, stride_kn, stride_vn, full_begin, full_end, first_m, interval, sq,
        sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head, threshold, False, EVEN, hides, TERMS, PRECISION, D,
        BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if right is not None or rows_ptr is not None or not EVEN:
        acc, total, m = _tiles(
            acc, total, m, q, k_ptr, v_ptr, stride_kn, stride_vn, full_end, end, first_m, interval, sq,
            sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head, threshold, True, EVEN, True, TERMS, PRECISION, D,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    if threshold is not None:
        share *= kept_share
    o_ptr += b * stride_ob + h * stride_oh
    store_rows(o_ptr, acc * share[:, None], first_m, stride_om, sq, D, BLOCK_M, BLOCK_D, not EVEN)
    # Rows past the end are written as rows without a key, for the backward to read without a mask.
    lse = tl.where((total > 0.0) & (offs_m < sq), m + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + head.to(tl.int64) * padded_sq + offs_m, lse)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: AttentionCall, *, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, Sq, H, D] in q's dtype and lse [B, H, whole tiles of Sq] in float32, base 2; +inf for rows without a key."""
    batch, sq, heads, d = q.shape
    sk, target = k.shape[1], target_of(q.device)
    config = choose_attention("fwd", target, D=d, dtype=q.dtype, call=call)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles_m = triton.cdiv(sq, config.block_m)
    lse = torch.empty(batch, heads, tiles_m * config.block_m, dtype=torch.float32, device=q.device)
    launch(
        _attention_fwd_kernel,
        (tiles_m * batch * heads,),
        config,
        q,
        k,
        v,
        o,
        lse,
        call.sinks,
        *call.tensors,
        call.rows,
        call.valid,
        sq,
        sk,
        lse.shape[2],
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *o.stride()[:3],
        *call.strides,
        *call.numbers,
        G=heads // k.shape[2],
        TERMS=call.terms,
        D=d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_k,
        EVEN=call.is_even(sq, sk),
        PRECISION=dot_precision(precision, q.dtype, target),
    )
    return o, lse
