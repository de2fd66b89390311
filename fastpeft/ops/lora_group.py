"""LoRA linears that read one input (q, k, v of an attention; gate, up of an MLP) as one op.

    y_i = x w_i^T + s_i (drop_i(x) a_i^T) b_i^T + bias_i
    dx = sum_i dy_i w_i + dS_i a_i,    dS_i = s_i dy_i b_i,    da_i = dS_i^T x,    db_i = s_i dy_i^T S_i

Without dropout the a's are stacked: x is read once for all S and once for all da, and dx is one sum in one buffer. Kept for
backward: x, the S's (sum of R columns), and a seed per member with dropout. Nothing of a w's size is kept, quantised or not.

On the CPU, q, k, v of a 512-wide Llama layer (N = 512, 256, 256, R = 16, M = 1024, bfloat16, one thread with AMX): the
low-rank products take 0.9 ms in place of 1.5, and two additions of dx of 0.17 ms go.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastpeft import backend
from fastpeft.ops import lora_group_triton, lora_torch
from fastpeft.ops.algorithms import composed_is_faster
from fastpeft.ops.dropout import LEVELS, draw_seed, keep_mask, threshold_of
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.frozen_linear import frozen_linear
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_torch import Member, sum_rows
from fastpeft.ops.tracing import traced, transformed
from fastpeft.ops.weights import FrozenWeight
from fastpeft.reference import lora_group as reference


class Projection(NamedTuple):
    """One linear of a group: arguments of `lora_linear`, by the same names. a and b are None where it has no adapter."""

    w: FrozenWeight
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: float = 1.0
    dropout_p: float = 0.0
    seed: int | None = None


class LoRAGroup(torch.autograd.Function):
    """Several projections of one x. tensors: w, a, b, bias of each in turn, w None where it is quantised and given in `members`.

    members hold no tensors here: autograd must see those. wide: the dtype of the low-rank products, x's own unless they are to
    be exact. Keeps x, the S's in one buffer and seeds.
    """

    @staticmethod
    def forward(ctx, x, members, wide, impl, *tensors):
        full = [with_tensors(member, *four) for member, four in zip(members, groups_of(4, tensors), strict=True)]
        outputs, s = PASSES[impl].group_forward(x.reshape(-1, x.shape[-1]), full, wide)
        needs = list(groups_of(4, ctx.needs_input_grad[4:]))
        ctx.save_for_backward(
            x if any(need[1] for need in needs) else None,
            *(s_i if need[2] else None for s_i, need in zip(s, needs, strict=True)),
            *(tensor for four in groups_of(4, tensors) for tensor in four[:3]),
        )
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.members, ctx.wide, ctx.impl = x.shape, members, wide, impl
        ctx.bias_dtypes = [None if member.bias is None else member.bias.dtype for member in full]
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @first_order_only("lora_linear_group")
    def backward(ctx, *grads):
        x, *kept = ctx.saved_tensors
        s, tensors = kept[: len(grads)], kept[len(grads) :]
        members = [with_tensors(m, *three, None) for m, three in zip(ctx.members, groups_of(3, tensors), strict=True)]
        needs = list(groups_of(4, ctx.needs_input_grad[4:]))
        dys = [None if grad is None else grad.reshape(-1, grad.shape[-1]) for grad in grads]
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        needs_a, needs_b = [need[1] for need in needs], [need[2] for need in needs]
        dx, das, dbs = PASSES[ctx.impl].group_backward(
            dys, rows, s, members, ctx.needs_input_grad[0], needs_a, needs_b, ctx.wide
        )
        results = []
        for da, db, dy, need, dtype in zip(das, dbs, dys, needs, ctx.bias_dtypes, strict=True):
            results += [None, da, db, sum_rows(dy, dtype) if need[3] and dy is not None else None]
        return None if dx is None else dx.view(ctx.x_shape), None, None, None, *results


def groups_of(count, values):
    """`values` in lists of `count`."""
    return [values[i : i + count] for i in range(0, len(values), count)]


def with_tensors(member, w, a, b, bias):
    """A Member that was described without tensors, with those that autograd handed back."""
    return member._replace(w=member.w if w is None else w, a=a, b=b, bias=bias)


PASSES = {"torch": lora_torch, "triton": lora_group_triton}


def lora_linear_group(
    x: torch.Tensor, members: Sequence[Projection], *, impl: str = "auto", exact: bool = False
) -> tuple[torch.Tensor, ...]:
    """(y_i) of y_i = x w_i^T + scale_i * (drop_i(x) a_i^T) b_i^T + bias_i, with every w_i frozen.

    Shapes:  x [..., K], w_i [N_i, K], a_i [R_i, K], b_i [N_i, R_i], bias_i [N_i] or None -> y_i [..., N_i]
    Weights: as lora_linear's: tensors or quantised ones, mixed at will
    Dtypes:  as lora_linear's. exact=True takes the low-rank products, S and every dS in float32 (or wider) instead of x's dtype:
             for bfloat16 x and float32 a, b the relative error of da and db against float64 is then 3e-7 in place of 3e-3, as
             PEFT's; S takes twice the bytes, and no float32 copy of x is kept, only made again. float32 x is not concerned
    Grads:   x, every a, b and bias; never a w. First order only
    Dropout: a mask of its own for every member with dropout_p, a function of its seed (drawn in order where None)
    Raises:  ValueError that names the member, as lora_linear does; NotImplementedError where the implementation cannot run
    Source:  Hu et al. 2021, arXiv:2106.09685, section 4.1
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    members = [Projection(*member) for member in members]
    for i, member in enumerate(members):
        check_projection(f"lora_linear_group: member {i}", x, member, autocast)
    if not autocast:
        return run_unchecked(chosen, x, members, exact)
    x = x.to(torch.get_autocast_dtype(x.device.type))
    with torch.autocast(x.device.type, enabled=False):
        return run_unchecked(chosen, x, members, exact)


