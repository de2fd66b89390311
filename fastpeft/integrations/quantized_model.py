"""Models whose linear weights bitsandbytes' modules hold: what `quantize` (quantize.py) makes, from a folder or in place.

The result is what transformers makes with a BitsAndBytesConfig, module for module and byte for byte (but for the codes of
doubly quantised scales, where bitsandbytes' table rounds a few to the second nearest): transformers saves and loads it, and PEFT
trains it. Two things differ: the weights are quantised by this package's kernels, and Linear4bit is never repacked for CPUs.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from fastpeft.integrations.bitsandbytes import OUTLIER_THRESHOLD, hold, linear_of
from fastpeft.integrations.quantize import QUANT_TYPES, QuantType
from fastpeft.integrations.transformers import DTYPES, load_config, model_source, one_line
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import frozen_weight, is_conv1d, is_linear_4bit, is_quantized, keep_model_unpacked
from fastpeft.methods.config import HEAD_NAMES
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.ops.weights import QuantizedWeight

COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bits_and_bytes_config(
    quant_type: QuantType,
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    double_quant: bool = True,
    skip_modules: Iterable[str] | None = None,
) -> BitsAndBytesConfig:
    """transformers' description of these settings."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quantize: expected quant_type one of {QUANT_TYPES}, got {quant_type!r}")
    if compute_dtype not in COMPUTE_DTYPES:
        raise ValueError(f"quantize: expected compute_dtype one of {COMPUTE_DTYPES}, got {compute_dtype!r}")
    if isinstance(skip_modules, str):
        raise ValueError(f"quantize: expected skip_modules as a list of names, got the text {skip_modules!r}")
    skip = None if skip_modules is None else list(skip_modules)
    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=skip,
    )


def check_blocksize(blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"quantize: expected a blocksize that is a power of two from 32 to 4096, got {blocksize!r}")


def _quantized(weight: torch.Tensor, config: BitsAndBytesConfig, blocksize: int) -> QuantizedWeight:
    """The weight [N, K] in the storage that `config` describes."""
    if config.load_in_8bit:
        return quantize_int8(weight)
    options = {"blocksize": blocksize, "double_quant": config.bnb_4bit_use_double_quant}
    return quantize_4bit(weight, config.bnb_4bit_quant_type, **options)


