"""The LoRA layers of Hugging Face PEFT run this package's ops: lora.Linear, lora.Linear4bit and lora.Linear8bitLt.

    y = x W^T + bias + sum over active adapters of s (B (A drop(x)) + lora_bias),    or DoRA

PEFT's forward casts x to the adapters' dtype, keeps that copy, the dropped copy and a mask for backward, and adds in passes over
y. Here nothing of these is kept, and q, k, v and gate, up that read one x are one op.

Numerics: adapters wider than x are rounded to x's dtype for the products, which is bfloat16's own noise; exact=True takes these
    in float32, as PEFT does without autocast. An int8 base in training is multiplied as its dequantised values, without
    bitsandbytes' rounding of x to int8 on a GPU; in eval mode it stays bitsandbytes'.
Two ways in: `accelerate(model)` for layers that exist or that PEFT adds to the model later, and
    `accelerate_new_layers(peft_config)` for those of a model that is not accelerated.
"""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastpeft.integrations.acceleration.few_rows import few_rows
from fastpeft.integrations.acceleration.ledger import LEDGER, Accelerated, Acceleration
from fastpeft.integrations.acceleration.linears import undo_reading
from fastpeft.layers.base_weight import (
    is_conv1d,
    is_linear_4bit,
    is_linear_8bit,
    is_linear_base,
    is_repacked,
    keep_unpacked,
)
from fastpeft.layers.linear_adapter import is_plain_linear, is_untouched
from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.lora_products import LoRAProducts
from fastpeft.layers.shared_input import Call, link_children, link_siblings

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    from fastpeft.integrations.acceleration.apply import Walk

PART = "lora"


class FastLora(LoRAProducts, Accelerated):
    """PEFT's LoRA on a linear, by lora_linear_group and dora_linear. What these do not compute is left to PEFT's own forward."""

    added = ("impl", "exact", "followers", "_row_squares")

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if few_rows(self.impl, x) and not self.exact and self.base_layer.weight.is_floating_point():
            return self.as_before(x, *args, **kwargs)
        why = _refused_arguments(args, kwargs) or _refused(self, x)
        if why is not None:
            return self.fall_back(why, x, *args, **kwargs)
        y = self.run_with(_acting(self), x)
        # under autocast Linear4bit gives x's dtype, every other linear the autocast dtype
        return y.to(x.dtype) if y.dtype != x.dtype and is_linear_4bit(self.base_layer) else y

    def shared_call(self, x: torch.Tensor) -> Call | None:
        """All that one call of lora_linear_group needs to compute this layer for x; None where that is not all of it."""
        return None if _refused(self, x) is not None else self.call_with(_acting(self), x)


# -- when PEFT's own forward runs ---------------------------------------------------------------------------------------


def _acting(layer: FastLora) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _refused_arguments(args: tuple, kwargs: dict[str, Any]) -> str | None:
    if not args and not kwargs:
        return None
    if kwargs.get("adapter_names") is not None:
        return "adapter_names: one batch with several adapters"
    if args or any(value is not None for value in kwargs.values()):
        return f"called with {', '.join(kwargs) or 'more than x'}"
    return None


def _refused(layer: FastLora, x: torch.Tensor) -> str | None:
    """Why PEFT's own forward computes this layer for x; None where ours does."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged into the weight"
    names = _acting(layer)
    if not names:
        return "no active adapter has tensors here"
    base = layer.base_layer
    if not is_plain_linear(base):
        return "its base layer trains, is hooked or has a forward of its own"
    if is_linear_8bit(base) and not base.training:
        return "8-bit base in eval mode: bitsandbytes rounds x to int8"
    if type(x) is not torch.Tensor and is_traceable_wrapper_subclass(x):
        return f"x is a {type(x).__name__}"
    w = base.weight
    if w.is_floating_point() and w.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x in {x.dtype} over a base in {w.dtype}"
    return next((why for why in (_refused_adapter(layer, name, x, len(names)) for name in names) if why), None)


def _refused_adapter(layer: FastLora, name: str, x: torch.Tensor, acting: int) -> str | None:
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    variant = layer.lora_variant.get(name)
    if variant is not None:
        if type(variant).__name__ != "DoraLinearVariant":
            return f"variant {type(variant).__name__}"
        if acting > 1:
            return "DoRA beside another active adapter: PEFT scales what that one adds too"
        if layer.exact and a.weight.dtype != x.dtype:
            return "exact=True: dora_linear rounds to x's dtype"
    if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
        return f"its adapter is made of {type(a).__name__} and {type(b).__name__}"
    if not (is_untouched(a) and is_untouched(b)):
        return "its adapter's own linears are hooked"
    if type(dropout) is nn.Dropout:
        if dropout.p >= 1 or dropout.training != layer.training:
            return "dropout of everything, or in another mode than its layer"
    elif type(dropout) is not nn.Identity:
        return f"dropout by {type(dropout).__name__}"
    if not layer.cast_input_dtype_enabled and a.weight.dtype != x.dtype:
        return "cast_input_dtype_enabled is off"
    return None


# -- replacing ----------------------------------------------------------------------------------------------------------

_FORWARDS = {
    ("peft.tuners.lora.layer", "Linear.forward"),
    ("peft.tuners.lora.bnb", "Linear4bit.forward"),
    ("peft.tuners.lora.bnb", "Linear8bitLt.forward"),
}


def _unfit(layer: "BaseTunerLayer") -> str | None:
    """Why a layer of PEFT stays as it is; None where FastLora can stand for it."""
    forward = type(layer).forward
    if (forward.__module__, forward.__qualname__) not in _FORWARDS:
        if type(layer).__module__.startswith("peft.tuners.lora."):
            return "LoRA, but not on a linear that is dense or bitsandbytes'"
        return "not LoRA, or with a forward of its own"
    base = layer.base_layer
    if not is_linear_base(base):
        return f"its base layer is a {type(base).__name__}"
    if is_traceable_wrapper_subclass(base.weight):
        return f"its weight is a {type(base.weight).__name__}"
    if is_repacked(base):
        return (
            "bitsandbytes has repacked its 4-bit weight for this CPU: fastpeft.integrations.bitsandbytes.unpack(model)"
        )
    if layer.fan_in_fan_out != is_conv1d(base):
        return "fan_in_fan_out is not as its base layer stores the weight"
    return None


def replace_layer(
    ledger: Acceleration, path: str, layer: "BaseTunerLayer", impl: str = "auto", exact: bool = False
) -> bool:
    """Let a layer that is not `_unfit` be a FastLora; False, with the reason kept, where other code has replaced it."""
    base = layer.base_layer
    if not ledger.swap(path, layer, FastLora, PART, impl=impl, exact=exact):
        return False
    undo_reading(ledger, base)
    keep_unpacked(base)
    return True


def replace_lora(walk: "Walk") -> None:
    """The part "lora": PEFT's LoRA layers run our ops, and siblings that read one input are one op."""
    ledger = walk.ledger
    own = [module for module in walk.model.modules() if isinstance(module, LoRALinear)]
    if own:
        ledger.note(f"{PART:10} {len(own)} linears are fastpeft's own layers: they run these ops already")
    linked = [(module, module.followers) for module in own]
    ledger.undo_by(lambda: [setattr(module, "followers", followers) for module, followers in linked])
    _replace_new(walk)
    newcomers = Newcomers(walk)
    ledger.look_again = newcomers.look
    ledger.undo_by(walk.core.base_model.register_forward_pre_hook(newcomers).remove)


