"""Part "norm": transformers' RMSNorms by the fused op, which keeps x in its own dtype and one number a row for backward.

A module is taken for an RMSNorm by structure: one parameter `weight` [K], and `variance_epsilon` or `eps`. What it computes is
then asked of its own forward, on two fixed rows: so Gemma's weight + 1 is told from Llama's weight, and a norm that takes off
the mean or normalises by groups is kept as it is; a call with more than x runs the module's own code. The rows also tell the
dtype of the result where x and the weight differ: Gemma's is x's, T5's the weight's, Llama's the wider one.

nn.LayerNorm stays: PyTorch's own kernel already keeps no more than x and two numbers a row, and layer_norm of ops/norm.py is that
kernel on a CPU. The add before a norm stays in the decoder layer's forward: fusing it would need a forward per family.
"""

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._mode_utils import no_dispatch

from fastpeft.integrations.acceleration.few_rows import few_rows
from fastpeft.integrations.acceleration.ledger import Accelerated, own_class
from fastpeft.ops.norm import rms_norm
from fastpeft.reference.norm import rms_norm as formula

if TYPE_CHECKING:
    from fastpeft.integrations.acceleration.apply import Walk

PART = "norm"
EPS_NAMES = ("variance_epsilon", "eps")
_OFFSETS = (0.0, 1.0)
_SAME = 1e-5  # relative: float32 sums in another order differ by less, another formula by more


def _x_dtype(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    return x


def _weight_dtype(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    return weight


_DTYPES_OF_Y = (torch.promote_types, _x_dtype, _weight_dtype)
"""The dtype of y from those of x and the weight, as transformers' norms have it."""


class FastRMSNorm(Accelerated):
    """y = x / sqrt(mean(x^2) + eps) * (weight + offset), in the dtype that the module's own forward gives."""

    eps_name: str
    offset: float
    impl: str

    @staticmethod
    def dtype_of_y(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
        raise NotImplementedError("FastRMSNorm: a rule of _DTYPES_OF_Y, see _replacement")

    def forward(self, x, *args, **kwargs):
        if few_rows(self.impl, x):
            return self.as_before(x, *args, **kwargs)
        if args or kwargs:
            return self.fall_back("called with more than x", x, *args, **kwargs)
        weight = self.weight
        if not x.is_floating_point() or x.shape[-1:] != weight.shape:
            return self.fall_back(f"x is not floating [..., {len(weight)}]", x)
        if x.device != weight.device:
            return self.fall_back("x and the weight are on two devices", x)
        dtype = x.dtype if x.dtype == weight.dtype else self.dtype_of_y(x.dtype, weight.dtype)
        return rms_norm(x, weight, eps=getattr(self, self.eps_name), offset=self.offset, dtype=dtype, impl=self.impl)


def replace_norms(walk: "Walk") -> None:
    """Swap every RMSNorm that `rms_norm` computes; say why the other norms stay."""
    for path, module in walk.model.named_modules():
        if isinstance(module, nn.LayerNorm):
            walk.ledger.keep(path, module, PART, "PyTorch's own kernel keeps x and two numbers a row already")
            continue
        eps_name = _eps_name(module)
        if eps_name is None or isinstance(module, Accelerated):
            continue
        rule = _rule(module, eps_name)
        if rule is None:
            walk.ledger.keep(path, module, PART, "it computes something else than x / rms(x) * (weight + 0 or 1)")
            continue
        walk.ledger.swap(path, module, _replacement(eps_name, *rule, walk.impl), PART)


def _eps_name(module: nn.Module) -> str | None:
    """The attribute that holds the epsilon of what looks like an RMSNorm; None for other modules."""
    parameters = module._parameters
    weight = parameters.get("weight")
    others = [name for name, parameter in parameters.items() if name != "weight" and parameter is not None]
    if weight is None or weight.dim() != 1 or others or module._buffers or module._modules:
        return None
    return next((name for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)


@functools.cache
def _replacement(eps_name: str, offset: float, dtype_of_y, impl: str) -> type[FastRMSNorm]:
    settings = {"eps_name": eps_name, "offset": offset, "dtype_of_y": staticmethod(dtype_of_y), "impl": impl}
    return type("FastRMSNorm", (FastRMSNorm,), settings)


def _rule(module: nn.Module, eps_name: str):
    """(offset, rule of _DTYPES_OF_Y) by which rms_norm computes what the module does; None if there is none."""
    with no_dispatch(), torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        k = len(module.weight)
        columns = torch.arange(k, dtype=torch.float32, device="cpu")
        weight = (columns * 1.7).sin() * 0.5 + 1
        eps = getattr(module, eps_name)
        sizes = torch.tensor([[3.0], [eps**0.5]], device="cpu")  # the second row is where eps counts
        x = ((columns + torch.tensor([[0.0], [0.5]], device="cpu")).cos() + 0.25) * sizes
        y = _own_forward(module, weight, x)
        if y is None or y.dtype != x.dtype or y.shape != x.shape:
            return None
        limit = _SAME * y.abs().amax(dim=-1, keepdim=True)
        fits = [
            offset
            for offset in _OFFSETS
            if bool(((y - formula(x, weight, eps=eps, offset=offset)).abs() <= limit).all())
        ]
        half, single = torch.bfloat16, torch.float32
        pairs = [(half, half), (half, single), (single, half)]
        found = [_own_forward(module, weight.to(of_weight), x.to(of_x)) for of_x, of_weight in pairs]
        if not fits or any(result is None for result in found):
            return None
        dtypes = [result.dtype for result in found]
        rules = [rule for rule in _DTYPES_OF_Y if [rule(*pair) for pair in pairs] == dtypes]
        return (fits[0], rules[0]) if rules else None


def _own_forward(module: nn.Module, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """What the module's class makes of x with another weight; None where it cannot be called so."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = module._parameters | {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        y = own_class(module).forward(twin, x)
    except (TypeError, RuntimeError, ValueError):
        return None
    return y if isinstance(y, torch.Tensor) else None
