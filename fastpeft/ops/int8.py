"""8-bit storage of a frozen weight: int8 rows with one float32 scale each, as bitsandbytes' Linear8bitLt keeps them.

row_absmax(n) = max_k |half(w(n, k))|,   q(n, k) = round(half(w(n, k)) * (127 / row_absmax(n))),  ties to even
w^(n, k)      = q(n, k) * (row_absmax(n) * (1 / 127)) in float32, rounded once
"""

from dataclasses import dataclass

import torch

from fastpeft import backend
from fastpeft.ops.tracing import has_values, is_fake

# bfloat16 and float16, 4096 x 4096, one thread: 15 ms through a float32 buffer of this many elements that stays in the cache,
# 101 ms by one product of int8 and float32, 133 ms by bitsandbytes' cast and product in place.
_CHUNK = 1 << 17


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight [N, K] in 8 bits: w^ = q * row_absmax / 127, in the rounding of bitsandbytes' training forward.

    Shapes:  q [N, K], contiguous; row_absmax [N]
    Dtypes:  q int8, row_absmax float32; dtype is the original weight's
    Raises:  ValueError where the parts disagree, or a scale is negative or not finite
    Source:  Dettmers et al. 2022, arXiv:2208.07339
    """

    q: torch.Tensor
    row_absmax: torch.Tensor
    dtype: torch.dtype = torch.float16

    def __post_init__(self):
        _check(self)

    @classmethod
    def unchecked(cls, q: torch.Tensor, row_absmax: torch.Tensor, dtype: torch.dtype) -> "Int8Weight":
        """An Int8Weight of parts that were checked before; nothing waits for the device."""
        weight = object.__new__(cls)
        weight.__dict__.update(q=q, row_absmax=row_absmax, dtype=dtype)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def ndim(self) -> int:
        return 2

    @property
    def quant_type(self) -> str:
        return "int8"

    def dequantize(
        self, dtype: torch.dtype | None = None, *, impl: str = "auto", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """w^ [N, K] in `dtype` (default: the original weight's), in `out` if given: contiguous, of that shape and dtype.

        Dtypes:  any floating one; float64 holds the float32 product
        Raises:  ValueError for an `out` that does not fit
        """
        dtype = self.dtype if dtype is None else dtype
        chosen = backend.resolve(impl, self.device, dtype)
        if out is not None and (
            out.shape != self.q.shape or out.dtype != dtype or out.device != self.device or not out.is_contiguous()
        ):
            raise ValueError(
                f"Int8Weight.dequantize: expected out {self.shape} {dtype} on {self.device}, contiguous, "
                f"got {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
            )
        if chosen == "triton":
            from fastpeft.kernels.int8 import int8_dequantize

            return int8_dequantize(self.q, self.row_absmax, dtype, out=out)
        scale = (self.row_absmax * (1.0 / 127.0))[:, None]
        if chosen == "reference":
            w = (self.q * scale).to(dtype)
            return w if out is None else out.copy_(w)
        out = torch.empty_like(self.q, dtype=dtype) if out is None else out
        if self.device.type != "cpu":
            return torch.mul(self.q, scale, out=out)
        _multiply_rows(self.q, scale, out)
        return out

    def to(self, device: torch.device | str) -> "Int8Weight":
        """The same weight on `device`; itself if it is there."""
        device = torch.device(device)
        if device == self.device:
            return self
        return Int8Weight.unchecked(self.q.to(device), self.row_absmax.to(device), self.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the storage holds, by name."""
        return {"q": self.q, "row_absmax": self.row_absmax}


def _multiply_rows(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, K] = q * scale [N, 1] in float32, rounded to out's dtype."""
    step = min(len(q), max(1, _CHUNK // q.shape[1]))
    products = None if out.dtype == torch.float32 else torch.empty(step, q.shape[1])
    if is_fake(q):  # nothing to write; what is held has been allocated
        return
    for first in range(0, len(q), step):
        rows = slice(first, first + step)
        chunk = out[rows] if products is None else products[: len(q[rows])]
        chunk.copy_(q[rows]).mul_(scale[rows])
        if products is not None:
            out[rows].copy_(chunk)


def quantize_int8(w: torch.Tensor) -> Int8Weight:
    """q = round(half(w) * (127 / row_absmax)): bitsandbytes' bytes; w goes through float16 first.

    Shapes:  w [N, K], N K >= 1, any strides
    Dtypes:  w float32, float16 or bfloat16
    Raises:  ValueError for another shape or dtype, and for a weight that is not finite in float16
    Source:  Dettmers et al. 2022, arXiv:2208.07339
    """
    if w.dim() != 2 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"quantize_int8: expected a floating w [N, K] with elements, got {tuple(w.shape)} {w.dtype}")
    half = w.detach().to(torch.float16)
    row_absmax = half.abs().amax(1).float()
    if has_values(w) and not torch.isfinite(row_absmax).all():
        n, k = (~torch.isfinite(half)).nonzero()[0].tolist()
        raise ValueError(
            f"quantize_int8: expected weights that are finite in float16 (up to 65504), got w[{n}, {k}] = {w[n, k].item()}"
        )
    scale = 127.0 / row_absmax
    scale = torch.where(row_absmax > 0, scale, torch.zeros_like(scale))[:, None]
    return Int8Weight.unchecked((half * scale).round_().to(torch.int8).contiguous(), row_absmax, w.dtype)


def _check(w: Int8Weight) -> None:
    q, scales = w.q, w.row_absmax
    fits = q.dim() == 2 and q.numel() > 0 and q.dtype == torch.int8 and q.is_contiguous()
    fits = fits and scales.shape == q.shape[:1] and scales.dtype == torch.float32 and scales.device == q.device
    if not fits or not w.dtype.is_floating_point:
        raise ValueError(
            "Int8Weight: expected q int8 [N, K], contiguous, row_absmax float32 [N] on one device and a floating dtype, got "
            f"{q.dtype} {tuple(q.shape)} on {q.device}, {scales.dtype} {tuple(scales.shape)} on {scales.device}, {w.dtype}"
        )
    if not has_values(scales):
        return
    bad = ~(torch.isfinite(scales) & (scales >= 0))
    if bad.any():
        first = bad.nonzero()[0].item()
        raise ValueError(
            f"Int8Weight: expected row_absmax finite and not negative, got {scales[first].item()} at row {first} "
            f"({int(bad.sum())} such of {scales.numel()}); the quantisation state is damaged"
        )