def run_unchecked(impl, x, members, exact):
    """lora_linear_group by the named implementation, in x's dtype, of what was checked and cast before."""
    thresholds = [threshold_of(member.dropout_p) if member.a is not None else 0 for member in members]
    if impl == "reference":
        return _reference(x, members, thresholds)
    if _one_by_one(impl, x, members, thresholds, exact):
        return tuple(_alone(impl, x, member) for member in members)
    described, tensors = describe(members)
    wide = torch.promote_types(x.dtype, torch.float32) if exact else x.dtype
    return LoRAGroup.apply(x, described, wide, impl, *tensors)


def describe(members: Sequence[Projection]) -> tuple[list[Member], list[torch.Tensor | None]]:
    """Members without tensors, and w, a, b, bias of each in turn; w is None where the Member holds a quantised one.

    A seed that is missing is drawn, in order.
    """
    described, tensors = [], []
    for w, a, b, bias, scale, dropout_p, seed in members:
        threshold = threshold_of(dropout_p) if a is not None else 0
        if threshold and seed is None:
            seed = draw_seed()
        is_tensor = isinstance(w, torch.Tensor)
        described.append(Member(None if is_tensor else w, None, None, None, scale, seed or 0, threshold))
        tensors += [w if is_tensor else None, a, b, bias]
    return described, tensors


def _one_by_one(impl, x, members, thresholds, exact) -> bool:
    """True where a Function for all of them is not to be had, or costs more than it saves."""
    m = x.numel() // x.shape[-1] if x.shape[-1] else 0
    adapted = [member for member in members if member.a is not None]
    dense = all(isinstance(member.w, torch.Tensor) for member in members)
    if m == 0 or traced(x) or transformed() or (dense and not adapted):
        return True
    if exact or not dense or impl != "torch":
        return False
    n, k, first = sum(member.w.shape[0] for member in members), x.shape[-1], adapted[0].a
    return composed_is_faster(m, n, k, first.shape[0], x.dtype, first.dtype, any(thresholds))


def _alone(impl, x, member):
    w, a, b, bias, scale, dropout_p, seed = member
    if isinstance(w, torch.Tensor) and w.dtype != x.dtype:  # x was cast for autocast
        w, bias = w.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if a is not None:
        return lora_linear(x, w, a, b, bias, scale=scale, dropout_p=dropout_p, seed=seed, impl=impl)
    return frozen_linear(x, w, None if bias is None else bias.to(x.dtype), impl=impl)


def _reference(x, members, thresholds):
    wide, keeps, used = x.dtype, [], []
    for member, threshold in zip(members, thresholds, strict=True):
        seed = member.seed
        if threshold and seed is None:
            seed = draw_seed()
        keeps.append(keep_mask(seed=seed, like=x, threshold=threshold) if threshold else None)
        w = member.w if isinstance(member.w, torch.Tensor) else member.w.dequantize(x.dtype, impl="reference")
        used.append(member._replace(w=w, dropout_p=threshold / LEVELS))
        for tensor in (w, *member[1:4]):
            wide = wide if tensor is None else torch.promote_types(wide, tensor.dtype)
    used = [Projection(*(None if t is None else t.to(wide) for t in member[:4]), *member[4:]) for member in used]
    return tuple(y.to(x.dtype) for y in reference.lora_linear_group(x.to(wide), used, keeps))


# -- checks -----------------------------------------------------------------------------------------------------------


def check_projection(where: str, x: torch.Tensor, member: Projection, autocast: bool) -> None:
    """Raise the ValueError that says what of x and this projection does not fit. Nothing is computed."""
    w, a, b, bias, _, dropout_p, _ = member
    n, k = w.shape if len(w.shape) == 2 else (None, None)
    fits = n is not None and x.dim() >= 1 and x.shape[-1] == k and (bias is None or tuple(bias.shape) == (n,))
    if a is None or b is None:
        adapter_fits = a is None and b is None
    else:
        r = a.shape[0] if a.dim() == 2 else 0
        adapter_fits = r >= 1 and tuple(a.shape) == (r, k) and tuple(b.shape) == (n, r)
    tensors = {"w": w, "a": a, "b": b, "bias": bias}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not (fits and adapter_fits):
        listed = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in {"x": x, **tensors}.items())
        transposed = (
            a is not None and b is not None and a.dim() == 2 and tuple(b.shape) == (a.shape[0], n) != (n, a.shape[0])
        )
        raise ValueError(
            f"{where}: expected x [..., K], w [N, K], a [R, K], b [N, R] (or neither), bias [N], got {listed}"
            + ("; is b transposed?" if transposed else "")
        )
    if any(tensor.device != x.device for tensor in tensors.values()):
        devices = ", ".join(f"{name} {tensor.device}" for name, tensor in {"x": x, **tensors}.items())
        raise ValueError(f"{where}: expected all on one device, got {devices}")
    quantized = not isinstance(w, torch.Tensor)
    plain = [tensor for tensor in tensors.values() if tensor is not w]
    floating = x.is_floating_point() and all(t.is_floating_point() for t in plain)
    if not floating or not (quantized or autocast or w.dtype == x.dtype) or not (quantized or w.is_floating_point()):
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in {"x": x, **tensors}.items())
        raise ValueError(
            f"{where}: expected x and w of one floating dtype and floating a, b, bias, got {dtypes}; "
            f"cast x to {w.dtype}, or run under torch.autocast"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{where}: expected 0 <= dropout_p < 1, got {dropout_p}")
    if not quantized and w.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where}: expected a frozen w, got w.requires_grad=True; its gradient is never computed here")
