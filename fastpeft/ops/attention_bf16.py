"""Attention in bfloat16 by PyTorch's batched products, on a CPU that has instructions for them: AVX-512 BF16.

Library products of bfloat16 are three times as fast as those of float32 there, which PyTorch's flash kernel is not. A tile is
some heads of a stretch of queries against every key that these see, so that a softmax needs one tile and no statistics:

    forward   p = softmax(scale q k^T),  o = p v
    backward  p again,  dp = do v^T,  ds = p (dp - rowsum(p dp)),  dq = scale ds k,  dk += scale ds^T q,  dv += p^T do

p is kept where all of it takes no more than q, k, v and o: of short sequences, up to about 270 tokens of 9 heads on 3 of 64
under causality.

Products, scores and weights are rounded to bfloat16, as by plain calls; what is in a softmax and the sums over tiles is float32.
Measured on an AMD EPYC (Zen 4, 1 thread), forward and backward in ms, beside scaled_dot_product_attention and transformers' eager
code, 9 query heads on 3 key heads of 64, causal: 4 x 256 tokens 5.7 + 10.9 (8.5 where p is kept), 9.3 + 23.7, 11.6 + 22.0;
16 x 64 tokens 3.6 + 6.9 (5.0), 3.8 + 20.4, 5.1 + 7.0; 1 x 1024 tokens 18.7 + 36.7, 25.3 + 50.0, 62.3 + 95.7.
"""

import math
from collections.abc import Iterator

import torch

from fastpeft import backend
from fastpeft.ops.attention_scores import Segment
from fastpeft.ops.attention_terms import Settings, Terms

_TILE = 2**20  # scores of a tile: 2 MiB
_ROWS = 256  # queries of a tile, at most
_WINDOW_ROWS = 64  # where causality or a window hides keys: shorter stretches multiply fewer hidden ones
_WORTH = 2**17  # scores from which on this is faster than PyTorch's kernel
_KEPT = 1.0  # p is kept up to so many times the bytes of q, k, v and o
_FAR = -1e30  # added to the score of a padded key: finite, so that a row of them is no NaN before it is cleared


def covers(q, k, terms: Terms, settings: Settings) -> bool:
    """bfloat16 on such a CPU, causality, windows and padding, and every query has a key beside it."""
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or settings.softcap is not None or settings.threshold:
        return False
    if any(term is not None for name, term in zip(terms._fields, terms, strict=True) if name != "key_padding_mask"):
        return False
    bounded = settings.left is not None or settings.right is not None
    if bounded and q.shape[1] != k.shape[1]:
        return False
    return worth(q, k)


def worth(q, k) -> bool:
    """Is there such a CPU, and enough to do for it?"""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[1]
    return q.shape[1] > 1 and scores >= _WORTH and backend.cpu_dots_bfloat16()


