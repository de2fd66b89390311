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
    "IA3Config": "fastpeft.methods.ia3",
    "LNTuningConfig": "fastpeft.methods.layernorm_tuning",
    "LoRAEmbedding": "fastpeft.layers.lora",
    "LoRALinear": "fastpeft.layers.lora",
    "LoraConfig": "fastpeft.methods.lora",
    "MultitaskPromptTuningConfig": "fastpeft.methods.multitask_prompt_tuning",
    "NoTargetError": "fastpeft.methods.targets",
    "OFTConfig": "fastpeft.methods.oft",
    "PeftConfig": "fastpeft.methods.config",
    "PeftModel": "fastpeft.model",
    "PrefixTuningConfig": "fastpeft.methods.prefix_tuning",
    "PromptEncoderConfig": "fastpeft.methods.p_tuning",
    "PromptTuningConfig": "fastpeft.methods.prompt_tuning",
    "get_peft_model": "fastpeft.model",
    "lora_linear": "fastpeft.ops.lora",
    "prepare_for_training": "fastpeft.model",
    "prepare_model_for_kbit_training": "fastpeft.model",
    "quantize": "fastpeft.integrations.quantize",
}

__all__ = [
    "BOFTConfig",
    "BitFitConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "MultitaskPromptTuningConfig",
    "NoTargetError",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "__version__",
    "get_peft_model",
    "lora_linear",
    "prepare_for_training",
    "prepare_model_for_kbit_training",
    "quantize",
]

if TYPE_CHECKING:
    from fastpeft.integrations.quantize import quantize
    from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
    from fastpeft.methods.bitfit import BitFitConfig
    from fastpeft.methods.boft import BOFTConfig
    from fastpeft.methods.config import PeftConfig
    from fastpeft.methods.ia3 import IA3Config
    from fastpeft.methods.layernorm_tuning import LNTuningConfig
    from fastpeft.methods.lora import LoraConfig
    from fastpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from fastpeft.methods.oft import OFTConfig
    from fastpeft.methods.p_tuning import PromptEncoderConfig
    from fastpeft.methods.prefix_tuning import PrefixTuningConfig
    from fastpeft.methods.prompt_tuning import PromptTuningConfig
    from fastpeft.methods.targets import NoTargetError
    from fastpeft.model import PeftModel, get_peft_model, prepare_for_training, prepare_model_for_kbit_training
    from fastpeft.ops.lora import lora_linear


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_EXPORTS))
