"""What a call of the attention kernels has beside q, k and v, in the order in which every kernel takes it."""

from dataclasses import dataclass, field

import torch

EVEN_LENGTH = 128  # lengths that this divides fill every tile: those kernels mask no row
BIAS_ALIGNMENT = 16  # elements; see attention_scores.py


@dataclass(frozen=True)
class AttentionCall:
    """The terms of one attention; None where there is none.

    bias: of `aligned_bias`, expanded to [B, H, Sq, Sk or more]; distances [H, 2 max_distance + 1] float32, what a key at
    distance d - max_distance adds, farther ones as the ends; sinks [H]; slopes [B, H] float32; padding [B, Sk] int8, 1 = attend;
    valid [B, 2] int32, the first key of each batch that is no padding and the one behind the last;
    rows [3, Sq] and keys [2, Sk] int32 of packed sequences: (beside, low, high) of every query and (low, high) of every key;
    cos, sin [B or 1, S, D / 2], contiguous: angles of every token, by which q and k are rotated when their tiles are loaded;
    left, right: bounds of the distance of a visible key.
    """

    scale: float
    softcap: float | None = None
    left: int | None = None
    right: int | None = None
    bias: torch.Tensor | None = None
    distances: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    valid: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    seed: int = 0
    threshold: int = 0
    # Derived: arguments of every kernel, in order.
    tensors: tuple = field(init=False, repr=False)
    strides: tuple = field(init=False, repr=False)
    numbers: tuple = field(init=False, repr=False)

    def __post_init__(self):
        bias = (0, 0, 0) if self.bias is None else self.bias.stride()[:3]
        slopes = 0 if self.slopes is None else self.slopes.stride(0)
        padding = 0 if self.padding is None else self.padding.stride(0)
        threshold = self.threshold or None
        kept_share = 1.0 / (1.0 - self.threshold / 65536)
        numbers = (self.softcap, self.left, self.right, self.max_distance, self.seed, threshold, kept_share)
        object.__setattr__(self, "tensors", (self.bias, self.distances, self.slopes, self.padding, self.cos, self.sin))
        rope = (0, 0) if self.cos is None else (self.cos.stride(0) if self.cos.shape[0] > 1 else 0, self.cos.stride(1))
        object.__setattr__(self, "strides", (*bias, slopes, padding, *rope))
        object.__setattr__(self, "numbers", (self.scale, *numbers))

    @property
    def max_distance(self) -> int:
        """The farthest distance that `distances` tells apart."""
        return 0 if self.distances is None else self.distances.shape[1] // 2

    @property
    def terms(self) -> tuple[bool, bool, bool]:
        """Which of (bias, distances, slopes) there are."""
        return self.bias is not None, self.distances is not None, self.slopes is not None

    @property
    def skips_tiles(self) -> bool:
        """True if some tiles may never be visited."""
        return self.left is not None or self.right is not None or self.rows is not None or self.valid is not None

    def is_even(self, sq: int, sk: int) -> bool:
        """True if every tile is full of rows that exist."""
        return self.rows is None and sq % EVEN_LENGTH == 0 and sk % EVEN_LENGTH == 0


def valid_keys(mask: torch.Tensor) -> torch.Tensor:
    """[B, 2] int32 of a mask [B, Sk], True = attend: see AttentionCall; zeros for a batch without a key. Nothing waits."""
    mask = mask.to(torch.int8)
    some = mask.amax(1)
    first, behind = mask.argmax(1), mask.shape[1] - mask.flip(1).argmax(1)
    return (torch.stack([first, behind], 1) * some[:, None]).int()


def aligned_bias(bias: torch.Tensor) -> torch.Tensor:
    """bias [.., Sk] with room for whole rows of BIAS_ALIGNMENT elements: itself if it is so laid out, else a copy.

    What lies between Sk and the multiple of BIAS_ALIGNMENT is read but not used.
    """
    strides = [stride for stride, size in zip(bias.stride()[:3], bias.shape[:3], strict=True) if size > 1]
    if bias.shape[3] % BIAS_ALIGNMENT == 0 and bias.stride(3) == 1 and not any(s % BIAS_ALIGNMENT for s in strides):
        return bias
    copy = _whole_rows(bias.shape, bias.dtype, bias.device)
    copy[..., : bias.shape[3]] = bias
    return copy


def empty_aligned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised [..., N] whose rows are a multiple of BIAS_ALIGNMENT apart."""
    return _whole_rows(shape, dtype, device)[..., : shape[-1]]


def _whole_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    padded = -(-shape[-1] // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    return torch.empty(*shape[:-1], padded, dtype=dtype, device=device)


def packed_intervals(
    cu_q: torch.Tensor, cu_k: torch.Tensor, sq: int, sk: int, left: int | None, right: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, keys) of packed sequences: see AttentionCall. Nothing waits for the device."""
    i, j = torch.arange(sq, device=cu_q.device), torch.arange(sk, device=cu_q.device)
    cu_q, cu_k = cu_q.long(), cu_k.long()
    shift = cu_k[1:] - cu_q[1:]  # a query's key beside it, by sequence: they are aligned at their ends
    of_query = torch.searchsorted(cu_q[1:], i, right=True)
    of_key = torch.searchsorted(cu_k[1:], j, right=True)
    beside, beside_key = i + shift[of_query], j - shift[of_key]
    row_low, row_high = cu_k[of_query], cu_k[of_query + 1]
    key_low, key_high = cu_q[of_key], cu_q[of_key + 1]
    if left is not None:
        row_low = torch.minimum(torch.maximum(row_low, beside - left), row_high)
        key_high = torch.maximum(torch.minimum(key_high, beside_key + left + 1), key_low)
    if right is not None:
        row_high = torch.maximum(torch.minimum(row_high, beside + right + 1), row_low)
        key_low = torch.minimum(torch.maximum(key_low, beside_key - right), key_high)
    return torch.stack([beside, row_low, row_high]).int(), torch.stack([key_low, key_high]).int()
