"""Adapter fusion: how to mix several trained bottleneck adapters is learned (Pfeiffer et al. 2021, arXiv:2005.00247).

y = h + V sum_n p_n d_n,    p = softmax over the adapters n of (Q h + b) . (K d_n)

h: the module's output; d_n: what adapter n would add to it. V begins as the identity, Q and K near zero: near the mean of the
adapters. Only Q, b, K and V are trained; the adapters stay as they are. Use:

    model.load_adapter(folder_a, "a"); model.load_adapter(folder_b, "b")     # or train them here
    model.add_adapter("mix", FusionConfig(adapters=["a", "b"])); model.set_adapter("mix")

A fusion's folder holds its own tensors and its adapters' names, not the adapters: load those first, under these names.
PEFT has no such method: it answers a folder of it with KeyError 'FUSION'. Load it with fastpeft.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.bottleneck import BottleneckAdapter
from fastpeft.methods.bottleneck import widths
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import NoTargetError, adapter_layers


@dataclass
class FusionConfig(PeftConfig):
    """Options of a fusion of bottleneck adapters, which acts at every module that has one of them.

    Raises:  ValueError without two or more names
    """

    peft_type: ClassVar[str] = "FUSION"
    known_to_peft: ClassVar[bool] = False
    shown_elsewhere: ClassVar[frozenset[str]] = PeftConfig.shown_elsewhere | {"modules_to_save"}

    adapters: list[str] = field(default_factory=list)
    """Names of the bottleneck adapters to mix; they have to be in the model, and stay."""
    modules_to_save: list[str] | None = None
    """Names of modules that are trained in full and saved with the fusion, such as a new head."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("adapters", "modules_to_save"):
            value = getattr(self, name)
            is_names = isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
            if not is_names and not (value is None and name == "modules_to_save"):
                raise ValueError(f"FusionConfig: expected {name} a list of names, got {value!r}")
        self.adapters = list(self.adapters)
        if len(set(self.adapters)) < 2 or len(set(self.adapters)) < len(self.adapters):
            raise ValueError(f"FusionConfig: expected adapters with two or more different names, got {self.adapters}")

    def needed_adapters(self) -> list[str]:
        return list(self.adapters)

    def target_paths(self, model: nn.Module, *, strict: bool = True) -> list[str]:
        """Raises:  NoTargetError if one of the adapters is no bottleneck; ValueError where they cannot be mixed"""
        paths, found = [], set()
        for path, layer in adapter_layers(model):
            members = [name for name in self.adapters if name in getattr(layer, "adapter_settings", {})]
            if not members:
                continue
            settings = [layer.adapter_settings[name] for name in members]
            if len({one.position for one in settings}) > 1:
                places = {name: one.position for name, one in zip(members, settings, strict=True)}
                raise ValueError(f"FusionConfig: expected adapters of one placement, got {places} at {path}")
            if not all(one.residual for one in settings):
                raise ValueError(f"FusionConfig: expected adapters with residual=True, got {members} at {path}")
            paths.append(path)
            found.update(members)
        missing = [name for name in self.adapters if name not in found]
        if missing:
            raise NoTargetError(
                f"FusionConfig: expected the names of bottleneck adapters, got {missing}, which are none"
            )
        return paths

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        layer = BottleneckAdapter(module)
        layer.add_fusion(adapter_name, self.adapters, widths(path, module)[1], autocast_adapter_dtype)
        return layer
