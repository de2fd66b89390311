"""Adapter files in Hugging Face PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

This file knows folders, a config as a dict, and tensors by name; it knows no modules. A tensor's name on disk is

    base_model.model.<path of the module in the base model>.<parameter>       e.g. ....q_proj.lora_A.weight

without the adapter's name; prompt methods have prompt_embeddings alone, and heads below base_model. What a training needs to
go on, and the adapter does not show, is in a side file, training_state.safetensors. Pickle files
are refused: unpickling runs code from the file.
"""

import json
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAMES = ("adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin")
TRAINING_NAME = "training_state.safetensors"  # a side file: PEFT does not look at it
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_adapter(source: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(config, tensors by their name on disk) of an adapter, from a folder or a Hugging Face hub id; tensors on the CPU.

    Raises:  FileNotFoundError if the folder or a file is missing; ValueError for a pickle, a damaged or truncated file
    """
    folder = adapter_folder(source)
    return read_config(folder), read_tensors(folder)


def adapter_folder(source: str | os.PathLike) -> Path:
    """The folder `source`, or, where there is none and it reads like "user/adapter", the hub's copy in the local cache.

    Raises:  FileNotFoundError, with the reason, if the hub does not have it or cannot be asked
    """
    folder = Path(source)
    if folder.exists() or not HUB_ID.fullmatch(os.fspath(source)):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"adapter: expected a folder, got no folder {source}; if it is on the Hugging Face hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(os.fspath(source), allow_patterns=[CONFIG_NAME, TENSORS_NAME]))
    except (OSError, ValueError) as error:  # every error of the hub is one of them
        reason = " ".join(str(error).split())[:300]
        raise FileNotFoundError(
            f"adapter: expected a folder or an id on the Hugging Face hub, got no folder {source}, and the hub says: {reason}"
        ) from error


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of adapter_config.json."""
    folder = Path(folder)
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(
            f"adapter: expected a folder with {CONFIG_NAME} and {TENSORS_NAME}, got no folder {folder}"
        )
    if not path.is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise FileNotFoundError(f"adapter: expected {path}, got a folder with {found}; is this an adapter?")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"adapter: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"adapter: expected a JSON object in {path}, got {type(values).__name__}")
    return values


def read_tensors(folder: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors by name."""
    folder = Path(folder)
    path = folder / TENSORS_NAME
    if not path.is_file():
        pickles = [name for name in PICKLE_NAMES if (folder / name).is_file()]
        if pickles:
            raise ValueError(
                f"adapter: {folder / pickles[0]} is a pickle, and unpickling runs code from the file; "
                f"load it with peft where you trust it and save it again as {TENSORS_NAME}"
            )
        raise FileNotFoundError(f"adapter: expected {path}, got no such file")
    return _load_tensors(path)


def read_training_tensors(source: str | os.PathLike) -> dict[str, torch.Tensor]:
    """What is in the side file of a training's state; nothing where there is no such file."""
    path = Path(source) / TRAINING_NAME
    return _load_tensors(path) if path.is_file() else {}


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(
            f"adapter: {path} ({path.stat().st_size} bytes) is damaged, truncated or not a safetensors file: {error}"
        ) from error


def write_adapter(
    folder: str | os.PathLike,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    training: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the files of an adapter. Each is written under a temporary name first; only then are all renamed.

    training: the state of its training, for the side file; without any, a side file that stood there goes
    What stood in the folder is untouched until all new files are complete, whatever fails.
    Raises:  OSError if the folder cannot be made or written; ValueError for a tensor without data (meta device)
    """
    folder = Path(folder)
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"save_pretrained: expected tensors with data, got {len(empty)} on the meta device, e.g. {empty[0]}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    writers = {
        folder / TENSORS_NAME: lambda path: _save_tensors(tensors, path),
        folder / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
    }
    if training:
        writers[folder / TRAINING_NAME] = lambda path: _save_tensors(training, path)
    replace_files(writers)
    if not training:
        (folder / TRAINING_NAME).unlink(missing_ok=True)


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    # Shared storage is saved once per name: safetensors refuses aliases, and PEFT reads plain tensors.
    plain = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, metadata={"format": "pt"})
    except SafetensorError as error:  # an input/output error inside safetensors
        raise OSError(f"adapter: cannot write {path}: {error}") from error


def replace_files(writers: dict[Path, Callable[[Path], Any]]) -> None:
    """Let every writer write to a temporary path beside its target, then rename all of them; on failure remove them."""
    suffix = f".{secrets.token_hex(4)}.tmp"
    temporary = {target: target.with_name(target.name + suffix) for target in writers}
    try:
        for target, write in writers.items():
            write(temporary[target])
        for target, path in temporary.items():
            os.replace(path, target)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Raise one ValueError that lists every missing, unexpected and wrong-shaped tensor by name; else return."""
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    shapes = [
        f"{name} expected {tuple(expected[name].shape)}, got {tuple(found[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if expected[name].shape != found[name].shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes)]
    faults = [f"{len(items)} {kind}: {_listed(items)}" for kind, items in parts if items]
    if faults:
        raise ValueError(f"adapter does not fit this model: {'; '.join(faults)}; is it an adapter of another model?")


def _listed(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f", ... ({len(items) - most} more)" if len(items) > most else "")
