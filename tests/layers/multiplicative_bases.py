"""Linear modules of every kind that IA3, OFT and BOFT stand on, and what they hold as float64."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft
from fastpeft.layers.base_weight import BaseParameters, is_conv1d

IN, OUT = 24, 12


def linear(bias: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def conv1d():
    torch.manual_seed(0)
    base = Conv1D(OUT, IN)
    nn.init.normal_(base.bias)
    nn.init.normal_(base.weight)
    return base


def quantized(kind: str):
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(64, 32))
    base = fastpeft.quantize(holder, kind, skip_modules=[])[0]
    if hasattr(base, "compute_dtype"):
        base.compute_dtype = torch.float32
    return base


BASES = {
    "linear": linear,
    "no_bias": lambda: linear(bias=False),
    "conv1d": conv1d,
    "nf4": lambda: quantized("nf4"),
    "fp4": lambda: quantized("fp4"),
    "int8": lambda: quantized("int8"),
}


def float64_parts(base) -> tuple[torch.Tensor, torch.Tensor]:
    """(W [N, K], bias [N]) in float64; bias zero where there is none."""
    dense = BaseParameters.of(base).dense().detach().double()
    weight = dense.t() if is_conv1d(base) else dense
    bias = torch.zeros(len(weight), dtype=torch.float64) if base.bias is None else base.bias.detach().double()
    return weight, bias
