"""Part "rope": the model's own attention forward, with fastpeft's rotation of q and k in place of its module's function.

transformers' families call a function of their modelling module, `apply_rotary_pos_emb`, from inside the attention's forward. The
replaced forward is that forward's own code with one global name exchanged, so everything else in it stays what it is, patches
that others make to the module later included. Only replaced modules run it: the module's function stays where it is.

(q', k') = (q cos + half(q) sin, ...) rounded after each product; transformers rounds the sum too. Nothing but cos and sin is
kept for backward by either. Measured on a CPU (AMD EPYC, Zen 4, 1 thread, forward and backward, beside transformers'):
1.2 times as fast at [4, 9 and 3 heads, 256, 64] in bfloat16, 1.5 in float32, 1.9 and 3.0 at 32 and 8 heads of 128; with one
token 0.6, so that small calls on a CPU go to the module's own function.
"""

import dis
import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from fastpeft.integrations.acceleration.ledger import Accelerated, own_class
from fastpeft.ops.rope import apply_rope
from fastpeft.ops.tracing import traced

if TYPE_CHECKING:
    from fastpeft.integrations.acceleration.apply import Walk

_WORTH = 2**18  # elements of q and k from which on a CPU rotates them faster than transformers' function does


def replace_rope(walk: "Walk") -> None:
    """Swap every module of the family whose forward calls its rotary function."""
    name = walk.family.rotary
    if name is None:
        return
    for path, module in list(walk.core.named_modules()):
        own = own_class(module)
        if not _calls(own.forward, name):
            if _mentions(own.forward, name):
                walk.ledger.keep(path, module, "rope", f"{name} is not a global of its forward's module")
            continue
        replacement = replacement_of(own, own.forward, name, walk.impl)
        if replacement is None:
            walk.ledger.keep(
                path, module, "rope", f"its forward is wrapped in a way in which {name} cannot be exchanged"
            )
            continue
        walk.ledger.swap(path, module, replacement, "rope")


def rotary(own: Callable, impl: str) -> Callable:
    """A function with the arguments of transformers' rotary functions, `own` among them, by `apply_rope`."""

    @functools.wraps(own)
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        if not _fits(q, k, cos, sin, unsqueeze_dim):
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        if unsqueeze_dim == 2:
            return apply_rope(q, k, cos, sin, impl=impl)
        q, k = apply_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, impl=impl)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


def _fits(q, k, cos, sin, unsqueeze_dim) -> bool:
    """Is this [B, H, S, D] or [B, S, H, D] with a row of cos and sin, their halves alike, per token, and worth a call?"""
    if not (q.dim() == k.dim() == 4 and cos.dim() == 3 and unsqueeze_dim in (1, 2) and cos.shape == sin.shape):
        return False
    if not q.dtype == k.dtype == cos.dtype == sin.dtype or cos.requires_grad or sin.requires_grad:
        return False
    if cos.shape[-1] % 2 or cos.shape[-1] > q.shape[3] or cos.shape[1] != q.shape[3 - unsqueeze_dim]:
        return False
    if traced(q):
        return True  # a graph of other lengths must not come of asking for the size
    return q.device.type != "cpu" or q.numel() + k.numel() >= _WORTH


@functools.cache
def replacement_of(own: type[nn.Module], forward: Callable, name: str, impl: str) -> type[Accelerated] | None:
    """A mixin whose forward is `forward` with `name` exchanged; None where that cannot be done."""
    exchanged = _exchanged(forward, name, impl)
    if exchanged is None:
        return None

    class FastRotary(Accelerated):
        pass

    FastRotary.forward = exchanged
    return FastRotary


def _plain(function: Callable) -> Callable | None:
    """The function that decorators made with functools.wraps stand around."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function if isinstance(function, types.FunctionType) else None


def _mentions(forward: Callable, name: str) -> bool:
    inner = _plain(forward)
    return inner is not None and name in (*inner.__code__.co_names, *inner.__code__.co_freevars)


def _calls(forward: Callable, name: str) -> bool:
    inner = _plain(forward)
    if inner is None or not callable(inner.__globals__.get(name)):
        return False
    uses = {step.opname for step in dis.get_instructions(inner.__code__) if step.argval == name}
    return uses == {"LOAD_GLOBAL"}  # else it is an attribute or a variable as well


def _exchanged(function: Callable, name: str, impl: str) -> Callable | None:
    """A copy of `function`, its decorators included, that calls fastpeft's rotation where it called `name`.

    The name in its code is exchanged for one of ours, which is added to the module's globals: a copy of the globals would not see
    what others change in the module.
    """
    if not isinstance(function, types.FunctionType):
        return None
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is None:
        ours = f"_fastpeft_{impl}_{name}"
        function.__globals__.setdefault(ours, rotary(function.__globals__[name], impl))
        names = tuple(ours if used == name else used for used in function.__code__.co_names)
        return _copy(function, function.__code__.replace(co_names=names), function.__closure__)
    inner = _exchanged(wrapped, name, impl)
    cells = function.__closure__ or ()
    if inner is None or not any(cell.cell_contents is wrapped for cell in cells):
        return None
    closure = tuple(types.CellType(inner) if cell.cell_contents is wrapped else cell for cell in cells)
    copy = _copy(function, function.__code__, closure)
    copy.__wrapped__ = inner
    return copy


def _copy(function: types.FunctionType, code: types.CodeType, closure: tuple | None) -> types.FunctionType:
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__doc__, copy.__module__ = function.__qualname__, function.__doc__, function.__module__
    copy.__annotations__ = function.__annotations__
    copy.__dict__.update(function.__dict__)
    return copy
