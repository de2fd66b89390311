"""Putting adapters into a model, and choosing which of them act.

An adapter is built beside the model first (`prepare`) and only then installed, so that a bad config, a missing
module or a checkpoint of another model is found before anything has changed.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer, ModulesToSaveWrapper
from fastpeft.layers.base_weight import is_quantized, keep_model_unpacked
from fastpeft.layers.prompt import PromptLayer
from fastpeft.layers.row_adapters import named_items
from fastpeft.layers.shared_input import link_siblings
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import adapter_layers, base_modules, is_inside, paths_of_saved_modules
from fastpeft.tuner.injection import Injection, disk_tensors
from fastpeft.tuner.trained_parameters import TrainedParameters


def _restore_flags(requires_grad: dict[nn.Parameter, bool]) -> None:
    for parameter, flag in requires_grad.items():
        parameter.requires_grad_(flag)


class Adapters(nn.Module):
    """A model with adapters in it. `model` is the user's model: its modules are wrapped in place, its own code is not touched."""

    def __init__(self, model: nn.Module):
        super().__init__()
        keep_model_unpacked(model)
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self.disabled = False
        self.prompts = nn.ModuleDict()  # of prompt methods, by adapter name
        self._trained_of: dict[str, TrainedParameters] = {}

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        prompt = self.active_prompt()
        if prompt is not None:
            return prompt.call(self.model, args, kwargs)
        if len(self.prompts):
            kwargs.pop("task_ids", None)  # of a multitask prompt that is not active
        return self.model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        """The model's generate, with the active adapter's prompt if it has one."""
        prompt = self.active_prompt()
        if prompt is not None:
            return prompt.generate(self.model, args, kwargs)
        if len(self.prompts):
            kwargs.pop("task_ids", None)
        return self.model.generate(*args, **kwargs)

    def active_prompt(self) -> PromptLayer | None:
        """The prompt of the active adapter, or None: no prompt method, or adapters are off."""
        if self.disabled or not len(self.prompts):
            return None
        return next((self.prompts[name] for name in self.active_adapters if name in self.prompts), None)

    def layers(self) -> Iterator[tuple[str, AdapterLayer]]:
        """(path, wrapper) of every wrapped module; a shared one once, under its first path."""
        yield from adapter_layers(self.model)

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
        missing = [other for other in config.needed_adapters() if other not in self.peft_config]
        if missing:
            raise ValueError(
                f"add_adapter: {name!r} acts through the adapters {config.needed_adapters()}, of which {missing} are not "
                "loaded; load them first, under these names"
            )
        config = config.for_model(self.model)
        requires_grad = {parameter: parameter.requires_grad for parameter in self.model.parameters()}
        with contextlib.ExitStack() as stack:
            stack.callback(_restore_flags, requires_grad)
            for _, layer in self.layers():  # what is read off a weight is read off the base's own
                stack.enter_context(layer.own_parameters_in_place())
            paths = config.target_paths(self.model, strict=strict)
            modules = dict(base_modules(self.model))
            layers = {path: config.wrap(path, modules[path], name, autocast_adapter_dtype) for path in paths}
            layers |= self._copies(name, config, modules, strict, saved_paths)
            self._check_kinds(layers)
            copied = [path for path, layer in layers.items() if isinstance(layer, ModulesToSaveWrapper)]
            parameters = config.trained_parameters(modules, [path for path in layers if path not in copied], copied)
            self._check_trained(name, config, parameters)
            prompt = config.make_prompt(self.model, autocast_adapter_dtype, fresh=strict)
            return Injection(name, config.resolved(self.model, paths), layers, parameters, prompt)

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

    def _check_trained(self, name: str, config: PeftConfig, parameters: dict[str, nn.Parameter]) -> None:
        """Two adapters cannot train one parameter of the base, unless their methods say that each is switched on alone."""
        if parameters and any(layer.merged for _, layer in self.layers()):
            raise ValueError(
                f"add_adapter: {name!r} trains parameters of the base, which holds merged adapters; call unmerge_adapter first"
            )
        mine = TrainedParameters(parameters)
        others = [
            other
            for other, trained in self._trained_of.items()
            if trained.shares_with(mine)
            and not (config.may_share_parameters and self.peft_config[other].may_share_parameters)
        ]
        if others:
            raise ValueError(
                f"add_adapter: expected bias='none' beside {others}, which trains the same parameters of the base; "
                f"got {name!r} with {sorted(parameters)[:3]}"
            )

    def _check_together(self, names: list[str]) -> None:
        """Raise ValueError if two of these adapters train one parameter of the base, or two have copies of one module."""
        for i, name in enumerate(names):
            shared = [other for other in names[:i] if self._trained_of[other].shares_with(self._trained_of[name])]
            if shared:
                raise ValueError(
                    f"set_adapter: expected one of {[*shared, name]}, which train the same parameters of the base, got {names}"
                )
        for _, layer in self.layers():
            layer.check_selection(names)

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
        if injection.parameters:
            self._put_trained([])  # so that it starts from the base's own values, whatever another trained them to
        self._trained_of[injection.name] = TrainedParameters(injection.parameters)
        if injection.parameters:
            self._put_trained(self.active_adapters)
        if injection.prompt is not None:
            self.prompts[injection.name] = injection.prompt.requires_grad_(False).train(self.model.training)
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
        parameters = self._trained_of[name].trained()
        return disk_tensors(self.peft_config[name], self.layers(), name, parameters, self.prompt_of(name))

    def prompt_of(self, name: str) -> PromptLayer | None:
        return dict(self.prompts.items()).get(name)

    def training_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a resumed training of the adapter needs beside its own tensors, by name."""
        tensors = {
            f"{path}.{key}": tensor
            for path, layer in self.layers()
            for key, tensor in layer.training_tensors(name).items()
        }
        prompt = self.prompt_of(name)
        return tensors if prompt is None else tensors | prompt.training_tensors()

    # -- switching ------------------------------------------------------------------------------------------------------

    def set_adapter(self, names: str | Iterable[str], *, trainable: bool = True) -> None:
        """Activate these adapters, in this order, and make them (and nothing else) trainable, or frozen with trainable=False.

        Raises:  ValueError for an unknown name or two full copies of one module; then nothing has changed
        """
        wanted = [names] if isinstance(names, str) else list(names)
        self._known(wanted)
        prompted = [name for name in wanted if name in self.prompts]
        if prompted and len(wanted) > 1:
            raise ValueError(
                f"set_adapter: expected {prompted[0]!r}, which has a prompt, to be active alone, got {wanted}"
            )
        self._check_together(wanted)
        layers = [layer for _, layer in self.layers()]
        for layer in layers:
            layer.set_adapter(wanted, trainable=trainable)
        for name in self._wanted_last(wanted):
            self._trained_of[name].requires_grad_(trainable and name in wanted)
        for name, prompt in self.prompts.items():
            prompt.requires_grad_(trainable and name in wanted)
        self.active_adapters = wanted
        if not any(layer.merged for layer in layers):
            self._put_trained(wanted)

    def adapters_per_item(self, names: Iterable[str] | None) -> AbstractContextManager:
        """Inside, item i of a batch goes through the adapter names[i], or through none where that is "__base__".

        Raises:  what row_adapters.named_items raises
        """
        if names is None:
            return nullcontext()
        shared = [name for name, parameters in self._trained_of.items() if parameters.trained()]
        started = [name for _, layer in self.layers() for name in layer.started_from]
        whole = [*shared, *self.prompts, *dict.fromkeys(started)]
        return named_items(self.model, [layer for _, layer in self.layers()], list(names), self.peft_config, whole)

    def _put_trained(self, names: Iterable[str]) -> None:
        """Let the model hold the parameters that these adapters trained, unless adapters are disabled; else the base's."""
        wanted = [] if self.disabled else list(names)
        for name in self._wanted_last(wanted):
            self._trained_of[name].put(name in wanted)

    def _wanted_last(self, wanted: Iterable[str]) -> list[str]:
        """Every adapter, those that are wanted last: they have the last word about a parameter that others train too."""
        return sorted(self._trained_of, key=lambda name: name in wanted)

    def _known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(f"adapter: expected one of {sorted(self.peft_config)}, got {unknown}")

    def enable_adapter_layers(self) -> None:
        self.disabled = False
        self._put_trained(self.active_adapters)  # first: a merge that is taken up again adds to them
        for _, layer in self.layers():
            layer.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Compute with the base model's own bits: no adapter, no merged weight, no trained parameter."""
        self.disabled = True
        for _, layer in self.layers():
            layer.enable_adapters(False)
        self._put_trained([])

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; a module whose last adapter goes stands in the model again as it was.

        Raises:  ValueError for an unknown name, or one that another adapter acts through
        """
        self._known([name])
        users = [other for other, config in self.peft_config.items() if name in config.needed_adapters()]
        if users:
            raise ValueError(f"delete_adapter: {users} act through {name!r}; delete them first")
        owners = self._owners()
        for _, layer in list(self.layers()):
            layer.delete_adapter(name)
            if not layer.adapter_names:
                self._replace(owners, layer, layer.get_base_layer())
        self._trained_of.pop(name).put(False)
        if name in self.prompts:
            del self.prompts[name]
        del self.peft_config[name]
        remaining = [active for active in self.active_adapters if active != name]
        self.set_adapter(remaining or list(self.peft_config)[:1])

    @staticmethod
    def _replace(owners, old: nn.Module, new: nn.Module) -> None:
        for parent, attribute in owners[id(old)]:
            setattr(parent, attribute, new)
