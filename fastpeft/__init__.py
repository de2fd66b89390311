"""fastpeft: parameter-efficient fine-tuning with its hot path in Triton kernels.

The names below are loaded on first use, so that `import fastpeft` and `fastpeft --help` cost nothing and need
neither triton, transformers, peft nor bitsandbytes.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "AttentionConfig": "fastpeft.layers.attention",
    "CrossAttention": "fastpeft.layers.attention",
    "KeyValueCache": "fastpeft.layers.cache",
    "LearnedPositionalEmbedding": "fastpeft.layers.positions",
    "LoRAEmbedding": "fastpeft.layers.lora",
    "LoRALinear": "fastpeft.layers.lora",
    "LoraConfig": "fastpeft.methods.lora",
    "MultiHeadAttention": "fastpeft.layers.attention",
    "NoTargetError": "fastpeft.methods.targets",
    "PeftConfig": "fastpeft.methods.config",
    "PeftModel": "fastpeft.model",
    "RelativeBias": "fastpeft.ops.attention",
    "RelativePositionBias": "fastpeft.layers.positions",
    "RopeScaling": "fastpeft.ops.rope_tables",
    "RotaryEmbedding": "fastpeft.layers.positions",
    "SinusoidalPositionalEmbedding": "fastpeft.layers.positions",
    "apply_rope": "fastpeft.ops.rope",
    "attention": "fastpeft.ops.attention",
    "get_peft_model": "fastpeft.model",
    "lora_linear": "fastpeft.ops.lora",
    "prepare_for_training": "fastpeft.model",
    "prepare_model_for_kbit_training": "fastpeft.model",
    "quantize": "fastpeft.integrations.quantize",
}

__all__ = [
    "AttentionConfig",
    "CrossAttention",
    "KeyValueCache",
    "LearnedPositionalEmbedding",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "MultiHeadAttention",
    "NoTargetError",
    "PeftConfig",
    "PeftModel",
    "RelativeBias",
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "SinusoidalPositionalEmbedding",
    "__version__",
    "apply_rope",
    "attention",
    "get_peft_model",
    "lora_linear",
    "prepare_for_training",
    "prepare_model_for_kbit_training",
    "quantize",
]

if TYPE_CHECKING:
    from fastpeft.integrations.quantize import quantize
    from fastpeft.layers.attention import AttentionConfig, CrossAttention, MultiHeadAttention
    from fastpeft.layers.cache import KeyValueCache
    from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
    from fastpeft.layers.positions import (
        LearnedPositionalEmbedding,
        RelativePositionBias,
        RotaryEmbedding,
        SinusoidalPositionalEmbedding,
    )
    from fastpeft.methods.config import PeftConfig
    from fastpeft.methods.lora import LoraConfig
    from fastpeft.methods.targets import NoTargetError
    from fastpeft.model import PeftModel, get_peft_model, prepare_for_training, prepare_model_for_kbit_training
    from fastpeft.ops.attention import RelativeBias, attention
    from fastpeft.ops.lora import lora_linear
    from fastpeft.ops.rope import apply_rope
    from fastpeft.ops.rope_tables import RopeScaling


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_EXPORTS))
