"""fastpeft merge."""

from dataclasses import dataclass
from typing import Literal, TextIO


@dataclass(kw_only=True)
class MergeConfig:
    """Merge an adapter into its base model and save a plain transformers folder.

    An adapter that was trained on a quantised base is merged into the full weights: quantising the sum would round it."""

    adapter: str
    """Folder of the adapter."""
    output_dir: str
    """Folder for the merged model and its tokenizer."""
    model: str | None = None
    """Base model, if it is not where it was in training."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the merged weights; auto: the base model's."""
    overwrite: bool = False
    """Replace the folder."""


CONFIG = MergeConfig


def run(config: MergeConfig, results: TextIO) -> dict:
    """Merge and save, and return where."""
    from fastpeft.training.measure import Stopwatch
    from fastpeft.training.predict import TrainedAdapter
    from fastpeft.training.run_folder import check_output_folder

    clock = Stopwatch()
    folder = check_output_folder(config.output_dir, overwrite=config.overwrite)
    adapter = TrainedAdapter.load(
        config.adapter, base_model=config.model, dtype=config.dtype, use_cpu=True, full_weights=True
    )
    adapter.save_merged(folder, overwrite=config.overwrite)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "task": adapter.info.task,
        "merged": str(folder),
        "bytes": size,
        "seconds": round(clock.seconds(), 3),
        "adapter": config.adapter,
    }
