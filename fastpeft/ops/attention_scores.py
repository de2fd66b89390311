"""Which keys a stretch of queries sees, and what is added to their scores: what the passes of attention_torch.py build tiles of.

A Segment is one sequence, or the whole batch where nothing is packed: m queries, n keys, query i beside key i + n - m. Terms
of the distance alone, T5's relative bias and ALiBi, are one vector per head over the m + n - 1 distances; a tile of them is a
sliding window over it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastpeft.ops.attention_terms import Settings, Terms
from fastpeft.reference.attention import distance_buckets

HIDDEN = float("-inf")


@dataclass
class Segment:
    """Queries first_q to first_q + m and keys first_k to first_k + n of a call, with its terms."""

    terms: Terms
    settings: Settings
    first_q: int
    m: int
    first_k: int
    n: int
    by_distance: torch.Tensor | None = None  # [B or 1, H, m + n - 1] at index d + n - 1, or None

    @property
    def offset(self) -> int:
        return self.n - self.m

    def columns(self, r0: int, r1: int) -> tuple[int, int]:
        """The keys [c0, c1) that queries [r0, r1) may see; c1 <= c0 if none."""
        left, right = self.settings.left, self.settings.right
        c0 = 0 if left is None else max(0, r0 + self.offset - left)
        c1 = self.n if right is None else min(self.n, r1 + self.offset + right)
        return c0, c1

    def all_visible(self, r0: int, r1: int, c0: int, c1: int) -> bool:
        """Does every query of [r0, r1) see every key of [c0, c1), but for padding?"""
        left, right = self.settings.left, self.settings.right
        return (left is None or c0 >= r1 - 1 + self.offset - left) and (
            right is None or c1 - 1 <= r0 + self.offset + right
        )

    def hidden(self, r0: int, r1: int, c0: int, c1: int, device: torch.device) -> torch.Tensor:
        """[rows, columns] booleans: True where the window hides a key."""
        i = torch.arange(r0, r1, device=device)[:, None] + self.offset
        distance = torch.arange(c0, c1, device=device) - i
        left, right = self.settings.left, self.settings.right
        outside = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            outside |= distance < -left
        if right is not None:
            outside |= distance > right
        return outside

    def hide_(self, scores: torch.Tensor, r0: int, r1: int, c0: int, c1: int) -> None:
        """Write -inf into scores [..., rows, columns] where the window hides a key: only columns with both kinds are touched."""
        left, right = self.settings.left, self.settings.right
        first_full = c0 if left is None else min(c1, max(c0, r1 - 1 + self.offset - left))
        last_full = c1 if right is None else max(c0, min(c1, r0 + self.offset + right + 1))
        if first_full >= last_full:
            parts = [(c0, c1)]
        else:
            parts = [(c0, first_full), (last_full, c1)]
        for a, b in parts:
            if a < b:
                scores[..., a - c0 : b - c0].masked_fill_(self.hidden(r0, r1, a, b, scores.device), HIDDEN)

    def bias(self, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor | None:
        """The slice [B or 1, H or 1, rows or 1, columns] of the additive bias."""
        bias = self.terms.bias
        if bias is None:
            return None
        rows = slice(None) if bias.shape[2] == 1 else slice(self.first_q + r0, self.first_q + r1)
        return bias[:, :, rows, self.first_k + c0 : self.first_k + c1]

    def padding(self, c0: int, c1: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, 1, columns]: 0 for keys to attend to, -inf for padding."""
        mask = self.terms.key_padding_mask
        if mask is None:
            return None
        mask = mask[:, None, None, self.first_k + c0 : self.first_k + c1]
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, HIDDEN)

    def toeplitz(self, r0: int, r1: int, c0: int, c1: int) -> torch.Tensor | None:
        """[B or 1, H, rows, columns]: what depends on the distance only."""
        if self.by_distance is None:
            return None
        start = c0 + self.m - r1  # of the last row; each row above it begins one further
        windows = self.by_distance[..., start : start + (c1 - c0) + (r1 - r0) - 1].unfold(-1, c1 - c0, 1)
        return windows.flip(-2)

    def added(
        self, b: slice, heads: slice, r0: int, r1: int, c0: int, c1: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """The sum of all terms, broadcast over [B, H, rows, columns] of batch `b` and `heads`, without the window; or None."""
        total = None
        for term in (self.toeplitz(r0, r1, c0, c1), self.bias(r0, r1, c0, c1), self.padding(c0, c1, dtype)):
            if term is None:
                continue
            term = term[b] if term.shape[0] > 1 else term
            term = term[:, heads] if term.shape[1] > 1 else term
            total = term.to(dtype) if total is None else total + term
        return total


def segments(m: int, n: int, heads: int, terms: Terms, settings: Settings, dtype: torch.dtype) -> Iterator[Segment]:
    """The packed sequences, or the one that is the whole call; those without a query or a key are left out."""
    if terms.cu_seqlens_q is None:
        ends = [(0, m, 0, n)]
    else:
        starts_q, starts_k = terms.cu_seqlens_q.tolist(), terms.cu_seqlens_k.tolist()
        ends = zip(starts_q[:-1], starts_q[1:], starts_k[:-1], starts_k[1:], strict=True)
    for q0, q1, k0, k1 in ends:
        if q1 > q0 and k1 > k0:
            segment = Segment(terms, settings, q0, q1 - q0, k0, k1 - k0)
            if terms.table is not None or terms.alibi_slopes is not None:
                segment.by_distance = _by_distance(segment, heads, dtype)
            yield segment


def _distances(segment: Segment, device: torch.device) -> torch.Tensor:
    """j - i - offset, from that of the first key and the last query to that of the last key and the first query."""
    return torch.arange(1 - segment.n, segment.m, device=device)


def _by_distance(segment: Segment, heads: int, dtype: torch.dtype) -> torch.Tensor:
    terms = segment.terms
    total = torch.zeros(1, 1, 1, dtype=dtype)
    if terms.table is not None:
        total = terms.table.to(dtype)[bucket_of(segment)].mT[None]
    if terms.alibi_slopes is not None:
        slopes = terms.alibi_slopes.to(dtype).reshape(-1, heads, 1)
        total = total.to(slopes.device) - slopes * _distances(segment, slopes.device).abs()
    return total.contiguous()


def bucket_of(segment: Segment) -> torch.Tensor:
    """The bucket of the table that each distance of the segment takes: [m + n - 1], int64."""
    table, settings = segment.terms.table, segment.settings
    distance = _distances(segment, table.device)
    return distance_buckets(distance, table.shape[0], settings.bidirectional, settings.max_distance)


def sum_by_distance(ds: torch.Tensor) -> torch.Tensor:
    """[H, rows + columns - 1]: sums of ds [H, rows, columns] along its diagonals, in the order of `by_distance`."""
    heads, rows, columns = ds.shape
    width = rows + columns - 1
    skewed = torch.zeros(heads, rows * width, dtype=ds.dtype, device=ds.device)
    # row i begins at column rows - 1 - i of its line: all elements of one distance stand below each other
    skewed.as_strided(ds.shape, (rows * width, width - 1, 1), rows - 1).copy_(ds)
    return skewed.view(heads, rows, width).sum(1)
