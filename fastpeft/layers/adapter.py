"""What every wrapper of a base module shares: named adapters, which of them are active, and merging.

The attribute names are PEFT's (`base_layer`, `active_adapters`, `merged_adapters`, `disable_adapters`), so state_dict keys
and code written for PEFT models fit.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fastpeft.layers.base_weight import BaseParameters, keep_unpacked


def recomputes_layers(model: nn.Module) -> bool:
    """True for a transformers model with gradient checkpointing on, by the attribute's new name or its old one."""
    new_name = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if new_name is None else new_name)


def _finite(*tensors: torch.Tensor | None) -> bool:
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


class AdapterLayer(nn.Module):
    """A base module with named adapters on it. Subclasses hold the adapters' tensors and say how they act.

    A subclass defines
        adapter_attributes        names of the ModuleDicts / ParameterDicts keyed by adapter name
        settings_attributes       names of plain dicts (or ModuleDicts without tensors on disk) keyed by adapter name
        compute(names, x, ...)    the forward with these adapters acting, in this order; with none, the base's
        delta_weight(name)        what merging adds to base_layer.weight; or merge_into, where merging is no addition
        delta_bias(name)          what merging adds to base_layer.bias, or None
        mergeable                 False where the method has no merged form
        training_tensors(name)    what a resumed training needs beside the adapter's own tensors
    and fills
        started_from[name]        parameters of the base that this adapter acts on, where they are not the base's own (PiSSA)
    """

    adapter_attributes: tuple[str, ...] = ()
    settings_attributes: tuple[str, ...] = ()
    mergeable = True

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        keep_unpacked(base_layer)
        self.base_layer = base_layer
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.row_adapters: list[str] | None = None  # one name per item of the batch, while a mixed batch runs
        self.started_from: dict[str, BaseParameters] = {}
        self._unmerged: BaseParameters | None = None  # the base's own, while others stand in their place
        self.needs_its_adapter = False  # the base's own are gone: what stands there is what the adapter starts from
        self._merged_before_disable: list[str] = []

    def __getattr__(self, name: str):
        """Attributes of the base module (weight, bias, in_features, padding_idx, ...) are found on the wrapper too."""
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:  # the way of every call: a third of the general look-up's time
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def adapter_names(self) -> list[str]:
        return list(getattr(self, self.adapter_attributes[0]))

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors by their name on disk, e.g. {"lora_A.weight": ..., "lora_B.weight": ...}."""
        tensors = {}
        for attribute in self.adapter_attributes:
            holder = getattr(self, attribute)
            if name not in holder:
                continue
            entry = holder[name]
            if isinstance(entry, nn.Parameter):
                tensors[attribute] = entry
            else:
                tensors |= {f"{attribute}.{key}": tensor for key, tensor in entry.named_parameters()}
        return tensors

    def training_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What a resumed training needs and the adapter's own tensors do not show, by name; written to a side file."""
        return {}

    def absorb(self, other: "AdapterLayer") -> None:
        """Take over the adapters of another wrapper of the same class and base module; all entries of a name at once."""
        for attribute in (*self.adapter_attributes, *self.settings_attributes):
            getattr(self, attribute).update(getattr(other, attribute))
        self.started_from.update(other.started_from)

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter and everything kept for it; a merged one is unmerged first."""
        if name in self.merged_adapters:
            self.unmerge()
        for attribute in (*self.adapter_attributes, *self.settings_attributes):
            holder = getattr(self, attribute)
            if name in holder:
                del holder[name]
        self.active_adapters = [active for active in self.active_adapters if active != name]
        self._settle()
        self.started_from.pop(name, None)

    def check_selection(self, names: Iterable[str]) -> None:
        """Raise ValueError if these adapters cannot be active, or be merged, together on this module."""
        changed = [name for name in names if name in self.started_from]
        if len(changed) > 1:
            raise ValueError(
                f"set_adapter: expected at most one adapter that starts from changed base weights, got {changed}; save them as "
                "plain LoRA first (save_pretrained with path_initial_model_for_weight_conversion)"
            )

    def set_adapter(self, names: str | Iterable[str], *, trainable: bool = True) -> None:
        """Make these adapters the active ones, in this order; names this layer does not have are passed over."""
        wanted = [names] if isinstance(names, str) else list(names)
        self.check_selection(wanted)
        self.active_adapters = [name for name in wanted if name in self.adapter_names]
        for name in self.adapter_names:
            for tensor in self.adapter_tensors(name).values():
                if isinstance(tensor, nn.Parameter):  # a full copy of a module may hold buffers too
                    tensor.requires_grad_(trainable and name in self.active_adapters)
        self._settle()

    # -- the base's parameters --------------------------------------------------------------------------------------------

    def own_parameters(self) -> BaseParameters:
        """The base's own, whether they stand in it or not."""
        return self._unmerged or BaseParameters.of(self.base_layer)

    def parameters_under(self, names: Iterable[str]) -> BaseParameters:
        """What the adapters `names` act on: the base's own parameters, or those that one of them starts from."""
        return next((self.started_from[name] for name in names if name in self.started_from), None) or (
            self.own_parameters()
        )

    def _settle(self) -> None:
        """Let the base hold what the active adapters act on; its own where adapters are off. Merged weights stay."""
        if self.merged_adapters:
            return
        acting = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.started_from]
        if acting:
            own = self.own_parameters()
            self.started_from[acting[0]].install(self.base_layer)
            self._unmerged = own
        elif self._unmerged is not None:
            self._unmerged.install(self.base_layer)
            self._unmerged = None

    def give_up_own_parameters(self) -> None:
        """Where the active adapter starts from others, these are the base's from now on, and nothing is kept twice.

        For a base that is sharded. The adapter cannot be switched off any more.
        """
        if self._unmerged is not None:
            self._unmerged, self.needs_its_adapter = None, True
        self.started_from.clear()

    @contextlib.contextmanager
    def own_parameters_in_place(self) -> Iterator[None]:
        """Inside, the base holds its own parameters, whatever is merged or active."""
        if self._unmerged is None:
            yield
            return
        standing = BaseParameters.of(self.base_layer)
        self._unmerged.install(self.base_layer)
        try:
            yield
        finally:
            standing.install(self.base_layer)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. Off gives the base module's own bits, also when adapters were merged into it."""
        if not enabled and self.needs_its_adapter:
            raise NotImplementedError(
                "disable_adapter: expected the base's own weights, which were given up when the base was sharded (PiSSA, OLoRA, "
                "LoftQ start from others); load the saved adapter over a base that is not sharded"
            )
        if not enabled and self.merged_adapters:
            self._merged_before_disable = list(self.merged_adapters)
            self.unmerge()
        self.disable_adapters = not enabled
        self._settle()
        if enabled and self._merged_before_disable:
            names, self._merged_before_disable = self._merged_before_disable, []
            self.merge(names)

    # -- forward ------------------------------------------------------------------------------------------------------

    def compute(self, names: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The forward with the adapters `names` acting, in this order; with none, the base module's."""
        raise NotImplementedError(f"{type(self).__name__}: expected compute to be defined")

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.row_adapters is not None and not self.disable_adapters:
            from fastpeft.layers.row_adapters import by_name

            known = self.adapter_names
            return by_name(
                self, x, lambda name, items: self.compute([name] if name in known else [], items, *args, **kwargs)
            )
        off = self.disable_adapters or self.merged_adapters
        return self.compute([] if off else self.active_adapters, x, *args, **kwargs)

    # -- merging ------------------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        """Raise NotImplementedError where the method has no merged form."""
        if not self.mergeable:
            raise NotImplementedError(
                f"merge: {type(self).__name__} computes what no weight of the base module can; keep the adapter beside it"
            )

    def delta_weight(self, name: str) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__}: this method has no merged form")

    def delta_bias(self, name: str) -> torch.Tensor | None:
        return None

    def merge(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        """Let the base module compute what it computes with the adapters: in float32 (float64 if the base is), rounded once.

        A quantised weight is dequantised, summed, and quantised again with its own settings: that rounds as quantising did.
        The base's own Parameter object is set aside, so `unmerge` restores its bits and a tied module never sees the sum.
        Raises:  ValueError with safe_merge if a merged value is not finite; the base is then unchanged.
                 NotImplementedError where the method has no merged form
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        new = [name for name in wanted if name in self.adapter_names and name not in self.merged_adapters]
        if not new:
            return
        self.check_mergeable()
        names = [*self.merged_adapters, *new]
        self.check_selection(names)
        own, start = self.own_parameters(), self.parameters_under(names)
        weight, bias = self.merged_tensors(names, start.dense(), start.bias)
        if safe_merge and not _finite(weight, bias):
            raise ValueError(
                f"merge: the sum of the base weight and {names} has values that are not finite; not merged"
            )
        start.with_values(weight, bias).install(self.base_layer)
        self._unmerged, self.merged_adapters = own, names

    def merges_finite(self, adapter_names: Iterable[str]) -> bool:
        """True if every value of the base would be finite with these adapters, and those that are merged, in it."""
        new = [name for name in adapter_names if name in self.adapter_names and name not in self.merged_adapters]
        names = [*self.merged_adapters, *new]
        start = self.parameters_under(names)
        return not names or _finite(*self.merged_tensors(names, start.dense(), start.bias))

    @torch.no_grad()
    def merged_tensors(self, names: Iterable[str], weight: torch.Tensor, bias: torch.Tensor | None):
        """(weight, bias) with the adapters `names` in them; bias stays None where neither base nor adapters have one.

        weight: the base's own, dense, in its stored layout; the result has its dtype
        """
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide, copy=True)
        total_bias = None if bias is None else bias.to(wide, copy=True)
        for name in names:
            total, total_bias = self.merge_into(name, total, total_bias)
        if total_bias is not None:
            total_bias = total_bias.to(weight.dtype if bias is None else bias.dtype)
        return total.to(weight.dtype), total_bias

    def merge_into(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        """(weight, bias) of a base with this adapter in it; both are in float32 or wider and may be changed in place."""
        weight += self.delta_weight(name)
        delta = self.delta_bias(name)
        if delta is not None:
            delta = delta.to(weight.dtype)
            bias = delta if bias is None else bias.add_(delta)
        return weight, bias

    def unmerge(self) -> None:
        """Put back what stood in the base module before the merge, bit for bit."""
        if self.merged_adapters:
            self.merged_adapters = []
            self._unmerged.install(self.base_layer)
            self._unmerged = None
            self._settle()

    def bake(self, names: Iterable[str] | None) -> nn.Module:
        """The base module with the adapters merged in for good: what `merge_and_unload` puts in this wrapper's place."""
        self.merge(names)
        if not self.merged_adapters and self._unmerged is not None:
            self._unmerged.install(self.base_layer)
        self._unmerged, self.merged_adapters = None, []
        return self.base_layer

    def extra_repr(self) -> str:
        return f"adapters={self.adapter_names}, active={self.active_adapters}, merged={self.merged_adapters}"


class ModulesToSaveWrapper(AdapterLayer):
    """A module that is trained in full: one copy per adapter beside the original, which stays as it was.

    State-dict names are PEFT's: `original_module.*` and `modules_to_save.<adapter>.*`; on disk the adapter's copy has the
    module's plain name.
    """

    adapter_attributes = ("modules_to_save",)

    def __init__(self, original_module: nn.Module, adapter_name: str, copy: nn.Module):
        super().__init__(original_module)
        del self.base_layer
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict({adapter_name: copy.requires_grad_(True)})

    def __getattr__(self, name: str):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.chosen(), name)

    def get_base_layer(self) -> nn.Module:
        return self.original_module

    def chosen(self) -> nn.Module:
        """The active adapter's copy, or the original when adapters are off or none is active."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return dict(self.modules_to_save[name].state_dict(keep_vars=True)) if name in self.modules_to_save else {}

    def check_selection(self, names: Iterable[str]) -> None:
        copies = [name for name in names if name in self.modules_to_save]
        if len(copies) > 1:
            raise ValueError(
                f"set_adapter: expected at most one active adapter with a copy of a module, got {copies}; "
                "full copies (modules_to_save) do not add up"
            )

    def merge(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        """Nothing to add: the copy is used as it is."""

    def merges_finite(self, adapter_names: Iterable[str]) -> bool:
        return True

    def bake(self, names: Iterable[str] | None) -> nn.Module:
        wanted = self.active_adapters if names is None else [name for name in names if name in self.modules_to_save]
        return self.modules_to_save[wanted[0]] if wanted else self.original_module

    def forward(self, *args, **kwargs):
        if self.row_adapters is None or self.disable_adapters:
            return self.chosen()(*args, **kwargs)
        from fastpeft.layers.row_adapters import by_name

        first, *rest = args

        def run(name: str, items: torch.Tensor) -> torch.Tensor:
            has_copy = name in self.modules_to_save
            module = self.modules_to_save[name] if has_copy else self.original_module
            return module(items, *rest, **kwargs)

        return by_name(self, first, run)
