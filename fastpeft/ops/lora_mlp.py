"""The gated MLP of three LoRA linears as one op: what a Llama's MLP computes, and the least of it kept for backward.

    g = gate(x),   u = up(x),   h = act(g) * u,   y = down(h)        each linear x w^T + s (drop(x) a^T) b^T + bias
    dh, da, db of down from dy and h;   dg = dh * u * act'(g),   du = dh * act(g);   dx, da, db of gate and up from dg and du

| memory   | kept for backward            | computed again                     |
|----------|------------------------------|------------------------------------|
| speed    | x, g, u, h and every S       | nothing but act(g)                 |
| balanced | x, g, u and every S          | h, elementwise                     |
| memory   | x and the S of down          | g, u with their S, and h           |

Backward writes dg over dh and du over h where h was computed again: never over an input, dy, or what autograd kept. All three
policies give the same bits. Eager code keeps x for each linear (in float32 too, with float32 adapters over bfloat16), act(g),
g, u, h and its copies.
"""

from collections.abc import Sequence

import torch

from fastpeft import backend
from fastpeft.ops.algorithms import composed_is_faster
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.glu import ACTIVATIONS, glu
from fastpeft.ops.glu import PASSES as GLU_PASSES
from fastpeft.ops.lora_group import (
    PASSES,
    Projection,
    check_projection,
    describe,
    groups_of,
    run_unchecked,
    with_tensors,
)
from fastpeft.ops.lora_torch import sum_rows
from fastpeft.ops.tracing import traced, transformed

MEMORY = ("speed", "balanced", "memory")


class LoRAGluMLP(torch.autograd.Function):
    """tensors: w, a, b, bias of gate, up and down, w None where it is quantised and given in `members`.

    wide: the dtype of the low-rank products, as in LoRAGroup.
    """

    @staticmethod
    def forward(ctx, x, members, activation, memory, wide, impl, *tensors):
        gate, up, down = full = [
            with_tensors(member, *four) for member, four in zip(members, groups_of(4, tensors), strict=True)
        ]
        needs = list(groups_of(4, ctx.needs_input_grad[6:]))
        inner = ctx.needs_input_grad[0] or any(any(need[1:]) for need in needs[:2])  # gradients beyond dh
        need_h = needs[2][1]
        keep_h = need_h and memory == "speed"
        keep_parts = memory != "memory" and (inner or (need_h and not keep_h))
        rows = x.reshape(-1, x.shape[-1])
        (g, u), s = PASSES[impl].group_forward(rows, [gate, up], wide)
        h = GLU_PASSES[impl].forward(g, u, activation, out=None if keep_parts else u)
        (y,), (s_down,) = PASSES[impl].group_forward(h, [down], wide)
        keep_s = memory != "memory"
        keep_x = any(need[1] for need in needs[:2]) if keep_s else inner or need_h
        ctx.save_for_backward(
            x if keep_x else None,
            *((g, u) if keep_parts else (None, None)),
            h if keep_h else None,
            *(s_i if need[2] and keep_s else None for s_i, need in zip(s, needs)),
            s_down if needs[2][2] else None,
            *tensors,
        )
        ctx.members, ctx.activation, ctx.wide, ctx.impl = members, activation, wide, impl
        ctx.inner, ctx.x_shape = inner, x.shape
        ctx.bias_dtypes = [None if member.bias is None else member.bias.dtype for member in full]
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("lora_glu_mlp")
    def backward(ctx, grad):
        x, g, u, h, s_gate, s_up, s_down, *tensors = ctx.saved_tensors
        full = [with_tensors(m, *four) for m, four in zip(ctx.members, groups_of(4, tensors), strict=True)]
        parts = list(groups_of(4, ctx.needs_input_grad[6:]))
        kept = (None if x is None else x.reshape(-1, x.shape[-1])), g, u, h, [s_gate, s_up], s_down
        dy = grad.reshape(-1, grad.shape[-1])
        dx, grads = backward_passes(
            dy, *kept, full, ctx.activation, ctx.wide, ctx.impl, ctx.inner, ctx.needs_input_grad[0], parts
        )
        results = []
        for (da, db, dy_i), need, dtype in zip(grads, parts, ctx.bias_dtypes, strict=True):
            results += [None, da, db, sum_rows(dy_i, dtype) if need[3] else None]
        return None if dx is None else dx.view(ctx.x_shape), None, None, None, None, None, *results


