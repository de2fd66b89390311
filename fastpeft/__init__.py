"""fastpeft: parameter-efficient fine-tuning with its hot path in Triton kernels.

The names below are loaded on first use, so that `import fastpeft` and `fastpeft --help` cost nothing and need
neither triton, transformers, peft nor bitsandbytes.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "BOFTConfig": "fastpeft.methods.boft",
    "BitFitConfig": "fastpeft.methods.bitfit",
    "BottleneckConfig": "fastpeft.methods.bottleneck",
    "EvaConfig": "fastpeft.methods.lora",
    "FusionConfig": "fastpeft.methods.fusion",
    "IA3Config": "fastpeft.methods.ia3",
    "LNTuningConfig": "fastpeft.methods.layernorm_tuning",
    "LoRAEmbedding": "fastpeft.layers.lora",
    "LoRALinear": "fastpeft.layers.lora",
    "LoftQConfig": "fastpeft.methods.lora",
    "LoraConfig": "fastpeft.methods.lora",
    "NoTargetError": "fastpeft.methods.targets",
    "OFTConfig": "fastpeft.methods.oft",
    "PeftConfig": "fastpeft.methods.config",
    "PeftModel": "fastpeft.model",
    "create_loraplus_optimizer": "fastpeft.training.loraplus",
    "get_peft_model": "fastpeft.model",
    "initialize_lora_eva_weights": "fastpeft.model.eva",
    "lora_linear": "fastpeft.ops.lora",
    "prepare_for_training": "fastpeft.model",
    "prepare_model_for_kbit_training": "fastpeft.model",
    "quantize": "fastpeft.integrations.quantize",
    "replace_lora_weights_loftq": "fastpeft.integrations.loftq",
    "rescale_adapter_scale": "fastpeft.tuner.scaling",
}

__all__ = [
    "BOFTConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "EvaConfig",
    "FusionConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoftQConfig",
    "LoraConfig",
    "NoTargetError",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "__version__",
    "create_loraplus_optimizer",
    "get_peft_model",
    "initialize_lora_eva_weights",
    "lora_linear",
    "prepare_for_training",
    "prepare_model_for_kbit_training",
    "quantize",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
]

if TYPE_CHECKING:
    from fastpeft.integrations.loftq import replace_lora_weights_loftq
    from fastpeft.integrations.quantize import quantize
    from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
    from fastpeft.methods.bitfit import BitFitConfig
    from fastpeft.methods.boft import BOFTConfig
    from fastpeft.methods.bottleneck import BottleneckConfig
    from fastpeft.methods.config import PeftConfig
    from fastpeft.methods.fusion import FusionConfig
    from fastpeft.methods.ia3 import IA3Config
    from fastpeft.methods.layernorm_tuning import LNTuningConfig
    from fastpeft.methods.lora import EvaConfig, LoftQConfig, LoraConfig
    from fastpeft.methods.oft import OFTConfig
    from fastpeft.methods.targets import NoTargetError
    from fastpeft.model import PeftModel, get_peft_model, prepare_for_training, prepare_model_for_kbit_training
    from fastpeft.model.eva import initialize_lora_eva_weights
    from fastpeft.ops.lora import lora_linear
    from fastpeft.training.loraplus import create_loraplus_optimizer
    from fastpeft.tuner.scaling import rescale_adapter_scale


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_EXPORTS))
