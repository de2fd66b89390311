"""The gated MLP of three LoRA linears as one op: what a Llama's MLP computes, and the least of it kept for backward.

    g = gate(x),   u = up(x),   h = act(g) * u,   y = down(h)        each linear x w^T + s (drop(x) a^T) b^T + bias
    dh, da, db of down from dy and h;   dg = dh * u * act'(g),   du = dh * act(g);   dx, da, db of gate and up from dg and du

| memory   | kept for backward            | computed again                     |
|----------|------------------------------|------------------------------------|
| speed    | x, g, u, h and every S       | nothing but act(g)                 |
| balanced | x, g, u and every S          | h, elementwise                     |
| memory   | x                            | g, u, h, and every S               |

Backward writes over dh and act(g), and over u where it computed that itself: never over an input, dy, or what autograd kept. All
three policies give the same bits. Eager code keeps act(g) too, and copies of x and h. Where x is rms_norm's own output,
"balanced" and "memory" keep the norm's input, which is kept anyway, and compute x again.

Without dropout many rows are taken in parts: in backward, whose da and db are added in float32, and in forward where nothing of a
part is kept. With "memory" there is then never a tensor [M, N]. Quantised weights are written out once for all parts, where there
are so many rows that this takes less.

"memory" keeps x before it computes anything. Non-reentrant checkpointing computes a layer again up to the last tensor that it
kept: where the MLP is the layer's end, nothing of it but x is computed again there, and g and u are computed twice in all, as
often as with the other policies.

Llama's MLP at M = 1024, K = 576, N = 1536, R = 16, forward and backward on one thread of a Zen 4 core (no AMX), ms of CPU time
and MiB kept besides x; separate: LoRALinears that share x, and F.silu:

| base, adapters | PEFT | separate | speed | balanced | memory |
|---|---|---|---|---|---|
| bfloat16, float32 | 92, 19.7 | 67, 12.1 | 67, 9.1 | 68, 6.1 | 89, 0.03 |
| the same with dropout 0.05 | 109, 30.2 | 77, 12.1 | 77, 9.1 | 78, 6.1 | 101, 0.03 |
| float32, float32 | 159, 24.2 | 135, 24.2 | 133, 18.2 | 134, 12.2 | 176, 0.06 |
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
from fastpeft.ops.lora_torch import Member, sum_rows
from fastpeft.ops.norm import Normed, normed
from fastpeft.ops.rehearsal import spans
from fastpeft.ops.tracing import traced, transformed

MEMORY = ("speed", "balanced", "memory")


class Kept(NamedTuple):
    """What is kept for backward besides x and the projections' own tensors; None where it is not needed, or computed again."""

    g: torch.Tensor | None
    u: torch.Tensor | None
    h: torch.Tensor | None
    s_gate: torch.Tensor | None
    s_up: torch.Tensor | None
    s_down: torch.Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for: x's, and those of (a, b, bias) of gate, up and down."""

    x: bool
    gate: tuple[bool, bool, bool]
    up: tuple[bool, bool, bool]
    down: tuple[bool, bool, bool]

    @property
    def inner(self) -> bool:
        """Whether a gradient goes past h."""
        return self.x or any(self.gate) or any(self.up)

    @property
    def h(self) -> bool:
        return self.down[0]

    def keep_x(self, memory: str) -> bool:
        return self.inner or self.h if memory == "memory" else self.gate[0] or self.up[0]

    def keep_s_down(self, memory: str) -> bool:
        """It comes of h, where that is computed again."""
        return self.down[1] and not (memory == "memory" and (self.inner or self.h))


class _KeptFirst(torch.autograd.Function):
    """x itself. Keeps x, or what it was made from, and the projections' tensors, for a LoRAGluMLP that is yet to run."""

    @staticmethod
    def forward(ctx, x, h, weight, *tensors):
        ctx.save_for_backward(x if h is None else None, h, weight, *[None] * len(Kept._fields), *tensors)
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, *[None] * (len(ctx.needs_input_grad) - 1)


