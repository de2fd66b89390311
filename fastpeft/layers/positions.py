"""Where a token stands, told to attention: by rotating queries and keys, by adding a vector, or by a bias of the distance."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastpeft.ops.rope import apply_rope
from fastpeft.ops.rope_tables import PLAIN, RopeScaling, cos_sin, inverse_frequencies
from fastpeft.reference.attention import RelativeBias


class RotaryEmbedding(nn.Module):
    """(y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for pairs of the first `dim` columns of each head; angle p * inv_freq.

    dim                      rotated columns, even; columns past it are left alone
    max_position_embeddings  tokens that the tables hold at first; they grow as longer inputs come
    scaling                  RopeScaling, or the dict that transformers calls rope_parameters: linear, dynamic (NTK), yarn,
                             llama3, longrope
    interleaved              pairs (x[2 i], x[2 i + 1]) as in GPT-J, not (x[i], x[i + dim/2])

    Dynamic and longrope angles are a function of the length of this call: past the pretraining length every token's change.
    The tables are buffers in float32 and not part of the state dict.
    """

    def __init__(
        self,
        dim: int,
        max_position_embeddings: int = 2048,
        *,
        base: float = 10000.0,
        scaling: RopeScaling | Mapping[str, Any] | None = None,
        interleaved: bool = False,
    ):
        super().__init__()
        if max_position_embeddings < 1:
            raise ValueError(f"RotaryEmbedding: expected max_position_embeddings >= 1, got {max_position_embeddings}")
        if scaling is None:
            scaling = PLAIN
        elif not isinstance(scaling, RopeScaling):
            scaling = RopeScaling.from_parameters(scaling)
        self.dim, self.max_position_embeddings, self.base = dim, max_position_embeddings, base
        self.scaling, self.interleaved = scaling, interleaved
        self._angles = self._angles_of(1)
        cos, sin = self._made(1, max_position_embeddings, torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _angles_of(self, tokens: int) -> int:
        """What the angles depend on beside the position: alike for two lengths that share their tables."""
        if self.scaling.rope_type == "dynamic":
            return max(tokens, self.max_position_embeddings)
        if self.scaling.rope_type == "longrope":
            return tokens > (self.scaling.original_max_position_embeddings or self.max_position_embeddings)
        return 0

    def _made(self, tokens: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        inv_freq, factor = inverse_frequencies(
            self.dim,
            base=self.base,
            scaling=self.scaling,
            max_position_embeddings=self.max_position_embeddings,
            tokens=tokens,
        )
        return cos_sin(inv_freq, torch.arange(rows, device=device), factor)

    def tables(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [P, dim/2] in float32 for a sequence of `tokens`, P >= tokens."""
        rows, angles = self.cos.shape[0], self._angles_of(tokens)
        if tokens > rows or angles != self._angles or self.cos.dtype != torch.float32:  # .to(bfloat16) rounds buffers
            self.cos, self.sin = self._made(tokens, max(2 * rows, tokens) if tokens > rows else rows, self.cos.device)
            self._angles = angles
        return self.cos, self.sin

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        offset: int = 0,
        tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [B, S, H, D] and k [B, S, Hkv, D] rotated: token (b, s) stands at positions[b, s], or at offset + s.

        tokens: the length of the whole sequence; by default offset + S, or one past the largest position (read from the
        CPU; on another device the tables are taken to be long enough).
        """
        if tokens is None:
            tokens = offset + q.shape[1]
            if positions is not None:
                on_cpu = positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling()
                tokens = int(positions.max()) + 1 if on_cpu else self.cos.shape[0]
        cos, sin = self.tables(tokens)
        return apply_rope(q, k, cos, sin, positions=positions, offset=offset, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.max_position_embeddings}, base={self.base:g}, {self.scaling.rope_type}"


class SinusoidalPositionalEmbedding(nn.Module):
    """e[p, 2 i] = sin(p / base^(2 i / dim)), e[p, 2 i + 1] = cos of the same; nothing is trained.

    Source:  Vaswani et al. 2017, arXiv:1706.03762, section 3.5
    """

    def __init__(self, dim: int, *, base: float = 10000.0):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"SinusoidalPositionalEmbedding: expected an even dim >= 2, got {dim}")
        self.dim, self.base = dim, base

    def forward(self, positions: torch.Tensor, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[..., dim] of positions [...]."""
        inv_freq, _ = inverse_frequencies(self.dim, base=self.base)
        cos, sin = cos_sin(inv_freq, positions)
        return torch.stack((sin, cos), dim=-1).flatten(-2).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}"


class LearnedPositionalEmbedding(nn.Embedding):
    """e[p] = weight[p], trained: positions [...] -> [..., dim]."""

    def __init__(self, max_position_embeddings: int, dim: int, **options):
        super().__init__(max_position_embeddings, dim, **options)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
            largest = int(positions.max())
            if largest >= self.num_embeddings:
                raise ValueError(
                    f"LearnedPositionalEmbedding: expected positions below {self.num_embeddings}, got {largest}; make it longer"
                )
        return super().forward(positions)


class RelativePositionBias(nn.Module):
    """s(i, j) += weight[bucket(j - i), head], T5's buckets of the distance; weight [buckets, H] as in T5's embedding.

    `bias()` is what attention takes: the table itself, whose gradient is summed by distance. Calling the module gives the bias
    [1, H, Sq, Sk] in full, with the last query beside the last key.
    """

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True):
        super().__init__()
        self.bidirectional, self.max_distance = bidirectional, max_distance
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads))
        self.bias()  # checks the numbers
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def bias(self) -> RelativeBias:
        """The table with its rule, for `attention(..., relative_bias=...)`."""
        return RelativeBias(self.weight, self.bidirectional, self.max_distance)

    def forward(self, sq: int, sk: int) -> torch.Tensor:
        i, j = (torch.arange(size, device=self.weight.device) for size in (sq, sk))
        buckets = self.bias().buckets(j - (i + sk - sq)[:, None])
        return self.weight[buckets].permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        buckets, heads = self.weight.shape
        return f"{heads}, {buckets}, {self.max_distance}, bidirectional={self.bidirectional}"