def backward_passes(dy, rows, g, u, h, s, s_down, full, activation, wide, impl, inner, need_x, needs):
    """(dx, [(da, db, gradient of its output) of gate, up, down]) on rows; what of g, u, h, s is None is computed again."""
    group, elementwise = PASSES[impl], GLU_PASSES[impl]
    (*outer, down), need_h = full, needs[2][1]
    if g is None and (inner or (need_h and h is None)):
        (g, u), s = group.group_forward(rows, outer, wide)
    h_again = need_h and h is None
    late = h_again and inner and elementwise.GIVES_H
    if h_again and not late:
        h = elementwise.forward(g, u, activation)
    dh, (da,), (db,) = group.group_backward(
        [dy], h, [s_down], [down], inner, [need_h and not late], [needs[2][2]], wide
    )
    if not inner:
        return None, [(None, None, None), (None, None, None), (da, db, dy)]
    if late:
        dg, du, h = elementwise.backward_and_h(dh, g, u, activation)
        _, (da,), _ = group.group_backward([dy], h, [None], [down], False, [True], [False], wide)
    else:
        dg, du = elementwise.backward(dh, g, u, activation, out_gate=dh, out_up=h if h_again else None)
    del g, u, h
    needs_a, needs_b = [need[1] for need in needs[:2]], [need[2] for need in needs[:2]]
    dx, das, dbs = group.group_backward([dg, du], rows, s, outer, need_x, needs_a, needs_b, wide)
    return dx, [*zip(das, dbs, (dg, du)), (da, db, dy)]


def lora_glu_mlp(
    x: torch.Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    memory: str = "balanced",
    impl: str = "auto",
    exact: bool = False,
) -> torch.Tensor:
    """y = down(act(gate(x)) * up(x)), each of gate, up, down a linear with a frozen w and, or not, an adapter.

    Shapes:  x [..., K], gate and up w [N, K], down w [N', N], adapters and biases as lora_linear_group's -> y [..., N']
    Weights: as lora_linear's: tensors or quantised ones, mixed at will
    Dtypes:  as lora_linear_group's, `exact` too; g, u and h are in x's dtype
    Grads:   x, every a, b and bias; never a w. First order only
    Memory:  "speed", "balanced" or "memory": see the table above. The result and the gradients do not depend on it
    Dropout: as lora_linear_group's: a mask of its own for each, seeds drawn in the order gate, up, down where None
    Small:   few rows of a dense base are computed by lora_linear_group and glu, and keep what these do
    Raises:  ValueError that names the projection, as lora_linear_group does, or the wrong option
    Source:  Shazeer 2020, arXiv:2002.05202; Hu et al. 2021, arXiv:2106.09685
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    if activation not in ACTIVATIONS or memory not in MEMORY:
        raise ValueError(
            f"lora_glu_mlp: expected activation in {ACTIVATIONS} and memory in {MEMORY}, got {activation!r} and {memory!r}"
        )
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    members = [Projection(*member) for member in (gate, up, down)]
    _check(x, members, autocast)
    if not autocast:
        return _run(chosen, x, members, activation, memory, exact)
    x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return _run(chosen, x, members, activation, memory, exact)


def _run(impl, x, members, activation, memory, exact):
    if _in_three(impl, x, members, exact):
        g, u = run_unchecked(impl, x, members[:2], exact)
        return run_unchecked(impl, glu(g, u, activation, impl=impl), members[2:], exact)[0]
    described, tensors = describe(members)
    wide = torch.promote_types(x.dtype, torch.float32) if exact else x.dtype
    return LoRAGluMLP.apply(x, described, activation, memory, wide, impl, *tensors)


def _in_three(impl: str, x: torch.Tensor, members: Sequence[Projection], exact: bool) -> bool:
    """True where one Function is not to be had, or costs more than it saves."""
    if impl == "reference" or x.numel() == 0 or traced(x) or transformed():
        return True
    adapted = [member for member in members if member.a is not None]
    dense = all(isinstance(member.w, torch.Tensor) for member in members)
    if impl != "torch" or exact or not dense or not adapted:
        return False
    (n, k), a = members[0].w.shape, adapted[0].a
    dropped = any(member.dropout_p for member in adapted)
    return composed_is_faster(x.numel() // k, 3 * n, k, a.shape[0], x.dtype, a.dtype, dropped)


def _check(x, members, autocast):
    gate, up, down = members
    where = "lora_glu_mlp"
    check_projection(f"{where}: gate", x, gate, autocast)
    check_projection(f"{where}: up", x, up, autocast)
    if tuple(up.w.shape) != tuple(gate.w.shape):
        raise ValueError(
            f"{where}: expected gate and up of one shape [N, K], got {tuple(gate.w.shape)} and {tuple(up.w.shape)}"
        )
    h = x.new_empty(0, gate.w.shape[0])
    check_projection(f"{where}: down, where x is h = act(gate) * up", h, down, autocast)
