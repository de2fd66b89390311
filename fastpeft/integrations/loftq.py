"""LoftQ for a model that is quantised already: A and B take up what quantising lost.

    s B A = the leading r singular triples of W - Q,   Q the base's quantised weight, W the full one

Source:  Li et al. 2023, arXiv:2310.08659
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from fastpeft.layers.base_weight import is_quantized
from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.lora_init import leading

WHERE = "replace_lora_weights_loftq"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike | nn.Module | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the adapter of every quantised module the values that make W + ... out of Q; by PEFT's name, for 4 and 8 bits.

    model_path  the full weights: a folder with model.safetensors (or its shards), such a file, or the full model itself; None
                for the folder that the model was loaded from. Weights are read one at a time
    callback    called after each module with the model and the module's path; where it returns False the old values come back
    The update is divided by the adapter's scale alpha / r; PEFT leaves that out, so its start is off where alpha is not r.
    Raises:  ValueError for a model without quantised modules with this adapter, DoRA, or weights that are missing or of another
             shape; FileNotFoundError for files that are. The adapter is then unchanged
    """
    layers = {
        path: layer
        for path, layer in peft_model.base_model.layers()
        if isinstance(layer, LoRALinear) and adapter_name in layer.adapter_names and is_quantized(layer.base_layer)
    }
    if not layers:
        raise ValueError(f"{WHERE}: expected quantised modules with the adapter {adapter_name!r}, got none")
    for path, layer in layers.items():
        if adapter_name in layer.lora_magnitude_vector or adapter_name in layer.merged_adapters:
            raise ValueError(
                f"{WHERE}: expected an adapter without DoRA that is not merged, got {adapter_name!r} at {path}"
            )
        if not layer.scaling[adapter_name] > 0:
            raise ValueError(f"{WHERE}: expected a scale above 0, got {layer.scaling[adapter_name]} at {path}")
    full = _FullWeights(peft_model.get_base_model(), model_path)
    for path, layer in layers.items():
        found, expected = full.shape(path), (layer.out_features, layer.in_features)
        if found != expected:
            raise ValueError(f"{WHERE}: expected {path}.weight {expected} in the full model, got {found}")
    for path, layer in layers.items():
        a, b = layer.lora_pair(adapter_name)
        q = layer.own_parameters().dense()
        residual = full.weight(path).to(device=q.device, dtype=torch.float32) - q.to(torch.float32)
        before = (a.clone(), b.clone()) if callback is not None else None
        for held, new in zip((a, b), leading(residual, a.shape[0], layer.scaling[adapter_name]), strict=True):
            held.zero_()
            held[: new.shape[0], : new.shape[1]] = new.to(held)  # of a rank above min(N, K) the rest is zero
        if callback is not None and not callback(peft_model, path):
            a.copy_(before[0])
            b.copy_(before[1])


class _FullWeights:
    """Weights by the path of their module, in a full model or in its files; a file may lack the model's base prefix."""

    def __init__(self, model: nn.Module, source: str | os.PathLike | nn.Module | None):
        self.prefix = getattr(model, "base_model_prefix", "")
        self.model = source if isinstance(source, nn.Module) else None
        self.files: dict[str, Path] = {}
        if self.model is None:
            self.files = _files(_folder(model) if source is None else Path(source))

    def _key(self, path: str) -> str:
        key = f"{path}.weight"
        names = [key, key.removeprefix(f"{self.prefix}."), f"{self.prefix}.{key}"]
        found = next((name for name in names if name in self.files), None)
        if found is None:
            raise ValueError(
                f"{WHERE}: expected {key} in the full weights, got none; they have {sorted(self.files)[:4]}, ..."
            )
        return found

    def shape(self, path: str) -> tuple[int, ...]:
        if self.model is not None:
            return tuple(self._module_weight(path).shape)
        key = self._key(path)
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def weight(self, path: str) -> torch.Tensor:
        if self.model is not None:
            return self._module_weight(path)
        key = self._key(path)
        with safe_open(self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    def _module_weight(self, path: str) -> torch.Tensor:
        module = dict(self.model.named_modules()).get(path)
        if module is None or is_quantized(module) or getattr(module, "weight", None) is None:
            raise ValueError(
                f"{WHERE}: expected a full weight of {path} in the full model, got {type(module).__name__}"
            )
        return module.weight.detach()


def _folder(model: nn.Module) -> Path:
    """Where the model was loaded from: its folder, or the hub's copy in the local cache."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ValueError(f"{WHERE}: expected model_path, as the model does not say where it was loaded from")
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except (ImportError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{WHERE}: expected the files of {name} on this machine, got none; give model_path"
        ) from error


def _files(source: Path) -> dict[str, Path]:
    """The file of every tensor by the tensor's name."""
    if source.is_file():
        return _names_in(source)
    whole, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if whole.is_file():
        return _names_in(whole)
    if not index.is_file():
        raise FileNotFoundError(f"{WHERE}: expected {whole} or its shards, got no such file")
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {key: source / name for key, name in named.items()}


def _names_in(path: Path) -> dict[str, Path]:
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)
