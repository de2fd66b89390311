"""Bottleneck adapters: a small network after a module or beside it, and a learned mix of several of them.

f(v) = Up(act(Down(dropout(norm(v)))))

after     y = h + s f(h)                                h = module(x)        (Houlsby et al. 2019, Pfeiffer et al. 2020)
beside    y = h + s f(x)                                                     (He et al. 2021, "parallel")
residual  y = module(x, r + s f(r))                     r: the module's second argument, which it adds to its own result
fusion    y = h + V sum_n p_n d_n,   p = softmax_n((K^T (Q h + b)) . d_n),   d_n = s_n f_n(.) of each fused adapter n

Shapes:  x [..., K], h and y [..., N]; Down [R, K or N], Up [N, R]; Q, K, V [N, N]
Dtypes:  an adapter computes in the dtype of its tensors, float32 over a half-precision or quantised base; y is in h's dtype,
         rounded once
Grads:   the active adapters' tensors, and x; of a fusion Q, b, K, V only
Raises:  TypeError where the module's output is neither a tensor nor a tuple that begins with one
Source:  arXiv:1902.00751, arXiv:2005.00247, arXiv:2110.04366
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.linear_adapter import base_product, check_adapter_name, tensor_factory
from fastpeft.ops.widened_linear import widened_linear

NON_LINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda v: F.gelu(v, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "linear": lambda v: v,
}
"""gelu_new is GELU by tanh, as in GPT-2 and in Houlsby et al.'s code; swish is silu; linear is none."""

NEAR_IDENTITY_STD = 1e-2
"""Houlsby et al. 2019, section 3.6: a normal distribution cut off at two standard deviations."""

QUERY_KEY_STD = 0.02
"""Spread of a new fusion's Q and K, so that it begins near the plain mean of its adapters; BERT's own initialisation."""

Position = Literal["after", "beside", "residual"]


@dataclass(frozen=True)
class BottleneckSettings:
    """How one bottleneck acts at one module, beside its tensors.

    residual: keep h in the sum; False: y = s f(h), only for "after"
    """

    position: Position = "after"
    non_linearity: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    residual: bool = True

    def __post_init__(self):
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(
                f"BottleneckSettings: expected non_linearity one of {sorted(NON_LINEARITIES)}, got {self.non_linearity!r}"
            )


class _Group(NamedTuple):
    """Adapters that act together, and on which items of the batch; None: on all."""

    names: list[str]
    items: torch.Tensor | None = None

    def of(self, t: torch.Tensor) -> torch.Tensor:
        return t if self.items is None else t[self.items]

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        return part if self.items is None else whole.index_copy(0, self.items, part)