class LoRAGluMLP(torch.autograd.Function):
    """tensors: w, a, b, bias of gate, up and down, w None where it is quantised and given in `members`.

    wide: the dtype of the low-rank products, as in LoRAGroup. h, weight: what x was made from, with the norm's settings, or None;
    they are then kept in its place, and get no gradient here. kept_by: the node of a _KeptFirst that did that; `asked`: the
    gradient of x is wanted.
    """

    @staticmethod
    def forward(ctx, x, h, weight, norm, kept_by, asked, members, activation, memory, wide, impl, *tensors):
        full = [with_tensors(member, *four) for member, four in zip(members, groups_of(4, tensors), strict=True)]
        of_members = groups_of(4, ctx.needs_input_grad[_BEFORE:])
        needs = Needs(ctx.needs_input_grad[0] and asked, *(tuple(four[1:]) for four in of_members))
        y, kept = forward_passes(x.reshape(-1, x.shape[-1]), full, activation, memory, wide, impl, needs)
        if kept_by is None:
            keep = needs.keep_x(memory)
            kept_x = (None, h, weight) if keep and norm is not None else (x if keep else None, None, None)
            ctx.save_for_backward(*kept_x, *kept, *tensors)
        ctx.norm, ctx.kept_by, ctx.members, ctx.settings = norm, kept_by, members, (activation, wide, impl)
        ctx.needs, ctx.x_shape = needs, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("lora_glu_mlp")
    def backward(ctx, grad):
        x, h, weight, *saved = (ctx if ctx.kept_by is None else ctx.kept_by).saved_tensors
        kept, tensors = Kept(*saved[:6]), saved[6:]
        del saved
        full = [with_tensors(m, *four) for m, four in zip(ctx.members, groups_of(4, tensors), strict=True)]
        rows = Normed(h, weight, ctx.norm) if h is not None else None if x is None else x.reshape(-1, x.shape[-1])
        dx, grads = backward_passes(grad.reshape(-1, grad.shape[-1]), rows, kept, full, *ctx.settings, ctx.needs)
        per_member = [gradient for three in grads for gradient in (None, *three)]
        return None if dx is None else dx.view(ctx.x_shape), *[None] * (_BEFORE - 1), *per_member


_BEFORE = 11
"""Arguments of LoRAGluMLP before the tensors."""


def forward_passes(rows, full, activation, memory, wide, impl, needs: Needs) -> tuple[torch.Tensor, Kept]:
    """y [M, N'] of x's rows and what backward needs under this policy. full: Members of gate, up, down."""
    m = rows.shape[0]
    keeps = memory != "memory" or needs.keep_s_down(memory)
    part, full = (m, full) if keeps else _in_parts(full, m, rows.dtype, 2)  # g, and u or h
    if m <= part:
        return _forward_of(rows, full, activation, memory, wide, impl, needs)
    y = rows.new_empty(m, full[2].w.shape[0])
    for span in spans(m, part):
        y[span], kept = _forward_of(rows[span], full, activation, memory, wide, impl, needs)
    return y, kept


def _forward_of(rows, full, activation, memory, wide, impl, needs: Needs) -> tuple[torch.Tensor, Kept]:
    """`forward_passes` of some rows."""
    group, *outer, down = PASSES[impl], *full
    keep_h = needs.h and memory == "speed"
    keep_parts = memory != "memory" and (needs.inner or (needs.h and not keep_h))
    keep_s = memory != "memory"
    (g, u), (s_gate, s_up) = group.group_forward(rows, outer, wide)
    h = GLU_PASSES[impl].forward(g, u, activation, out=None if keep_parts else u)
    (y,), (s_down,) = group.group_forward(h, [down], wide)
    return y, Kept(
        g if keep_parts else None,
        u if keep_parts else None,
        h if keep_h else None,
        s_gate if keep_s and needs.gate[1] else None,
        s_up if keep_s and needs.up[1] else None,
        s_down if needs.keep_s_down(memory) else None,
    )


CHUNK_BYTES = 16 << 20
"""Of one [rows, N] tensor: more rows than fit are taken in parts, since four or five such tensors live at once."""
CHUNK_ROWS = 256
"""Parts are multiples of this."""


