"""dq, and on the way delta and the gradients of an unbroadcast bias and of a table by distance.

    p = exp2(s - lse),  delta = rowsum(do * o),  ds = p (keep (do v^T) / (1 - dropout) - delta)
    dq = scale (ds cap') k,   dbias = ds,   ddistances(d) = sum of ds over j - beside(i) = d

Reads q, o, do and lse once, k and v once per query tile that sees them. Comes before dk and dv, which read delta.

The sums over diagonals: turning row i of a tile by beside(i) brings equal distances into one column, `tl.gather`; what differs by
a multiple of BLOCK_N is told apart by its block. Each program keeps one histogram and writes it once: two stages, no atomics.
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
    rope_of,
    score_tile,
    store_rows,
    terms_of,
    tile_range,
    turned_back,
    within_keys,
)
from fastpeft.kernels.attention_tiling import choose_attention
from fastpeft.kernels.launch import dot_precision, launch, target_of
from fastpeft.kernels.partial_sums import sum_parts

_BLOCKS_BELOW = tl.constexpr(1 << 20)  # makes distances positive before they are divided


@triton.jit
def _add_diagonals(
    histogram, ds, n, interval, max_distance, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BINS: tl.constexpr
):
    """histogram [BINS] plus ds summed by distance; bin 0 takes -max_distance and below, bin 2 max_distance what is beyond."""
    beside, low, high = interval
    column = tl.arange(0, BLOCK_N)
    key = (column[None, :] + beside[:, None] + _BLOCKS_BELOW * BLOCK_N) % BLOCK_N  # [BLOCK_M, BLOCK_N]
    turned = tl.gather(ds, key, 1)
    block = (n + key - beside[:, None] - column[None, :]) // BLOCK_N  # exact
    nearest = tl.maximum(low, n) - beside
    farthest = tl.minimum(high, n + BLOCK_N) - 1 - beside
    sees = nearest <= farthest
    first = tl.min(tl.where(sees, (nearest + _BLOCKS_BELOW * BLOCK_N) // BLOCK_N - _BLOCKS_BELOW, _BLOCKS_BELOW), 0)
    last = tl.max(tl.where(sees, (farthest + _BLOCKS_BELOW * BLOCK_N) // BLOCK_N - _BLOCKS_BELOW, -_BLOCKS_BELOW), 0)
    bins = tl.arange(0, BINS)
    for at in tl.range(first, last + 1, num_stages=1):
        sums = tl.sum(tl.where(block == at, turned, 0.0), 0)  # of distances at BLOCK_N + column
        distance = at * BLOCK_N + column
        place = bins - max_distance - at * BLOCK_N
        found = tl.gather(sums, tl.minimum(tl.maximum(place, 0), BLOCK_N - 1), 0)
        inner = (place >= 0) & (place < BLOCK_N) & (bins > 0) & (bins < 2 * max_distance)
        below = tl.sum(tl.where(distance <= -max_distance, sums, 0.0), 0)
        beyond = tl.sum(tl.where(distance >= max_distance, sums, 0.0), 0)
        histogram += tl.where(inner, found, 0.0)
        histogram += tl.where(bins == 0, below, 0.0) + tl.where(bins == 2 * max_distance, beyond, 0.0)
    return histogram


@triton.jit
def _tiles(
    dq,
    histogram,
    q,
    do,
    lse,
    delta,
    k_ptr,
    v_ptr,
    dbias_ptr,
    stride_kn,
    stride_vn,
    stride_dbm,
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
    kept_share,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BINS: tl.constexpr,
):
    """(dq, histogram) after the key tiles in [begin, end)."""
    beside, low, high = interval
    offs_m = first_m + tl.arange(0, BLOCK_M)
    factor = factor_of(scale, softcap)
    for n in tl.range(begin, end, BLOCK_N):
        n = tl.multiple_of(n, BLOCK_N)
        offs_n = n + tl.arange(0, BLOCK_N)
        k = load_turned(k_ptr, n, stride_kn, sk, rope, D, BLOCK_N, BLOCK_D, MASKED and not EVEN)
        s, capped = score_tile(
            q, k, terms, scale, softcap, beside, first_m, offs_n, sq, sk, TERMS, MASKED and not EVEN, False, PRECISION
        )
        p = tl.exp2(s * factor - lse[:, None])
        if MASKED:
            p = tl.where((offs_n[None, :] >= low[:, None]) & (offs_n[None, :] < high[:, None]), p, 0.0)
        if padding_ptr is not None:
            attend = tl.load(padding_ptr + offs_n, mask=offs_n < sk, other=0)
            p = tl.where((attend != 0)[None, :], p, 0.0)
        v = load_rows(v_ptr, n, stride_vn, sk, D, BLOCK_N, BLOCK_D, MASKED and not EVEN)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if threshold is not None:
            dp = tl.where(kept(seed, row_of_head, offs_m, n, threshold, BLOCK_M, BLOCK_N), dp * kept_share, 0.0)
        ds = p * (dp - delta[:, None])
        if dbias_ptr is not None:
            rows = tl.arange(0, BLOCK_M)
            ptrs = dbias_ptr + first_m.to(tl.int64) * stride_dbm + (rows[:, None] * stride_dbm + offs_n[None, :])
            mask = (offs_m < sq)[:, None]
            if MASKED and not EVEN:
                mask = mask & (offs_n < sk)[None, :]
            tl.store(ptrs, ds.to(dbias_ptr.dtype.element_ty), mask=mask)
        if BINS:
            histogram = _add_diagonals(histogram, ds, n, interval, terms[3], BLOCK_M, BLOCK_N, BINS)
        if softcap is not None:
            ds = ds * (1.0 - capped * capped)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, histogram


@triton.jit(do_not_specialize=["sq", "sk", "padded_sq", "left", "right", "max_distance", "seed", "threshold"])
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dbias_ptr,
    histogram_ptr,
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
    stride_dob,
    stride_dom,
    stride_doh,
    stride_dqb,
    stride_dqm,
    stride_dqh,
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
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BINS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # grid (cdiv(Sq, BLOCK_M) * B * H,); histogram [B, tiles of Sq, H, BINS]
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
    if dbias_ptr is not None:
        dbias_ptr += b * stride_dbb + h * stride_dbh
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

    do_ptr += b * stride_dob + h * stride_doh
    o_ptr += b * stride_ob + h * stride_oh
    do = load_rows(do_ptr, first_m, stride_dom, sq, D, BLOCK_M, BLOCK_D, not EVEN)
    o = load_rows(o_ptr, first_m, stride_om, sq, D, BLOCK_M, BLOCK_D, not EVEN)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = head.to(tl.int64) * padded_sq + offs_m
    inside = offs_m < padded_sq  # more than Sq rows; those past the end have lse = +inf
    tl.store(delta_ptr + row, delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
    q_ptr += b * stride_qb + h * stride_qh
    q = load_turned(q_ptr, first_m, stride_qm, sq, rope, D, BLOCK_M, BLOCK_D, not EVEN)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    histogram = tl.zeros([BINS if BINS else 1], tl.float32)
    row_of_head = head * sq
    if left is not None or rows_ptr is not None:
        dq, histogram = _tiles(
            dq, histogram, q, do, lse, delta, k_ptr, v_ptr, dbias_ptr, stride_kn, stride_vn, stride_dbm, begin,
            tl.minimum(full_begin, end), first_m, interval, sq, sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head,
            threshold, kept_share, True, EVEN, TERMS, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D, BINS,
        )  # fmt: skip
    dq, histogram = _tiles(
        dq, histogram, q, do, lse, delta, k_ptr, v_ptr, dbias_ptr, stride_kn, stride_vn, stride_dbm, full_begin,
        full_end, first_m, interval, sq, sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head,
        threshold, kept_share, False, EVEN, TERMS, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D, BINS,
    )  # fmt: skip
    if right is not None or rows_ptr is not None or not EVEN:
        dq, histogram = _tiles(
            dq, histogram, q, do, lse, delta, k_ptr, v_ptr, dbias_ptr, stride_kn, stride_vn, stride_dbm, full_end,
            end, first_m, interval, sq, sk, terms, rope, padding_ptr, scale, softcap, seed, row_of_head,
            threshold, kept_share, True, EVEN, TERMS, PRECISION, D, BLOCK_M, BLOCK_N, BLOCK_D, BINS,
        )  # fmt: skip

    dq_ptr += b * stride_dqb + h * stride_dqh
    dq = turned_back(dq, first_m, sq, rope, BLOCK_M, BLOCK_D, not EVEN)
    store_rows(dq_ptr, dq * scale, first_m, stride_dqm, sq, D, BLOCK_M, BLOCK_D, not EVEN)
    if BINS:
        place = ((b * tiles_m + pid_m) * H + h) * BINS
        tl.store(histogram_ptr + place + tl.arange(0, BINS), histogram)


def attention_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    do: torch.Tensor,
    lse: torch.Tensor,
    call: AttentionCall,
    *,
    dbias: torch.Tensor | None,
    with_distances: bool,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq in q's dtype, delta shaped as lse and, if asked for, ddistances [H, 2 max_distance + 1], both in float32.

    dbias [B, H, Sq, Sk] or None is written where a query sees a key's tile; give zeros if tiles are skipped.
    """
    batch, sq, heads, d = q.shape
    sk, target = k.shape[1], target_of(q.device)
    config = choose_attention("dq", target, D=d, dtype=q.dtype, call=call)
    tiles_m = triton.cdiv(sq, config.block_m)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty_like(lse)
    width = 2 * call.max_distance + 1
    bins = max(config.block_n, triton.next_power_of_2(width)) if with_distances else 0
    parts = torch.empty(batch * tiles_m, heads, bins, dtype=torch.float32, device=q.device) if bins else None
    launch(
        _attention_dq_kernel,
        (tiles_m * batch * heads,),
        config,
        q,
        k,
        v,
        o,
        do,
        lse,
        delta,
        dq,
        dbias,
        parts,
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
        *do.stride()[:3],
        *dq.stride()[:3],
        *((0, 0, 0) if dbias is None else dbias.stride()[:3]),
        *call.strides,
        *call.numbers,
        G=heads // k.shape[2],
        TERMS=call.terms,
        D=d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_k,
        BINS=bins,
        EVEN=call.is_even(sq, sk),
        PRECISION=dot_precision(precision, q.dtype, target),
    )
    if parts is None:
        return dq, delta, None
    ddistances = torch.empty(heads, width, dtype=torch.float32, device=q.device)
    sum_parts(parts, ddistances)
    return dq, delta, ddistances
