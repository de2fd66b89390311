"""Attention by library calls: what a CPU runs, and any device on request. Signatures and what is kept: attention_terms.py.

On a CPU PyTorch's own flash kernel does the products wherever it can (`aten::_scaled_dot_product_flash_attention_for_cpu`,
what scaled_dot_product_attention calls): it takes a causal flag, aligned at the first key, and an additive mask without a
gradient. What it lacks is put around it by pieces of queries and keys:

    Sq < Sk, causal   two pieces, the keys before the square and the square, joined by their lse
    sinks             lse' = log(exp(lse) + exp(sink)),  o' = o exp(lse - lse'); its backward takes o' and lse' as they are
    window, biases    short stretches of queries against the keys that they see, with a mask of that size

Softcap, dropout, gradients of biases, and other devices go through attention_tiles.py; bfloat16 on a CPU with AVX-512 BF16, where
nothing but causality, a window or padding enters, through attention_bf16.py. Half precision is widened where this CPU
computes float32 faster: measured without AMX (Xeon, 1 thread, D 64, 1 x 8 heads x 1024) bfloat16 takes 32 + 91 ms forward and
backward as it is and 22 + 52 ms widened; with 64 tokens 2.8 + 35 and 3.7 + 9 ms.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastpeft import backend
from fastpeft.ops import attention_bf16, attention_tiles
from fastpeft.ops.attention_scores import Segment, segments
from fastpeft.ops.attention_sdpa import WIDE_FORWARD_FROM
from fastpeft.ops.attention_terms import Settings, Terms
from fastpeft.ops.fast_matmul import small_products

_ROWS = 128  # queries of a piece where a mask is made for it
_MASK = 2**20  # elements of such a mask, at most, unless one head of 16 queries has more

_SINKS = Terms._fields.index("sinks")  # put around the kernel's result, whatever made it


class _Piece(NamedTuple):
    """Queries `rows` of batch `b` and heads `heads` against keys `columns`; mask is added to the scores."""

    b: slice
    heads: slice
    kv_heads: slice
    rows: slice
    columns: slice
    causal: bool
    mask: torch.Tensor | None
    joins: bool = False  # these queries have another piece too


def _by_flash(q, terms: Terms, settings: Settings, needs=()) -> bool:
    """Does PyTorch's CPU kernel do this call, or, given `needs`, its backward pass?"""
    wants_bias = len(needs) > 4 and (needs[3] or needs[4])
    return q.device.type == "cpu" and settings.softcap is None and not settings.threshold and not wants_bias