def _replace_new(walk: "Walk") -> None:
    """Replace those of PEFT's layers in the model that the ledger does not know yet."""
    if "peft" not in sys.modules:  # no layer can be PEFT's
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    ledger, replaced = walk.ledger, 0
    known = {item.path for item in ledger.kept if item.part == PART}
    for path, module in walk.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, Accelerated) and path not in known:
            why = _unfit(module)
            if why is None:
                replaced += replace_layer(ledger, path, module, walk.impl, walk.exact)
            else:
                ledger.keep(path, module, PART, why)
    if replaced:
        groups = link_siblings(walk.model)
        ledger.note(f"{PART:10} {groups} groups of linears with one input (q, k, v; gate, up) run as one op each")


class Newcomers:
    """Replaces the layers that PEFT adds to a model that is accelerated already, as SFTTrainer(model, peft_config=...) does.

    A pre-hook of the decoder, which every way to call the model passes. PEFT keeps its configs by adapter on the model that it
    goes into: as long as these are the same there is nothing to look for.
    """

    def __init__(self, walk: "Walk | None"):
        self.walk = walk
        self.seen = None if walk is None else self._configs()

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if self.walk is not None and not torch.compiler.is_compiling():
            self.look()

    def look(self) -> None:
        configs = self._configs()
        if configs != self.seen:
            self.seen = configs
            _replace_new(self.walk)

    def _configs(self) -> list[tuple[str, int]]:
        configs = self.walk.core.__dict__.get("peft_config") or {}
        return [(name, id(config)) for name, config in configs.items()]

    def __reduce__(self):
        return Newcomers, (None,)  # a copy of the model is not accelerated


# -- at creation --------------------------------------------------------------------------------------------------------


@dataclass
class _Maker:
    """Stands for a class in PEFT's table of custom modules: PEFT makes its own layer, and this replaces it."""

    impl: str
    exact: bool
    siblings: dict[str, "WeakValueDictionary[str, nn.Module]"] = field(default_factory=dict)

    def __call__(self, target: nn.Module, adapter_name: str, config: "LoraConfig", **kwargs) -> nn.Module:
        from peft.tuners.lora.model import LoraModel

        table = config._custom_modules
        config._custom_modules = {key: made for key, made in table.items() if made is not self}
        try:
            layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        finally:
            config._custom_modules = table
        if _unfit(layer) is None:
            path = kwargs.get("target_name", "")
            layer.__dict__[LEDGER] = ledger = Acceleration(layer)
            replace_layer(ledger, path, layer, self.impl, self.exact)
            self._link(path, layer)
        return layer

    def _link(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        children = self.siblings.setdefault(parent, WeakValueDictionary())
        if name in children:  # another model
            children = self.siblings[parent] = WeakValueDictionary()
        children[name] = layer
        link_children(parent, children)

    def __reduce__(self):
        return _Maker, (self.impl, self.exact)


def accelerate_new_layers(peft_config: "LoraConfig", *, impl: str = "auto", exact: bool = False) -> "LoraConfig":
    """Let PEFT make accelerated LoRA layers wherever it uses this config: the same object, for the call that it goes into.

    For code that makes the layers itself and trains at once, where `accelerate` cannot come in between:

        trainer = SFTTrainer(model, peft_config=accelerate_new_layers(LoraConfig(...)), ...)

    Where the model can be had before training, `accelerate(model)` does this and the rest, and prints what was replaced. It may
    come after this one. `restore(model)` undoes either. Layers that exist already, from another adapter, stay as they are.
    Files on disk do not change: PEFT saves neither the table of custom modules nor the classes.
    Raises:  TypeError for a config that is not peft.LoraConfig
    """
    if not hasattr(peft_config, "_register_custom_module"):
        raise TypeError(f"accelerate_new_layers: expected a peft.LoraConfig, got {type(peft_config).__name__}")
    peft_config._register_custom_module({nn.Module: _Maker(impl, exact)})
    return peft_config
