"""One call from a model and rows to a trained adapter: fastpeft.finetune."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastpeft.methods.by_name import check_fields, named_method
from fastpeft.methods.config import PeftConfig
from fastpeft.model import PeftModel
from fastpeft.training.record import RunRecord

if TYPE_CHECKING:
    from fastpeft.training.config import TrainConfig


@dataclass(frozen=True)
class FineTuned:
    """What finetune made: the run's record (metrics, costs, history), the model with its adapter, and the tokenizer."""

    record: RunRecord
    model: PeftModel
    tokenizer: Any

    @property
    def metrics(self) -> dict[str, float]:
        """The record's metrics of the held-out rows."""
        return self.record.metrics


def finetune(
    model: Any, data: Any, method: str | PeftConfig = "lora", output_dir: str | os.PathLike = "out", *,
    tokenizer: Any = None, **options: Any,
) -> FineTuned:  # fmt: skip
    """Train an adapter on rows, evaluate before and after, and write adapter, run.json and report.html into output_dir.

        finetune("MODEL", "reviews.csv", "qlora", "out", r=16, num_train_epochs=2).metrics

    model:   a folder or hub name, or a loaded transformers model, which gets the adapter in it; then with its tokenizer
    data:    a file or folder; rows as dicts; a datasets.Dataset; or {"train": ..., "validation": ..., "test": ...} of these
    method:  a name as get_peft_config takes it ("qlora" quantises the base, too), or a config
    options: fields of TrainConfig, or of the method's config
    Raises:  ValueError for a name that is neither, or both; what `train` raises for wrong input, before anything is written
    """
    from fastpeft.training.engine import run_training

    base, tokenizer, name = _model(model, tokenizer)
    config, splits = train_config(name, data, method, output_dir, options)
    return FineTuned(*run_training(config, model=base, tokenizer=tokenizer, rows=splits))


def train_config(
    model: str, data: Any, method: str | PeftConfig, output_dir: str | os.PathLike, options: Mapping[str, Any]
) -> tuple["TrainConfig", dict[str, Any] | None]:
    """The TrainConfig of a call, and the rows that are in memory by split, or None for a file."""
    from fastpeft.training.config import TrainConfig

    if isinstance(method, PeftConfig):
        kind, peft, training = type(method), {}, {}
    else:
        named = named_method(method)
        kind, peft, training = named.config_class, dict(named.options), dict(named.training)
    of_training = {item.name for item in dataclasses.fields(TrainConfig)} - {"model", "data", "output_dir", "peft"}
    of_method = {item.name for item in dataclasses.fields(kind)}
    check_fields("finetune", options, of_training | of_method)
    both = sorted(set(options) & of_training & of_method)
    if both:
        raise ValueError(
            f"finetune: {both} are options of the training and of {kind.__name__}; pass method={kind.__name__}(...) and the "
            "training's here"
        )
    peft |= {name: value for name, value in options.items() if name in of_method}
    training |= {name: value for name, value in options.items() if name in of_training}
    config = dataclasses.replace(method, **peft) if isinstance(method, PeftConfig) else kind(**peft)
    splits = None if isinstance(data, (str, os.PathLike)) else as_splits(data)
    name = os.fspath(data) if splits is None else f"{sum(map(len, splits.values()))} rows in memory"
    return TrainConfig(model=model, data=name, output_dir=os.fspath(output_dir), peft=config, **training), splits


def as_splits(data: Any) -> dict[str, Any]:
    """Rows in memory as a datasets.Dataset by split; one table is the train split."""
    from datasets import Dataset

    if not isinstance(data, Mapping):
        data = {"train": data}
    splits = {}
    for name, rows in data.items():
        if isinstance(rows, Dataset):
            splits[name] = rows
        elif isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
            splits[name] = Dataset.from_list([dict(row) for row in rows])
        else:
            raise TypeError(
                f"data: expected a path, a list of dicts or a datasets.Dataset, got {type(rows).__name__} for {name}"
            )
        if not len(splits[name]):
            raise ValueError(f"data: expected at least one row of {name}, got none")
    return splits


def _model(model: Any, tokenizer: Any) -> tuple[Any, Any, str]:
    """(loaded model or None, tokenizer or None, name). A loaded model's tokenizer is found by its name if not given."""
    if isinstance(model, (str, os.PathLike)):
        return None, tokenizer, os.fspath(model)
    if isinstance(model, PeftModel) or not hasattr(model, "config"):
        raise TypeError(f"finetune: expected a path, a name or a transformers model, got {type(model).__name__}")
    name = getattr(model.config, "_name_or_path", "")
    if tokenizer is None:
        if not name:
            raise ValueError(
                f"finetune: expected tokenizer=... beside a {type(model).__name__} that does not say where it is from"
            )
        from fastpeft.integrations.transformers import load_tokenizer

        tokenizer = load_tokenizer(name)
    return model, tokenizer, name or type(model).__name__
