"""One LoRA layer of Hugging Face PEFT over any base, and a training step of it."""

import bitsandbytes
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.integrations.acceleration.peft_lora import replace_layer

N, K, R = 65, 97, 5
BYTES_N, BYTES_K = 33, 128  # of quantised bases


def base(kind: str, dtype: torch.dtype, bias: bool = True) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    n, k = (N, K) if kind in ("linear", "conv1d") else (BYTES_N, BYTES_K)
    w, b = torch.randn(n, k, generator=generator) / k**0.5, torch.randn(n, generator=generator)
    if kind == "conv1d":
        made = Conv1D(n, k)
        made.weight.data, made.bias.data = w.t().contiguous().to(dtype), b.to(dtype)
        return made
    if kind == "linear":
        made = nn.Linear(k, n, bias=bias, dtype=dtype)
        made.weight.data = w.to(dtype)
    elif kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(k, n, bias=bias, has_fp16_weights=False)
        made.weight.data = w.to(dtype)
    else:
        made = bitsandbytes.nn.Linear4bit(k, n, bias=bias, quant_type="nf4", compute_dtype=dtype)
        made.weight.data = w.to(dtype)
    if bias:
        made.bias = nn.Parameter(b.to(dtype))
    return made.requires_grad_(False).to("cpu")


def wrapped(module: nn.Module, adapters: int = 1, adapter_dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """PEFT's layer over `module`, its adapters drawn from one seed and all active, in training mode."""
    model = nn.ModuleDict({"target": module})
    model.is_loaded_in_4bit = isinstance(module, bitsandbytes.nn.Linear4bit)
    model.is_loaded_in_8bit = isinstance(module, bitsandbytes.nn.Linear8bitLt)
    names = ["default", "other"][:adapters]
    for name in names:
        config = peft.LoraConfig(
            **{"r": R, "lora_alpha": 7, "target_modules": ["target"], "fan_in_fan_out": isinstance(module, Conv1D)}
            | options
        )
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    layer = model["target"]
    layer.set_adapter(names)
    generator = torch.Generator().manual_seed(4)
    for path, parameter in layer.named_parameters():
        if "lora_" in path:
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = (values.abs() + 0.5 if "magnitude" in path else values).to(adapter_dtype)
    return layer.train()


def accelerated(layer: nn.Module, **options) -> Acceleration:
    ledger = Acceleration(layer)
    assert replace_layer(ledger, "target", layer, **options)
    return ledger


def step(
    layer: nn.Module, dtype: torch.dtype, rows: tuple[int, ...] = (3, 11), values_of: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """y and every gradient, for inputs from one seed; an oracle in a wide dtype takes the values of a narrow one."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(*rows, layer.in_features, generator=generator).to(values_of).to(dtype).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator)
    y.backward(dy.to(values_of).to(y.dtype))
    got = {"y": y.detach(), "dx": x.grad}
    return got | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
