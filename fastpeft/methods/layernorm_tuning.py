"""LN tuning: only the weights of norms are trained (Zhao et al. 2023, arXiv:2312.11420)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.layernorm_tuning import NormTuning
from fastpeft.methods.targeted import TargetedConfig

_LLAMA = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "norm",
)
NORM_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("LayerNorm",)),
    **dict.fromkeys(("gpt2", "gpt_neo"), ("ln_1", "ln_2", "ln_f")),
    **dict.fromkeys(("bloom", "falcon"), ("input_layernorm", "post_attention_layernorm", "ln_f")),
    "distilbert": ("sa_layer_norm", "output_layer_norm", "LayerNorm"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gptj": ("ln_1", "ln_f"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
    "phi": ("input_layernorm", "final_layernorm"),
    "phi3": _LLAMA,
}
"""Norms that are trained, by `model.config.model_type`: PEFT's where it has a row."""


@dataclass
class LNTuningConfig(TargetedConfig):
    """Options of LN tuning, by PEFT's names."""

    peft_type: ClassVar[str] = "LN_TUNING"
    default_targets: ClassVar[dict[str, tuple[str, ...]]] = NORM_TARGETS

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        try:
            return NormTuning(module, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        except TypeError as error:
            raise ValueError(f"LNTuningConfig: target_modules: {path}: {error}") from error