def modules_to_skip(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of the modules that keep their full weights: those that are asked for, or the usual ones; and shared weights."""
    tied = _modules_with_shared_weights(model)
    if wanted is not None:
        return [*wanted, *tied]
    usual = get_keys_to_not_convert(model) if isinstance(model, PreTrainedModel) else []
    usual = [name.removesuffix(".bias") for name in usual]  # the last module, where its last parameter is a bias
    heads = {"pooler", *(name for names in HEAD_NAMES.values() for name in names)}  # made anew for many a task
    named = [path for path, _ in model.named_modules() if path.rpartition(".")[2] in heads]
    precise = getattr(model, "_keep_in_fp32_modules", None) or []
    return list(dict.fromkeys([*usual, *named, *precise, *tied]))


def _modules_with_shared_weights(model: nn.Module) -> list[str]:
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(path)
    shared = [path for paths in holders.values() if len(paths) > 1 for path in paths]
    keys = getattr(model, "all_tied_weights_keys", {})  # without data, and before they are tied, they are named only
    return [*shared, *(key.removesuffix(".weight") for pair in keys.items() for key in pair if key.endswith(".weight"))]


# -- a model in memory ------------------------------------------------------------------------------------------------


def quantize_module(
    model: nn.Module, config: BitsAndBytesConfig, blocksize: int, device: torch.device | str | None
) -> nn.Module:
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ValueError("quantize: expected a model without adapters, got one with adapters in it; quantise it first")
    if any(map(is_quantized, model.modules())):
        _check_same_settings(model, config, blocksize)
        keep_model_unpacked(model)
        return model if device is None else model.to(device)
    skip = modules_to_skip(model, config.llm_int8_skip_modules)
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if (type(module) is nn.Linear or is_conv1d(module)) and should_convert_module(path, skip):
            places.setdefault(id(module), []).append(path)
    if not places:
        raise _no_linear_modules(model, skip)
    _check_has_data(model)
    for paths in places.values():  # paths, not modules: an old weight is let go before the next is quantised
        _replace(model, paths, config, blocksize, device)
    if device is not None:
        model.to(device)
    config.llm_int8_skip_modules = skip
    return mark(model, config)


def _replace(model: nn.Module, paths: list[str], config: BitsAndBytesConfig, blocksize: int, device: Any) -> None:
    old = model.get_submodule(paths[0])
    weight = old.weight.detach()
    weight = (weight.t() if is_conv1d(old) else weight).to(device or weight.device)
    new = linear_of(_quantized(weight, config, blocksize), old.bias, config.bnb_4bit_compute_dtype)
    new.source_cls = type(old)
    new.train(old.training)
    for path in paths:
        model.set_submodule(path, new)


def _no_linear_modules(model: nn.Module, skip: Sequence[str]) -> ValueError:
    return ValueError(
        f"quantize: expected linear modules, found none in {type(model).__name__} outside skip_modules {list(skip)}; "
        "there is nothing to quantise"
    )


def _check_has_data(model: nn.Module) -> None:
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(f"quantize: expected a model with data, got {len(empty)} weights on meta such as {empty[0]}")


def _check_same_settings(model: nn.Module, config: BitsAndBytesConfig, blocksize: int) -> None:
    found = {_settings(module) for module in model.modules() if is_quantized(module)}
    if config.load_in_8bit:
        wanted = ("int8",)
    else:
        wanted = (config.bnb_4bit_quant_type, blocksize, bool(config.bnb_4bit_use_double_quant))
    if found != {wanted}:
        names = "(quant_type, blocksize, double_quant)"
        raise ValueError(
            f"quantize: expected a model in full precision or quantised as {names} = {wanted}, got one quantised as "
            f"{sorted(found)}; load the full weights again"
        )


def _settings(module: nn.Module) -> tuple:
    weight = frozen_weight(module)
    return (weight.quant_type, weight.blocksize, weight.nested is not None) if is_linear_4bit(module) else ("int8",)


def mark(model: nn.Module, config: BitsAndBytesConfig) -> nn.Module:
    """Tell transformers, its Trainer and PEFT that the model is quantised: what `from_pretrained` sets."""
    keep_model_unpacked(model)
    for module in model.modules():
        if is_quantized(module):
            frozen_weight(module)  # a weight that did not come is found here
            module.requires_grad_(False)
    setattr(model, "is_loaded_in_8bit" if config.load_in_8bit else "is_loaded_in_4bit", True)
    if isinstance(model, PreTrainedModel):
        kind = Bnb8BitHfQuantizer if config.load_in_8bit else Bnb4BitHfQuantizer
        model.hf_quantizer = kind(config, pre_quantized=True)
        model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
        model.hf_quantizer.postprocess_model(model)
    return model


# -- a folder ---------------------------------------------------------------------------------------------------------


def load_quantized(
    name_or_path: str | os.PathLike,
    settings: BitsAndBytesConfig,
    *,
    blocksize: int = 64,
    device: torch.device | str | None = None,
    dtype: str = "auto",
    auto_class: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a folder or hub name, quantised while it is read. auto_class and options: transformers' Auto class and
    what its from_pretrained takes, by default the class that was saved.

    Where another class is loaded than the one that was saved, a new head may be missing (it is made anew) and an old one left
    over; every other weight has to be there.
    """
    source = model_source(name_or_path)
    saved = load_config(source)
    names = saved.architectures or []
    kind = auto_class or (getattr(transformers, names[0], None) if names else None)
    if kind is None:
        raise ValueError(
            f"model {source}: its config.json names no class of transformers ({names}); pass a model instead"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    options |= {"dtype": DTYPES[dtype], "device_map": {"": str(device or "cpu")}, "output_loading_info": True}
    arrival = None if getattr(saved, "quantization_config", None) else _OnArrival(settings, blocksize)
    if arrival is not None:
        options |= {"quantization_config": arrival, "use_safetensors": True}
    try:
        model, report = kind.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        fault = next(iter(arrival.faults), error) if arrival is not None else error  # transformers only counts them
        raise one_line(f"model {source}", fault) from error
    _check_report(source, model, names, report)
    if arrival is None:
        return quantize_module(model, settings, blocksize, None)
    settings.llm_int8_skip_modules = model.config.quantization_config.llm_int8_skip_modules
    return mark(model, settings)


def _check_report(source: str, model: PreTrainedModel, saved_as: Sequence[str], report: dict[str, Any]) -> None:
    """Raise ValueError where weights did not come as they should have."""
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if type(model).__name__ not in saved_as:  # a new head, and an old one
        body = f"{model.base_model_prefix}."
        missing = [key for key in missing if key.startswith(body) and ".pooler." not in key]
        mismatched = [key for key in mismatched if key.startswith(body)]
        unexpected = []
    for what, keys in (("lacks", missing), ("has too much:", unexpected), ("has in other shapes", mismatched)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise ValueError(
                f"model {source}: expected the weights of {type(model).__name__}; it {what} {keys[:4]}{more}"
            )


class _OnArrival(BitsAndBytesConfig):
    """bitsandbytes' settings for a model whose weights this package quantises while transformers reads them."""

    def __init__(self, config: BitsAndBytesConfig, blocksize: int):
        super().__init__(**{name: value for name, value in config.to_dict().items() if name in _CONFIG_FIELDS})
        self.blocksize = blocksize
        self.faults: list[ValueError] = []  # weights that cannot be quantised
        self.quant_method = "fastpeft_int8" if self.load_in_8bit else "fastpeft_4bit"


_CONFIG_FIELDS = (
    "load_in_8bit", "load_in_4bit", "llm_int8_threshold", "llm_int8_skip_modules", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
)  # fmt: skip


class _QuantizeWeight(ConversionOps):
    """One linear weight from the file -> the parameter of its bitsandbytes module."""

    def __init__(self, config: _OnArrival):
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: nn.Module | None = None, **_: Any
    ) -> dict[str, nn.Parameter]:
        parameters = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            weight = weight.t() if module.source_cls.__name__ == "Conv1D" else weight
            shape = (module.out_features, module.in_features)
            if tuple(weight.shape) != shape:
                self.config.faults.append(ValueError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}"))
                raise self.config.faults[-1]
            try:
                parameters[name] = hold(module, _quantized(weight, self.config, self.config.blocksize))
            except ValueError as error:
                self.config.faults.append(ValueError(f"{name}: {error}"))
                raise
            module._is_hf_initialized = True
        return parameters


class _WithOwnKernels:
    """The part of the two quantizers below that differs from transformers'."""

    quantization_config: _OnArrival

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self.quantization_config)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        config = self.quantization_config
        config.llm_int8_skip_modules = modules_to_skip(model, config.llm_int8_skip_modules)
        super()._process_model_before_weight_loading(model, **kwargs)
        if not any(map(is_quantized, model.modules())):
            raise _no_linear_modules(model, config.llm_int8_skip_modules)


@register_quantizer("fastpeft_4bit")
class _Quantizer4bit(_WithOwnKernels, Bnb4BitHfQuantizer):
    pass


@register_quantizer("fastpeft_int8")
class _QuantizerInt8(_WithOwnKernels, Bnb8BitHfQuantizer):
    pass
