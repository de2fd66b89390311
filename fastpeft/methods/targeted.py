"""What the configurations of methods that wrap modules by name share: which modules, which heads, which biases."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from fastpeft.layers.base_weight import is_conv1d, is_linear_base
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import (
    ALL_LINEAR,
    DEFAULT_TARGETS,
    check_pattern,
    find_targets,
    is_inside,
    names_module,
    names_peft_agrees_on,
)

BIAS_CHOICES = ("none", "all", "lora_only")


@dataclass
class TargetedConfig(PeftConfig):
    """Options of a method that wraps modules chosen by name."""

    default_targets: ClassVar[dict[str, tuple[str, ...] | str]] = DEFAULT_TARGETS
    """What target_modules=None means, by `model.config.model_type`: names, or a regular expression as a text."""
    shown_elsewhere: ClassVar[frozenset[str]] = PeftConfig.shown_elsewhere | {
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "fan_in_fan_out",
    }

    target_modules: list[str] | str | None = None
    """Names of the modules to adapt (last components), a regular expression for whole paths, "all-linear", or None for the
    architecture's usual ones."""
    exclude_modules: list[str] | str | None = None
    """Names, or a regular expression, of modules to leave alone."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained in full and saved with the adapter, such as a new head."""

    def __post_init__(self):
        super().__post_init__()
        self.target_modules = self._names("target_modules", may_be_pattern=True)
        self.exclude_modules = self._names("exclude_modules", may_be_pattern=True)
        self.modules_to_save = self._names("modules_to_save")
        empty = self.target_modules is not None and not self.target_modules
        if empty and not getattr(self, "target_parameters", None):
            raise ValueError(f"{type(self).__name__}: expected target_modules with at least one name, got an empty one")

    def _names(self, field: str, *, may_be_pattern: bool = False) -> list[str] | str | None:
        """A list of names, sorted where it came as a set or tuple; or a regular expression, if the field may be one."""
        value, where = getattr(self, field), type(self).__name__
        if value is None:
            return None
        if isinstance(value, str) and may_be_pattern:
            check_pattern(f"{where}: {field}", value)
            return value
        if not isinstance(value, (list, set, tuple, frozenset)) or not all(isinstance(name, str) for name in value):
            raise ValueError(f"{where}: expected {field} a list of names, got {value!r}")
        return value if isinstance(value, list) else sorted(value)

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        return find_targets(
            model,
            self.target_modules,
            task_type=self.task_type,
            exclude_modules=self.exclude_modules,
            modules_to_save=[*(self.modules_to_save or []), *self.heads_to_save()],
            layers_to_transform=getattr(self, "layers_to_transform", None),
            layers_pattern=getattr(self, "layers_pattern", None),
            strict=strict,
            defaults=self.default_targets,
        )

    def resolved(self, model: nn.Module, paths: list[str]) -> "TargetedConfig":
        config = super().resolved(model, paths)
        named = config.target_modules
        if named is None:
            row = self.default_targets[model.config.model_type]
            names = [] if isinstance(row, str) else [n for n in row if any(names_module(n, path) for path in paths)]
            named = row if isinstance(row, str) else sorted(names)
        elif isinstance(named, str) and named.lower() == ALL_LINEAR:
            named = list(paths)
        saved = names_peft_agrees_on(model, [*(config.modules_to_save or []), *config.heads_to_save()])
        changes: dict[str, Any] = {"target_modules": named, "modules_to_save": saved or None}
        if hasattr(config, "fan_in_fan_out"):
            modules = [model.get_submodule(path) for path in paths]
            changes["fan_in_fan_out"] = any(is_conv1d(getattr(module, "base_layer", module)) for module in modules)
        return dataclasses.replace(config, **changes)


@dataclass
class LayerwiseConfig(TargetedConfig):
    """TargetedConfig with a choice of layers by number, and of biases of the base that are trained too."""

    shown_elsewhere: ClassVar[frozenset[str]] = TargetedConfig.shown_elsewhere | {
        "layers_to_transform",
        "layers_pattern",
        "bias",
    }

    layers_to_transform: list[int] | int | None = None
    """Numbers of the layers to adapt; None for all."""
    layers_pattern: list[str] | str | None = None
    """Name of the module list that layers_to_transform counts in, such as "layers" or "h"."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained too."""

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        self.layers_pattern = self._names("layers_pattern", may_be_pattern=True)
        choices = self.bias_choices()
        if self.bias not in choices:
            raise ValueError(f"{where}: expected bias one of {choices}, got {self.bias!r}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"{where}: layers_pattern says where layers_to_transform counts; give that too")
        is_pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        if is_pattern and self.layers_to_transform is not None:
            raise ValueError(f"{where}: layers_to_transform needs target_modules as a list, got a regular expression")
        layers = self.layers_to_transform
        numbers = layers if isinstance(layers, (list, tuple)) else [] if layers is None else [layers]
        if not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{where}: expected layers_to_transform a number or a list of numbers, got {layers!r}")
        for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []:
            check_pattern(f"{where}: layers_pattern", pattern)

    @classmethod
    def bias_choices(cls) -> tuple[str, ...]:
        """What `bias` may be: none, all, or those of the wrapped modules only, which PEFT names after the method."""
        return BIAS_CHOICES

    def trained_parameters(
        self, modules: dict[str, nn.Module], wrapped: list[str], copied: list[str]
    ) -> dict[str, nn.Parameter]:
        if self.bias == "none":
            return {}
        biases = {}
        for path, module in modules.items():
            bias = getattr(module, "bias", None)
            is_wrapped = path in wrapped
            left_out = is_inside(path, copied) or (self.bias != "all" and not is_wrapped)
            if isinstance(bias, nn.Parameter) and not left_out:
                biases[f"{path}.base_layer.bias" if is_wrapped else f"{path}.bias"] = bias
        return biases


def by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches the path's end at a component boundary, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), default)


def require_linear(where: str, path: str, module: nn.Module) -> nn.Module:
    """The module, if it is linear.

    Raises:  NotImplementedError for an embedding or a convolution; ValueError for what is no weighted map at all
    """
    if is_linear_base(module):
        return module
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        raise NotImplementedError(
            f"{where}: expected a linear module, got {type(module).__name__} at {path}, for which this method is not here; "
            "leave it out of target_modules"
        )
    raise ValueError(
        f"target_modules: expected nn.Linear or transformers' Conv1D, got {type(module).__name__} at {path}; "
        "name the linear modules inside it"
    )
