"""The weight of the module that an adapter stands on, whatever way it is stored: read as [N, K], replaced, put back.

    nn.Linear                       weight [N, K]
    transformers' Conv1D            weight [K, N]
    bitsandbytes' Linear4bit        Params4bit, packed bytes with a quant_state        -> NF4Weight
    bitsandbytes' Linear8bitLt      Int8Params, int8 rows with their absolute maxima   -> Int8Weight

A quantised weight is read in place: the NF4Weight or Int8Weight shares bitsandbytes' storage. bitsandbytes is known by the
names of its classes, so that nothing here needs it installed.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.ops.int8 import Int8Weight, quantize_int8
from fastpeft.ops.nf4 import NestedAbsmax, NF4Weight, quantize_4bit
from fastpeft.ops.tracing import address, is_fake
from fastpeft.ops.weights import FrozenWeight


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (GPT-2): a linear whose weight is stored [K, N]. Known by name: no import needed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear_4bit(module: nn.Module) -> bool:
    """True for bitsandbytes' Linear4bit and its subclasses (LinearNF4, LinearFP4)."""
    return _is_from_bitsandbytes(type(module), "Linear4bit")


def is_linear_8bit(module: nn.Module) -> bool:
    """True for bitsandbytes' Linear8bitLt and its subclasses."""
    return _is_from_bitsandbytes(type(module), "Linear8bitLt")


@functools.cache
def _is_from_bitsandbytes(kind: type, name: str) -> bool:
    return any(base.__name__ == name and base.__module__.startswith("bitsandbytes.") for base in kind.__mro__)


def is_quantized(module: nn.Module) -> bool:
    """True if bitsandbytes holds the module's weight in 4 or 8 bits."""
    return is_linear_4bit(module) or is_linear_8bit(module)


def is_linear_base(module: nn.Module) -> bool:
    """True for a module that computes x W^T + bias: nn.Linear, Conv1D, and bitsandbytes' two linears."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def compute_dtype(base_layer: nn.Module, x_dtype: torch.dtype) -> torch.dtype:
    """In what the base takes its product, by bitsandbytes' rule: Linear4bit's compute_dtype where it is set, else x's.

    The result is x's dtype again in every case.
    """
    wanted = getattr(base_layer, "compute_dtype", None) if is_linear_4bit(base_layer) else None
    return x_dtype if wanted is None else wanted


def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
    """(N, K), also where the stored tensor has another shape."""
    if is_linear_base(base_layer) and not is_conv1d(base_layer):
        return base_layer.out_features, base_layer.in_features
    first, second = base_layer.weight.shape
    return (second, first) if is_conv1d(base_layer) else (first, second)


# -- reading ----------------------------------------------------------------------------------------------------------


def frozen_weight(base_layer: nn.Module) -> FrozenWeight:
    """The base's weight [N, K]: a tensor (a view for Conv1D), or an NF4Weight or Int8Weight on bitsandbytes' own storage.

    Cheap on every call: what was read is kept until the module's storage is another one.
    Raises:  ValueError for a bitsandbytes module that is not quantised yet, or that bitsandbytes repacked (see keep_unpacked)
    """
    weight = base_layer.weight
    if not is_quantized(base_layer):
        return weight.t() if is_conv1d(base_layer) else weight
    state = _state(base_layer)
    known: _Reading | None = base_layer.__dict__.get(READING)
    if known is not None and known.is_of(weight, state):
        return known.weight
    read = _read_4bit(base_layer, state) if is_linear_4bit(base_layer) else _read_int8(base_layer, state)
    setattr(base_layer, READING, _Reading(read, state, _statistics(state), address(weight)))
    return read


class _Reading(NamedTuple):
    """What frozen_weight made of a module, and what it was made of. A copy of the module reads its own."""

    weight: NF4Weight | Int8Weight
    state: Any
    statistics: torch.Tensor
    address: int

    def __reduce__(self):
        return type(None), ()

    def is_of(self, weight: nn.Parameter, state: Any) -> bool:
        if self.state is not state or self.statistics is not _statistics(state):
            return False
        return torch.compiler.is_compiling() or self.address == address(weight)  # torch.compile knows no addresses


READING = "_fastpeft_reading"
"""The attribute of a base module that holds what was read. A dictionary keyed by modules would do in eager mode; torch.compile
guards on all of its keys."""


def _state(base: nn.Module) -> Any:
    """What the bytes mean: a quant_state (4 bits) or the rows' absolute maxima (int8); None if it is not quantised.

    bitsandbytes keeps it in two places, and a move to another device may lose one of them.
    """
    if is_linear_4bit(base):
        state = getattr(base.weight, "quant_state", None)
        return getattr(base, "quant_state", None) if state is None else state
    held = base.state.SCB
    return getattr(base.weight, "SCB", None) if held is None else held


def _statistics(state: Any) -> torch.Tensor:
    return state if isinstance(state, torch.Tensor) else state.absmax


def _read_4bit(base: nn.Module, state: Any) -> NF4Weight:
    if state is None:
        raise _not_quantized(base)
    keep_unpacked(base)
    return _packed_weight(base.weight, state)


def _packed_weight(weight: torch.Tensor, state: Any) -> NF4Weight:
    nested = None
    if state.nested:
        inner = state.state2
        nested = NestedAbsmax(inner.code, inner.absmax, state.offset, inner.blocksize)
    return NF4Weight(
        packed=_plain(weight).view(torch.uint8).view(-1),
        absmax=state.absmax,
        shape=tuple(state.shape),
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
        nested=nested,
    )


def _read_int8(base: nn.Module, row_absmax: torch.Tensor | None) -> Int8Weight:
    if row_absmax is None or base.weight.dtype != torch.int8:
        raise _not_quantized(base)
    rows = _plain(base.weight)
    return Int8Weight(q=rows, row_absmax=row_absmax.to(rows.device), dtype=torch.float16)  # quantised from float16


def _plain(parameter: nn.Parameter) -> torch.Tensor:
    """The parameter's data as a plain tensor: bitsandbytes' classes have methods of their own."""
    return parameter.detach().as_subclass(torch.Tensor)


def _not_quantized(base: nn.Module) -> ValueError:
    return ValueError(
        f"{type(base).__name__}({base.in_features}, {base.out_features}): expected a quantised weight, got one in "
        f"{base.weight.dtype} that bitsandbytes has not quantised; move the module to its device first (.to(device))"
    )


# -- bitsandbytes' repacking on CPUs ----------------------------------------------------------------------------------


def is_repacked(base_layer: nn.Module) -> bool:
    """True if bitsandbytes has put a Linear4bit's bytes in its CPU order (see keep_unpacked)."""
    return is_linear_4bit(base_layer) and bool(getattr(_state(base_layer), "packing_format_for_cpu", False))


