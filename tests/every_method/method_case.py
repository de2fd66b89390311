"""What a method promises, as data: tests/every_method/test_*.py hold every method of the library to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from tests import tiny_models

MODELS: dict[str, Callable] = {
    "llama": tiny_models.llama,
    "gpt2": tiny_models.gpt2,
    "bert": tiny_models.bert,
    "t5": tiny_models.t5,
}
TASK_TYPES = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class MethodCase:
    """One way to configure one method.

    kind         the config class's name, the same in fastpeft and in peft
    options      its options for every model
    per_model    further options by model; a model that is not named here gets none
    models       which of MODELS the method runs on
    in_peft      peft has the method: files go both ways, forward and gradients are compared
    not_in_peft_on  models on which peft refuses the method, or computes something else
    identity     a fresh adapter leaves the model's function as it was
    mergeable    merge_and_unload gives a plain model with the same function
    over_nf4     works over an NF4 base; else it raises NotImplementedError or ValueError that says so
    checkpointing  works with gradient checkpointing; else a forward in training raises ValueError or NotImplementedError
    same_names   parameters have PEFT's names, so that gradients can be compared by name
    learning_rate, steps, factor   a task it can learn: the loss of `steps` steps falls below factor * the first
    fill_std     how far the trained values are moved from their start to make the adapter do something
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    per_model: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: tuple[str, ...] = ("llama", "gpt2", "bert", "t5")
    in_peft: bool = True
    not_in_peft_on: tuple[str, ...] = ()
    identity: bool = True
    mergeable: bool = True
    over_nf4: bool = True
    checkpointing: bool = True
    same_names: bool = True
    learning_rate: float = 1e-2
    steps: int = 30
    factor: float = 0.7
    fill_std: float = 0.1

    def config(self, library: ModuleType, model: str):
        """The config for a model, of fastpeft or of peft."""
        options = {"task_type": TASK_TYPES[model]} | self.options | self.per_model.get(model, {})
        return getattr(library, self.kind)(**options)
