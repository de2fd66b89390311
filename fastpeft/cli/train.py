"""fastpeft train."""

import dataclasses
from typing import TextIO

from fastpeft.methods.lora import LoraConfig
from fastpeft.training.config import TrainConfig

CONFIG = TrainConfig


def run(config: TrainConfig, results: TextIO) -> dict:
    """Train, and return the metrics and costs."""
    from fastpeft.training.engine import train  # transformers and datasets take seconds to import; --help needs neither

    return train(dataclasses.replace(config, peft=single_pattern(config.peft))).summary()


def single_pattern(peft: LoraConfig) -> LoraConfig:
    """One target that is "all-linear" or a regular expression, which a command line gives as a list of one, as text."""
    changes = {}
    for name in ("target_modules", "exclude_modules"):
        value = getattr(peft, name)
        if (
            isinstance(value, list)
            and len(value) == 1
            and (value[0] == "all-linear" or set(value[0]) & set("*+?()[]|^$\\"))
        ):
            changes[name] = value[0]
    return dataclasses.replace(peft, **changes) if changes else peft