class BottleneckAdapter(AdapterLayer):
    """Any module whose output is a tensor, or a tuple that begins with one, with bottlenecks and fusions of them.

    Several active bottlenecks: those in the residual argument and beside the module add up; then those after it act one after
    another, in the order of their names. A fusion acts alone.
    """

    adapter_attributes = (
        "adapter_down",
        "adapter_up",
        "adapter_norm",
        "fusion_query",
        "fusion_key",
        "fusion_value",
    )
    settings_attributes = ("adapter_settings", "fused_adapters")
    mergeable = False

    def __init__(self, base_layer: nn.Module, impl: str = "auto"):
        super().__init__(base_layer)
        self.impl = impl
        self._arguments = list(inspect.signature(base_layer.forward).parameters)
        for attribute in self.adapter_attributes:
            setattr(self, attribute, nn.ModuleDict())
        self.adapter_settings: dict[str, BottleneckSettings] = {}
        self.fused_adapters: dict[str, list[str]] = {}

    @property
    def adapter_names(self) -> list[str]:
        return [*self.adapter_down, *self.fusion_query]

    # -- adding ---------------------------------------------------------------------------------------------------------

    def add_bottleneck(
        self,
        name: str,
        sizes: tuple[int, int, int],
        settings: BottleneckSettings,
        *,
        layer_norm: bool = False,
        init_weights: bool | Literal["houlsby"] = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """sizes: (what the bottleneck reads, R, what it gives)."""
        check_adapter_name("BottleneckAdapter", name)
        reads, rank, gives = sizes
        factory = tensor_factory(self.base_layer, autocast_adapter_dtype)
        self.adapter_down[name] = nn.Linear(reads, rank, **factory)
        self.adapter_up[name] = nn.Linear(rank, gives, **factory)
        if layer_norm:
            self.adapter_norm[name] = nn.LayerNorm(reads, **factory)
        self.adapter_settings[name] = settings
        self._reset(name, init_weights)

    @torch.no_grad()
    def _reset(self, name: str, init_weights: bool | str) -> None:
        """True: Down Kaiming-uniform, Up zero: exactly the identity. "houlsby": both near zero. False: nn.Linear's own."""
        down, up = self.adapter_down[name], self.adapter_up[name]
        if init_weights == "houlsby":
            for linear in (down, up):
                cut = 2 * NEAR_IDENTITY_STD
                nn.init.trunc_normal_(linear.weight, std=NEAR_IDENTITY_STD, a=-cut, b=cut)
                nn.init.zeros_(linear.bias)
        elif init_weights:
            for tensor in (down.bias, up.weight, up.bias):
                nn.init.zeros_(tensor)

    def add_fusion(self, name: str, adapters: list[str], width: int, autocast_adapter_dtype: bool = True) -> None:
        """A mix of `adapters`, as many of them as this module has; width: N. V begins as the identity."""
        check_adapter_name("BottleneckAdapter", name)
        factory = tensor_factory(self.base_layer, autocast_adapter_dtype)
        self.fusion_query[name] = nn.Linear(width, width, **factory)
        self.fusion_key[name] = nn.Linear(width, width, bias=False, **factory)  # a bias moves all scores alike
        self.fusion_value[name] = nn.Linear(width, width, bias=False, **factory)
        with torch.no_grad():
            nn.init.normal_(self.fusion_query[name].weight, std=QUERY_KEY_STD)
            nn.init.normal_(self.fusion_key[name].weight, std=QUERY_KEY_STD)
            nn.init.zeros_(self.fusion_query[name].bias)
            nn.init.eye_(self.fusion_value[name].weight)
        self.fused_adapters[name] = list(adapters)

    def check_selection(self, names: Iterable[str]) -> None:
        here = [name for name in names if name in self.adapter_names]
        fusions = [name for name in here if name in self.fusion_query]
        if fusions and len(here) > 1:
            raise ValueError(
                f"set_adapter: expected the fusion {fusions[0]!r} without another bottleneck, got {here}; "
                f"it runs {self.fused_adapters[fusions[0]]} itself"
            )

    # -- forward --------------------------------------------------------------------------------------------------------

    def forward(self, *args, **kwargs):
        if self.row_adapters is None or self.disable_adapters:
            return self.compute([] if self.disable_adapters else self.active_adapters, *args, **kwargs)
        from fastpeft.layers.row_adapters import names_per_item

        x = self._argument(0, args, kwargs)
        names = names_per_item(self, x)
        groups = []
        for name in dict.fromkeys(names):
            if name in self.adapter_names:
                mine = [i for i, other in enumerate(names) if other == name]
                groups.append(_Group([name], torch.tensor(mine, device=x.device)))
        return self._run(groups, args, kwargs)

    def compute(self, names: list[str], *args, **kwargs):
        return self._run([_Group(names)] if names else [], args, kwargs)

    def _run(self, groups: list[_Group], args: tuple, kwargs: dict[str, Any]):
        for group in groups:
            args, kwargs = self._in_residual(group, args, kwargs)
        output = base_product(self.base_layer, self.impl, *args, **kwargs)
        if not groups:
            return output
        h, *others = output if isinstance(output, tuple) else (output,)
        if not isinstance(h, torch.Tensor):
            raise TypeError(
                f"BottleneckAdapter: expected {type(self.base_layer).__name__} to give a tensor or a tuple that begins with "
                f"one, got {type(output).__name__}; name a module inside it"
            )
        x = self._argument(0, args, kwargs)
        for group in groups:
            h = group.put(h, self._at_output(group, x, h))
        return (h, *others) if isinstance(output, tuple) else h

    def _in_residual(self, group: _Group, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's arguments, with what stands in the residual added to the second."""
        names = [name for name in group.names if self._position(name) == "residual"]
        if not names:
            return args, kwargs
        whole = self._argument(1, args, kwargs)
        r = group.of(whole)
        whole = group.put(whole, self._with_sum(names, r, r, r).to(r.dtype))
        if len(args) > 1:
            return (args[0], whole, *args[2:]), kwargs
        return args, kwargs | {self._arguments[1]: whole}

    def _argument(self, number: int, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The base module's argument of that number, however it is passed."""
        return args[number] if len(args) > number else kwargs[self._arguments[number]]

    def _at_output(self, group: _Group, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """The output of the group's items, with what stands beside the module and after it."""
        dtype, y = h.dtype, group.of(h)
        beside = [name for name in group.names if self._position(name) == "beside"]
        if beside:
            y = self._with_sum(beside, group.of(x), y, y)
        for name in group.names:
            if self._position(name) != "after":
                continue
            if name in self.fusion_query or self.adapter_settings[name].residual:
                y = self._with_sum([name], y, y, y)
            else:
                y = self._bottleneck(name, y, self.training)
        return y.to(dtype)

    def _position(self, name: str) -> Position:
        """Where an adapter acts; a fusion acts where its adapters do."""
        return self.adapter_settings[self._members(name)[0] if name in self.fusion_query else name].position

    def _members(self, fusion: str) -> list[str]:
        return [name for name in self.fused_adapters[fusion] if name in self.adapter_down]

    def _with_sum(self, names: list[str], v: torch.Tensor, query: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """total + what each of the adapters makes of v, not rounded to total's dtype."""
        for name in names:
            is_fusion = name in self.fusion_query
            added = self._fused(name, v, query) if is_fusion else self._bottleneck(name, v, self.training)
            total = total + added
        return total

    def _bottleneck(self, name: str, v: torch.Tensor, training: bool) -> torch.Tensor:
        """s f(v)"""
        down, up, settings = self.adapter_down[name], self.adapter_up[name], self.adapter_settings[name]
        if name in self.adapter_norm:
            v = self.adapter_norm[name](v.to(down.weight.dtype))
        if training and settings.dropout:
            v = F.dropout(v, settings.dropout)
        z = widened_linear(v, down.weight, down.bias)
        added = up(NON_LINEARITIES[settings.non_linearity](z))
        return added if settings.scaling == 1.0 else added * settings.scaling

    def _fused(self, name: str, v: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """V sum_n p_n d_n. The fused adapters are used as they are: without their dropout."""
        d = torch.stack([self._bottleneck(member, v, training=False) for member in self._members(name)], dim=-2)
        q = self.fusion_query[name](query.to(self.fusion_query[name].weight.dtype))
        key = q @ self.fusion_key[name].weight  # K^T q once, not K d_n for every adapter
        p = torch.softmax((d @ key.unsqueeze(-1)).squeeze(-1), dim=-1)  # [..., adapters]
        return self.fusion_value[name]((p.unsqueeze(-2) @ d).squeeze(-2))
