"""Linears that read the very same input one after another (q, k, v; gate, up) are computed together.

`link_siblings` finds them once, by their names under one parent. Then the first of them that is called, the leader, computes
itself and its followers by one `lora_linear_group`, and a follower that is called with the same tensor object takes the result
that waits for it. The model's own code is not touched, and a linear outside any group is not concerned.

That the names were right is observed on every call. A result is handed over only if all that went into it is the same: the
tensor object and its version, the follower's tensors and their versions, its settings, grad mode and autocast; else the
follower computes its own. A result that nobody takes is dropped at the next input, or when the input dies, and a follower that
did not come is left alone from then on.

Nothing is learned from the first calls, though they would show the groups of any model: sums in another order round in another
way, and a run that is resumed must go on with the bits that it would have had.
"""

import contextlib
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_group import Projection, lora_linear_group
from fastpeft.ops.tracing import address, is_fake, traced, transformed

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
"""Names of linears with one input, in the order in which models call them."""

CROSS_ATTENTION = re.compile(r"cross|enc_?dec|encoder_attn|enc_attn", re.IGNORECASE)
"""Where the path of an attention says this, q reads another input than k and v."""


class Call(NamedTuple):
    """One linear's part in a shared call: all that its result depends on besides x."""

    projection: Projection
    impl: str
    exact: bool

    def stamp(self) -> tuple:
        """Compares equal as long as the result would be the same. Tensors count by place and version."""
        return (*map(_mark, self.projection), self.impl, self.exact)

    def fits(self, x: torch.Tensor, leader: "Call") -> bool:
        """Whether this linear can be computed in leader's call for x."""
        w, own = self.projection.w, leader.projection.w
        same_kind = not isinstance(w, torch.Tensor) or not isinstance(own, torch.Tensor) or w.dtype == own.dtype
        return same_kind and w.device == own.device and w.shape[1] == own.shape[1] and self[1:] == leader[1:]

    def run(self, x: torch.Tensor, others: Sequence["Call"] = ()) -> tuple[torch.Tensor, ...]:
        if not others and not self.exact:
            w, a, b, bias, scale, p, _ = self.projection
            return (lora_linear(x, w, a, b, bias, scale=scale, dropout_p=p, impl=self.impl),)
        members = [self.projection, *(other.projection for other in others)]
        return lora_linear_group(x, members, impl=self.impl, exact=self.exact)


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return address(value), 0 if value.is_inference() else value._version, value.requires_grad
    return value if value is None or isinstance(value, (int, float)) else id(value)


class Followers:
    """The linears that are computed with a leader: an attribute of it, copied and pickled with it.

    Gradient checkpointing that recomputes under saved-tensor hooks compares what forward pass and recomputation save. So under
    hooks a follower that stayed away is let go only after the leader's adapter was updated, which nobody does in between.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        self._under_hooks, self._version = list(modules), -1

    def now(self, adapter: torch.Tensor) -> list[nn.Module]:
        hooked = torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if not hooked:
            return self.modules
        if self._version != adapter._version:
            self._under_hooks, self._version = list(self.modules), adapter._version
        return self._under_hooks

    def let_go(self, module: nn.Module) -> None:
        self.modules = [other for other in self.modules if other is not module]


def link_siblings(model: nn.Module) -> int:
    """Let the wrapped linears in `model` that have one input by their names compute together; the number of groups.

    Groups that exist are made anew. A linear counts if it has `followers`, as LoRALinear does.
    """
    return sum(link_children(path, parent._modules) for path, parent in model.named_modules())


def link_children(path: str, children: Mapping[str, nn.Module]) -> int:
    """link_siblings for the children, by name, of the module at `path` alone."""
    groups = 0
    for names in SIBLINGS:
        if CROSS_ATTENTION.search(path) and len(names) == 3:
            names = names[1:]
        linears = [children[name] for name in names if hasattr(children.get(name), "shared_call")]
        if len({id(linear) for linear in linears}) < 2:
            continue
        groups += 1
        for linear in linears:
            linear.followers = None
        linears[0].followers = Followers(linears[1:])
    return groups


# -- calls ------------------------------------------------------------------------------------------------------------


class _Waiting(NamedTuple):
    """A result, the module that it was computed for, and what it was computed from."""

    of: weakref.ref
    stamp: tuple
    y: torch.Tensor


class _Input:
    """The input that a thread's linears read at the moment: who came first, and the results that wait for the others."""

    def __init__(self, x: torch.Tensor, leader: nn.Module):
        self.waiting: dict[int, _Waiting] = {}
        self.x = weakref.ref(x, lambda _, waiting=self.waiting: waiting.clear())
        self.version = x._version
        self.leader = weakref.ref(leader)
        self.mode = _mode(x)

    def take(self, layer: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor | None:
        """What waits for `layer`, if it is of this x and still holds."""
        if self.x() is not x or self.version != x._version or self.mode != _mode(x):
            return None
        waiting = self.waiting.pop(id(layer), None)
        fresh = waiting is not None and waiting.of() is layer and waiting.stamp == call.stamp()
        return waiting.y if fresh else None

    def close(self) -> None:
        """Another input has come: whoever did not fetch its result will not."""
        leader = self.leader()
        for waiting in self.waiting.values():
            follower = waiting.of()
            if leader is not None and follower is not None and leader.followers is not None:
                leader.followers.let_go(follower)
        self.waiting.clear()


class _State(threading.local):
    input: _Input | None = None
    enabled: bool = True


_state = _State()


@contextlib.contextmanager
def sharing(enabled: bool) -> Iterator[None]:
    """Inside, in this thread, linears with one input are computed together, or each by itself."""
    before, _state.enabled = _state.enabled, enabled
    _state.input = None
    try:
        yield
    finally:
        _state.enabled, _state.input = before, None


def _mode(x: torch.Tensor) -> tuple:
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    return torch.is_grad_enabled(), autocast, torch.get_autocast_dtype(kind) if autocast else None


def forward(layer: nn.Module, call: Call, x: torch.Tensor) -> torch.Tensor:
    """layer's output for x: one that waits for it, or its own, computed with those of its followers.

    layer.shared_call(x) says what a module would compute now, None if not by this op; `call` is layer's own.
    """
    followers, current = layer.followers, _state.input
    if not _state.enabled or (followers is None and current is None):
        return call.run(x)[0]
    if (type(x) is not torch.Tensor and not is_fake(x)) or traced(x) or transformed() or x.is_inference():
        return call.run(x)[0]
    if current is not None:
        y = current.take(layer, call, x)
        if y is not None:
            if not current.waiting:
                _state.input = None
            return y
    if followers is None:
        return call.run(x)[0]
    if current is not None:
        current.close()
        _state.input = None
    others = [(other, other.shared_call(x)) for other in followers.now(call.projection.a)]
    others = [(other, its) for other, its in others if its is not None and its.fits(x, call)]
    y, *results = call.run(x, [its for _, its in others])
    if others:
        _state.input = current = _Input(x, layer)
        for (other, its), result in zip(others, results, strict=True):
            current.waiting[id(other)] = _Waiting(weakref.ref(other), its.stamp(), result)
    return y
