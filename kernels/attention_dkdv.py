"""dk and dv: one program per tile of keys walks the queries that see it, of every query head that shares the key head.

    p^T = exp2(s^T - lse),   dv = (keep p^T) do / (1 - dropout),   dk = scale (ds^T cap') q

Scores are taken transposed, k q^T, so that p^T and ds^T are left operands and stay in registers: on sm_90 that is 20 wgmma
where the other way is 64 HMMA and 4 wgmma. Reads k and v once, q, do, lse and delta once per key tile that they see.
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.attention_call import AttentionCall
from fastpeft.kernels.attention_scores import (
    factor_of,
    interval_range,
    kept,
    load_rows,
    load_turned,
    query_interval,
    rope_from,
    rope_of,
    score_tile,
    store_rows,
    terms_of,
    tile_range,
    turned_back,
)
from fastpeft.kernels.attention_tiling import choose_attention
from fastpeft.kernels.launch import dot_precision, launch, target_of


@triton.jit
def _tiles(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    bias_ptr,
    distances_ptr,
    slopes_ptr,
    rope,
    b,
    first_h,
    H,
    stride_qm,
    stride_qh,
    stride_dom,
    stride_doh,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_sb,
    begin,
    end,
    begin_too,
    end_too,
    offs_n,
    first_n,
    rows_ptr,
    sq,
    sk,
    padded_sq,
    scale,
    softcap,
    left,
    right,
    max_distance,
    seed,
    threshold,
    kept_share,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    G: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(dk, dv) after the query tiles in [begin, end), if MASKED in [begin_too, end_too) too, of heads first_h + [0, G).

    In one loop: nested ones, or one for each range, spill registers.
    """
    factor = factor_of(scale, softcap)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    more = 0
    if MASKED:
        more = tl.cdiv(tl.maximum(end_too - begin_too, 0), BLOCK_M)
    start = tl.cast(begin, tl.int64)
    q_at, do_at, at = q_ptr + start * stride_qm, do_ptr + start * stride_dom, begin
    # From the last head's tile to the first head's next one.
    q_back = tl.cast(stride_qm, tl.int64) * BLOCK_M - tl.cast(stride_qh, tl.int64) * (G - 1)
    do_back = tl.cast(stride_dom, tl.int64) * BLOCK_M - tl.cast(stride_doh, tl.int64) * (G - 1)
    back = BLOCK_M - padded_sq * (G - 1)
    for i in tl.range(0, G * (tiles + more)):
        g = i % G
        m = begin + i // G * BLOCK_M
        if MASKED:
            m = tl.where(i // G < tiles, m, begin_too + (i // G - tiles) * BLOCK_M)
            q_at = q_ptr + tl.cast(g, tl.int64) * stride_qh + tl.cast(m, tl.int64) * stride_qm
            do_at = do_ptr + tl.cast(g, tl.int64) * stride_doh + tl.cast(m, tl.int64) * stride_dom
            at = g * padded_sq + m
        m = tl.multiple_of(m, BLOCK_M)
        offs_m = m + tl.arange(0, BLOCK_M)
        beside, low, high = query_interval(offs_m, rows_ptr, sq, sk, left, right)
        q = load_turned(q_at, 0, stride_qm, sq - m, rope_from(rope, m), D, BLOCK_M, BLOCK_D, MASKED and not EVEN)
        if not TERMS[0]:  # a bias needs the registers: then it comes later
            do = load_rows(do_at, 0, stride_dom, sq - m, D, BLOCK_M, BLOCK_D, MASKED and not EVEN)
        # Every tile's rows are there, +inf past the end.
        statistics = tl.multiple_of(at, BLOCK_M) + tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + statistics)
        if not TERMS[0]:
            delta = tl.load(delta_ptr + statistics)
        terms = terms_of(
            b,
            first_h + g,
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
        s, capped = score_tile(k, q, terms, scale, softcap, beside, m, offs_n, sq, sk, TERMS, not EVEN, True, PRECISION)
        p = tl.exp2(s * factor - lse[None, :])  # [BLOCK_N, BLOCK_M]
        if MASKED:
            p = tl.where((offs_n[:, None] >= low[None, :]) & (offs_n[:, None] < high[None, :]), p, 0.0)
        if TERMS[0]:
            do = load_rows(do_at, 0, stride_dom, sq - m, D, BLOCK_M, BLOCK_D, MASKED and not EVEN)
            delta = tl.load(delta_ptr + statistics)
        if threshold is not None:
            row_of_head = ((b * H + first_h + g) * sq).to(tl.int32)
            keep = tl.trans(kept(seed, row_of_head, offs_m, first_n, threshold, BLOCK_M, BLOCK_N))
            dv = tl.dot(tl.where(keep, p, 0.0).to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if threshold is not None:
            dp = tl.where(keep, dp * kept_share, 0.0)
        ds = p * (dp - delta[None, :])
        if softcap is not None:
            ds = ds * (1.0 - capped * capped)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if not MASKED:
            last = g == G - 1
            q_at += tl.where(last, q_back, stride_qh)
            do_at += tl.where(last, do_back, stride_doh)
            at += tl.where(last, back, padded_sq)
    return dk, dv


@triton.jit(do_not_specialize=["sq", "sk", "padded_sq", "left", "right", "max_distance", "seed", "threshold"])
def _attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    bias_ptr,
    distances_ptr,
    slopes_ptr,
    padding_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    keys_ptr,
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
    stride_dob,
    stride_dom,
    stride_doh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
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
):  # grid (cdiv(Sk, BLOCK_N) * B * H / G,); dk and dv have the same strides
    tiles_n = tl.cdiv(sk, BLOCK_N)
    pid_n = tl.program_id(0) % tiles_n
    group = tl.program_id(0) // tiles_n
    b, hk = (group // (H // G)).to(tl.int64), (group % (H // G)).to(tl.int64)
    first_n = pid_n * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    if rows_ptr is not None:
        inside = tl.minimum(offs_n, sk - 1)
        low, high = tl.load(keys_ptr + inside), tl.load(keys_ptr + sk + inside)
        begin, full_begin, full_end, end = interval_range(low, high, sq, BLOCK_M, True)
    else:
        first = first_n + sq - sk
        last = tl.minimum(first_n + BLOCK_N, sk) - 1 + sq - sk
        begin, full_begin, full_end, end = tile_range(first, last, right, left, sq, BLOCK_M, True)
    if valid_ptr is not None:  # no query sees a tile of padding alone
        seen = (first_n < tl.load(valid_ptr + 2 * b + 1)) & (first_n + BLOCK_N > tl.load(valid_ptr + 2 * b))
        end = tl.where(seen, end, begin)
        full_begin, full_end = tl.where(seen, full_begin, begin), tl.where(seen, full_end, begin)
    rope = rope_of(b, cos_ptr, sin_ptr, stride_rb, stride_rm)
    k = load_turned(k_ptr + b * stride_kb + hk * stride_kh, first_n, stride_kn, sk, rope, D, BLOCK_N, BLOCK_D, not EVEN)
    v = load_rows(v_ptr + b * stride_vb + hk * stride_vh, first_n, stride_vn, sk, D, BLOCK_N, BLOCK_D, not EVEN)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q_ptr += b * stride_qb + hk * G * stride_qh
    do_ptr += b * stride_dob + hk * G * stride_doh
    lse_ptr += (b * H + hk * G) * padded_sq
    delta_ptr += (b * H + hk * G) * padded_sq
    if right is not None or left is not None or rows_ptr is not None or not EVEN:
        dk, dv = _tiles(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, distances_ptr, slopes_ptr, rope, b, hk * G, H, stride_qm,
            stride_qh, stride_dom, stride_doh, stride_bb, stride_bh, stride_bm, stride_sb, begin,
            tl.minimum(full_begin, end), full_end, end, offs_n, first_n,
            rows_ptr, sq, sk, padded_sq, scale, softcap, left, right, max_distance, seed, threshold, kept_share,
            True, EVEN, G, TERMS, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dk, dv = _tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, bias_ptr, distances_ptr, slopes_ptr, rope, b, hk * G, H, stride_qm,
        stride_qh, stride_dom, stride_doh, stride_bb, stride_bh, stride_bm, stride_sb, full_begin, full_end, 0, 0, offs_n,
        first_n, rows_ptr, sq, sk, padded_sq, scale, softcap, left, right, max_distance, seed, threshold, kept_share,
        False, EVEN, G, TERMS, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if padding_ptr is not None:  # a hidden key's row holds what it would have got, or infinity
        attend = tl.load(padding_ptr + b * stride_pb + offs_n, mask=offs_n < sk, other=0)
        dk = tl.where((attend != 0)[:, None], dk, 0.0)
        dv = tl.where((attend != 0)[:, None], dv, 0.0)
    if threshold is not None:
        dv *= kept_share
    place = b * stride_dkb + hk * stride_dkh
    store_rows(dv_ptr + place, dv, first_n, stride_dkn, sk, D, BLOCK_N, BLOCK_D, not EVEN)
    dk = turned_back(dk, first_n, sk, rope, BLOCK_N, BLOCK_D, not EVEN)
    store_rows(dk_ptr + place, dk * scale, first_n, stride_dkn, sk, D, BLOCK_N, BLOCK_D, not EVEN)


def attention_dkdv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    call: AttentionCall,
    *,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv [B, Sk, Hkv, D] in k's dtype."""
    batch, sq, heads, d = q.shape
    sk, kv_heads, target = k.shape[1], k.shape[2], target_of(q.device)
    config = choose_attention("dkdv", target, D=d, dtype=q.dtype, call=call)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    launch(
        _attention_dkdv_kernel,
        (triton.cdiv(sk, config.block_n) * batch * kv_heads,),
        config,
        q,
        k,
        v,
        do,
        lse,
        delta,
        dk,
        dv,
        *call.tensors,
        call.rows,
        call.keys,
        call.valid,
        sq,
        sk,
        lse.shape[2],
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *do.stride()[:3],
        *dk.stride()[:3],
        *call.strides,
        *call.numbers,
        G=heads // kv_heads,
        TERMS=call.terms,
        D=d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_k,
        EVEN=call.is_even(sq, sk),
        PRECISION=dot_precision(precision, q.dtype, target),
    )
    return dk, dv
