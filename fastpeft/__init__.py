"""fastpeft: parameter-efficient fine-tuning with its hot path in Triton kernels.

The names below are loaded on first use, so that `import fastpeft` and `fastpeft --help` cost nothing and need
neither triton, transformers, peft nor bitsandbytes.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "Acceleration": "fastpeft.integrations.acceleration",
    "AdaLoraConfig": "fastpeft.methods.adalora",
    "AttentionConfig": "fastpeft.layers.attention",
    "AutoPeftModel": "fastpeft.integrations.auto",
    "AutoPeftModelForCausalLM": "fastpeft.integrations.auto",
    "AutoPeftModelForFeatureExtraction": "fastpeft.integrations.auto",
    "AutoPeftModelForQuestionAnswering": "fastpeft.integrations.auto",
    "AutoPeftModelForSeq2SeqLM": "fastpeft.integrations.auto",
    "AutoPeftModelForSequenceClassification": "fastpeft.integrations.auto",
    "AutoPeftModelForTokenClassification": "fastpeft.integrations.auto",
    "BOFTConfig": "fastpeft.methods.boft",
    "BitFitConfig": "fastpeft.methods.bitfit",
    "BottleneckConfig": "fastpeft.methods.bottleneck",
    "CrossAttention": "fastpeft.layers.attention",
    "EvaConfig": "fastpeft.methods.lora",
    "FusionConfig": "fastpeft.methods.fusion",
    "IA3Config": "fastpeft.methods.ia3",
    "KeyValueCache": "fastpeft.layers.cache",
    "LNTuningConfig": "fastpeft.methods.layernorm_tuning",
    "LearnedPositionalEmbedding": "fastpeft.layers.positions",
    "LoRAEmbedding": "fastpeft.layers.lora",
    "LoRALinear": "fastpeft.layers.lora",
    "LoftQConfig": "fastpeft.methods.lora",
    "LoraConfig": "fastpeft.methods.lora",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": "fastpeft.model.tasks",
    "MultiHeadAttention": "fastpeft.layers.attention",
    "MultitaskPromptTuningConfig": "fastpeft.methods.multitask_prompt_tuning",
    "MultitaskPromptTuningInit": "fastpeft.methods.kinds",
    "NoTargetError": "fastpeft.methods.targets",
    "OFTConfig": "fastpeft.methods.oft",
    "PEFT_TYPE_TO_CONFIG_MAPPING": "fastpeft.methods.by_name",
    "PeftConfig": "fastpeft.methods.config",
    "PeftModel": "fastpeft.model",
    "PeftModelForCausalLM": "fastpeft.model.tasks",
    "PeftModelForFeatureExtraction": "fastpeft.model.tasks",
    "PeftModelForQuestionAnswering": "fastpeft.model.tasks",
    "PeftModelForSeq2SeqLM": "fastpeft.model.tasks",
    "PeftModelForSequenceClassification": "fastpeft.model.tasks",
    "PeftModelForTokenClassification": "fastpeft.model.tasks",
    "PeftType": "fastpeft.methods.kinds",
    "PrefixTuningConfig": "fastpeft.methods.prefix_tuning",
    "PromptEncoderConfig": "fastpeft.methods.p_tuning",
    "PromptEncoderReparameterizationType": "fastpeft.methods.kinds",
    "PromptTuningConfig": "fastpeft.methods.prompt_tuning",
    "PromptTuningInit": "fastpeft.methods.kinds",
    "RelativeBias": "fastpeft.ops.attention",
    "RelativePositionBias": "fastpeft.layers.positions",
    "RopeScaling": "fastpeft.ops.rope_tables",
    "RotaryEmbedding": "fastpeft.layers.positions",
    "SinusoidalPositionalEmbedding": "fastpeft.layers.positions",
    "TaskType": "fastpeft.methods.kinds",
    "accelerate": "fastpeft.integrations.acceleration",
    "accelerate_new_layers": "fastpeft.integrations.acceleration",
    "apply_rope": "fastpeft.ops.rope",
    "attention": "fastpeft.ops.attention",
    "create_loraplus_optimizer": "fastpeft.training.loraplus",
    "dequantize": "fastpeft.integrations.dequantize",
    "finetune": "fastpeft.training.finetune",
    "geglu": "fastpeft.ops.glu",
    "get_layer_status": "fastpeft.model.status",
    "get_model_status": "fastpeft.model.status",
    "get_peft_config": "fastpeft.methods.by_name",
    "get_peft_model": "fastpeft.model",
    "get_peft_model_state_dict": "fastpeft.model.plain",
    "initialize_lora_eva_weights": "fastpeft.model.eva",
    "inject_adapter_in_model": "fastpeft.model.plain",
    "layer_norm": "fastpeft.ops.norm",
    "linear_cross_entropy": "fastpeft.ops.cross_entropy",
    "load_peft_weights": "fastpeft.model.plain",
    "lora_glu_mlp": "fastpeft.ops.lora_mlp",
    "lora_linear": "fastpeft.ops.lora",
    "plan": "fastpeft.training.plan",
    "prepare_for_training": "fastpeft.model",
    "prepare_model_for_kbit_training": "fastpeft.model",
    "quantize": "fastpeft.integrations.quantize",
    "register_method": "fastpeft.methods.by_name",
    "replace_lora_weights_loftq": "fastpeft.integrations.loftq",
    "rescale_adapter_scale": "fastpeft.tuner.scaling",
    "restore": "fastpeft.integrations.acceleration",
    "rms_norm": "fastpeft.ops.norm",
    "set_peft_model_state_dict": "fastpeft.model.plain",
    "study": "fastpeft.training.studies.conduct",
    "swiglu": "fastpeft.ops.glu",
}

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "Acceleration",
    "AdaLoraConfig",
    "AttentionConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "CrossAttention",
    "EvaConfig",
    "FusionConfig",
    "IA3Config",
    "KeyValueCache",
    "LNTuningConfig",
    "LearnedPositionalEmbedding",
    "LoRAEmbedding",
    "LoRALinear",
    "LoftQConfig",
    "LoraConfig",
    "MultiHeadAttention",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoTargetError",
    "OFTConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RelativeBias",
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "SinusoidalPositionalEmbedding",
    "TaskType",
    "__version__",
    "accelerate",
    "accelerate_new_layers",
    "apply_rope",
    "attention",
    "create_loraplus_optimizer",
    "dequantize",
    "finetune",
    "geglu",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "layer_norm",
    "linear_cross_entropy",
    "load_peft_weights",
    "lora_glu_mlp",
    "lora_linear",
    "plan",
    "prepare_for_training",
    "prepare_model_for_kbit_training",
    "quantize",
    "register_method",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "restore",
    "rms_norm",
    "set_peft_model_state_dict",
    "study",
    "swiglu",
]

if TYPE_CHECKING:
    from fastpeft.integrations.acceleration import Acceleration, accelerate, accelerate_new_layers, restore
    from fastpeft.integrations.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from fastpeft.integrations.dequantize import dequantize
    from fastpeft.integrations.loftq import replace_lora_weights_loftq
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
    from fastpeft.methods.adalora import AdaLoraConfig
    from fastpeft.methods.bitfit import BitFitConfig
    from fastpeft.methods.boft import BOFTConfig
    from fastpeft.methods.bottleneck import BottleneckConfig
    from fastpeft.methods.by_name import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config, register_method
    from fastpeft.methods.config import PeftConfig
    from fastpeft.methods.fusion import FusionConfig
    from fastpeft.methods.ia3 import IA3Config
    from fastpeft.methods.kinds import (
        MultitaskPromptTuningInit,
        PeftType,
        PromptEncoderReparameterizationType,
        PromptTuningInit,
        TaskType,
    )
    from fastpeft.methods.layernorm_tuning import LNTuningConfig
    from fastpeft.methods.lora import EvaConfig, LoftQConfig, LoraConfig
    from fastpeft.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
    from fastpeft.methods.oft import OFTConfig
    from fastpeft.methods.p_tuning import PromptEncoderConfig
    from fastpeft.methods.prefix_tuning import PrefixTuningConfig
    from fastpeft.methods.prompt_tuning import PromptTuningConfig
    from fastpeft.methods.targets import NoTargetError
    from fastpeft.model import PeftModel, get_peft_model, prepare_for_training, prepare_model_for_kbit_training
    from fastpeft.model.eva import initialize_lora_eva_weights
    from fastpeft.model.plain import (
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        set_peft_model_state_dict,
    )
    from fastpeft.model.status import get_layer_status, get_model_status
    from fastpeft.model.tasks import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
    )
    from fastpeft.ops.attention import RelativeBias, attention
    from fastpeft.ops.cross_entropy import linear_cross_entropy
    from fastpeft.ops.glu import geglu, swiglu
    from fastpeft.ops.lora import lora_linear
    from fastpeft.ops.lora_mlp import lora_glu_mlp
    from fastpeft.ops.norm import layer_norm, rms_norm
    from fastpeft.ops.rope import apply_rope
    from fastpeft.ops.rope_tables import RopeScaling
    from fastpeft.training.finetune import finetune
    from fastpeft.training.loraplus import create_loraplus_optimizer
    from fastpeft.training.plan import plan
    from fastpeft.training.studies.conduct import study
    from fastpeft.tuner.scaling import rescale_adapter_scale


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_EXPORTS))
