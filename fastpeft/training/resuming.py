"""Where an interrupted run goes on, and which of its options may differ then."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

from fastpeft.training.config import TrainConfig
from fastpeft.training.processes import Processes
from fastpeft.training.run_folder import CHECKPOINTS, TrainingInfo
from fastpeft.training.trainer import last_checkpoint

_FREE_TO_CHANGE = {
    "resume", "overwrite", "report", "title", "examples", "baseline", "max_new_tokens", "output_dir", "report_to",
    "save_predictions", "nproc", "distributed", "shard_adapters",
}  # fmt: skip
_ROWS_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")


def checkpoint_to_resume(config: TrainConfig, folder: Path, processes: Processes) -> Path:
    """The last complete checkpoint of the run in `folder`; warns of options that differ from the run's."""
    checkpoint = last_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise FileNotFoundError(
            f"resume: no complete checkpoint in {folder / CHECKPOINTS}; start again with --overwrite"
        )
    earlier = TrainingInfo.load(checkpoint).config
    now = json.loads(json.dumps(config.to_dict(), default=str)) | {"processes": processes.count}
    if _rows_of_a_step(now) == _rows_of_a_step(earlier):  # dealt out to other numbers of processes and batches
        now = {name: value for name, value in now.items() if name not in _ROWS_OF_A_STEP}
    if config.learning_rate is None:  # the run's own was chosen for it
        now.pop("learning_rate")
    changed = sorted(name for name in now if name not in _FREE_TO_CHANGE and now[name] != earlier.get(name, now[name]))
    if changed:
        pairs = ", ".join(f"{name} {earlier[name]!r} -> {now[name]!r}" for name in changed)
        warnings.warn(f"resume: options differ from the interrupted run's, the result will too: {pairs}", stacklevel=3)
    return checkpoint


def _rows_of_a_step(options: dict[str, Any]) -> int:
    return math.prod(options.get(name, 1) for name in _ROWS_OF_A_STEP)
