"""The part "mlp": gated MLPs by one op with their adapters inside, or with their act(gate) * up alone by one.

    y = down(act(gate(x)) * up(x))

An MLP is found by the names of its children and by what its forward reads of it, so that no model is listed here. Where all
three linears are what call_of (linears.py) can describe, in a step with gradients, it is lora_glu_mlp, under the walk's memory
policy; at the end of a layer that is checkpointed under "memory", which then costs nothing: see lora_mlp.py. Elsewhere the
linears run as they are, with their hooks, and glu keeps two tensors where the model keeps three.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from fastpeft.integrations.acceleration.activations import activation_of
from fastpeft.integrations.acceleration.checkpointing import computed_again
from fastpeft.integrations.acceleration.few_rows import few_rows
from fastpeft.integrations.acceleration.ledger import Accelerated, own_class
from fastpeft.integrations.acceleration.linears import call_of, options_of, undo_reading
from fastpeft.layers.linear_adapter import is_untouched
from fastpeft.ops.glu import glu
from fastpeft.ops.lora_mlp import lora_glu_mlp
from fastpeft.ops.tracing import is_fake

if TYPE_CHECKING:
    from fastpeft.integrations.acceleration.apply import Walk

PART = "mlp"


class Layout(NamedTuple):
    """Names of an MLP's children, and all names that its forward uses. up is None where gate gives both side by side.

    dropout: between h and down; h is then also cast to down's dtype, as T5 does.
    """

    gate: str
    up: str | None
    down: str
    act: str
    dropout: str | None
    uses: frozenset[str]

    def of(self, module: nn.Module) -> bool:
        names = (self.gate, self.up, self.down, self.act, self.dropout)
        children = [getattr(module, name, None) for name in names if name is not None]
        return all(isinstance(child, nn.Module) or callable(child) for child in children)


LAYOUTS = (
    Layout(
        "gate_proj",
        "up_proj",
        "down_proj",
        "act_fn",
        None,
        frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"}),
    ),  # Llama and most of its kin
    Layout(
        "gate_up_proj",
        None,
        "down_proj",
        "activation_fn",
        None,
        frozenset({"gate_up_proj", "chunk", "activation_fn", "down_proj"}),
    ),  # Phi-3
    Layout(
        "wi_0",
        "wi_1",
        "wo",
        "act",
        "dropout",
        frozenset(
            {"wi_0", "wi_1", "wo", "act", "dropout", "weight", "dtype", "to", "isinstance", "torch", "Tensor", "int8"}
        ),
    ),  # T5
)


class Plan(NamedTuple):
    """What a replaced MLP needs to know. ends_layer: its layer only adds the result to the residual, and keeps nothing of it."""

    layout: Layout
    activation: str
    memory: str
    impl: str
    ends_layer: bool


class FastGatedMLP(Accelerated):
    """A gated MLP by lora_glu_mlp, or by its own linears and glu."""

    added = ("_fastpeft_mlp",)
    _fastpeft_mlp: Plan

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        plan = self._fastpeft_mlp
        if few_rows(plan.impl, x) and _is_dense(self, plan.layout):
            return self.as_before(x, *args, **kwargs)
        why = _refused(self, plan, x, args, kwargs)
        if why is not None:
            return self.fall_back(why, x, *args, **kwargs)
        y = _in_one(self, plan, x)
        return _by_own_linears(self, plan, x) if y is None else y


def _is_dense(mlp: nn.Module, names: Layout) -> bool:
    weights = (getattr(getattr(mlp, name), "weight", None) for name in (names.gate, names.up, names.down) if name)
    return all(isinstance(weight, torch.Tensor) and weight.is_floating_point() for weight in weights)


def _refused(mlp: nn.Module, plan: Plan, x: torch.Tensor, args: tuple, kwargs: dict) -> str | None:
    """Why the model's own code must run."""
    if args or kwargs:
        return "called with more than x"
    if type(x) is not torch.Tensor and not is_fake(x):
        return f"x is a {type(x).__name__}"
    act = getattr(mlp, plan.layout.act)
    if isinstance(act, nn.Module) and not is_untouched(act):
        return f"a hook on {plan.layout.act}"
    if activation_of(act) != plan.activation:
        return f"{plan.layout.act} is another one than when the model was accelerated"
    if torch.nn.modules.module._has_any_global_hook():
        return "a hook on all modules"
    return None


