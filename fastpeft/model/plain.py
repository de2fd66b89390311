"""Adapters in a plain model, and an adapter's tensors as a dict: PEFT's functions for code that has no PeftModel."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from fastpeft.checkpoint import adapter_folder, read_tensors
from fastpeft.methods.config import PeftConfig
from fastpeft.model.loading import fill, install
from fastpeft.model.peft_model import DEFAULT_ADAPTER, PeftModel
from fastpeft.tuner import Tuner

_KEEPER = "_fastpeft_tuner"  # in the model's __dict__: as a submodule it would hold the model that holds it


class LoadResult(NamedTuple):
    """Names of the adapter's tensors that were not given, and given ones that the adapter does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def tuner_of(model: nn.Module, where: str) -> Tuner:
    """The Tuner of a PeftModel, or of a model that inject_adapter_in_model changed."""
    tuner = model.base_model if isinstance(model, PeftModel) else model.__dict__.get(_KEEPER)
    if not isinstance(tuner, Tuner):
        raise TypeError(
            f"{where}: expected a PeftModel, or a model from inject_adapter_in_model, got {type(model).__name__} without adapters"
        )
    return tuner


def inject_adapter_in_model(
    peft_config: PeftConfig, model: nn.Module, adapter_name: str = DEFAULT_ADAPTER, autocast_adapter_dtype: bool = True
) -> nn.Module:
    """`model` itself with the adapter in its modules: active, and trainable unless the config says inference_mode.

    Raises:  as get_peft_model; ValueError for a prompt method, which wraps no module; `model` is then unchanged
    """
    tuner = model.__dict__.get(_KEEPER) or Tuner(model)
    injection = tuner.prepare(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
    if injection.prompt is not None:
        raise ValueError(
            f"inject_adapter_in_model: expected a method that wraps modules, got {peft_config.peft_type}; use get_peft_model"
        )
    install(tuner, injection)
    tuner.set_adapter(adapter_name, trainable=not peft_config.inference_mode)
    model.__dict__[_KEEPER] = tuner
    return model


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, torch.Tensor]:
    """The adapter's tensors by their name on disk, detached. A plain model's have no "base_model.model." before them."""
    tuner = tuner_of(model, "get_peft_model_state_dict")
    tuner._known([adapter_name])
    tensors = {name: tensor.detach() for name, tensor in tuner.adapter_tensors(adapter_name).items()}
    config = tuner.peft_config[adapter_name] = tuner.peft_config[adapter_name].showing(tensors)
    tensors = config.to_disk(tensors)
    prefix = "" if isinstance(model, PeftModel) else config.key_prefix
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, torch.Tensor], adapter_name: str = DEFAULT_ADAPTER
) -> LoadResult:
    """Copy tensors, named as get_peft_model_state_dict names them, into an adapter.

    Raises:  ValueError that names every tensor of another shape; then nothing is copied
    """
    tuner = tuner_of(model, "set_peft_model_state_dict")
    tuner._known([adapter_name])
    config, expected = tuner.peft_config[adapter_name], tuner.adapter_tensors(adapter_name)
    prefix = "" if isinstance(model, PeftModel) else config.key_prefix
    found = config.from_disk({prefix + name: tensor for name, tensor in peft_model_state_dict.items()}, expected)
    wrong = [
        f"{name} expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in found.items()
        if name in expected and expected[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"set_peft_model_state_dict: {len(wrong)} of another shape: {', '.join(wrong[:6])}")
    given = {name: tensor for name, tensor in found.items() if name in expected}
    if given:
        fill(tuner, adapter_name, {**expected, **given}, {})
    return LoadResult(
        [name.removeprefix(prefix) for name in expected if name not in found],
        [name.removeprefix(prefix) for name in found if name not in expected],
    )


def load_peft_weights(model_id: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder or hub id by their name on disk, on the CPU: what set_peft_model_state_dict takes."""
    return read_tensors(adapter_folder(model_id))
