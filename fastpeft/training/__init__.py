"""Training on transformers.Trainer: data, metrics, checkpoints, evaluation, records and reports.

    from fastpeft import LoraConfig
    from fastpeft.training import TrainConfig, train
    record = train(TrainConfig(model="...", data="reviews.csv", output_dir="out", peft=LoraConfig(r=16)))

The names are loaded on first use: a record or a report needs neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

_EXPORTS = {
    "RunRecord": "fastpeft.training.record",
    "TrainConfig": "fastpeft.training.config",
    "TrainedAdapter": "fastpeft.training.predict",
    "Trainer": "fastpeft.training.trainer",
    "finetune": "fastpeft.training.finetune",
    "study": "fastpeft.training.studies.conduct",
    "suggested_learning_rate": "fastpeft.training.guidance",
    "train": "fastpeft.training.engine",
}

__all__ = [
    "RunRecord",
    "TrainConfig",
    "TrainedAdapter",
    "Trainer",
    "finetune",
    "study",
    "suggested_learning_rate",
    "train",
]

if TYPE_CHECKING:
    from fastpeft.training.config import TrainConfig
    from fastpeft.training.engine import train
    from fastpeft.training.finetune import finetune
    from fastpeft.training.guidance import suggested_learning_rate
    from fastpeft.training.predict import TrainedAdapter
    from fastpeft.training.record import RunRecord
    from fastpeft.training.studies.conduct import study
    from fastpeft.training.trainer import Trainer


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fastpeft.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
