"""P-tuning: a small network makes the vectors before the input's embeddings (Liu et al. 2021, arXiv:2103.10385)."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from fastpeft.layers.prompt import PromptLayer
from fastpeft.layers.prompt_encoder import PromptEncoder
from fastpeft.methods.prompt_learning import PromptLearningConfig

ENCODERS = ("MLP", "LSTM")
MLP_LAYERS = 2


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Options of P-tuning, by PEFT's names.

    Raises:  ValueError for a value outside its range
    """

    peft_type: ClassVar[str] = "P_TUNING"
    shown_elsewhere: ClassVar[frozenset[str]] = PromptLearningConfig.shown_elsewhere | {
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_dropout",
        "encoder_reparameterization_type",
    }

    encoder_reparameterization_type: str = "MLP"
    """The network: MLP, or LSTM (bidirectional, with an MLP after it)."""
    encoder_hidden_size: int | None = None
    """Its hidden width; the embeddings' by default."""
    encoder_num_layers: int = MLP_LAYERS
    """Layers of the LSTM; an MLP always has the same."""
    encoder_dropout: float = 0.0
    """Dropout between the LSTM's layers."""

    def __post_init__(self):
        super().__post_init__()
        where, kind = type(self).__name__, self.encoder_reparameterization_type
        self.encoder_reparameterization_type = kind = getattr(kind, "value", kind)
        if kind not in ENCODERS:
            raise ValueError(f"{where}: expected encoder_reparameterization_type one of {ENCODERS}, got {kind!r}")
        self._check_count("encoder_hidden_size")
        self._check_count("encoder_num_layers")
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"{where}: expected 0 <= encoder_dropout < 1, got {self.encoder_dropout}")

    def _sizes(self, model: nn.Module) -> dict[str, Any]:
        sizes = super()._sizes(model)
        return sizes | {"encoder_hidden_size": self.encoder_hidden_size or sizes["token_dim"]}

    def make_prompt(self, model: nn.Module, autocast_adapter_dtype: bool, fresh: bool) -> PromptLayer:
        prompt = PromptEncoder(self.task_type, self.num_virtual_tokens, self.num_transformer_submodules, self.token_dim)
        if not self.inference_mode:
            if self.encoder_reparameterization_type == "LSTM":
                prompt.add_lstm(self.encoder_hidden_size, self.encoder_num_layers, self.encoder_dropout)
            else:
                if self.encoder_num_layers != MLP_LAYERS:
                    warnings.warn(
                        f"encoder_num_layers={self.encoder_num_layers} is for the LSTM; the MLP always has the same layers",
                        stacklevel=2,
                    )
                prompt.add_mlp(self.encoder_hidden_size)
        return self._placed(prompt, model, autocast_adapter_dtype)
