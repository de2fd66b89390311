"""fastpeft merge."""

import sys
from dataclasses import dataclass
from typing import Literal, TextIO


@dataclass(kw_only=True)
class MergeConfig:
    """Merge an adapter into its base model and save a plain transformers folder. What that changes is measured and printed.

    An adapter that was trained on a quantised base is merged into the full weights unless --into says otherwise."""

    adapter: str
    """Folder of the adapter."""
    output_dir: str
    """Folder for the merged model and its tokenizer."""
    model: str | None = None
    """Base model, if it is not where it was in training."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the merged weights; auto: the base model's."""
    into: Literal["full", "dequantized"] = "full"
    """What is merged into: the full weights, or what the quantised base of its training stands for."""
    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Quantise the merged weights; this rounds the adapter's update too."""
    texts: tuple[str, ...] = ()
    """Texts on which logits are compared; default: four rows of drawn tokens."""
    measure: bool = True
    """Compare weights and logits before and after; at times three copies of the model are in memory."""
    overwrite: bool = False
    """Replace the folder."""


CONFIG = MergeConfig


def run(config: MergeConfig, results: TextIO) -> dict:
    """Merge, measure and save, and return where and what changed."""
    from fastpeft.training.measure import Stopwatch
    from fastpeft.training.merge import merge_to_folder
    from fastpeft.training.predict import adapter_info
    from fastpeft.training.run_folder import check_output_folder

    clock = Stopwatch()
    folder = check_output_folder(config.output_dir, overwrite=config.overwrite)
    names = ("dtype", "into", "quantize", "texts", "measure", "overwrite")
    options = {name: getattr(config, name) for name in names}
    change = merge_to_folder(config.adapter, folder, base_model=config.model, **options)
    for line in [] if change is None else change.lines():
        print(line, file=sys.stderr)
    return {
        "task": adapter_info(config.adapter, config.model).task,
        "merged": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "quantization": config.quantize,
        "change": None if change is None else change.to_dict(),
        "seconds": round(clock.seconds(), 3),
        "adapter": config.adapter,
    }
