"""Letting adapters act more or less for a while."""

import contextlib
import math
from collections.abc import Iterator

from torch import nn

from fastpeft.layers.lora_settings import LoRALayer


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, the scale of every LoRA adapter in `model` is `multiplier` times its own; PEFT's function of the same name.

    Raises:  ValueError for a model without LoRA, a merged adapter, or a multiplier that is not finite
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float) or not math.isfinite(multiplier):
        raise ValueError(f"rescale_adapter_scale: expected a finite number, got {multiplier!r}")
    layers = [module for module in model.modules() if isinstance(module, LoRALayer)]
    if not layers:
        raise ValueError("rescale_adapter_scale: expected a model with LoRA adapters, got none in it")
    if any(layer.merged for layer in layers):
        raise ValueError("rescale_adapter_scale: expected adapters that are not merged; call unmerge_adapter first")
    before = [layer.scaling for layer in layers]
    for layer in layers:
        layer.scaling = {name: scale * multiplier for name, scale in layer.scaling.items()}
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling
