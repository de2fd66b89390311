"""Putting adapters into a model and taking them out again.

An adapter is built beside the model first (`Tuner.prepare`) and only then installed, so that a bad config, a missing
module or a checkpoint of another model is found before anything has changed.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from fastpeft.checkpoint import KEY_PREFIX
from fastpeft.layers.adapter import AdapterLayer, ModulesToSaveWrapper
from fastpeft.layers.base_weight import BaseParameters, is_quantized, keep_model_unpacked
from fastpeft.layers.row_adapters import named_items
from fastpeft.layers.shared_input import link_siblings
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import base_modules, is_inside, paths_of_saved_modules


@dataclass
class Injection:
    """One adapter that is ready to be installed: a new single-adapter wrapper per module, and base biases to be trained."""

    name: str
    config: PeftConfig
    layers: dict[str, AdapterLayer]
    biases: dict[str, nn.Parameter] = field(default_factory=dict)  # by their path after the installation

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their name on disk."""
        return disk_tensors(self.layers.items(), self.name) | {
            KEY_PREFIX + key: bias for key, bias in self.biases.items()
        }


class TrainedBiases:
    """Biases of the base model that one adapter trains. The model holds either their trained values or the base's own;
    the others are kept aside.

    parameters: the biases by path; one that is registered under several paths comes once per path
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self._distinct = list({id(bias): bias for bias in parameters.values()}.values())
        self._aside = [bias.detach().clone() for bias in self._distinct]
        self.in_model = False

    def put(self, trained: bool) -> None:
        """Let the model hold the trained values, or the base's."""
        if trained is self.in_model:
            return
        for i, bias in enumerate(self._distinct):
            self._aside[i], bias.data = bias.data, self._aside[i].to(bias)
        self.in_model = trained

    def trained(self) -> dict[str, torch.Tensor]:
        """The trained values by path, wherever they are."""
        values = self._distinct if self.in_model else self._aside
        by_id = {id(bias): value for bias, value in zip(self._distinct, values, strict=True)}
        return {path: by_id[id(bias)] for path, bias in self.parameters.items()}

    def requires_grad_(self, flag: bool) -> None:
        for bias in self._distinct:
            bias.requires_grad_(flag)


def disk_tensors(layers: Iterable[tuple[str, AdapterLayer]], name: str) -> dict[str, torch.Tensor]:
    """Tensors of adapter `name` in these (path, wrapper) pairs by their name on disk."""
    return {
        f"{KEY_PREFIX}{path}.{key}": tensor
        for path, layer in layers
        for key, tensor in layer.adapter_tensors(name).items()
    }