def _groups(x, b: slice, tokens: slice, heads: slice, kv: int) -> torch.Tensor:
    """[b * kv, G * tokens, D] of x [B, S, H, D]: the query heads of a key head are rows of one product."""
    part = x[b, tokens, heads]
    batch, size, count, d = part.shape
    return part.view(batch, size, kv, count // kv, d).permute(0, 2, 3, 1, 4).reshape(batch * kv, -1, d)


def _tiles(q, k, segment: Segment) -> Iterator[tuple[slice, slice, int, int, int, int]]:
    """(batches, key heads, r0, r1, c0, c1): tiles of one (batches, key heads) follow each other."""
    (batch, m, heads, _), (_, n, kv_heads, _) = q.shape, k.shape
    group = heads // kv_heads
    bounded = segment.settings.left is not None or segment.settings.right is not None
    rows = min(m, _WINDOW_ROWS if bounded else _ROWS, max(16, _TILE // (group * n)))
    together = max(1, _TILE // (group * rows * n))  # key heads of whatever batch
    b_step, h_step = max(1, together // kv_heads), min(kv_heads, together)
    for b in range(0, batch, b_step):
        for h in range(0, kv_heads, h_step):
            for r0 in range(0, m, rows):
                r1 = min(m, r0 + rows)
                c0, c1 = segment.columns(r0, r1)
                yield slice(b, min(batch, b + b_step)), slice(h, min(kv_heads, h + h_step)), r0, r1, c0, c1


def _weights(queries, keys, segment: Segment, b: slice, r0: int, r1: int, c0: int, c1: int, out=None) -> torch.Tensor:
    """p [b * kv, G * rows, columns] of scaled queries, in `out` if there is one."""
    s = torch.bmm(queries, keys.mT)
    if not segment.all_visible(r0, r1, c0, c1):
        segment.hide_(s.view(-1, r1 - r0, c1 - c0), r0, r1, c0, c1)
    mask = segment.terms.key_padding_mask
    if mask is None:
        return torch.softmax(s, -1) if out is None else torch.ops.aten._softmax.out(s, -1, False, out=out)
    attend = mask[b, None, c0:c1].to(s.dtype)  # [b, 1, columns]
    by_batch = s.view(attend.shape[0], -1, c1 - c0)
    by_batch.add_((1 - attend).mul_(_FAR))
    p = torch.softmax(by_batch, -1)
    return torch.mul(p, attend, out=p if out is None else out.view(p.shape)).view(s.shape)


class _Kept:
    """p of every tile, one behind the other."""

    def __init__(self, flat: torch.Tensor):
        self.flat, self.first = flat, 0

    def of(self, *shape: int) -> torch.Tensor | None:
        """The place of the next tile; None where nothing is kept."""
        if not self.flat.numel():
            return None
        first, self.first = self.first, self.first + math.prod(shape)
        return self.flat[first : self.first].view(shape)


def _scores(q, k, segment: Segment) -> int:
    """Elements of p in all tiles."""
    group = q.shape[2] // k.shape[2]
    tiles = ((b, kv, (r1 - r0) * (c1 - c0)) for b, kv, r0, r1, c0, c1 in _tiles(q, k, segment))
    return sum((b.stop - b.start) * (kv.stop - kv.start) * group * area for b, kv, area in tiles)


def forward(q, k, v, terms: Terms, settings: Settings, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [B, Sq, H, D], p of all tiles [N] or [0]): only with `keep`, and where it is small."""
    o = torch.empty(q.shape, dtype=q.dtype)
    segment = Segment(terms, settings, 0, q.shape[1], 0, k.shape[1])
    group, block = q.shape[2] // k.shape[2], None
    scores = _scores(q, k, segment) if keep else 0
    kept = _Kept(q.new_empty(scores if scores <= _KEPT * 2 * (q.numel() + k.numel()) else 0))
    for b, kv, r0, r1, c0, c1 in _tiles(q, k, segment):
        count, heads, every = kv.stop - kv.start, slice(kv.start * group, kv.stop * group), slice(None)
        if block != (b, kv):
            block = b, kv
            keys, values = (_groups(x, b, every, kv, count) for x in (k, v))
        queries = _groups(q, b, slice(r0, r1), heads, count).mul(settings.scale)
        place = kept.of(queries.shape[0], queries.shape[1], c1 - c0)
        p = _weights(queries, keys[:, c0:c1], segment, b, r0, r1, c0, c1, place)
        part = torch.bmm(p, values[:, c0:c1])
        _put(o, part, b, slice(r0, r1), heads)
    return o, kept.flat


def _put(target, part, b: slice, tokens: slice, heads: slice) -> None:
    """target [B, S, H, D] at (b, tokens, heads) = part, which is as `_groups` has it."""
    place = target[b, tokens, heads]
    batch, size, count, d = place.shape
    place.copy_(part.view(batch, count, size, d).transpose(1, 2))


def backward(do, q, k, v, flat, terms: Terms, settings: Settings, needs) -> tuple[torch.Tensor | None, ...]:
    """(dq, dk, dv), None where not needed. flat: what `forward` kept, or [0]."""
    need_q, need_k, need_v, *_ = needs
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) if n else None for x, n in zip((q, k, v), needs, strict=False))
    segment = Segment(terms, settings, 0, q.shape[1], 0, k.shape[1])
    group, block, kept = q.shape[2] // k.shape[2], None, _Kept(flat)

    def finish():
        for target, total in ((dk, dk_sum), (dv, dv_sum)):
            if target is not None:
                _put(target, total, block[0], slice(None), block[1])

    for b, kv, r0, r1, c0, c1 in _tiles(q, k, segment):
        count, heads, every = kv.stop - kv.start, slice(kv.start * group, kv.stop * group), slice(None)
        if block != (b, kv):
            if block is not None:
                finish()
            block = b, kv
            keys, values = (_groups(x, b, every, kv, count) for x in (k, v))
            dk_sum = torch.zeros(keys.shape, dtype=torch.float32) if need_k else None
            dv_sum = torch.zeros(keys.shape, dtype=torch.float32) if need_v else None
        queries = _groups(q, b, slice(r0, r1), heads, count).mul(settings.scale)
        grads = _groups(do, b, slice(r0, r1), heads, count)
        p = kept.of(queries.shape[0], queries.shape[1], c1 - c0)
        if p is None:
            p = _weights(queries, keys[:, c0:c1], segment, b, r0, r1, c0, c1)
        if need_v:
            dv_sum[:, c0:c1] += torch.bmm(p.mT, grads)
        if not (need_q or need_k):
            continue
        dp = torch.bmm(grads, values[:, c0:c1].mT)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        if need_q:
            _put(dq, torch.bmm(ds, keys[:, c0:c1]).mul_(settings.scale), b, slice(r0, r1), heads)
        if need_k:
            dk_sum[:, c0:c1] += torch.bmm(ds.mT, queries)
    finish()
    return dq, dk, dv
