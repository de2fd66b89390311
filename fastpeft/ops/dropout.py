"""Dropout that is a function of a seed: the mask is drawn again wherever it is needed and never kept.

    drop(x) = keep(seed) * x          (unscaled: the caller folds 1 / (1 - p) into a scale that it applies anyway)

An element is kept where 16 random bits reach `threshold`, so p is a multiple of 1/65536. This file serves the `torch`
implementation, which draws from a seeded generator; the kernels draw Philox bits from (seed, row, column).
"""

import torch

LEVELS = 65536  # values of the 16 bits that decide one element


def threshold_of(p: float) -> int:
    """The smallest of the 65536 values that keeps an element: round(65536 p), at most 65535."""
    return min(round(p * LEVELS), LEVELS - 1)


def draw_seed() -> int:
    """63 bits from torch's default CPU generator: reproducible by torch.manual_seed, replayed by gradient checkpointing."""
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(*, seed: int, like: torch.Tensor, threshold: int) -> torch.Tensor:
    """1 with probability 1 - threshold / 65536, else 0, in `like`'s shape, dtype and device; a function of seed and shape.

    Four elements share one 64-bit draw, compared in place: a fifth of what torch's own dropout costs on a CPU. A mask of
    booleans would cost more to apply than to draw: bool times bfloat16 is not vectorised.
    """
    count = like.numel()
    generator = torch.Generator(like.device).manual_seed(seed)
    lanes = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
    bits = lanes.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    return bits.ge_(threshold - LEVELS // 2).to(like.dtype).view(like.shape)


def drop(x: torch.Tensor, seed: int, threshold: int) -> torch.Tensor:
    """keep * x; x itself where threshold is 0."""
    return x * keep_mask(seed=seed, like=x, threshold=threshold) if threshold else x
