"""Names of methods and tasks as PEFT has them: str enums, so that TaskType.CAUSAL_LM == "CAUSAL_LM"."""

import enum

from fastpeft.methods import METHODS
from fastpeft.methods.config import TASK_TYPES


class NamedKind(str, enum.Enum):
    """A member is its name, as text and in JSON."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[str]) -> str:
        return name

    def __str__(self) -> str:
        return self.value


TaskType = NamedKind("TaskType", list(TASK_TYPES), module=__name__)
TaskType.__doc__ = "What a model is tuned for: the values of `task_type`."

PromptTuningInit = NamedKind("PromptTuningInit", ["TEXT", "SAMPLE_VOCAB", "RANDOM"], module=__name__)
PromptTuningInit.__doc__ = "Where a prompt starts: the values of `prompt_tuning_init`."

MultitaskPromptTuningInit = NamedKind(
    "MultitaskPromptTuningInit",
    ["TEXT", "RANDOM", "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"],
    module=__name__,
)
MultitaskPromptTuningInit.__doc__ = "Where a multitask prompt starts: the values of `prompt_tuning_init`."

PromptEncoderReparameterizationType = NamedKind("PromptEncoderReparameterizationType", ["MLP", "LSTM"], module=__name__)
PromptEncoderReparameterizationType.__doc__ = "What makes a prompt: the values of `encoder_reparameterization_type`."

PeftType = NamedKind("PeftType", list(METHODS), module=__name__)
PeftType.__doc__ = "The methods of this library: the values of `peft_type`. What is registered later is text alone."
