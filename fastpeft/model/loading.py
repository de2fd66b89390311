"""Reading an adapter's folder into a model: everything is checked before the model changes."""

import os
import re

import torch
from torch import nn

from fastpeft.checkpoint import compare, read_adapter, read_training_tensors
from fastpeft.layers.adapter import recomputes_layers
from fastpeft.layers.prompt import PromptLayer
from fastpeft.methods import config_from_dict
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import base_modules
from fastpeft.model.preparation import require_input_gradients
from fastpeft.tuner import Injection, Tuner


def install(tuner: Tuner, injection: Injection) -> None:
    """Put a prepared adapter into the model; with gradient checkpointing on, its inputs get a gradient first."""
    if not tuner.peft_config and recomputes_layers(tuner.model):
        require_input_gradients(tuner.model)
    tuner.install(injection)


def load_into(
    tuner: Tuner, source: str | os.PathLike, name: str, is_trainable: bool, autocast_adapter_dtype: bool
) -> None:
    """The adapter of folder `source` under the new name, or its values into the adapter of that name.

    A first adapter becomes active. is_trainable: also what its training needs to go on, where the folder has it
    Raises:  FileNotFoundError, or ValueError for a damaged file, a pickle, or tensors that do not fit, listed by name; for
             is_trainable also where the trained encoder of a prompt is not in the folder
    """
    values, found = read_adapter(source)
    config = config_from_dict(values)
    config.inference_mode = not is_trainable
    injection = None
    if name in tuner.peft_config:
        different = config.differences(tuner.peft_config[name])
        if different:
            raise ValueError(f"load_adapter: {source} differs from the loaded {name!r} in {different}")
        expected, prompt = tuner.adapter_tensors(name), tuner.prompt_of(name)
    else:
        injection = tuner.prepare(
            name,
            config,
            autocast_adapter_dtype=autocast_adapter_dtype,
            strict=False,
            saved_paths=_paths_peft_saved(tuner, config, found),
        )
        expected, prompt = injection.tensors(), injection.prompt
    found = _without_extras(tuner, config.key_prefix, config.from_disk(found, expected), expected)
    compare(expected, found)
    state = read_training_tensors(source) if is_trainable else {}
    if is_trainable and prompt is not None:
        _check_encoder(source, prompt, state)
    if injection is not None:
        install(tuner, injection)
        if not tuner.active_adapters:
            tuner.set_adapter(name, trainable=is_trainable)
    else:
        tuner.peft_config[name] = tuner.peft_config[name].after_loading(config)
    fill(tuner, name, found, state)


def _check_encoder(source: str | os.PathLike, prompt: PromptLayer, state: dict[str, torch.Tensor]) -> None:
    """Raises ValueError where the parameters that make a prompt are not in the folder, or do not fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in prompt.training_tensors().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if wanted and not got:
        raise ValueError(
            f"load_adapter: {source} holds a prompt without the encoder that made it, so its training cannot go on; "
            "load it with is_trainable=False"
        )
    different = sorted(name for name in wanted | got if wanted.get(name) != got.get(name))
    if different:
        raise ValueError(
            f"load_adapter: {source}: expected the prompt's encoder with {wanted.get(different[0])} for {different[0]}, got "
            f"{got.get(different[0])}; load it with is_trainable=False"
        )


@torch.no_grad()
def fill(tuner: Tuner, name: str, found: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Copy saved values into an installed adapter, and its training's state where there is one that fits."""
    prompt = tuner.prompt_of(name)
    of_prompt = {} if prompt is None else prompt.disk_tensors()
    for key, tensor in tuner.adapter_tensors(name).items():
        if key not in of_prompt:
            tensor.copy_(found[key])
    if prompt is not None:
        prompt.load(found, state)
        return
    own_state = tuner.training_tensors(name) if state else {}  # last: it may hold more than the adapter's file
    if {key: tensor.shape for key, tensor in state.items()} == {key: t.shape for key, t in own_state.items()}:
        for key, tensor in own_state.items():
            tensor.copy_(state[key])


def _paths_peft_saved(tuner: Tuner, config: PeftConfig, found: dict[str, torch.Tensor]) -> list[str]:
    """Modules that PEFT saved by its bare endswith rule, such as input_layernorm for modules_to_save=["norm"]."""
    names = tuple(getattr(config, "modules_to_save", None) or ())
    owners = {key.removeprefix(config.key_prefix).rpartition(".")[0] for key in found}
    return [path for path, _ in base_modules(tuner.model) if names and path.endswith(names) and path in owners]


def _without_extras(
    tuner: Tuner, prefix: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Drop what PEFT writes beside the adapter: biases of wrappers, and embeddings that equal the base model's.

    Raises:  NotImplementedError if the file holds an embedding that differs from the base model's
    """
    modules = dict(base_modules(tuner.model))
    kept = {}
    for key, tensor in found.items():
        path = key.removeprefix(prefix)
        if key not in expected and re.search(r"\.(modules_to_save|original_module)\.([\w.]+\.)?bias$", path):
            continue
        owner = modules.get(path.removesuffix(".weight").removesuffix(".base_layer"))
        if key not in expected and isinstance(owner, nn.Embedding | nn.Linear) and path.endswith(".weight"):
            same = owner.weight.shape == tensor.shape and torch.equal(owner.weight.cpu(), tensor.to(owner.weight.dtype))
            if same:
                continue
            if isinstance(owner, nn.Embedding):
                raise NotImplementedError(
                    f"load_adapter: {key} {tuple(tensor.shape)} is not the base model's {tuple(owner.weight.shape)}; "
                    "the adapter was saved with a changed vocabulary: give the base model's embedding these weights first"
                )
        kept[key] = tensor
    return kept