def _pieces(segment: Segment, q, k, dtype) -> Iterator[_Piece]:
    (batch, _, heads, _), kv_heads = q.shape, k.shape[2]
    settings, terms, m, n = segment.settings, segment.terms, segment.m, segment.n
    everything = slice(0, batch), slice(0, heads), slice(0, kv_heads)

    def place(rows, columns):
        return (
            slice(segment.first_q + rows[0], segment.first_q + rows[1]),
            slice(segment.first_k + columns[0], segment.first_k + columns[1]),
        )

    parts = [segment.by_distance is not None, terms.bias is not None, terms.key_padding_mask is not None]
    none_left = settings.left is None or settings.left >= n - 1
    visible = segment.all_visible(0, m, 0, n)
    square = none_left and settings.right == 0 and n <= m
    if sum(parts) <= 1 and not parts[0] and (visible or square):  # one mask that is there already, or none
        first = m - n if square and not visible else 0
        mask = segment.bias(first, m, 0, n) if parts[1] else segment.padding(0, n, dtype)
        mask = mask if mask is None or mask.dtype in (dtype, torch.float32) else mask.to(dtype)
        yield _Piece(*everything, *place((first, m), (0, n)), square and not visible, mask)
        return
    if none_left and settings.right == 0 and n > m and not any(parts):
        yield _Piece(*everything, *place((0, m), (0, n - m)), False, None, joins=True)
        yield _Piece(*everything, *place((0, m), (n - m, n)), True, None, joins=True)
        return
    group = heads // kv_heads
    per_batch = any(term is not None and term.shape[0] > 1 for term in (terms.bias, terms.key_padding_mask))
    per_batch |= segment.by_distance is not None and segment.by_distance.shape[0] > 1
    per_head = segment.by_distance is not None or (terms.bias is not None and terms.bias.shape[1] > 1)
    widest = n if None in (settings.left, settings.right) else min(n, settings.left + settings.right + _ROWS)
    rows = min(m, _ROWS, max(16, _MASK // (widest * (group if per_head else 1))))
    kv_step = max(1, min(kv_heads, _MASK // (rows * widest * group))) if per_head else kv_heads
    b_step = max(1, _MASK // (rows * widest * (kv_step * group if per_head else 1))) if per_batch else batch
    for b in range(0, batch, b_step):
        for h in range(0, kv_heads, kv_step):
            kv = slice(h, min(kv_heads, h + kv_step))
            of_queries, of_batch = slice(kv.start * group, kv.stop * group), slice(b, min(batch, b + b_step))
            for r0 in range(0, m, rows):
                r1 = min(m, r0 + rows)
                c0, c1 = segment.columns(r0, r1)
                if c0 >= c1:
                    continue
                mask = segment.added(of_batch, of_queries, r0, r1, c0, c1, dtype)
                if not segment.all_visible(r0, r1, c0, c1):
                    shape = (1, 1, r1 - r0, c1 - c0) if mask is None else (*mask.shape[:2], r1 - r0, c1 - c0)
                    mask = q.new_zeros(shape, dtype=dtype) if mask is None else mask.expand(shape).clone()
                    segment.hide_(mask, r0, r1, c0, c1)
                yield _Piece(of_batch, of_queries, kv, *place((r0, r1), (c0, c1)), False, mask)


def _is_plain(q, k, terms, settings) -> bool:
    """Is this the call that PyTorch's kernel knows by itself? Found out first: a decoded token costs little more than asking."""
    bounded = settings.left is not None or (settings.right is not None and (settings.right or q.shape[1] != k.shape[1]))
    return not bounded and all(term is None for i, term in enumerate(terms) if i != _SINKS)


def _rows_contiguous(x):
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _heads_first(x, piece, tokens, heads):
    return _rows_contiguous(x[piece.b, tokens, heads].transpose(1, 2))


def _is_whole(piece, q, k):
    """Does the piece hold every query and key of the call?"""
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return all(
        (part.start or 0) == 0 and part.stop == size
        for part, size in zip((piece.b, piece.heads, piece.rows, piece.columns), sizes, strict=True)
    )


def forward(q, k, v, terms: Terms, settings: Settings, keep: bool = False):
    """(o [B, Sq, H, D], lse [B, H, Sq]); lse is 0 for a query that sees no key. From attention_bf16.py: what it keeps, [N]."""
    if attention_bf16.covers(q, k, terms, settings):
        return attention_bf16.forward(q, k, v, terms, settings, keep)
    if not _by_flash(q, terms, settings):
        return attention_tiles.forward(q, k, v, terms, settings)
    dtype = q.dtype
    widen = dtype == torch.bfloat16 and (q.shape[1] >= WIDE_FORWARD_FROM or terms.sinks is not None)
    if (widen and not backend.cpu_multiplies_bfloat16()) or (dtype == torch.float16 and terms.sinks is not None):
        q, k, v = q.float(), k.float(), v.float()
    with small_products():
        o, lse = _forward(q, k, v, terms, settings)
    if terms.sinks is not None:
        joined = torch.logaddexp(lse, terms.sinks.to(lse.dtype)[:, None])
        o = o * (lse - joined).exp_().transpose(1, 2)[..., None].to(o.dtype)
        lse = joined
    return o.to(dtype), lse


def _forward(q, k, v, terms, settings):
    if _is_plain(q, k, terms, settings):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *map(_rows_contiguous, (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))),
            0.0,
            settings.right == 0,
            scale=settings.scale,
        )
        return o.transpose(1, 2), lse
    (batch, sq, heads, _), dtype = q.shape, torch.promote_types(q.dtype, torch.float32)
    o = lse = None
    for segment in segments(sq, k.shape[1], heads, terms, settings, dtype):
        for piece in _pieces(segment, q, k, _mask_dtype(q)):
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q, piece, piece.rows, piece.heads),
                _heads_first(k, piece, piece.columns, piece.kv_heads),
                _heads_first(v, piece, piece.columns, piece.kv_heads),
                0.0,
                piece.causal,
                attn_mask=piece.mask,
                scale=settings.scale,
            )
            part = part.transpose(1, 2)
            if _is_whole(piece, q, k):
                return part, part_lse
            if o is None:
                o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
                lse = torch.zeros(batch, heads, sq, dtype=dtype, device=q.device)
            place, place_lse = o[piece.b, piece.rows, piece.heads], lse[piece.b, piece.heads, piece.rows]
            if piece.joins and piece.causal:  # the second of two: the first is there
                joined = torch.logaddexp(place_lse, part_lse)
                for target, of in ((place, place_lse), (part, part_lse)):
                    target.mul_((of - joined).exp_().transpose(1, 2)[..., None])
                place += part
                place_lse.copy_(joined)
            else:
                place.copy_(part)
                place_lse.copy_(part_lse)
    if o is None:  # no sequence has a key
        o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.zeros(batch, heads, sq, dtype=dtype, device=q.device)
    return o, lse


def _mask_dtype(q):
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def backward(do, q, k, v, o, lse, terms: Terms, settings: Settings, needs):
    """(dq, dk, dv, dbias, dtable, dsinks), None where not needed."""
    if attention_bf16.covers(q, k, terms, settings):
        kept = lse if lse.dim() == 1 else q.new_empty(0)  # an operator of torch.library has no place for it
        return *attention_bf16.backward(do, q, k, v, kept, terms, settings, needs), None, None, None
    if not _by_flash(q, terms, settings, needs):
        return attention_tiles.backward(do, q, k, v, o, lse, terms, settings, needs)
    dtype = q.dtype
    delta = (do * o).sum(-1, dtype=lse.dtype) if needs[5] else None
    dsinks = attention_tiles.sink_gradient(delta, lse, terms.sinks) if needs[5] else None
    if not any(needs[:3]):
        return None, None, None, None, None, dsinks
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not backend.cpu_multiplies_bfloat16()):
        do, q, k, v, o = (tensor.float() for tensor in (do, q, k, v, o))
    with small_products():
        grads = _backward(do, q, k, v, o, lse, terms, settings)
    grads = [grad.to(dtype) if needed else None for grad, needed in zip(grads, needs[:3], strict=True)]
    return *grads, None, None, dsinks


def _backward(do, q, k, v, o, lse, terms, settings):
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = None
    for segment in segments(q.shape[1], k.shape[1], q.shape[2], terms, settings, wide):
        for piece in _pieces(segment, q, k, _mask_dtype(q)):
            of_queries = (piece.b, piece.rows, piece.heads)
            of_keys = (piece.b, piece.columns, piece.kv_heads)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(do, piece, piece.rows, piece.heads),
                _heads_first(q, piece, piece.rows, piece.heads),
                _heads_first(k, piece, piece.columns, piece.kv_heads),
                _heads_first(v, piece, piece.columns, piece.kv_heads),
                _heads_first(o, piece, piece.rows, piece.heads),
                lse[piece.b, piece.heads, piece.rows],
                0.0,
                piece.causal,
                attn_mask=piece.mask,
                scale=settings.scale,
            )
            parts = [part.transpose(1, 2) for part in parts]
            if _is_whole(piece, q, k):
                return parts
            if sums is None:
                sums = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
            for total, part, place in zip(sums, parts, (of_queries, of_keys, of_keys), strict=True):
                total[place] += part
    return sums or [torch.zeros_like(x) for x in (q, k, v)]