def keep_unpacked(base_layer: nn.Module, name: str = "") -> None:
    """Never let bitsandbytes reorder a Linear4bit's bytes in place.

    On CPUs with AVX512-BF16 its forward in eval mode does: 32-row tiles, scales rounded to bfloat16. Afterwards its training
    forward has no gradient, and what reads the bytes (a merge, DoRA) reads garbage. The switch is on the instance, for good.
    Raises:  ValueError if it has happened already: the rounding cannot be taken back
    """
    if not is_linear_4bit(base_layer):
        return
    if is_repacked(base_layer):
        raise ValueError(
            f"{name or type(base_layer).__name__}: expected a 4-bit weight as it was quantised, got one that bitsandbytes "
            "repacked for this CPU in a forward in eval mode, which rounded its scales to bfloat16; load the model again and "
            "give it to fastpeft before its first forward, or accept the rounding with "
            "fastpeft.integrations.bitsandbytes.unpack(model)"
        )
    base_layer.support_avx512bf16_for_cpu = False


def keep_model_unpacked(model: nn.Module) -> None:
    """keep_unpacked for every Linear4bit in a model; if one raises, none has changed."""
    found = [(name, module) for name, module in model.named_modules() if is_linear_4bit(module)]
    for name, module in sorted(found, key=lambda pair: not is_repacked(pair[1])):  # those that raise first
        keep_unpacked(module, name)


# -- replacing and putting back ---------------------------------------------------------------------------------------


