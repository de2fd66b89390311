"""4-bit storage of a frozen weight: NF4 and FP4 in bitsandbytes' layout, with and without double quantisation.

    w^(i) = codes[q(i)] * absmax(i // G) in float32, rounded once; i counts the elements of w [N, K] row by row

Layout and rounding: fastpeft/reference/nf4.py. A weight is checked once, when an NF4Weight is made of it, and never in a
training step: on a GPU the checks wait for the device.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastpeft import backend
from fastpeft.ops import nf4_torch
from fastpeft.ops.tracing import constants, has_values, is_fake
from fastpeft.reference import nf4 as reference

if TYPE_CHECKING:
    from fastpeft.kernels.nf4 import Packed

BLOCKSIZES, QUANT_TYPES = reference.BLOCKSIZES, reference.QUANT_TYPES
_QUANTIZED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NestedAbsmax(NamedTuple):
    """What an 8-bit absmax means: absmax(g) = code[absmax_q(g)] * absmax(g // blocksize) + offset."""

    code: torch.Tensor  # float32 [256]
    absmax: torch.Tensor  # float32 [ceil(blocks / blocksize)]
    offset: torch.Tensor  # float32, no dimension
    blocksize: int = reference.NESTED_BLOCKSIZE


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A frozen weight [N, K] in 4 bits: w^(i) = codes[q(i)] * absmax(i // blocksize).

    Shapes:  packed [ceil(N K / 2)], element 2j in the high four bits; absmax [ceil(N K / blocksize)]: blocks run across the
             ends of rows
    Dtypes:  packed uint8; absmax float32, or uint8 where `nested` says what it means; dtype is the original weight's
    Raises:  ValueError where the parts disagree, or a scale is negative or not finite
    Source:  Dettmers et al. 2023, arXiv:2305.14314, section 3
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    quant_type: str = "nf4"
    dtype: torch.dtype = torch.float32
    nested: NestedAbsmax | None = None

    def __post_init__(self):
        _check(self)

    @classmethod
    def unchecked(
        cls,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        shape: tuple[int, int],
        blocksize: int,
        quant_type: str,
        dtype: torch.dtype,
        nested: NestedAbsmax | None,
    ) -> "NF4Weight":
        """An NF4Weight of parts that were checked before; nothing waits for the device."""
        weight = object.__new__(cls)
        names = ("packed", "absmax", "shape", "blocksize", "quant_type", "dtype", "nested")
        weight.__dict__.update(zip(names, (packed, absmax, shape, blocksize, quant_type, dtype, nested)))
        return weight

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def ndim(self) -> int:
        return 2

    def dequantize(
        self, dtype: torch.dtype | None = None, *, impl: str = "auto", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """w^ [N, K] in `dtype` (default: the original weight's), in `out` if given: contiguous, of that shape and dtype.

        Dtypes:  any floating one; float64 holds the float32 product
        Raises:  ValueError for an `out` that does not fit
        """
        dtype = self.dtype if dtype is None else dtype
        chosen = backend.resolve(impl, self.device, dtype)
        if out is not None:
            _check_out(self, dtype, out)
        if self.packed.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta") if out is None else out
        if chosen == "torch" and is_fake(self.packed):
            self.float_absmax()  # the one allocation besides that grows with the weight
            return torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        if chosen == "triton":
            from fastpeft.kernels.nf4 import nf4_dequantize

            return nf4_dequantize(self.as_packed(), dtype, out=out)
        if chosen == "torch":
            return nf4_torch.dequantize(
                self.packed, self.float_absmax(), self.quant_type, self.blocksize, self.shape, dtype, out=out
            )
        w = reference.dequantize(
            self.packed, self.float_absmax(), self.quant_type, self.blocksize, self.shape, torch.float32
        ).to(dtype)
        return w if out is None else out.copy_(w)

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on `device`; itself if it is there."""
        device = torch.device(device)
        if device == self.device:
            return self
        nested = self.nested
        if nested is not None:
            nested = NestedAbsmax(*(part.to(device) for part in nested[:3]), nested.blocksize)
        return NF4Weight.unchecked(
            self.packed.to(device),
            self.absmax.to(device),
            self.shape,
            self.blocksize,
            self.quant_type,
            self.dtype,
            nested,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything the storage holds, by name."""
        held = {"packed": self.packed, "absmax": self.absmax}
        if self.nested is not None:
            code, absmax, offset, _ = self.nested
            held |= {"nested_code": code, "nested_absmax": absmax, "nested_offset": offset}
        return held

    def float_absmax(self) -> torch.Tensor:
        """absmax as float32 [blocks]: as it lies, or computed where it is nested."""
        if self.nested is None:
            return self.absmax
        return nf4_torch.dequantize_absmax(self.absmax, *self.nested)

    def as_packed(self) -> "Packed":
        """The same tensors as the kernels take them."""
        from fastpeft.kernels.nf4 import Packed

        codes = _codes_on(self.quant_type, self.device)
        if self.nested is None:
            return Packed(self.packed, self.absmax, codes, self.shape, self.blocksize)
        return Packed(self.packed, self.absmax, codes, self.shape, self.blocksize, *self.nested)


def quantize_4bit(
    w: torch.Tensor,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = False,
    impl: str = "auto",
) -> NF4Weight:
    """q(i) = code nearest to w(i) / absmax(i // blocksize), a tie going to the lower one: bitsandbytes' bytes.

    Shapes:  w [N, K], N K >= 1, any strides
    Dtypes:  w float32, float16 or bfloat16
    Meta:    a w without memory gives an NF4Weight without memory
    Double:  double_quant stores absmax in 8 bits: 4.13 bits a weight at blocksize 64, not 4.5
    Raises:  ValueError for another shape, dtype, block size or quant_type, and for a NaN or an infinity in w
    Source:  Dettmers et al. 2023, arXiv:2305.14314, section 3
    """
    if w.dim() != 2 or w.numel() == 0 or w.dtype not in _QUANTIZED_DTYPES:
        raise ValueError(
            f"quantize_4bit: expected w [N, K] with elements, float32, float16 or bfloat16, got {tuple(w.shape)} {w.dtype}"
        )
    _check_format("quantize_4bit", quant_type, blocksize)
    chosen = backend.resolve(impl, w.device, w.dtype)
    w = w.detach().contiguous()
    if not has_values(w):
        packed, absmax = (
            w.new_empty(-(-w.numel() // 2), dtype=torch.uint8),
            w.new_empty(-(-w.numel() // blocksize)).float(),
        )
    elif chosen == "triton":
        from fastpeft.kernels.nf4 import nf4_quantize

        packed, absmax = nf4_quantize(w, *_ranks_on(quant_type, w.device), blocksize)
    elif chosen == "torch":
        packed, absmax = nf4_torch.quantize(w, quant_type, blocksize)
    else:
        packed, absmax = reference.quantize(w.cpu(), quant_type, blocksize)
        packed, absmax = packed.to(w.device), absmax.to(w.device)
    if has_values(w) and not torch.isfinite(absmax).all():
        n, k = (~torch.isfinite(w)).nonzero()[0].tolist()
        raise ValueError(
            f"quantize_4bit: expected finite weights, got w[{n}, {k}] = {w[n, k].item()} in w {tuple(w.shape)}; "
            "a block with such a value cannot be scaled"
        )
    nested = None
    if double_quant:
        code = _dynamic_table_on(w.device)
        if has_values(absmax):
            absmax, scales, offset = reference.quantize_absmax(absmax)
        else:
            scales = absmax.new_empty(-(-absmax.numel() // reference.NESTED_BLOCKSIZE))
            absmax, offset = torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(())
        nested = NestedAbsmax(code, scales, offset)
    return NF4Weight.unchecked(packed, absmax, (w.shape[0], w.shape[1]), blocksize, quant_type, w.dtype, nested)


@constants
def _codes_on(quant_type: str, device: torch.device) -> torch.Tensor:
    return reference.codes(quant_type).to(device)


@constants
def _ranks_on(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    bounds, order = reference.ranks(quant_type)
    return bounds.to(device), order.to(device)


@constants
def _dynamic_table_on(device: torch.device) -> torch.Tensor:
    return reference.dynamic_table().to(device)


def _check_format(where: str, quant_type: str, blocksize: int) -> None:
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"{where}: expected quant_type in {QUANT_TYPES}, got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{where}: expected blocksize in {BLOCKSIZES}, got {blocksize}")


def _check(w: NF4Weight) -> None:
    _check_format("NF4Weight", w.quant_type, w.blocksize)
    if len(w.shape) != 2 or min(w.shape) < 1 or not w.dtype.is_floating_point:
        raise ValueError(f"NF4Weight: expected shape [N, K] and a floating dtype, got {tuple(w.shape)} and {w.dtype}")
    elements = w.shape[0] * w.shape[1]
    blocks = -(-elements // w.blocksize)
    expected = {
        "packed": (w.packed, torch.uint8, (-(-elements // 2),)),
        "absmax": (w.absmax, torch.float32 if w.nested is None else torch.uint8, (blocks,)),
    }
    if w.nested is not None:
        code, absmax, offset, nested_blocksize = w.nested
        if nested_blocksize != reference.NESTED_BLOCKSIZE:
            raise ValueError(f"NF4Weight: expected a nested blocksize of 256, got {nested_blocksize}")
        expected |= {
            "nested.code": (code, torch.float32, (256,)),
            "nested.absmax": (absmax, torch.float32, (-(-blocks // nested_blocksize),)),
            "nested.offset": (offset, torch.float32, ()),
        }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != w.device or not tensor.is_contiguous():
            layout = "" if tensor.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"NF4Weight: expected {name} {dtype} {shape} on {w.device} for shape {tuple(w.shape)} in blocks of "
                f"{w.blocksize}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}; is the quantisation "
                "state of another weight, or damaged?"
            )
    for name, (tensor, dtype, _) in expected.items():
        if dtype == torch.float32 and has_values(tensor):
            _check_values(name, tensor, signed=name in ("nested.code", "nested.offset"))


def _check_values(name: str, scales: torch.Tensor, signed: bool) -> None:
    lowest, highest = (value.item() for value in scales.aminmax())
    finite = float("-inf") < lowest and highest < float("inf")  # False for a NaN, which aminmax hands on
    if finite and (signed or lowest >= 0.0):
        return
    bad = (~torch.isfinite(scales) if not finite else scales < 0).reshape(-1).nonzero()
    first = bad[0].item()
    raise ValueError(
        f"NF4Weight: expected {name} {'finite' if signed else 'finite and not negative'}, got {scales.reshape(-1)[first].item()} "
        f"at {first} ({bad.numel()} such of {scales.numel()}); the quantisation state is damaged"
    )


def _check_out(w: NF4Weight, dtype: torch.dtype, out: torch.Tensor) -> None:
    if out.shape != w.shape or out.dtype != dtype or out.device != w.device or not out.is_contiguous():
        raise ValueError(
            f"NF4Weight.dequantize: expected out {tuple(w.shape)} {dtype} on {w.device}, contiguous, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}, strides {out.stride()}"
        )