class Tuner(nn.Module):
    """A model with adapters in it. `model` is the user's model: its modules are wrapped in place, its own code is not touched."""

    def __init__(self, model: nn.Module):
        super().__init__()
        keep_model_unpacked(model)
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self.disabled = False
        self._biases_of: dict[str, TrainedBiases] = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path, wrapper) of every wrapped module; a shared one once, under its first path."""
        for path, module in self.model.named_modules():
            if isinstance(module, AdapterLayer):
                yield path, module

    # -- adding ---------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        name: str,
        config: PeftConfig,
        *,
        autocast_adapter_dtype: bool = True,
        strict: bool = True,
        saved_paths: Iterable[str] = (),
    ) -> Injection:
        """Build adapter `name` beside the model. strict=False (loading) lets names in the config match nothing.

        saved_paths: modules to save beyond those that the config names by whole components
        """
        if name in self.peft_config:
            raise ValueError(
                f"add_adapter: expected a new name, got {name!r}, which exists; delete_adapter({name!r}) first"
            )
        if not name or "." in name:
            raise ValueError(f"add_adapter: expected a name without dots, got {name!r}")
        requires_grad = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        try:
            paths = config.target_paths(self.model, strict=strict)
            modules = dict(base_modules(self.model))
            layers = {path: config.wrap(path, modules[path], name, autocast_adapter_dtype) for path in paths}
            layers |= self._copies(name, config, modules, strict, saved_paths)
            self._check_kinds(layers)
            return Injection(name, config.resolved(self.model, paths), layers, self._biases(config, layers, modules))
        finally:
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)

    def _copies(self, name, config, modules, strict, saved_paths) -> dict[str, AdapterLayer]:
        """A trained copy of every module to save. One memo for all: weights that are tied stay tied among the copies."""
        heads = config.heads_to_save()
        wanted = list(dict.fromkeys([*(getattr(config, "modules_to_save", None) or []), *heads]))
        paths = paths_of_saved_modules(self.model, wanted, optional=heads if strict else wanted)
        memo: dict = {}
        copies = {}
        for path in dict.fromkeys([*paths, *saved_paths]):
            module = modules[path]
            if any(isinstance(child, AdapterLayer) for child in module.modules()):
                raise ValueError(
                    f"modules_to_save: {path} holds modules that another adapter wraps; delete that adapter first"
                )
            if any(map(is_quantized, module.modules())):
                raise ValueError(
                    f"modules_to_save: expected modules with full weights, got {path}, which is quantised and cannot be trained "
                    "in full; leave it unquantised (skip_modules of fastpeft.quantize)"
                )
            copies[path] = ModulesToSaveWrapper(module, name, copy.deepcopy(module, memo))
        self._warn_of_ties(copies)
        return copies

    def _warn_of_ties(self, copies: dict[str, ModulesToSaveWrapper]) -> None:
        inside = {id(p) for wrapper in copies.values() for p in wrapper.original_module.parameters()}
        tied = [
            path
            for path, module in base_modules(self.model)
            if not is_inside(path, copies)
            and any(id(p) in inside for p in module._parameters.values() if p is not None)
        ]
        if tied:
            warnings.warn(
                f"modules_to_save: {sorted(copies)} shares weights with {tied}, which stay frozen; "
                "name both to train them as one",
                stacklevel=2,
            )

    def _check_kinds(self, layers: dict[str, AdapterLayer]) -> None:
        installed = dict(self.layers())
        for path, new in layers.items():
            old = installed.get(path)
            if old is not None and type(old) is not type(new):
                raise ValueError(
                    f"add_adapter: {path} is wrapped by {type(old).__name__} already, a {type(new).__name__} cannot join it"
                )

    def _biases(self, config, layers, modules) -> dict[str, nn.Parameter]:
        choice = getattr(config, "bias", "none")
        if choice == "none":
            return {}
        others = [name for name, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if others:
            raise ValueError(
                f"add_adapter: expected bias='none' beside {others}, which trains the base's biases; got {choice!r}"
            )
        copied = [path for path, layer in layers.items() if isinstance(layer, ModulesToSaveWrapper)]
        biases = {}
        for path, module in modules.items():
            bias = getattr(module, "bias", None)
            wrapped = path in layers and path not in copied
            if not isinstance(bias, nn.Parameter) or is_inside(path, copied) or (choice == "lora_only" and not wrapped):
                continue
            biases[f"{path}.base_layer.bias" if wrapped else f"{path}.bias"] = bias
        return biases

    def install(self, injection: Injection) -> None:
        """Put a prepared adapter into the model, frozen and not active yet. A first adapter freezes the base."""
        if not self.peft_config:
            self.model.requires_grad_(False)
        owners = self._owners()
        installed = dict(self.layers())
        for path, layer in injection.layers.items():
            layer.set_adapter([])
            layer.train(layer.get_base_layer().training)
            if path in installed:
                installed[path].absorb(layer)
            else:
                layer.disable_adapters = self.disabled
                for parent, attribute in owners[id(layer.get_base_layer())]:
                    setattr(parent, attribute, layer)
        self._biases_of[injection.name] = TrainedBiases(injection.biases)
        self.peft_config[injection.name] = injection.config
        link_siblings(self.model)

    def _owners(self) -> dict[int, list[tuple[nn.Module, str]]]:
        """Every (parent, attribute) that holds a module: a shared module has several."""
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in [self, *self.model.modules()]:
            for attribute, child in parent._modules.items():
                owners.setdefault(id(child), []).append((parent, attribute))
        return owners

    # -- reading --------------------------------------------------------------------------------------------------------

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The installed adapter's tensors by their name on disk."""
        biases = self._biases_of[name].trained()
        return disk_tensors(self.layers(), name) | {KEY_PREFIX + path: bias for path, bias in biases.items()}

    # -- switching ------------------------------------------------------------------------------------------------------

    def set_adapter(self, names: str | Iterable[str], *, trainable: bool = True) -> None:
        """Activate these adapters, in this order, and make them (and nothing else) trainable, or frozen with trainable=False.

        Raises:  ValueError for an unknown name or two full copies of one module; then nothing has changed
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self._known(wanted)
        layers = [layer for _, layer in self.layers()]
        for layer in layers:
            layer.check_selection(wanted)
        for layer in layers:
            layer.set_adapter(wanted, trainable=trainable)
        for name, biases in self._biases_of.items():
            biases.requires_grad_(trainable and name in wanted)
        self.active_adapters = wanted
        if not any(layer.merged for layer in layers):
            self._put_biases(wanted)

    def adapters_per_item(self, names: Iterable[str] | None) -> AbstractContextManager:
        """Inside, item i of a batch goes through the adapter names[i], or through none where that is "__base__".

        Raises:  what row_adapters.named_items raises
        """
        if names is None:
            return nullcontext()
        biased = [name for name, biases in self._biases_of.items() if biases.trained()]
        return named_items(self.model, [layer for _, layer in self.layers()], list(names), self.peft_config, biased)

    def _put_biases(self, names: Iterable[str]) -> None:
        """Let the model hold the biases that these adapters trained, unless adapters are disabled; else the base's."""
        wanted = [] if self.disabled else list(names)
        for name, biases in self._biases_of.items():
            biases.put(name in wanted)

    def _known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter: expected one of {sorted(self.peft_config)}, got {unknown}")

    def enable_adapter_layers(self) -> None:
        self.disabled = False
        self._put_biases(self.active_adapters)  # first: a merge that is taken up again adds to them
        for _, layer in self.layers():
            layer.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Compute with the base model's own bits: no adapter, no merged weight, no trained bias."""
        self.disabled = True
        for _, layer in self.layers():
            layer.enable_adapters(False)
        self._put_biases([])

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; a module whose last adapter goes stands in the model again as it was."""
        self._known([name])
        owners = self._owners()
        for _, layer in list(self.layers()):
            layer.delete_adapter(name)
            if not layer.adapter_names:
                self._replace(owners, layer, layer.get_base_layer())
        self._biases_of.pop(name).put(False)
        del self.peft_config[name]
        remaining = [active for active in self.active_adapters if active != name]
        self.set_adapter(remaining or list(self.peft_config)[:1])

    @staticmethod
    def _replace(owners, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in owners[id(old)]:
            setattr(parent, attribute, new)

    # -- merging --------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters (the active ones by default) to the base weights; `unmerge_adapter` restores the bits.

        Raises:  ValueError with safe_merge if a value is not finite; then no module is merged
        """
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        before = {layer: list(layer.merged_adapters) for _, layer in self.layers()}
        if not any(before.values()):
            self._put_biases(names)
        try:
            for layer in before:
                layer.merge(names, safe_merge)
        except ValueError:
            for layer, merged in before.items():
                layer.unmerge()
                layer.merge(merged)
            if not any(before.values()):
                self._put_biases(self.active_adapters)
            raise

    def unmerge_adapter(self) -> None:
        for _, layer in self.layers():
            layer.unmerge()
        self._put_biases(self.active_adapters)

    def merge_and_unload(self, safe_merge: bool = False, adapter_names: Iterable[str] | None = None) -> nn.Module:
        """The plain model with the adapters merged into its weights for good; module by module, so nothing is held twice."""
        names = list(self.active_adapters if adapter_names is None else adapter_names)
        self._known(names)
        if safe_merge:
            self._check_finite(names)
        self._put_biases(names)
        owners = self._owners()
        for _, layer in list(self.layers()):
            self._replace(owners, layer, layer.bake(names))
        self._untie()
        return self.model

    def _check_finite(self, names: list[str]) -> None:
        for path, layer in self.layers():
            merging = [name for name in names if name in layer.adapter_names]
            if merging and not isinstance(layer, ModulesToSaveWrapper):
                own = BaseParameters.of(layer.get_base_layer())
                merged = layer.merged_tensors(merging, own.dense(), own.bias)
                if not all(tensor is None or bool(tensor.isfinite().all()) for tensor in merged):
                    raise ValueError(
                        f"merge_and_unload: {path} has values that are not finite with {names}; nothing was merged"
                    )

    def _untie(self) -> None:
        """Tell the model's config when its output embedding is not its input embedding any more."""
        config = getattr(self.model, "config", None)
        if not getattr(config, "tie_word_embeddings", False) or not hasattr(self.model, "get_output_embeddings"):
            return
        outputs, inputs = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if outputs is not None and outputs.weight is not inputs.weight:
            config.tie_word_embeddings = False

    def unload(self) -> nn.Module:
        """The plain model as it was before any adapter."""
        self.unmerge_adapter()
        self._put_biases([])
        owners = self._owners()
        for _, layer in list(self.layers()):
            self._replace(owners, layer, layer.get_base_layer())
        self.peft_config, self.active_adapters, self._biases_of, self.disabled = {}, [], {}, False
        return self.model