class BaseParameters(NamedTuple):
    """The parameters of a base module at one time. Taken before a merge, `install`ed they are the module's again, bit for bit."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    state: Any  # a 4-bit quant_state, int8 rows' absolute maxima, or None

    @classmethod
    def of(cls, base: nn.Module) -> "BaseParameters":
        state = None
        if is_quantized(base):
            frozen_weight(base)  # refuses what cannot be read
            state = _state(base)
        return cls(base.weight, getattr(base, "bias", None), state)

    def dense(self) -> torch.Tensor:
        """The weight as the module's forward multiplies it, in its stored layout; a fresh float32 tensor if it is quantised."""
        if self.state is None:
            return self.weight
        if isinstance(self.state, torch.Tensor):
            rows = _plain(self.weight)
            return Int8Weight(q=rows, row_absmax=self.state.to(rows.device), dtype=torch.float16).dequantize(
                torch.float32
            )
        return _packed_weight(self.weight, self.state).dequantize(torch.float32)

    def with_values(self, weight: torch.Tensor, bias: torch.Tensor | None) -> "BaseParameters":
        """New parameters with these values, the weight stored in the same way: a quantised one with the same settings."""
        new_bias = self.bias if bias is None else nn.Parameter(bias, requires_grad=False)
        if self.state is None:
            return BaseParameters(nn.Parameter(weight, requires_grad=False), new_bias, None)
        if isinstance(self.state, torch.Tensor):
            rows = quantize_int8(weight)
            return BaseParameters(int8_parameter(rows, type(self.weight)), new_bias, rows.row_absmax)
        old = _packed_weight(self.weight, self.state)
        options = {"blocksize": old.blocksize, "double_quant": old.nested is not None}
        new = quantize_4bit(weight, old.quant_type, **options)
        state = quant_state(new, type(self.state), self.state.code)
        state.dtype = old.dtype  # of the model's weights; the sum is in float32
        return BaseParameters(packed_parameter(new, state, type(self.weight), self.weight.dtype), new_bias, state)

    def install(self, base: nn.Module) -> None:
        """Let the module hold these parameters, on the device (and in the floating dtype) of those it holds now."""
        self._follow(base)
        base.weight = self.weight
        if hasattr(base, "bias"):
            base.bias = self.bias
        if is_linear_4bit(base):
            base.quant_state = self.weight.quant_state = self.state
            self.weight.module = base
        elif is_linear_8bit(base):
            base.state.CB = base.state.SCB = None  # the next forward takes them from the parameter
            self.weight.CB, self.weight.SCB = self.weight.data, self.state.to(self.weight.device)

    def _follow(self, base: nn.Module) -> None:
        """Go where the model went, or take the dtype it took, while these parameters were aside."""
        if self.weight is base.weight:
            return
        self.weight.data = _plain(self.weight).to(_plain(base.weight))
        if self.state is not None and not isinstance(self.state, torch.Tensor):
            self.state.to(base.weight.device)
        if self.bias is not None:
            like = self.bias if base.bias is None else base.bias
            self.bias.data = self.bias.data.to(device=base.weight.device, dtype=like.dtype)


def quant_state(weight: NF4Weight, kind: type, code: torch.Tensor) -> Any:
    """bitsandbytes' QuantState (`kind`) of a packed weight; code: its 16 values. Nothing is copied."""
    inner = None
    if weight.nested is not None:
        inner = kind(
            absmax=weight.nested.absmax, code=weight.nested.code, blocksize=weight.nested.blocksize, dtype=torch.float32
        )
    return kind(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code.to(weight.device),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=weight.dtype,
        offset=None if weight.nested is None else weight.nested.offset,
        state2=inner,
    )


def packed_parameter(weight: NF4Weight, state: Any, kind: type, storage: torch.dtype = torch.uint8) -> nn.Parameter:
    """bitsandbytes' Params4bit (`kind`) on the storage of a packed weight; storage: the dtype it shows its bytes in."""
    if is_fake(weight.packed):  # which no other class can be made of
        parameter = nn.Parameter(weight.packed.view(storage).view(-1, 1), requires_grad=False)
        parameter.quant_state = state
        return parameter
    return kind(
        data=weight.packed.view(storage).view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=weight.blocksize,
        compress_statistics=weight.nested is not None,
        quant_type=weight.quant_type,
        quant_storage=storage,
        bnb_quantized=True,
    )


def int8_parameter(weight: Int8Weight, kind: type) -> nn.Parameter:
    """bitsandbytes' Int8Params (`kind`) on the storage of an int8 weight."""
    if is_fake(weight.q):
        parameter = nn.Parameter(weight.q, requires_grad=False)
        parameter.CB, parameter.SCB = weight.q, weight.row_absmax
        return parameter
    return kind(weight.q, requires_grad=False, has_fp16_weights=False, CB=weight.q, SCB=weight.row_absmax)
