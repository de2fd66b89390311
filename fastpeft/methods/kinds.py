"""Names of methods and tasks as PEFT has them: str enums, so that TaskType.CAUSAL_LM == "CAUSAL_LM"."""

import enum

from fastpeft.methods import METHODS
from fastpeft.methods.config import TASK_TYPES


class NamedKind(str, enum.Enum):
    """A member is its name, as text and in JSON."""

    def __str__(self) -> str:
        return self.value


TaskType = NamedKind("TaskType", {name: name for name in TASK_TYPES}, module=__name__)
TaskType.__doc__ = "What a model is tuned for: the values of `task_type`."

PeftType = NamedKind("PeftType", {name: name for name in METHODS}, module=__name__)
PeftType.__doc__ = "The methods of this library: the values of `peft_type`. What is registered later is text alone."
