"""Between this package's quantised weights and bitsandbytes' modules: both hold the same bytes, nothing is copied.

    NF4Weight  <->  Params4bit in a Linear4bit        Int8Weight  <->  Int8Params in a Linear8bitLt

The way to here, reading a module, is `fastpeft.layers.base_weight.frozen_weight`.
"""

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, get_4bit_type
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.layers.base_weight import (
    frozen_weight,
    int8_parameter,
    is_linear_4bit,
    is_repacked,
    keep_unpacked,
    packed_parameter,
    quant_state,
)
from fastpeft.ops.int8 import Int8Weight
from fastpeft.ops.nf4 import NF4Weight

OUTLIER_THRESHOLD = 6.0
"""Inputs above it are multiplied in floating point by Linear8bitLt in eval mode; transformers' own value."""


def params_4bit(weight: NF4Weight) -> Params4bit:
    """A Params4bit on the storage of a packed weight."""
    state = quant_state(weight, QuantState, get_4bit_type(weight.quant_type, device=weight.device))
    return packed_parameter(weight, state, Params4bit)


def int8_params(weight: Int8Weight) -> Int8Params:
    """An Int8Params on the storage of an int8 weight."""
    return int8_parameter(weight, Int8Params)


def linear_of(
    weight: NF4Weight | Int8Weight, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None
) -> Linear4bit | Linear8bitLt:
    """The bitsandbytes module that holds a quantised weight, frozen; compute_dtype: of a Linear4bit's products, None for x's."""
    n, k = weight.shape
    with _disable_current_modes(), torch.device("meta"):  # no data is made that would be thrown away
        if isinstance(weight, Int8Weight):
            linear = Linear8bitLt(k, n, bias is not None, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
        else:
            linear = Linear4bit(
                k, n, bias is not None, compute_dtype, weight.nested is not None, quant_type=weight.quant_type
            )
    hold(linear, weight)
    if bias is not None:
        linear.bias = bias
    linear.source_cls = nn.Linear  # transformers reads it when it loads: whether the weight was stored transposed
    return linear.requires_grad_(False)


def hold(linear: Linear4bit | Linear8bitLt, weight: NF4Weight | Int8Weight) -> nn.Parameter:
    """Give a bitsandbytes module this weight, and return its new parameter."""
    if isinstance(weight, Int8Weight):
        linear.weight = int8_params(weight)
    else:
        linear.weight = params_4bit(weight)
        linear.weight.module = linear
        linear.quant_state = linear.weight.quant_state
        keep_unpacked(linear)
    return linear.weight


def unpack(model: nn.Module) -> nn.Module:
    """Undo bitsandbytes' repacking for CPUs in every Linear4bit, accepting that the scales were rounded to bfloat16 by it.

    The codes are exact; with double quantisation the rounded scales are kept in float32 instead, as nesting them again
    would round them once more.
    """
    for module in model.modules():
        if not is_linear_4bit(module):
            continue
        if is_repacked(module):
            _unpack(module)
        keep_unpacked(module)
    return model


def _unpack(linear: Linear4bit) -> None:
    state = linear.weight.quant_state
    scales = state.absmax.t().reshape(-1).float()
    state.original_nested = False  # keeps bitsandbytes from quantising the scales anew
    data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(linear.weight.data, state)
    state.absmax, state.nested, state.offset, state.state2 = scales, False, None, None
    linear.weight.data, linear.weight.quant_state, linear.quant_state = data, state, state
    linear.weight.compress_statistics = False
    frozen_weight(linear)
