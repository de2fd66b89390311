"""fastpeft evaluate."""

from dataclasses import dataclass
from typing import Literal, TextIO


@dataclass(kw_only=True)
class EvaluateConfig:
    """Metrics of an adapter on labelled rows."""

    adapter: str
    """Folder of the adapter."""
    data: str
    """File with rows, or a folder with a saved dataset or split files, as for train."""
    split: Literal["auto", "train", "validation", "test"] = "auto"
    """Split of a folder to use; auto: test, else validation, else train. A single file is used whole."""
    model: str | None = None
    """Base model, if it is not where it was in training."""
    text_column: str | None = None
    """Column with the text; default: as in training."""
    label_column: str | None = None
    """Column with the class; default: as in training."""
    prompt_column: str | None = None
    """Column with the prompt; default: as in training."""
    response_column: str | None = None
    """Column with the response; default: as in training."""
    max_rows: int | None = None
    """Use only the first so many rows."""
    batch_size: int = 32
    """Rows of a batch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights; auto: as saved."""
    bf16: bool = False
    """Compute in bfloat16 (autocast)."""
    use_cpu: bool = False
    """Stay on the CPU even if there is a GPU."""


CONFIG = EvaluateConfig


def run(config: EvaluateConfig, results: TextIO) -> dict:
    """Evaluate, and return the metrics and costs."""
    from fastpeft.training.data import read_splits
    from fastpeft.training.measure import Stopwatch, peak_memory_mb
    from fastpeft.training.predict import TrainedAdapter
    from fastpeft.training.prepare import first_rows, held_out_split

    clock = Stopwatch()
    splits = read_splits(config.data)
    split = (held_out_split(splits) or "train") if config.split == "auto" else config.split
    if split not in splits:
        raise ValueError(f"split: expected one of {sorted(splits)} in {config.data}, got {split!r}")
    adapter = TrainedAdapter.load(config.adapter, base_model=config.model, dtype=config.dtype, use_cpu=config.use_cpu)
    columns = {role: getattr(config, f"{role}_column") for role in ("text", "label", "prompt", "response")}
    rows = first_rows(splits[split], config.max_rows)
    metrics, report = adapter.evaluate(rows, batch_size=config.batch_size, bf16=config.bf16, columns=columns)
    device = next(adapter.model.parameters()).device
    return {
        "task": adapter.info.task,
        **metrics,
        **report.to_dict(),
        "split": split,
        "seconds": round(clock.seconds(), 3),
        "peak_memory_mb": round(peak_memory_mb(device), 1),
        "adapter": str(config.adapter),
    }
