"""Attention layers: projections that every PEFT method can adapt, around the attention op.

    q, k, v = x Wq^T, x Wk^T, x Wv^T;   o = attention(rope(q), rope(k), v);   y = o Wo^T

The projections are nn.Linear by the names that LoRA and its kin are told: q_proj, k_proj, v_proj, o_proj.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastpeft.layers.cache import KeyValueCache
from fastpeft.layers.positions import RelativePositionBias, RotaryEmbedding
from fastpeft.ops.attention import attention
from fastpeft.ops.rope_tables import RopeScaling
from fastpeft.reference import attention as reference


@dataclass
class AttentionConfig:
    """Sizes and terms of an attention layer.

    hidden_size            of the input and the output; memory_size of a CrossAttention's memory, hidden_size by default
    num_heads              query heads; num_kv_heads key/value heads that divide them, num_heads by default
    head_dim               hidden_size / num_heads by default
    causal, window         who is seen: window (left, right) tokens, or left alone with causal
    softcap, dropout       of the scores; of the weights, while training
    use_rotary             rotary positions: rotary_dim of head_dim columns, rotary_base, rotary_scaling, rotary_interleaved
    use_relative_position  T5's bias: num_buckets, max_distance; bidirectional unless causal
    use_alibi, use_sinks   a bias of -slope * distance; a learnt extra logit per head
    use_flash_attention    the fused op; False: the reference, which keeps every weight
    bias                   do q_proj, k_proj and v_proj have a bias; output_bias: does o_proj
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    memory_size: int | None = None
    causal: bool = False
    window: int | tuple[int | None, int | None] | None = None
    softcap: float | None = None
    dropout: float = 0.0
    scale: float | None = None
    bias: bool = False
    output_bias: bool = False
    use_rotary: bool = False
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_scaling: RopeScaling | Mapping[str, Any] | None = None
    rotary_interleaved: bool = False
    max_position_embeddings: int = 2048
    use_relative_position: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    use_alibi: bool = False
    use_sinks: bool = False
    use_flash_attention: bool = True

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "memory_size", "max_position_embeddings"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"AttentionConfig: expected {name} >= 1, got {value}")
        self.num_kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"AttentionConfig: expected num_kv_heads that divide num_heads={self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"AttentionConfig: expected num_heads that divide hidden_size={self.hidden_size}, got {self.num_heads}; "
                    "or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_heads
        self.memory_size = self.hidden_size if self.memory_size is None else self.memory_size
        self.rotary_dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        if self.use_rotary and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"AttentionConfig: expected an even rotary_dim of 2 to head_dim={self.head_dim}, got {self.rotary_dim}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"AttentionConfig: expected 0 <= dropout < 1, got {self.dropout}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"AttentionConfig: expected softcap > 0 or None, got {self.softcap}")
        if isinstance(self.window, list):
            self.window = tuple(self.window)
        sides = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(side is not None and side < 0 for side in sides) or len(sides) > 2:
            raise ValueError(
                f"AttentionConfig: expected window (left, right) of tokens >= 0 or None, got {self.window!r}"
            )
        if isinstance(self.window, int) and not self.causal:
            raise ValueError(f"AttentionConfig: expected causal=True with window={self.window}; or give (left, right)")
        if self.use_rotary and self.use_relative_position:
            raise ValueError("AttentionConfig: expected use_rotary or use_relative_position, got both")


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[H]: 2^(-8 h / H) for a power of two; else those of the next lower one, and every other one of the next higher.

    Source:  Press et al. 2022, arXiv:2108.12409, section 3
    """
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2 ** (-4 * (2 * i + 1) / lower) for i in range(num_heads - lower)]
    return torch.tensor(slopes)


class _Attention(nn.Module):
    """Projections and terms that self- and cross-attention share."""

    def __init__(self, config: AttentionConfig, memory_size: int):
        super().__init__()
        self.config = config
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * d, bias=config.bias)
        self.k_proj = nn.Linear(memory_size, kv_heads * d, bias=config.bias)
        self.v_proj = nn.Linear(memory_size, kv_heads * d, bias=config.bias)
        self.o_proj = nn.Linear(heads * d, config.hidden_size, bias=config.output_bias)
        self.relative_position = None
        if config.use_relative_position:
            self.relative_position = RelativePositionBias(
                heads, config.num_buckets, config.max_distance, bidirectional=not config.causal
            )
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.use_sinks else None
        self.register_buffer("alibi", alibi_slopes(heads) if config.use_alibi else None, persistent=False)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))

    def _attend(self, q, k, v, *, need_weights, **given):
        config = self.config
        terms = {
            "scale": config.scale,
            "causal": config.causal,
            "window": config.window,
            "softcap": config.softcap,
            "relative_bias": None if self.relative_position is None else self.relative_position.bias(),
            "alibi_slopes": self.alibi,
            "sinks": self.sinks,
            **given,
        }
        o = attention(
            q,
            k,
            v,
            dropout_p=config.dropout if self.training else 0.0,
            impl="auto" if config.use_flash_attention else "reference",
            **terms,
        )
        y = self.o_proj(o.flatten(-2))
        if not need_weights:
            return y
        return y, reference.weights(q, k, **terms)

    def extra_repr(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(AttentionConfig)}
        derived = ("hidden_size", "num_kv_heads", "head_dim", "memory_size", "rotary_dim")
        changed = {
            name: value for name, value in vars(self.config).items() if value != defaults[name] or name in derived
        }
        return ", ".join(f"{name}={value}" for name, value in changed.items())


class MultiHeadAttention(_Attention):
    """y = attention(x Wq^T, x Wk^T, x Wv^T) Wo^T over the tokens of x [B, S, hidden_size], as its config says."""

    def __init__(self, config: AttentionConfig):
        super().__init__(config, config.hidden_size)
        self.rotary = None
        if config.use_rotary:
            self.rotary = RotaryEmbedding(
                config.rotary_dim,
                config.max_position_embeddings,
                base=config.rotary_base,
                scaling=config.rotary_scaling,
                interleaved=config.rotary_interleaved,
            )

    def forward(
        self,
        x: torch.Tensor,
        *,
        key_padding_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        need_weights: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y [B, S, hidden_size]; with need_weights also the weights [B, H, S, Sk] before dropout, by the reference.

        key_padding_mask  [B, Sk] booleans, True = attend; Sk counts the tokens of the cache
        bias              [B or 1, H or 1, S or 1, Sk], added to the scores, with gradient
        positions         [B or 1, S] of the rotary embedding; by default the tokens after those of the cache
        cu_seqlens        int32 [n + 1], the first tokens of n sequences packed into one row; positions begin anew in each
        cache             takes the keys and values of x and gives those before
        """
        q, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        if self.rotary is not None:
            seen = 0 if cache is None else cache.length
            if positions is None and cu_seqlens is not None:
                positions = _positions(cu_seqlens, x.shape[1])
            q, k = self.rotary(q, k, positions=positions, offset=seen if positions is None else 0)
        if cache is not None:
            k, v = cache.update(k, v)
        given = {"key_padding_mask": key_padding_mask, "bias": bias}
        if cu_seqlens is not None:
            given |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return self._attend(q, k, v, need_weights=need_weights, **given)


