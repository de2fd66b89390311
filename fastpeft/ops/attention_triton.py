"""Attention by the fused kernels. Equations: attention.py; the passes' signatures: attention_terms.py."""

import torch

from fastpeft import backend
from fastpeft.ops.attention_terms import Settings, Terms
from fastpeft.reference.attention import distance_buckets


def forward(q, k, v, terms: Terms, settings: Settings, keep: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse): lse [B, H, Sq] in base 2."""
    from fastpeft.kernels.attention_fwd import attention_fwd

    q, k, v = (_columns_contiguous(tensor) for tensor in (q, k, v))
    call = _call(q, k.shape[1], terms, settings)
    return attention_fwd(q, k, v, call, precision=backend.matmul_precision(q.device))


def backward(do, q, k, v, o, lse, terms: Terms, settings: Settings, needs) -> tuple[torch.Tensor | None, ...]:
    """(dq, dk, dv, dbias, dtable, dsinks), each None where `needs` does not ask."""
    from fastpeft.kernels.attention_bwd import attention_bwd

    need_q, need_k, need_v, need_bias, need_table, need_sinks = needs
    do, q, k, v = (_columns_contiguous(tensor) for tensor in (do, q, k, v))
    grads = attention_bwd(
        do,
        q,
        k,
        v,
        o,
        lse,
        _call(q, k.shape[1], terms, settings),
        with_keys=need_k or need_v,
        bias_shape=tuple(terms.bias.shape) if need_bias else None,
        with_distances=need_table,
        with_sinks=need_sinks,
        precision=backend.matmul_precision(q.device),
    )
    return (
        grads.dq if need_q else None,
        grads.dk if need_k else None,
        grads.dv if need_v else None,
        grads.dbias,
        _table_gradient(grads.ddistances, terms.table, settings) if need_table else None,
        grads.dsinks.to(terms.sinks.dtype) if need_sinks else None,
    )


def _columns_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _call(q: torch.Tensor, sk: int, terms: Terms, settings: Settings):
    from fastpeft.kernels.attention_call import AttentionCall, aligned_bias, packed_intervals, valid_keys

    batch, sq, heads, _ = q.shape
    left, right = settings.left, settings.right
    left = None if left is None or left >= sq + sk else left
    right = None if right is None or right >= sq + sk else right
    rows = keys = None
    if terms.cu_seqlens_q is not None:
        rows, keys = packed_intervals(terms.cu_seqlens_q, terms.cu_seqlens_k, sq, sk, left, right)
    cos, sin = terms.cos, terms.sin
    if cos is not None and (cos.stride() != sin.stride() or cos.stride(2) != 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    bias, slopes, mask = terms.bias, terms.alibi_slopes, terms.key_padding_mask
    return AttentionCall(
        scale=settings.scale,
        softcap=settings.softcap,
        left=left,
        right=right,
        bias=None if bias is None else aligned_bias(bias).expand(batch, heads, sq, -1),
        distances=None if terms.table is None else _by_distance(terms.table, settings),
        sinks=terms.sinks,
        slopes=None if slopes is None else slopes.float().expand(batch, heads).contiguous(),
        padding=None if mask is None else mask.contiguous().view(torch.int8),
        valid=None if mask is None else valid_keys(mask),
        cos=cos,
        sin=sin,
        rows=rows,
        keys=keys,
        seed=settings.seed,
        threshold=settings.threshold,
    )


def _buckets(table: torch.Tensor, settings: Settings) -> torch.Tensor:
    """The bucket of every distance from -max_distance to max_distance; farther ones share the ends'."""
    distances = torch.arange(-settings.max_distance, settings.max_distance + 1, device=table.device)
    return distance_buckets(distances, table.shape[0], settings.bidirectional, settings.max_distance)


def _by_distance(table: torch.Tensor, settings: Settings) -> torch.Tensor:
    """[H, 2 max_distance + 1] in float32: what a key at each distance adds."""
    return table.float().t()[:, _buckets(table, settings)].contiguous()


def _table_gradient(ddistances: torch.Tensor, table: torch.Tensor, settings: Settings) -> torch.Tensor:
    """[buckets, H]: the sum over each bucket's distances, in order; index_add_ would add in any order on a GPU."""
    buckets = _buckets(table, settings)
    member = buckets == torch.arange(table.shape[0], device=table.device)[:, None]  # [buckets, distances]
    return torch.where(member[:, None], ddistances, 0.0).sum(-1).to(table.dtype)
