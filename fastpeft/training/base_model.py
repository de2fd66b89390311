"""The frozen base model of a run: read in full, or quantised while it is read; and what it takes in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft.integrations.transformers import DTYPES, load_config, load_model
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from fastpeft.training.config import BaseOptions


def compute_dtype(options: BaseOptions, saved: Any) -> torch.dtype:
    """The dtype of a 4-bit weight's products; saved: the model's config."""
    if options.bf16:
        return torch.bfloat16
    return DTYPES[options.dtype] if options.dtype != "auto" else getattr(saved, "dtype", None) or torch.float32


def load_base(
    source: str, options: BaseOptions, *, labels: Sequence[str] = (), device: torch.device | str = "cpu"
) -> Any:
    """The base model: with a classification head over `labels` if there are any, else a causal LM. Quantised ones are read
    on `device`; the head is never quantised.

    Raises:  OSError or ValueError with a one-line reason
    """
    if options.quantization == "none":
        return load_model(source, labels=labels, dtype=options.dtype)
    from fastpeft.integrations.quantized_model import bits_and_bytes_config, load_quantized  # imports bitsandbytes

    saved = load_config(source)
    settings = bits_and_bytes_config(
        options.quantization, compute_dtype=compute_dtype(options, saved), double_quant=options.double_quant
    )
    if not labels:
        return load_quantized(source, settings, device=device, dtype=options.dtype, auto_class=AutoModelForCausalLM)
    names = dict(enumerate(labels))
    config = AutoConfig.from_pretrained(source, id2label=names, label2id={name: index for index, name in names.items()})
    config.problem_type = "single_label_classification"
    return load_quantized(
        source,
        settings,
        device=device,
        dtype=options.dtype,
        auto_class=AutoModelForSequenceClassification,
        config=config,
        ignore_mismatched_sizes=True,
    )


def quantize_in_place(model: nn.Module, options: BaseOptions) -> nn.Module:
    """A model that is loaded already, as `options` say."""
    if options.quantization == "none":
        return model
    from fastpeft.integrations.quantize import quantize

    dtype = compute_dtype(options, getattr(model, "config", None))
    return quantize(model, options.quantization, compute_dtype=dtype, double_quant=options.double_quant)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """{"quantization", "bytes"} of a model without adapters, and for 4 bits {"blocksize", "double_quant"}.

    Units: bytes of all parameters, buffers and scales; what is shared counts once
    """
    quantized = [frozen_weight(module) for module in model.modules() if is_quantized(module)]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [tensor for weight in quantized for tensor in weight.tensors().values()]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    described: dict[str, Any] = {"quantization": "none", "bytes": sum(sizes.values())}
    if quantized:
        first = quantized[0]
        described["quantization"] = first.quant_type
        if first.quant_type != "int8":
            described |= {"blocksize": first.blocksize, "double_quant": first.nested is not None}
    return described
