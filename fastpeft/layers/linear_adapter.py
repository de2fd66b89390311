"""What every wrapper of a linear module shares: sizes, the frozen weight, and the base's product alone.

x W^T + bias,    W [N, K] of an nn.Linear, a Conv1D, or bitsandbytes' Linear4bit or Linear8bitLt
"""

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import (
    compute_dtype,
    frozen_weight,
    is_conv1d,
    is_linear_base,
    is_quantized,
    weight_shape,
)
from fastpeft.ops.frozen_linear import frozen_linear
from fastpeft.ops.weights import FrozenWeight


def check_adapter_name(where: str, name: str) -> None:
    if "." in name or not name:
        raise ValueError(f"{where}: expected an adapter name without dots, got {name!r}")


def tensor_factory(base_layer: nn.Module, autocast_adapter_dtype: bool) -> dict:
    """Where and in which dtype an adapter's tensors are made: with the base, in float32 where the base is half precision."""
    weight = getattr(base_layer, "weight", None)
    if weight is None:  # a module of several linears
        weight = next(base_layer.parameters())
    half = weight.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if (half and autocast_adapter_dtype) or not weight.is_floating_point() else weight.dtype
    return {"device": weight.device, "dtype": dtype}


def is_untouched(module: nn.Module) -> bool:
    """True if nobody has put a hook on a module or a forward on the instance."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked and "forward" not in module.__dict__


def is_plain_linear(base: nn.Module) -> bool:
    """True if a linear base's forward is just its weight and bias: no subclass, hook, or instance override to honour."""
    own = type(base).forward
    own_forward = is_conv1d(base) or own is nn.Linear.forward
    if not own_forward and is_quantized(base):
        own_forward = own.__module__.startswith("bitsandbytes.") and not base.weight.is_floating_point()
    return own_forward and is_untouched(base) and not base.weight.requires_grad


def base_product(base: nn.Module, impl: str, *args, **kwargs) -> torch.Tensor:
    """A base module's own forward. A quantised linear goes through our product: bitsandbytes' is wrong on a CPU where
    blocks cross rows."""
    if not is_quantized(base) or not is_plain_linear(base):
        return base(*args, **kwargs)
    x, *_ = args
    wanted = compute_dtype(base, x.dtype)
    return frozen_linear(x.to(wanted), frozen_weight(base), base.bias, impl=impl).to(x.dtype)


class LinearAdapter(AdapterLayer):
    """A linear module with adapters of one method. A subclass defines what AdapterLayer asks for.

    impl: implementation of the ops: "auto", "torch", "triton", "reference"
    Raises:  TypeError for a base module that is not linear
    """

    def __init__(self, base_layer: nn.Module, impl: str = "auto"):
        if not is_linear_base(base_layer):
            raise TypeError(
                f"{type(self).__name__}: expected an nn.Linear or transformers Conv1D, got {type(base_layer).__name__}"
            )
        super().__init__(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)
        self.impl = impl
        self.out_features, self.in_features = weight_shape(base_layer)

    def freeze_base(self) -> None:
        self.base_layer.weight.requires_grad_(False)
        if self.base_layer.bias is not None:
            self.base_layer.bias.requires_grad_(False)

    def frozen_weight(self) -> FrozenWeight:
        """The frozen weight as [N, K], whatever way the base stores it."""
        return frozen_weight(self.base_layer)

    def base_is_plain(self) -> bool:
        return is_plain_linear(self.base_layer)

    def base_forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base alone."""
        return base_product(self.base_layer, self.impl, x, *args, **kwargs)
