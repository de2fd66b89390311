"""Exact attention by tiles of scores: softcap, dropout, and gradients of biases, which PyTorch's own CPU kernel lacks.

A tile is some heads of a stretch of queries against all keys that these may see, so a softmax needs one tile and no running
maximum; its size is bounded, so memory grows with Sq + Sk. Keys that no query of a tile sees are not multiplied. Per tile,
with base the sum of all biases:

    forward   s = cap(scale q k^T) + base,  e = exp(s - max),  lse = max + log sum e,  o = keep e v / (sum e (1 - p))
    backward  p = exp(s - lse),  dp = keep do v^T / (1 - p),  ds = p (dp - rowsum(do o)),  dq = scale ds k,  dk += scale ds^T q,
              dv += (keep p / (1 - p))^T do,  dbias += ds,  dtable by sums of ds along diagonals

Statistics, products and sums are taken in float32 (float64 for float64). Tiles follow each other in one order: equal inputs
give equal bits. The dropout mask of a tile is drawn from (seed, number of the tile).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastpeft.ops.attention_scores import Segment, bucket_of, segments, sum_by_distance
from fastpeft.ops.attention_terms import Settings, Terms
from fastpeft.ops.dropout import LEVELS, keep_mask

_TILE = 2**18  # scores of a tile: 1 MiB of float32 stays in a core's cache between its passes
_ROWS = 256
_WINDOW_ROWS = 128  # where a window or causality hides keys: shorter stretches multiply fewer hidden ones
_GOLDEN = 0x9E3779B97F4A7C15  # spreads the tiles' numbers over the bits of a seed
_SEEDS = 2**63 - 1


class _Tile(NamedTuple):
    """Batch b, key heads [h0, h1), queries [r0, r1) and keys [c0, c1) of a segment."""

    b: int
    h0: int
    h1: int
    r0: int
    r1: int
    c0: int
    c1: int
    number: int


def _tiles(segment: Segment, batch: int, kv_heads: int, group: int, first: int) -> Iterator[_Tile]:
    """Tiles with a visible key, those of one (b, h0) together; numbers go on from `first`."""
    settings = segment.settings
    bounded = settings.left is not None or settings.right is not None
    m, n = segment.m, segment.n
    widest = (
        n if settings.left is None or settings.right is None else min(n, settings.left + settings.right + 1 + _ROWS)
    )
    rows = min(m, _WINDOW_ROWS if bounded else _ROWS, max(16, _TILE // (group * widest)))
    heads = max(1, min(kv_heads, _TILE // (rows * group * widest)))
    number = first
    for b in range(batch):
        for h0 in range(0, kv_heads, heads):
            for r0 in range(0, m, rows):
                r1 = min(m, r0 + rows)
                c0, c1 = segment.columns(r0, r1)
                if c0 < c1:
                    yield _Tile(b, h0, min(kv_heads, h0 + heads), r0, r1, c0, c1, number)
                number += 1


def _all_tiles(q, k, terms, settings, dtype) -> Iterator[tuple[Segment, _Tile]]:
    (batch, sq, heads, _), sk, kv_heads = q.shape, k.shape[1], k.shape[2]
    first = 0
    for segment in segments(sq, sk, heads, terms, settings, dtype):
        tile = None
        for tile in _tiles(segment, batch, kv_heads, heads // kv_heads, first):
            yield segment, tile
        first = first if tile is None else tile.number + 1


def keep_of(q: torch.Tensor, k: torch.Tensor, terms: Terms, settings: Settings) -> torch.Tensor:
    """[B, H, Sq, Sk] booleans: the dropout mask that the passes draw; True where no tile reaches. For tests."""
    batch, sq, heads, _ = q.shape
    kept = torch.ones(batch, heads, sq, k.shape[1], dtype=torch.bool, device=q.device)
    group = heads // k.shape[2]
    for segment, t in _all_tiles(q, k, terms, settings, torch.float32):
        like = q.new_empty(t.h1 - t.h0, group * (t.r1 - t.r0), t.c1 - t.c0)
        mask = _keep(like, t, settings).view((t.h1 - t.h0) * group, t.r1 - t.r0, t.c1 - t.c0)
        rows, columns = segment.first_q + t.r0, segment.first_k + t.c0
        place = kept[t.b, t.h0 * group : t.h1 * group]
        place[:, rows : rows + t.r1 - t.r0, columns : columns + t.c1 - t.c0] = mask.bool()
    return kept


def _keep(like, tile, settings):
    seed = (settings.seed + (tile.number + 1) * _GOLDEN) & _SEEDS
    return keep_mask(seed=seed, like=like, threshold=settings.threshold)


def _queries(x, segment, t, group, dtype):
    """[key heads, group * rows, D] of x [B, Sq, H, D]: the query heads of a key head are rows of one product."""
    rows = slice(segment.first_q + t.r0, segment.first_q + t.r1)
    part = x[t.b, rows, t.h0 * group : t.h1 * group].transpose(0, 1)
    return part.to(dtype).reshape(t.h1 - t.h0, group * (t.r1 - t.r0), x.shape[3])


def _keys(x, segment, t, dtype):
    """[key heads, n, D] of x [B, Sk, Hkv, D]."""
    return x[t.b, segment.first_k : segment.first_k + segment.n, t.h0 : t.h1].transpose(0, 1).to(dtype).contiguous()


def _scores(segment, t, queries, keys, group, base, *, overwrite=False):
    """(s, tanh or None): the tile's scores [key heads, group * rows, columns], hidden ones -inf; base is added or None.

    overwrite: the scores may take the place of base.
    """
    settings = segment.settings
    transposed = keys[:, t.c0 : t.c1].mT
    shape = t.h1 - t.h0, group * (t.r1 - t.r0), t.c1 - t.c0
    tanh = None
    if settings.softcap is None:
        if base is None:
            s = torch.bmm(queries, transposed).mul_(settings.scale)
        else:
            s = base.expand(-1, shape[0] * group, t.r1 - t.r0, shape[2]).reshape(shape)
            if overwrite:  # what was only expanded is copied first
                s = s.contiguous().baddbmm_(queries, transposed, alpha=settings.scale)
            else:
                s = torch.baddbmm(s, queries, transposed, alpha=settings.scale)
    else:
        tanh = torch.bmm(queries, transposed).mul_(settings.scale / settings.softcap).tanh_()
        s = tanh * settings.softcap
        if base is not None:
            s.view(-1, group * shape[0], t.r1 - t.r0, shape[2]).add_(base)
    if not segment.all_visible(t.r0, t.r1, t.c0, t.c1):
        segment.hide_(s.view(shape[0] * group, t.r1 - t.r0, shape[2]), t.r0, t.r1, t.c0, t.c1)
    return s, tanh


def _base(segment, t, group, dtype):
    heads = slice(t.h0 * group, t.h1 * group)
    return segment.added(slice(t.b, t.b + 1), heads, t.r0, t.r1, t.c0, t.c1, dtype)


def forward(q, k, v, terms: Terms, settings: Settings):
    """(o [B, Sq, H, D], lse [B, H, Sq]) as attention_terms.py says."""
    (batch, sq, heads, _), kv_heads = q.shape, k.shape[2]
    group, dtype = heads // kv_heads, torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, sq), 0.0, dtype=dtype, device=q.device)
    sinks = None if terms.sinks is None else terms.sinks.to(dtype)
    kept = 1.0 - settings.threshold / LEVELS
    keys = values = block = None
    for segment, t in _all_tiles(q, k, terms, settings, dtype):
        if block != (segment.first_k, segment.first_q, t.b, t.h0):
            block = segment.first_k, segment.first_q, t.b, t.h0
            keys, values = _keys(k, segment, t, dtype), _keys(v, segment, t, dtype)
        s, _ = _scores(segment, t, _queries(q, segment, t, group, dtype), keys, group, _base(segment, t, group, dtype))
        largest = s.amax(-1, keepdim=True)
        if sinks is not None:
            sink = sinks[t.h0 * group : t.h1 * group].view(-1, group, 1).expand(-1, -1, t.r1 - t.r0)
            sink = sink.reshape(t.h1 - t.h0, -1, 1)
            largest = torch.maximum(largest, sink)
        largest.masked_fill_(largest == float("-inf"), 0.0)
        s.sub_(largest).exp_()
        total = s.sum(-1, keepdim=True)
        if sinks is not None:
            total += (sink - largest).exp_()
        nothing = total == 0
        log_total = (total.log() + largest).masked_fill_(nothing, 0.0)
        total.masked_fill_(nothing, 1.0)
        if settings.threshold:
            s.mul_(_keep(s, t, settings))
            total *= kept
        part = torch.bmm(s, values[:, t.c0 : t.c1]).div_(total)
        rows, in_heads = slice(segment.first_q + t.r0, segment.first_q + t.r1), slice(t.h0 * group, t.h1 * group)
        o[t.b, rows, in_heads] = part.view(-1, t.r1 - t.r0, part.shape[-1]).transpose(0, 1).to(o.dtype)
        lse[t.b, in_heads, rows] = log_total.view(-1, t.r1 - t.r0)
    return o, lse


def backward(do, q, k, v, o, lse, terms: Terms, settings: Settings, needs):
    """(dq, dk, dv, dbias, dtable, dsinks), None where not needed; lse is that of `forward` or of attention_torch.py."""
    heads, kv_heads = q.shape[2], k.shape[2]
    group, dtype = heads // kv_heads, lse.dtype
    need_q, need_k, need_v, need_bias, need_table, _ = needs
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dk = torch.zeros(k.shape, dtype=dtype, device=q.device) if need_k else None
    dv = torch.zeros(v.shape, dtype=dtype, device=q.device) if need_v else None
    dbias = torch.zeros(terms.bias.shape, dtype=dtype, device=q.device) if need_bias else None
    dtable = torch.zeros(terms.table.shape, dtype=dtype, device=q.device) if need_table else None
    delta = (do * o).sum(-1, dtype=dtype)  # [B, Sq, H]
    kept = 1.0 - settings.threshold / LEVELS
    diagonals = {}  # of each segment, by its first query: gradients of what depends on the distance, [H, m + n - 1]
    keys = values = block = None
    for segment, t in _all_tiles(q, k, terms, settings, dtype):
        if block != (segment.first_k, segment.first_q, t.b, t.h0):
            block = segment.first_k, segment.first_q, t.b, t.h0
            keys, values = _keys(k, segment, t, dtype), _keys(v, segment, t, dtype)
        size = t.r1 - t.r0
        rows, in_heads = slice(segment.first_q + t.r0, segment.first_q + t.r1), slice(t.h0 * group, t.h1 * group)
        columns = slice(segment.first_k + t.c0, segment.first_k + t.c1)
        queries, grads = (_queries(x, segment, t, group, dtype) for x in (q, do))
        base, minus_lse = _base(segment, t, group, dtype), -lse[t.b, in_heads, rows, None]
        base = minus_lse[None] if base is None else base + minus_lse
        p, tanh = _scores(segment, t, queries, keys, group, base, overwrite=True)
        p.exp_()
        keep = _keep(p, t, settings).div_(kept) if settings.threshold else None
        if need_v:
            weights = p if keep is None else p * keep
            dv[t.b, columns, t.h0 : t.h1] += torch.bmm(weights.mT, grads).transpose(0, 1)
        if not (need_q or need_k or need_bias or need_table):
            continue
        minus_delta = -delta[t.b, rows, in_heads].mT.reshape(t.h1 - t.h0, group * size, 1)
        transposed = values[:, t.c0 : t.c1].mT
        if keep is None:
            ds = torch.baddbmm(minus_delta, grads, transposed)
        else:
            ds = torch.bmm(grads, transposed).mul_(keep).add_(minus_delta)
        ds.mul_(p)
        by_head = ds.view(-1, size, t.c1 - t.c0)
        if need_bias:
            _add_to_bias(dbias, by_head, segment, t, in_heads)
        if need_table:
            new = by_head.new_zeros(heads, segment.m + segment.n - 1) if segment.first_q not in diagonals else None
            _, sums = diagonals.setdefault(segment.first_q, (segment, new))
            start = t.c0 + segment.m - t.r1
            sums[in_heads, start : start + size + t.c1 - t.c0 - 1] += sum_by_distance(by_head)
        if tanh is not None:
            ds.mul_(tanh.square_().neg_().add_(1.0))
        if need_q:
            part = torch.bmm(ds, keys[:, t.c0 : t.c1]).mul_(settings.scale)
            dq[t.b, rows, in_heads] = part.view(-1, size, part.shape[-1]).transpose(0, 1).to(q.dtype)
        if need_k:
            dk[t.b, columns, t.h0 : t.h1] += torch.bmm(ds.mT, queries).mul_(settings.scale).transpose(0, 1)
    for segment, sums in diagonals.values():
        dtable.index_add_(0, bucket_of(segment), sums.mT)
    results = (dq, dk, dv, dbias, dtable)
    inputs = (q, k, v, terms.bias, terms.table)
    dsinks = sink_gradient(delta, lse, terms.sinks) if needs[5] else None
    return *(None if x is None else x.to(like.dtype) for x, like in zip(results, inputs, strict=True)), dsinks


def sink_gradient(delta: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """dsinks [H] = -sum over batch and queries of exp(sink - lse) delta: the sink's weight has no value."""
    share = (sinks.to(lse.dtype)[:, None] - lse).exp_()  # [B, H, Sq]
    return share.mul_(delta.transpose(1, 2)).sum((0, 2)).neg_().to(sinks.dtype)


def _add_to_bias(dbias, ds, segment, t, heads):
    """dbias [B or 1, H or 1, Sq or 1, Sk] += ds [heads, rows, columns] of a tile, summed over what the bias broadcasts."""
    columns = slice(segment.first_k + t.c0, segment.first_k + t.c1)
    target = dbias[t.b if dbias.shape[0] > 1 else 0, :, :, columns]
    if dbias.shape[1] == 1:
        ds = ds.sum(0, keepdim=True)
    else:
        target = target[heads]
    if dbias.shape[2] == 1:
        ds = ds.sum(1, keepdim=True)
    else:
        target = target[:, segment.first_q + t.r0 : segment.first_q + t.r1]
    target += ds
