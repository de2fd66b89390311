"""Attention, term by term, with every score in memory: what the fused implementations must give.

    s = scale * q k^T,  s = softcap * tanh(s / softcap),  s = s + bias + relative bias + alibi,  s = -inf where hidden
    p = exp(s) / (sum over keys of exp(s) + exp(sink)),   o = (keep * p / (1 - dropout_p)) v

Positions: query i stands beside key i + Sk - Sq, so that the last query stands beside the last key, whatever the lengths are;
in packed sequences this holds within each sequence. With d = j - (i + Sk - Sq) the distance of key j from query i:

    window (left, right):  -left <= d <= right is seen;  causal: d <= 0
    relative bias:         table[bucket(d), head], T5's buckets
    alibi:                 -slope * |d|

A query without a visible key gives zeros.

Shapes:  q [B, Sq, H, D], k and v [B, Sk, Hkv, D], Hkv divides H -> o [B, Sq, H, D]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Vaswani et al. 2017, arXiv:1706.03762; Raffel et al. 2020, arXiv:1910.10683 (buckets); Press et al. 2022,
         arXiv:2108.12409 (alibi); Xiao et al. 2024, arXiv:2309.17453 (sinks)
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RelativeBias:
    """T5's bias by distance: s(i, j) += table[bucket(j - i - offset), head].

    table          [buckets, H], with gradient
    bidirectional  keys to the right have buckets of their own; else they share that of distance 0
    max_distance   distances from here on share the last bucket; more than half of the buckets of a side
    """

    table: torch.Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self):
        if self.table.dim() != 2 or not self.table.is_floating_point():
            raise ValueError(
                f"RelativeBias: expected floating table [buckets, H], got {tuple(self.table.shape)} {self.table.dtype}"
            )
        per_side = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        if per_side < 2 or self.max_distance <= per_side // 2:
            raise ValueError(
                f"RelativeBias: expected 2 buckets a side or more and max_distance > half of them, got "
                f"{self.num_buckets} buckets, bidirectional={self.bidirectional}, max_distance={self.max_distance}"
            )

    @property
    def num_buckets(self) -> int:
        return self.table.shape[0]

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket, int64, of each distance d = j - i - offset."""
        return distance_buckets(distance, self.num_buckets, self.bidirectional, self.max_distance)


def distance_buckets(distance: torch.Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> torch.Tensor:
    """T5's buckets: the first half of a side's are single distances, the others grow by a constant factor."""
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        first = torch.zeros_like(distance, dtype=torch.int64)
        distance = (-distance).clamp_min(0)
    exact = num_buckets // 2
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    grown = exact + (growth * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance.long(), grown.clamp_max(num_buckets - 1))


def distances(
    sq: int, sk: int, device: torch.device, cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(d [Sq, Sk], same [Sq, Sk] or None): distance of each key from each query, and whether one sequence holds both."""
    i, j = torch.arange(sq, device=device), torch.arange(sk, device=device)
    if cu_seqlens_q is None:
        return j - (i + sk - sq)[:, None], None
    cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    of_query = torch.searchsorted(cu_q, i, right=True)  # its sequence, counted from 1
    of_key = torch.searchsorted(cu_k, j, right=True)
    beside = i + (cu_k - cu_q)[of_query]  # aligned at the ends of the sequences
    return j - beside[:, None], of_query[:, None] == of_key


def scores(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
) -> torch.Tensor:
    """s [B, H, Sq, Sk]; -inf where a key is hidden."""
    (_, sq, heads, d), sk = q.shape, k.shape[1]
    k = k.repeat_interleave(heads // k.shape[2], dim=2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    distance, visible = distances(sq, sk, q.device, cu_seqlens_q, cu_seqlens_k)
    if relative_bias is not None:
        s = s + relative_bias.table[relative_bias.buckets(distance)].permute(2, 0, 1)
    if alibi_slopes is not None:
        s = s - alibi_slopes.reshape(-1, heads, 1, 1) * distance.abs()
    visible = torch.ones_like(distance, dtype=torch.bool) if visible is None else visible
    left, right = window if isinstance(window, tuple) else (window, None)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if causal:
        visible = visible & (distance <= 0)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    return s.masked_fill(~visible, float("-inf"))


def weights(q: torch.Tensor, k: torch.Tensor, *, sinks: torch.Tensor | None = None, **terms) -> torch.Tensor:
    """p [B, H, Sq, Sk], before dropout. A row sums to 1, less the sink's share; one without a visible key to 0."""
    s = scores(q, k, **terms)
    batch, heads, sq, sk = s.shape
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).reshape(1, heads, 1, 1).expand(batch, heads, sq, 1)], dim=-1)
        return s.softmax(-1)[..., :sk]
    # A row without a key is taken out before the softmax, whose gradient would be NaN.
    empty = (s == float("-inf")).all(-1, keepdim=True)
    return s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    **terms,
) -> torch.Tensor:
    """o [B, Sq, H, D] = (keep * p / (1 - dropout_p)) v with p = weights(q, k, **terms); keep [B, H, Sq, Sk] or None."""
    p = weights(q, k, **terms)
    if keep is not None:
        p = p * keep / (1.0 - dropout_p)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v)
