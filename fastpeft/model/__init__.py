"""PeftModel: a model with adapters, by PEFT's names."""

from fastpeft.model.peft_model import DEFAULT_ADAPTER, PeftModel, get_peft_model
from fastpeft.model.preparation import (
    prepare_for_training,
    prepare_model_for_kbit_training,
    require_input_gradients,
)

__all__ = [
    "DEFAULT_ADAPTER",
    "PeftModel",
    "get_peft_model",
    "prepare_for_training",
    "prepare_model_for_kbit_training",
    "require_input_gradients",
]
