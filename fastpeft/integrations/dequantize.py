"""dequantize: the dense copy of a quantised base, into which an adapter merges without being rounded to 4 or 8 bits again."""

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import frozen_weight, is_quantized, weight_shape
from fastpeft.model import PeftModel

# What transformers leaves on a model that bitsandbytes quantised: without them it is a plain model, which can be saved.
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit")


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantised linear of a model, bare or with adapters, by an nn.Linear with the values its bytes stand for.

    W = code[q] * absmax (4 bits) or q * absmax_row / 127 (8 bits); quantising's own error stays in W. In place, frozen:
    `dequantize(model).merge_and_unload()` is a plain model whose weights are W + delta, rounded once, to `dtype`.

    dtype: of the new weights; None: that of the model's floating parameters, as an embedding's or a norm's
    Raises:  ValueError where nothing is quantised or adapters are merged; NotImplementedError for an adapter that acts on base
             weights of its own (OLoRA over a quantised base). The model is then unchanged
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    quantized = [module for module in inner.modules() if is_quantized(module)]
    if not quantized:
        raise ValueError(
            f"dequantize: expected a model with quantised linears, got none in {type(inner).__name__}; it is dense already"
        )
    for layer in (module for module in inner.modules() if isinstance(module, AdapterLayer)):
        if layer.merged_adapters:
            raise ValueError(f"dequantize: {layer.merged_adapters} are merged; call unmerge_adapter first")
        if layer.started_from:
            raise NotImplementedError(
                f"dequantize: {sorted(layer.started_from)} act on quantised weights of their own; merge them, or delete them"
            )
    dtype = dtype or _floating_dtype(inner, quantized)
    dense = {id(module): _dense(module, dtype) for module in quantized}
    for parent in list(inner.modules()):
        for name, child in parent._modules.items():
            if id(child) in dense:
                setattr(parent, name, dense[id(child)])
    for mark in _MARKS:
        inner.__dict__.pop(mark, None)
    if getattr(inner, "config", None) is not None and hasattr(inner.config, "quantization_config"):
        del inner.config.quantization_config
    return model


def _floating_dtype(model: nn.Module, quantized: list[nn.Module]) -> torch.dtype:
    inside = {id(parameter) for module in quantized for parameter in module.parameters()}
    adapters = {
        id(parameter)
        for layer in model.modules()
        if isinstance(layer, AdapterLayer)
        for name in layer.adapter_names
        for parameter in layer.adapter_tensors(name).values()
    }
    own = (p for p in model.parameters() if id(p) not in inside | adapters and p.is_floating_point())
    return next((parameter.dtype for parameter in own), torch.float32)


@torch.no_grad()
def _dense(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    n, k = weight_shape(module)
    linear = nn.Linear(k, n, bias=module.bias is not None, device="meta").requires_grad_(False)
    linear.weight = nn.Parameter(frozen_weight(module).dequantize(torch.float32).to(dtype), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().to(dtype, copy=True), requires_grad=False)
    return linear.train(module.training)
