"""Dropout that is a function of a seed: the mask is drawn again wherever it is needed and never kept.

    drop(x) = keep(seed) * x          (unscaled: the caller folds 1 / (1 - p) into a scale that it applies anyway)

An element is kept where 16 random bits reach `threshold`, so p is a multiple of 1/65536. This file serves the `torch`
implementation, which draws from a seeded generator; the kernels draw Philox bits from (seed, row, column).
"""

from collections.abc import Iterator

import numpy as np
import torch

from fastpeft import backend

LEVELS = 65536  # values of the 16 bits that decide one element
_CHUNK = 2**21  # elements of a mask that are drawn at once, at most


def threshold_of(p: float) -> int:
    """The smallest of the 65536 values that keeps an element: round(65536 p), at most 65535."""
    return min(round(p * LEVELS), LEVELS - 1)


def draw_seed() -> int:
    """63 bits from torch's default CPU generator: reproducible by torch.manual_seed, replayed by gradient checkpointing."""
    if backend.rehearsing():
        return 0
    return int(torch.empty((), dtype=torch.int64).random_())


class Draws:
    """The 16-bit numbers of one seed, in order. On a CPU NumPy's SFC64 draws them: a third of the time of torch's generator."""

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self._generator: np.random.Generator | torch.Generator | None = None
        if backend.rehearsing():
            return
        if device.type == "cpu":
            self._generator = np.random.Generator(np.random.SFC64(seed))
        else:
            self._generator = torch.Generator(device).manual_seed(seed)

    def bits(self, count: int) -> torch.Tensor:
        """The next `count` numbers as int16, to be overwritten; a count that 4 does not divide wastes the rest of a draw."""
        draws = (count + 3) // 4
        if self._generator is None:
            lanes = torch.empty(draws, dtype=torch.int64, device=self.device)
        elif self.device.type == "cpu":
            lanes = torch.from_numpy(self._generator.integers(-(2**63), 2**63, size=draws, dtype=np.int64))
        else:
            lanes = torch.empty(draws, dtype=torch.int64, device=self.device)
            lanes.random_(-(2**63), None, generator=self._generator)
        return lanes.view(torch.int16)[:count]


def keep_mask(*, seed: int, like: torch.Tensor, threshold: int) -> torch.Tensor:
    """1 with probability 1 - threshold / 65536, else 0, in `like`'s shape, dtype and device; a function of seed and shape.

    Four elements share one 64-bit draw, compared in place: an eighth of what torch's own dropout costs on a CPU. A mask of
    booleans would cost more to apply than to draw: bool times bfloat16 is not vectorised.
    """
    bits = Draws(seed, like.device).bits(like.numel())
    return bits.ge_(threshold - LEVELS // 2).to(like.dtype).view(like.shape)


def keep_chunks(
    shape: tuple[int, int], like: torch.Tensor, seed: int, threshold: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(slice of rows, keep of these rows, to be overwritten): `keep_mask` of [M, K] in `like`'s dtype, part after part.

    Parts bound the memory. They are not to be small: of a down projection (K = 1536, M = 1024, R = 16, bfloat16) dropout takes
    1.7 + 2.7 ms in parts of 2^21 elements, 2.3 + 3.6 ms in parts of 2^18 (one thread of a Zen 4).
    Other devices than the CPU draw all at once.
    """
    m, k = shape
    step = (
        min(max(_CHUNK // k // 4 * 4, 4), m) if backend.type_of(like.device) == "cpu" else m
    )  # 4 rows: no draw is cut in two
    draws = Draws(seed, like.device)
    keep = torch.empty(step, k, dtype=like.dtype, device=like.device)
    for start in range(0, m, step):
        part = keep[: min(step, m - start)]
        part.copy_(draws.bits(part.numel()).ge_(threshold - LEVELS // 2).view(part.shape))
        yield slice(start, start + part.shape[0]), part


def drop(x: torch.Tensor, seed: int, threshold: int) -> torch.Tensor:
    """keep * x; x itself where threshold is 0."""
    return x * keep_mask(seed=seed, like=x, threshold=threshold) if threshold else x
