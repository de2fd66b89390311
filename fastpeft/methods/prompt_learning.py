"""What the configurations of prompt methods share: how many virtual tokens, and the sizes of the model they go into."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.methods.config import TASK_TYPES, PeftConfig
from fastpeft.methods.targets import names_peft_agrees_on

# The end of a transformers class's name says what it is for.
TASK_OF_CLASS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass
class PromptLearningConfig(PeftConfig):
    """Options common to all prompt methods, by PEFT's names. What is None is read off the model."""

    key_prefix: ClassVar[str] = "base_model."
    shown_elsewhere: ClassVar[frozenset[str]] = PeftConfig.shown_elsewhere | {"modules_to_save"}

    num_virtual_tokens: int | None = None
    """Tokens of the prompt; has no default."""
    token_dim: int | None = None
    """Width of a virtual token: that of the embeddings; of a prefix, that of a layer's keys."""
    num_transformer_submodules: int | None = None
    """Transformers in the model: 2 for encoder and decoder, else 1."""
    num_attention_heads: int | None = None
    """Attention heads of the model; of a prefix, those of the keys and values."""
    num_layers: int | None = None
    """Layers of the model."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained in full and saved with the adapter, such as a new head."""

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        if self.num_virtual_tokens is None:
            raise ValueError(f"{where}: expected num_virtual_tokens at least 1, got none; say how long the prompt is")
        names = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
        for name in names:
            self._check_count(name)
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(
                f"{where}: expected num_transformer_submodules 1 or 2, got {self.num_transformer_submodules}"
            )
        saved = self.modules_to_save
        if saved is not None and (isinstance(saved, str) or not all(isinstance(name, str) for name in saved)):
            raise ValueError(f"{where}: expected modules_to_save a list of names, got {saved!r}")
        self.modules_to_save = None if saved is None else list(saved)

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{type(self).__name__}: expected {name} a whole number, at least 1, got {value!r}")

    def for_model(self, model: nn.Module) -> "PromptLearningConfig":
        if not hasattr(model, "config"):
            raise ValueError(
                f"{type(self).__name__}: expected a transformers model, got {type(model).__name__} without a config"
            )
        filled = dataclasses.replace(self, task_type=self.task_type or self._task_of(model))
        return dataclasses.replace(filled, **filled._sizes(model))

    def _task_of(self, model: nn.Module) -> str:
        name = type(model).__name__
        task = next((task for ending, task in TASK_OF_CLASS.items() if name.endswith(ending)), None)
        if task is None or (task == "SEQ_2_SEQ_LM" and not model.config.is_encoder_decoder):
            raise ValueError(
                f"{type(self).__name__}: expected task_type one of {TASK_TYPES}, got none, and {name} does not say it; "
                "a prompt has to know where it goes"
            )
        return task

    def _sizes(self, model: nn.Module) -> dict[str, Any]:
        """The fields that are None, as the model says."""
        config = model.config.get_text_config()
        width = model.get_input_embeddings().weight.shape[1]
        if self.token_dim not in (None, width):
            raise ValueError(
                f"{type(self).__name__}: expected token_dim {width}, the width of the model's embeddings, got {self.token_dim}"
            )
        return self._counts(config) | {"token_dim": width}

    def _counts(self, config: Any) -> dict[str, Any]:
        read = {
            "num_layers": getattr(config, "num_hidden_layers", None),
            "num_attention_heads": getattr(config, "num_attention_heads", None),
            "num_transformer_submodules": 2 if self.task_type == "SEQ_2_SEQ_LM" else 1,
        }
        return {name: value if getattr(self, name) is None else getattr(self, name) for name, value in read.items()}

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        """None: a prompt wraps no module."""
        return []

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        raise TypeError(f"{type(self).__name__}: a prompt wraps no module, got {path}")

    def resolved(self, model: nn.Module, paths: list[str]) -> "PromptLearningConfig":
        config = super().resolved(model, paths)
        saved = names_peft_agrees_on(model, [*(config.modules_to_save or []), *config.heads_to_save()])
        return dataclasses.replace(config, modules_to_save=saved or None)

    def _placed(self, prompt: nn.Module, model: nn.Module, autocast_adapter_dtype: bool) -> nn.Module:
        """The prompt where the model's embeddings are, in float32, or in their dtype if that is wanted."""
        weight = model.get_input_embeddings().weight
        return prompt.to(device=weight.device, dtype=torch.float32 if autocast_adapter_dtype else model.dtype)
