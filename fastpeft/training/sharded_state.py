"""What a training goes on from, in parts: every process writes what it holds, and any number of processes reads it again.

    FOLDER: torch.distributed.checkpoint's files, with
      adapter.NAME            a trained parameter by its name in the model
      optimizer.NUMBER.NAME   what the optimizer keeps for its parameter NUMBER
      options                 the optimizer's options

No process gathers what others hold: a shard is read from the places of the files where it lies. FOLDER/.metadata is written last.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

_ADAPTER, _OPTIMIZER, _OPTIONS = "adapter.", "optimizer.", "options"
_LAST = ".metadata"


def is_state(folder: Path) -> bool:
    """True if save_state has written the folder to its end."""
    return (folder / _LAST).is_file()


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the folder, in the place of one that a killed run has left. For all processes."""
    state = optimizer.state_dict()
    values = _trained(model) | {_OPTIONS: tuple(state["param_groups"])}  # a list would be taken apart
    for number, kept in state["state"].items():
        values |= {f"{_OPTIMIZER}{number}.{name}": value for name, value in kept.items()}
    if _rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
    save(values, storage_writer=FileSystemWriter(folder), no_dist=not dist.is_initialized())


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read into the model and the optimizer what they hold of it here, whoever wrote it. For all processes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values = _trained(model) | {_OPTIONS: None}
    for name, stored in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if name.startswith(_OPTIMIZER):
            values[name] = _room_for(stored, parameters[int(name.split(".")[1])])
    load(values, storage_reader=FileSystemReader(folder), no_dist=not dist.is_initialized())
    state: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        if name.startswith(_OPTIMIZER):
            number, key = name.removeprefix(_OPTIMIZER).split(".", 1)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": list(values[_OPTIONS])})


def _room_for(stored: Any, parameter: torch.Tensor) -> torch.Tensor | None:
    """An empty tensor that is sharded as the parameter is, if it has its shape; None for what is no tensor."""
    if not isinstance(stored, TensorStorageMetadata):
        return None
    dtype = stored.properties.dtype
    if isinstance(parameter, DTensor) and stored.size == parameter.shape:
        return torch.zeros_like(parameter.detach(), dtype=dtype)
    return torch.zeros(stored.size, dtype=dtype)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {_ADAPTER + name: parameter.detach() for name, parameter in named if parameter.requires_grad}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