def _in_one(mlp: nn.Module, plan: Plan, x: torch.Tensor) -> torch.Tensor | None:
    """All of it as one op; None where that cannot be, or where nothing would be kept for backward anyway."""
    names = plan.layout
    if names.up is None or not torch.is_grad_enabled() or _drops(mlp, names):
        return None
    calls = []
    for name in (names.gate, names.up, names.down):
        call = call_of(getattr(mlp, name), x)
        if call is None:
            return None
        calls.append(call)
    options = options_of(calls, plan.impl)
    gate, up, down = (call.projection for call in calls)
    if options is None or not _one_dtype(x, (gate, up, down)):
        return None
    if not x.requires_grad and not any(t is not None and t.requires_grad for p in (gate, up, down) for t in p[1:4]):
        return None
    impl, exact = options
    memory = "memory" if plan.ends_layer and computed_again() else plan.memory
    return lora_glu_mlp(x, gate, up, down, activation=plan.activation, memory=memory, impl=impl, exact=exact)


def _one_dtype(x: torch.Tensor, projections) -> bool:
    """Whether all products are in one dtype. Under autocast a 4-bit linear gives x's dtype, others the autocast dtype."""
    dense = [p.w.dtype for p in projections if isinstance(p.w, torch.Tensor)]
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return all(dtype == x.dtype for dtype in dense)
    return x.dtype == torch.get_autocast_dtype(kind) or len(dense) == len(projections)


def _by_own_linears(mlp: nn.Module, plan: Plan, x: torch.Tensor) -> torch.Tensor:
    names = plan.layout
    g = getattr(mlp, names.gate)(x)
    u = None if names.up is None else getattr(mlp, names.up)(x)
    if u is not None and u.dtype != g.dtype:  # one of the two is quantised, under autocast
        wide = torch.promote_types(g.dtype, u.dtype)
        g, u = g.to(wide), u.to(wide)
    h = glu(g, u, plan.activation, impl=plan.impl)
    del g, u
    down = getattr(mlp, names.down)
    if names.dropout is not None:
        h = getattr(mlp, names.dropout)(h)
        w = down.weight
        if isinstance(w, torch.Tensor) and h.dtype != w.dtype != torch.int8:
            h = h.to(w.dtype)
    return down(h)


def _drops(mlp: nn.Module, names: Layout) -> bool:
    """Whether something happens between h and down."""
    if names.dropout is None:
        return False
    dropout = getattr(mlp, names.dropout)
    return not is_untouched(dropout) or (dropout.training and dropout.p > 0)


# -- replacing ----------------------------------------------------------------------------------------------------------


def _names_used(forward: Callable) -> frozenset[str]:
    """Every attribute and global that a function reads; nothing of one that was wrapped by other code."""
    code = getattr(forward, "__code__", None)
    return frozenset() if code is None or hasattr(forward, "__wrapped__") else frozenset(code.co_names)


def _unfit(module: nn.Module, layout: Layout) -> str | None:
    """Why an MLP with these children stays as it is."""
    forward = own_class(module).forward
    if _names_used(forward) != layout.uses or (layout.up is None and not _gate_comes_first(forward)):
        return f"its forward is another than {layout.down}(act({layout.gate}(x)) * ...)"
    act = getattr(module, layout.act)
    if activation_of(act) is None:
        return f"its activation is {type(act).__name__ if isinstance(act, nn.Module) else act}"
    if layout.dropout is not None and type(getattr(module, layout.dropout)) is not nn.Dropout:
        return f"its dropout is {type(getattr(module, layout.dropout)).__name__}"
    return None


class _Packed:
    """What a packed MLP's forward must be, to the instruction."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up_states = self.gate_up_proj(hidden_states)

        gate, up_states = up_states.chunk(2, dim=-1)
        up_states = up_states * self.activation_fn(gate)

        return self.down_proj(up_states)


def _gate_comes_first(forward: Callable) -> bool:
    """Names do not tell which half is the gate."""
    return forward.__code__.co_code == _Packed.forward.__code__.co_code


_LAYER = {"self_attn", "input_layernorm", "post_attention_layernorm"}
"""Beside its MLP, the children of a layer that is x + attn(norm(x)), then x + mlp(norm(x)). With other ones something may come
after the MLP: a dropout (T5), a norm (Gemma 2)."""


def _ends_layer(model: nn.Module, path: str) -> bool:
    above, _, name = path.rpartition(".")
    return {child for child, _ in model.get_submodule(above).named_children()} == _LAYER | {name}


def replace_mlp(walk: "Walk") -> None:
    """Swap every gated MLP of the model; one that looks like it and is not is kept, with the reason."""
    for path, module in walk.model.named_modules():
        layout = next((layout for layout in LAYOUTS if layout.of(module)), None)
        if layout is None:
            continue
        why = _unfit(module, layout)
        if why is not None:
            walk.ledger.keep(path, module, PART, why)
            continue
        activation = activation_of(getattr(module, layout.act))
        plan = Plan(layout, activation, walk.memory, walk.impl, _ends_layer(walk.model, path))
        if walk.ledger.swap(path, module, FastGatedMLP, PART, _fastpeft_mlp=plan):
            for name in (layout.gate, layout.up, layout.down):
                if name is not None:
                    undo_reading(walk.ledger, getattr(module, name))