def _in_parts(full, m: int, dtype: torch.dtype, wide: int) -> tuple[int, Sequence[Member]]:
    """(rows of a part, the members with dense weights), or (m, members) where all are taken at once.

    That is with dropout, whose masks belong to row numbers; and where quantised weights, written out for all parts instead of
    one by one, would take more than parts save of the tensors [M, N] that live at once, `wide` of them.
    """
    n = full[0].w.shape[0]
    part = max(CHUNK_ROWS, CHUNK_BYTES // (n * dtype.itemsize) // CHUNK_ROWS * CHUNK_ROWS)
    quantised = [math.prod(member.w.shape) for member in full if not isinstance(member.w, torch.Tensor)]
    more = sum(quantised) - max(quantised, default=0)
    if any(member.threshold for member in full) or wide * (m - part) * n <= more:
        return m, full
    dense = [w if isinstance(w, torch.Tensor) else w.dequantize(dtype) for w, *_ in full]
    return part, [member._replace(w=w) for member, w in zip(full, dense, strict=True)]


def backward_passes(dy, rows, kept: Kept, full, activation, wide, impl, needs: Needs):
    """(dx, [(da, db, dbias) of gate, up, down]); what is not kept is computed again. rows: x [M, K], or what it was made from."""
    m = dy.shape[0]
    part, full = _in_parts(full, m, dy.dtype, 3 if kept.g is not None else 4)  # dg, du, h, and g
    if m <= part:
        whole = rows if rows is None else rows[:]
        return _backward_of(dy, whole, kept, full, activation, wide, impl, needs)
    dx = dy.new_empty(m, full[0].w.shape[1]) if needs.x else None
    sums = _Sums()
    for span in spans(m, part):
        some = Kept(*(None if tensor is None else tensor[span] for tensor in kept))
        x = None if rows is None else rows[span]
        dx_part, grads = _backward_of(dy[span], x, some, full, activation, wide, impl, needs)
        if needs.x:
            dx[span] = dx_part
        sums.add([grad for three in grads for grad in three])
        del x, dx_part, grads  # before the next part's are made
    return dx, [tuple(three) for three in groups_of(3, sums.rounded())]


class _Sums:
    """Sums of lists of tensors, some None, in float32 or wider, rounded once."""

    def __init__(self):
        self.totals, self.dtypes = None, None

    def add(self, tensors) -> None:
        if self.totals is None:
            self.dtypes = [None if t is None else t.dtype for t in tensors]
            self.totals = [None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
            return
        for total, tensor in zip(self.totals, tensors, strict=True):
            if total is not None:
                total += tensor

    def rounded(self) -> list[torch.Tensor | None]:
        return [
            None if total is None else total.to(dtype) for total, dtype in zip(self.totals, self.dtypes, strict=True)
        ]


def _backward_of(dy, rows, kept: Kept, full, activation, wide, impl, needs: Needs):
    """`backward_passes` of some rows."""
    group, elementwise, *outer, down = PASSES[impl], GLU_PASSES[impl], *full
    g, u, h, *s, s_down = kept
    act = None
    s_again = needs.down[1] and s_down is None
    h_again = h is None and (needs.h or s_again)
    own = g is None and (needs.inner or h_again)
    if own:
        (g, u), s = group.group_forward(rows, outer, wide)
    late = h_again and needs.inner and elementwise.GIVES_H
    if h_again and not late:
        if needs.inner:
            h, act = elementwise.forward_and_act(g, u, activation)
        else:
            h = elementwise.forward(g, u, activation)
        if s_again:
            (s_down,) = group.group_down(h, [down], wide)
    now = needs.h and not late, needs.down[1] and not (late and s_again)
    dh, (da,), (db,) = group.group_backward([dy], h, [s_down], [down], needs.inner, [now[0]], [now[1]], wide)
    grads = [(None, None, None), (None, None, None)]
    dx = None
    if needs.inner:
        if late:
            dg, du, h = elementwise.backward_and_h(dh, g, u, activation, out_up=u if own else None)
            if s_again:
                (s_down,) = group.group_down(h, [down], wide)
            _, (da,), (later,) = group.group_backward([dy], h, [s_down], [down], False, [needs.h], [s_again], wide)
            db = later if s_again else db
        else:
            h = None
            there = {} if act is None else {"act": act}
            dg, du = elementwise.backward(dh, g, u, activation, out_gate=dh, **there)
        del g, u, h, dh, act
        needs_a, needs_b, _ = zip(needs.gate, needs.up)
        dx, das, dbs = group.group_backward([dg, du], rows, s, outer, needs.x, needs_a, needs_b, wide)
        wanted = zip(outer, das, dbs, (dg, du), (needs.gate, needs.up))
        grads = [(da_i, db_i, _grad_bias(m, d, need)) for m, da_i, db_i, d, need in wanted]
    return dx, [*grads, (da, db, _grad_bias(down, dy, needs.down))]


def _grad_bias(member, dy, needs):
    return sum_rows(dy, member.bias.dtype) if needs[2] else None


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
    Tracing: torch.compile, fake and meta tensors see the operators of lora_mlp_custom.py, which keep the same
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
    if impl != "reference" and traced(x) and x.numel():
        from fastpeft.ops.lora_mlp_custom import traced_call

        return traced_call(x, members, activation, memory, exact, impl)
    if _in_three(impl, x, members, exact):
        g, u = run_unchecked(impl, x, members[:2], exact)
        return run_unchecked(impl, glu(g, u, activation, impl=impl), members[2:], exact)[0]
    described, tensors = describe(members)
    wide = torch.promote_types(x.dtype, torch.float32) if exact else x.dtype
    made = None if memory == "speed" else normed(x)
    h, weight, norm = (None,) * 3 if made is None else (made.h, made.weight, made.settings)
    kept_by, asked = None, x.requires_grad
    if memory == "memory" and torch.is_grad_enabled() and _needs(x, tensors).keep_x(memory):
        x = _KeptFirst.apply(x, h, weight, *tensors)
        kept_by = x.grad_fn
    return LoRAGluMLP.apply(x, h, weight, norm, kept_by, asked, described, activation, memory, wide, impl, *tensors)


def _needs(x, tensors) -> Needs:
    """What autograd will ask of a call."""
    asks = [tensor is not None and tensor.requires_grad for tensor in tensors]
    return Needs(x.requires_grad, *(tuple(four[1:]) for four in groups_of(4, asks)))


def _in_three(impl: str, x: torch.Tensor, members: Sequence[Projection], exact: bool) -> bool:
    """True where one Function is not to be had, or costs more than it saves."""
    if impl == "reference" or x.numel() == 0 or transformed():
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
