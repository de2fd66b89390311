"""Attention as operators of torch.library, for torch.compile, fake tensors and meta tensors.

fastpeft::attention           (o, lse) of q, k, v and the terms; differentiable in q, k, v, bias, the bias's table and sinks
fastpeft::attention_backward  their gradients, of no elements where not asked for

Eager code calls the passes without them. Both run the passes of one implementation, so nothing of the size of the scores exists
while a graph is traced either. seed: a number on the CPU, read without a synchronisation.
"""

import importlib

import torch
import torch.nn.functional as F
from torch.library import custom_op

from fastpeft.ops.attention_terms import PASSES, Settings, Terms

_LSE_ROWS = 128  # kernels keep the statistics of whole tiles of queries, all of which divide this


def _passes(impl: str):
    return importlib.import_module(PASSES[impl])


def _settings(seed, scale, left, right, softcap, bidirectional, max_distance, threshold) -> Settings:
    number = 0 if seed is None else int(seed)
    return Settings(scale, left, right, softcap, bidirectional, max_distance, number, threshold)


def _lse_shape(q, impl) -> tuple[int, int, int]:
    batch, sq, heads, _ = q.shape
    return batch, heads, sq if impl == "torch" else (sq + _LSE_ROWS - 1) // _LSE_ROWS * _LSE_ROWS


@custom_op("fastpeft::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    bidirectional: bool,
    max_distance: int,
    threshold: int,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [B, Sq, H, D] contiguous, lse [B, H, Sq or more]): what the implementation's backward wants to have kept."""
    terms = Terms(bias, table, sinks, alibi_slopes, key_padding_mask, cu_seqlens_q, cu_seqlens_k, cos, sin)
    settings = _settings(seed, scale, left, right, softcap, bidirectional, max_distance, threshold)
    shape, statistics = _lse_shape(q, impl), torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), q.new_zeros(shape, dtype=statistics)
    o, lse = _passes(impl).forward(q, k, v, terms, settings)
    if lse.dim() < 3:
        lse = q.new_zeros(shape, dtype=statistics)  # none are needed
    if lse.shape[2] < shape[2]:
        lse = F.pad(lse, (0, shape[2] - lse.shape[2]), value=float("inf"))  # as rows without a key
    return o.contiguous(), lse.contiguous()


@attention.register_fake
def _(q, k, v, *rest):
    impl = rest[-1]
    statistics = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q, impl), dtype=statistics)


@custom_op("fastpeft::attention_backward", mutates_args=())
def attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    left: int | None,
    right: int | None,
    softcap: float | None,
    bidirectional: bool,
    max_distance: int,
    threshold: int,
    impl: str,
    needs: list[bool],
) -> list[torch.Tensor]:
    """[dq, dk, dv, dbias, dtable, dsinks], contiguous."""
    terms = Terms(bias, table, sinks, alibi_slopes, key_padding_mask, cu_seqlens_q, cu_seqlens_k, cos, sin)
    settings = _settings(seed, scale, left, right, softcap, bidirectional, max_distance, threshold)
    inputs = (q, k, v, bias, table, sinks)
    if q.numel() == 0 or k.numel() == 0:
        return [x.new_zeros(x.shape) if needed else q.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]
    grads = _passes(impl).backward(do, q, k, v, o, lse, terms, settings, tuple(needs))
    return [q.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


@attention_backward.register_fake
def _(do, q, k, v, o, lse, bias, table, sinks, *rest):
    needs = rest[-1]
    inputs = (q, k, v, bias, table, sinks)
    return [x.new_empty(x.shape) if needed else q.new_empty(0) for x, needed in zip(inputs, needs, strict=True)]


_TENSORS = 13  # arguments that are tensors: q, k, v, the terms and the seed


def _keep(ctx, inputs, output):
    o, lse = output
    ctx.save_for_backward(*inputs[:_TENSORS], o, lse)
    ctx.settings = inputs[_TENSORS:]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    nothing = [None] * (_TENSORS - 6 + len(ctx.settings))
    if do is None:
        return *[None] * 6, *nothing
    q, k, v, *terms, o, lse = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = attention_backward(do, q, k, v, o, lse, *terms, *ctx.settings, needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *nothing


attention.register_autograd(_differentiate, setup_context=_keep)
