"""Attention that is exact and deterministic, whatever enters the score: the autograd.Function and the public op."""

import contextlib
import importlib

import torch

from fastpeft import backend
from fastpeft.ops import attention_sdpa
from fastpeft.ops.attention_terms import (
    PASSES,
    RelativeBias,
    Settings,
    Terms,
    bounds_of,
    check_numbers,
    check_on_load,
    check_tensors,
    check_terms,
    relative_of,
    rope_rows,
)
from fastpeft.ops.dropout import LEVELS, draw_seed, keep_mask, threshold_of
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.rope import apply_rope
from fastpeft.ops.tracing import traced, transformed
from fastpeft.reference import attention as reference

__all__ = ["RelativeBias", "attention"]

_NOTHING = (None,) * 8


def _passes(impl: str):
    return importlib.import_module(PASSES[impl])


class Attention(torch.autograd.Function):
    """Keeps q, k, v, o, the terms as they came and lse, or what the passes want instead; dropout masks are computed again."""

    @staticmethod
    def forward(ctx, q, k, v, *rest):
        *terms, settings, impl = rest
        terms = Terms(*terms)
        if q.numel() == 0 or k.numel() == 0:
            o, lse = torch.zeros_like(q), None
        else:
            o, lse = _passes(impl).forward(q, k, v, terms, settings, keep=any(ctx.needs_input_grad))
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, o, lse, *terms)
            ctx.settings, ctx.impl = settings, impl
        return o

    @staticmethod
    @first_order_only("attention")
    def backward(ctx, do):
        q, k, v, o, lse, *terms = ctx.saved_tensors
        terms, needs = Terms(*terms), tuple(ctx.needs_input_grad[:6])
        if lse is None:
            inputs = (q, k, v, *terms[:3])
            grads = [torch.zeros_like(tensor) if needed else None for tensor, needed in zip(inputs, needs, strict=True)]
        else:
            grads = _passes(ctx.impl).backward(do, q, k, v, o, lse, terms, ctx.settings, needs)
        return *grads, *[None] * (len(Terms._fields) - 1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    rope: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope_on_load: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """o = drop(softmax(mask(cap(scale * q k^T) + bias + relative_bias - alibi_slopes |d|), sinks)) v, d = j - (i + Sk - Sq).

    Shapes:  q [B, Sq, H, D], k and v [B, Sk, Hkv, D], Hkv divides H -> o [B, Sq, H, D]; any strides; bias [B or 1, H or 1,
             Sq or 1, Sk]; alibi_slopes [H] or [B, H]; sinks [H]; key_padding_mask [B, Sk], True = attend; cu_seqlens_q and
             cu_seqlens_k int32 [n + 1], the first tokens of n packed sequences and the number of tokens, B = 1; rope (cos,
             sin), a row per token [S, R/2] or [B or 1, S, R/2], or D columns whose halves are alike, Sq = Sk = S
    Rope:    q and k are rotated as apply_rope does it, half-split, before they meet. rope_on_load: by `triton`'s kernels whenever
             a tile of them is loaded, so that no rotated copy is written; D a power of two = R. The others rotate beforehand,
             as is faster by count: attention_scores.py
    Masks:   causal d <= 0, aligned at the last query and key; window (left, right) -left <= d <= right, None = no bound; an int
             is the left side of a causal window. A query without a visible key gives zeros and no gradient
    Dtypes:  q, k, v alike: float32, float16, bfloat16, on the CPU also float64; softmax statistics in float32 or wider
    Grads:   q, k, v, bias, relative_bias.table, sinks; deterministic; first order only
    Dropout: of the weights p; the mask is a function of `seed` and is never kept. The implementations draw different masks
    Units:   scale 1 / sqrt(D) by default; softcap in scores: cap(s) = softcap tanh(s / softcap)
    Raises:  ValueError or TypeError where shapes, dtypes, devices or values disagree; NotImplementedError where the named
             implementation cannot run
    Source:  Dao 2023, arXiv:2307.08691; the terms: fastpeft/reference/attention.py
    """
    rest = (window, softcap, relative_bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, rope)
    covered = (q, k, v, scale, causal, bias, key_padding_mask)
    if (
        not dropout_p
        and rest == _NOTHING
        and attention_sdpa.covers(*covered)
        and backend.resolve(impl, q.device, q.dtype) == "torch"
        and not transformed()
    ):
        return attention_sdpa.by_sdpa(*covered)
    if not q.is_meta and q.dtype != torch.float64 and torch.is_autocast_enabled(q.device.type):
        # first of all: a rotated q or k may be float32 beside a v in half precision
        q, k, v = (tensor.to(torch.get_autocast_dtype(q.device.type)) for tensor in (q, k, v))
    check_tensors(q, k, v)
    check_numbers(scale, softcap, dropout_p)
    left, right = bounds_of(window, causal)
    table = None if relative_bias is None else relative_bias.table
    terms = Terms(bias, table, sinks, alibi_slopes, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
    check_terms(q, k.shape[1], terms)
    chosen = backend.resolve(impl, q.device, q.dtype)
    if rope is not None:
        cos, sin = rope_rows(q, k, rope)
        if rope_on_load and chosen == "triton":
            check_on_load(q.shape[3], cos)
            terms = terms._replace(cos=cos, sin=sin)
        else:
            q, k = apply_rope(q, k, cos, sin, impl=chosen)
    threshold = threshold_of(dropout_p)
    settings = Settings(
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        left=left,
        right=right,
        softcap=None if softcap is None else float(softcap),
        bidirectional=True if relative_bias is None else relative_bias.bidirectional,
        max_distance=0 if relative_bias is None else relative_bias.max_distance,
        seed=seed or 0,
        threshold=threshold,
    )
    autocast = q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)
    with torch.autocast(q.device.type, enabled=False) if autocast else contextlib.nullcontext():
        if chosen == "reference" or transformed():
            return _composed(q, k, v, terms, settings, seed)
        if traced(q):
            return _as_operator(q, k, v, terms, settings, seed, chosen)
        if threshold and seed is None:
            settings = Settings(**{**vars(settings), "seed": draw_seed()})
        wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *terms))
        if not wants_gradient and q.numel() and k.numel():  # a Function costs as much as a token's decoding
            return _passes(chosen).forward(q, k, v, terms, settings)[0]
        return Attention.apply(q, k, v, *terms, settings, chosen)