class CrossAttention(_Attention):
    """y = attention(x Wq^T, m Wk^T, m Wv^T) Wo^T: the tokens of x [B, Sq, hidden_size] look at a memory m [B, Sk, memory_size].

    A memory has no place beside x: rotary embeddings and causality are refused.
    """

    def __init__(self, config: AttentionConfig):
        if config.use_rotary or config.causal:
            raise ValueError(
                "CrossAttention: expected use_rotary=False and causal=False, got "
                f"use_rotary={config.use_rotary}, causal={config.causal}"
            )
        super().__init__(config, config.memory_size)

    def forward(
        self,
        x: torch.Tensor,
        memory: torch.Tensor | None = None,
        *,
        memory_padding_mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
        need_weights: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """y [B, Sq, hidden_size]; with need_weights also the weights [B, H, Sq, Sk].

        cache  keeps the memory's keys and values: they are made in the first call, and `memory` is not read in later ones
        """
        q = self._split(self.q_proj(x))
        if cache is not None and cache.length:
            k, v = cache.keys, cache.values
        elif memory is None:
            raise ValueError("CrossAttention: expected memory [B, Sk, memory_size], got None and a cache without keys")
        else:
            k, v = self._split(self.k_proj(memory)), self._split(self.v_proj(memory))
            if cache is not None:
                k, v = cache.update(k, v)
        return self._attend(q, k, v, need_weights=need_weights, key_padding_mask=memory_padding_mask, bias=bias)


def _positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1, tokens]: each token's place in its own sequence."""
    place = torch.arange(tokens, device=cu_seqlens.device)
    starts = cu_seqlens[torch.searchsorted(cu_seqlens.long(), place, right=True) - 1]
    return (place - starts)[None]
