"""Dropout that is a function of a seed: the mask can be drawn again wherever it is needed, and is kept as bits at most.

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


class Keep:
    """`keep_mask` of [M, K] as bit patterns, part after part; on a CPU what was drawn once is held, a bit per element.

    A part is integers of the width of `dtype`, -1 where the element is kept and 0 where not: `masked` takes the bits of x that
    they leave, for a third of what a product with ones and zeros costs; a dropped infinity is 0 then, too. Drawing takes
    0.6 ns per element on one thread of a Zen 4, unpacking 0.2.

    Parts bound the memory. They are not to be small: of a down projection (K = 1536, M = 1024, R = 16, bfloat16) dropout takes
    1.7 + 2.7 ms in parts of 2^21 elements, 2.3 + 3.6 ms in parts of 2^18. Other devices than the CPU draw all at once.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int, threshold: int):
        self.shape, self.width, self.device = shape, _WIDTHS[dtype.itemsize], device
        self.seed, self.least = seed, threshold - LEVELS // 2
        self._packed: list[np.ndarray | None] = []

    @property
    def nbytes(self) -> int:
        """Of the bits that are held."""
        return sum(packed.nbytes for packed in self._packed if packed is not None)

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(slice of rows, mask of these rows, to be overwritten)"""
        (m, k), on_cpu = self.shape, backend.type_of(self.device) == "cpu"
        step = min(max(_CHUNK // k // 4 * 4, 4), m) if on_cpu else m  # 4 rows: no draw is cut in two
        buffer = torch.empty(step, k, dtype=self.width, device=self.device)
        spans = [slice(first, min(m, first + step)) for first in range(0, m, step)]
        if len(self._packed) == len(spans):
            for span, packed in zip(spans, self._packed, strict=True):
                part = buffer[: span.stop - span.start]
                yield span, part.copy_(_unpacked(packed, part.shape)).neg_()
            return
        self._packed.clear()
        draws = Draws(self.seed, self.device)
        for span in spans:
            part = buffer[: span.stop - span.start]
            bits = draws.bits(part.numel())
            if on_cpu:
                self._packed.append(None if backend.rehearsing() else np.packbits(bits.numpy() >= self.least))
            yield span, part.copy_(bits.ge_(self.least).neg_().view(part.shape))


def _unpacked(packed: np.ndarray | None, shape: torch.Size) -> torch.Tensor:
    """Ones and zeros of one byte; fake ones in a rehearsal, which packs nothing."""
    if packed is None:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=shape.numel())).view(shape)


BESIDE = "_fastpeft_keep"
"""The attribute of a kept S that holds its Keep."""
_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(x: torch.Tensor, mask: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x where a part of `Keep` says so, else 0, in the memory of `out`: x itself or the mask."""
    return torch.bitwise_and(x.view(mask.dtype), mask, out=out.view(mask.dtype)).view(x.dtype)


def drop(x: torch.Tensor, seed: int, threshold: int) -> torch.Tensor:
    """keep * x; x itself where threshold is 0."""
    return x * keep_mask(seed=seed, like=x, threshold=threshold) if threshold else x