def _as_operator(q, k, v, terms: Terms, settings: Settings, seed: int | None, impl: str) -> torch.Tensor:
    """fastpeft::attention, for who traces; the seed is drawn where the graph runs."""
    from fastpeft.ops import attention_custom, custom

    number = None
    if settings.threshold:
        number = custom.draw_seed() if seed is None else torch.tensor(seed)
    numbers = (settings.scale, settings.left, settings.right, settings.softcap)
    of_table = (settings.bidirectional, settings.max_distance)
    return attention_custom.attention(q, k, v, *terms, number, *numbers, *of_table, settings.threshold, impl)[0]


def _composed(q, k, v, terms: Terms, settings: Settings, seed: int | None) -> torch.Tensor:
    """The reference: calls that autograd, tracers and torch.func know; the scores are kept."""
    keep = None
    if settings.threshold:
        scores = q.new_empty(()).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if traced(q):
            from fastpeft.ops import custom

            keep = custom.keep_mask(
                scores, custom.draw_seed() if seed is None else torch.tensor(seed), settings.threshold
            )
        else:
            keep = keep_mask(seed=draw_seed() if seed is None else seed, like=scores, threshold=settings.threshold)
    o = reference.attention(
        q,
        k,
        v,
        scale=settings.scale,
        window=(settings.left, settings.right),
        softcap=settings.softcap,
        bias=terms.bias,
        relative_bias=relative_of(terms, settings),
        alibi_slopes=terms.alibi_slopes,
        sinks=terms.sinks,
        key_padding_mask=terms.key_padding_mask,
        cu_seqlens_q=terms.cu_seqlens_q,
        cu_seqlens_k=terms.cu_seqlens_k,
        dropout_p=settings.threshold / LEVELS,
        keep=keep,
    )
    return o.to(q.dtype)
