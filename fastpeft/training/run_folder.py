"""The folder of a run: what is kept beside the adapter, and whether a new run may write there."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft import __version__
from fastpeft.training.data import Columns
from fastpeft.training.record import TASKS
from fastpeft.training.text_format import TextFormat

INFO_FILE = "fastpeft_training.json"  # a side file: PEFT warns about keys it does not know in adapter_config.json
RECORD_FILE = "run.json"
REPORT_FILE = "report.html"
CHECKPOINTS = "checkpoints"
PREDICTIONS_FILE = "predictions.npz"
TENSORBOARD = "tensorboard"


@dataclass
class TrainingInfo:
    """What evaluate and predict need to use an adapter the way it was trained, and how it was trained.

    model is the base model's folder or name; labels the class names by index; config every option of the run.
    """

    task: str
    model: str
    labels: list[str] = field(default_factory=list)
    columns: Columns = field(default_factory=Columns)
    text_format: TextFormat = field(default_factory=TextFormat)
    config: dict[str, Any] = field(default_factory=dict)
    fastpeft_version: str = __version__

    def save(self, folder: str | Path) -> None:
        """Write fastpeft_training.json into `folder`, through a temporary name."""
        path = Path(folder) / INFO_FILE
        draft = path.with_name(path.name + ".partial")
        draft.write_text(json.dumps(asdict(self), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def load(cls, folder: str | Path) -> "TrainingInfo":
        """Read fastpeft_training.json. Raises FileNotFoundError or ValueError with a one-line reason."""
        path = Path(folder) / INFO_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["columns"] = Columns(**values["columns"])
            values["text_format"] = TextFormat(**values["text_format"])
            info = cls(**{name: values[name] for name in (item.name for item in fields(cls))})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what fastpeft train writes, got {error!r}") from error
        if info.task not in TASKS:
            raise ValueError(f"{path}: expected task in {list(TASKS)}, got {info.task!r}")
        return info


def save_arrays(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as .npz, through a temporary name."""
    draft = Path(path).with_name(Path(path).name + ".partial")
    with draft.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(draft, path)


def check_output_folder(folder: str | Path, *, overwrite: bool = False, resume: bool = False) -> Path:
    """The folder as a Path, if a run may write there; nothing is created.

    Raises:  FileExistsError if it holds an adapter and neither overwrite nor resume is set; NotADirectoryError if it is a
    file or below one; PermissionError (or the system's OSError) if it cannot be written
    """
    folder = Path(folder)
    existing = next(path for path in [folder, *folder.absolute().parents] if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise NotADirectoryError(f"output folder {folder}: expected a folder, but {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise type(error)(f"output folder {folder}: cannot write in {existing}: {error.strerror or error}") from error
    holds_run = (folder / "adapter_config.json").exists() or (folder / CHECKPOINTS).exists()
    if holds_run and not (overwrite or resume):
        raise FileExistsError(
            f"output folder {folder}: holds a run already; use another, --overwrite it, or --resume it"
        )
    return folder
