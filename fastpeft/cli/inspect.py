"""fastpeft inspect."""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import torch

from fastpeft.checkpoint import read_config, read_tensors
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.lora import LoraConfig
from fastpeft.model import get_peft_model
from fastpeft.training.config import TASK_TYPES
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION


@dataclass(kw_only=True)
class InspectConfig:
    """Show what is in an adapter, or what a config would train in a model. The model's weights are not read."""

    adapter: str | None = None
    """Folder of an adapter."""
    model: str | None = None
    """A model's folder or name, with the adapter's options below."""
    task: Literal["classification", "causal_lm"] = CAUSAL_LM
    """Which head the model has."""
    num_labels: int = 2
    """Classes of a classification head."""
    peft: PeftConfig = field(default_factory=LoraConfig)
    """The adapter to be."""

    def __post_init__(self) -> None:
        if (self.adapter is None) == (self.model is None):
            raise ValueError(f"inspect: expected --adapter or --model, got {'both' if self.adapter else 'neither'}")


CONFIG = InspectConfig
ANY_STEPS = 10**9
"""A training of any length: what it would train does not depend on it."""


def run(config: InspectConfig, results: TextIO) -> dict:
    """Print the table, and return the totals."""
    return _adapter(Path(config.adapter), results) if config.adapter else _model(config, results)


def _adapter(folder: Path, results: TextIO) -> dict:
    values, tensors = read_config(folder), read_tensors(folder)
    shown = {name: value for name, value in sorted(values.items()) if value not in (None, False, [], {})}
    results.writelines(f"{name:<24} {value}\n" for name, value in shown.items())
    rows = [
        (
            name,
            tuple(tensor.shape),
            str(tensor.dtype)[6:],
            tensor.nbytes,
            torch.linalg.vector_norm(tensor.float()).item(),
        )
        for name, tensor in sorted(tensors.items())
    ]
    _table(results, ("tensor", "shape", "dtype", "bytes", "norm"), rows)
    return {
        "adapter": str(folder),
        "peft_type": values.get("peft_type"),
        "model": values.get("base_model_name_or_path"),
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    }


def _model(config: InspectConfig, results: TextIO) -> dict:
    from fastpeft.integrations.transformers import load_model

    labels = [str(label) for label in range(config.num_labels)] if config.task == CLASSIFICATION else []
    print(f"reading {config.model}", file=sys.stderr)
    base = load_model(config.model, labels=labels, on_meta=True)
    peft = dataclasses.replace(config.peft, task_type=config.peft.task_type or TASK_TYPES[config.task]).for_run(
        ANY_STEPS
    )
    model = get_peft_model(base, peft)
    rows = [(row["name"], tuple(row["shape"]), row["dtype"], row["numel"]) for row in model.trainable_parameter_table()]
    _table(results, ("trainable parameter", "shape", "dtype", "numbers"), rows)
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "model": config.model,
        "peft_type": peft.peft_type,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": round(100 * trainable / total, 4),
    }


def _table(results: TextIO, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [header, *[tuple(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]]
    widths = [max(len(row[index]) for row in cells) for index in range(len(header))]
    for row in cells:
        tail = "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        results.write(f"{row[0].ljust(widths[0])}  {tail}\n")
