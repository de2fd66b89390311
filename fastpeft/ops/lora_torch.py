"""The LoRA linear by library calls, one projection or several of one input: what a CPU runs, and any device on request.

Equations and what is kept: lora.py and lora_group.py.

Where the time goes (bfloat16, M = 1024, K = 512, R = 16, one thread with AMX, ms): the base product of one 512 x 512 projection
0.49 forward and 0.48 backward; S 0.05, S b^T into y 0.12, dS 0.05, dA 0.09, dB 0.09, dS a into dx 0.11. Three projections of
one x: S 0.09 instead of 0.14, dA 0.13 instead of 0.28, dS a 0.12 instead of 0.34, and every dx added by its own product instead
of by 0.17 ms of addition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastpeft.ops.dropout import BESIDE, LEVELS, Keep, masked
from fastpeft.ops.weights import FrozenWeight, dense


class Member(NamedTuple):
    """One projection of a shared input; a and b are None where it has no adapter."""

    w: FrozenWeight
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float
    seed: int
    threshold: int

    @property
    def c(self) -> float:
        """The only factor between S and y, and between dy and dS."""
        return self.scale / (1.0 - self.threshold / LEVELS)


# -- products, on rows x [M, K] and dy [M, N] -------------------------------------------------------------------------


def forward(rows, w, a, b, bias, scale, seed, threshold):
    """(y [M, N], s [M, R]) of one projection."""
    (y,), (s,) = group_forward(rows, [Member(w, a, b, bias, scale, seed, threshold)], rows.dtype)
    return y, s


def backward(dy, x, s, w, a, b, scale, seed, threshold, needs):
    """(dx, da, db), each None where `needs` = (x, a, b) does not ask; x may be None without da, s without db."""
    member = Member(w, a, b, None, scale, seed, threshold)
    dx, (da,), (db,) = group_backward([dy], x, [s], [member], needs[0], [needs[1]], [needs[2]], dy.dtype)
    return dx, da, db


def group_forward(rows: torch.Tensor, members: Sequence[Member], wide: torch.dtype):
    """(y_i), (s_i): every projection's output in rows' dtype and S in `wide`, in which the low-rank products are taken."""
    outputs, s = [], group_down(rows, members, wide)
    for member, s_i in zip(members, s, strict=True):
        bias = None if member.bias is None else member.bias.to(rows.dtype)
        y = F.linear(rows, dense(member.w, rows.dtype), bias)
        if s_i is not None:
            _add_product(y, s_i, member.b.to(wide).t(), member.c)
        outputs.append(y)
    return outputs, s


def group_down(rows, members, wide):
    """S_i = drop_i(x) a_i^T; None without an adapter. One product, with the a's stacked, for all that have no dropout."""
    s = [None] * len(members)
    joint = [i for i, member in enumerate(members) if member.a is not None and not member.threshold]
    if joint:
        parts = [members[i].a for i in joint]
        together = F.linear(rows.to(wide), _stacked(parts, wide))
        for i, part in zip(joint, together.split([a.shape[0] for a in parts], dim=1), strict=True):
            s[i] = part
    for i, member in enumerate(members):
        if member.threshold and member.a is not None:
            s[i] = _down_dropped(rows, member, wide)
    return s


def _down_dropped(rows, member, wide):
    """S of one projection, with the mask for `_grads_dropped` beside it: 1/16 of what x takes in half precision."""
    a_t = member.a.to(wide).t()
    s = rows.new_empty(rows.shape[0], a_t.shape[1], dtype=wide)
    keep = Keep(rows.shape, rows.dtype, rows.device, member.seed, member.threshold)
    for span, mask in keep.parts():
        torch.mm(masked(rows[span], mask, out=mask).to(wide), a_t, out=s[span])
    setattr(s, BESIDE, keep)
    return s


def group_backward(dys, rows, s, members, need_x, needs_a, needs_b, wide):
    """dx, (da_i), (db_i). A dy_i is None where nothing used that output; rows is None without any da, s_i without db_i."""
    used = [i for i, dy in enumerate(dys) if dy is not None]
    das, dbs, dx, joint = [None] * len(dys), [None] * len(dys), None, []
    if need_x:
        for i in used:
            w = dense(members[i].w, dys[i].dtype)
            dx = dys[i] @ w if dx is None else dx.addmm_(dys[i], w)
    for i in used:
        member = members[i]
        if needs_b[i]:
            dbs[i] = _grad_b(dys[i].to(wide), s[i], member.b, member.c)
        if member.a is None or not (need_x or needs_a[i]):
            continue
        ds = dys[i].to(wide) @ member.b.to(wide)
        if member.c != 1.0:
            ds.mul_(member.c)
        if not member.threshold:
            joint.append((i, ds))
            continue
        das[i] = _grads_dropped(dx, rows if needs_a[i] else None, ds, member, getattr(s[i], BESIDE, None))
    if joint:
        parts = [members[i].a for i, _ in joint]
        ds = joint[0][1] if len(joint) == 1 else torch.cat([ds for _, ds in joint], 1)
        if need_x:
            _add_product(dx, ds, _stacked(parts, wide), 1.0)
        if any(needs_a[i] for i, _ in joint):
            together = ds.t() @ rows.to(wide)
            for (i, _), a, da in zip(joint, parts, together.split([a.shape[0] for a in parts]), strict=True):
                das[i] = da.to(a.dtype) if needs_a[i] else None
    return dx, das, dbs


def _grads_dropped(dx, rows, ds, member, keep: Keep | None):
    """dx += keep * (dS a) in place, where there is a dx, and da = dS^T (keep * x), where there are rows."""
    a, like = member.a.to(ds.dtype), dx if rows is None else rows
    if keep is None:
        keep = Keep((ds.shape[0], a.shape[1]), like.dtype, like.device, member.seed, member.threshold)
    da = None if rows is None else a.new_zeros(a.shape, dtype=torch.promote_types(member.a.dtype, torch.float32))
    for span, mask in keep.parts():
        if dx is not None:
            part = (ds[span] @ a).to(dx.dtype)
            dx[span].add_(masked(part, mask, out=part))
        if rows is not None:
            da += ds[span].t() @ masked(rows[span], mask, out=mask).to(ds.dtype)
    return None if da is None else da.to(member.a.dtype)


def _stacked(parts, dtype):
    """The rows of several [R_i, K] under each other, in `dtype`."""
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])


def _add_product(y, s, b_t, c):
    """y += c s b_t in place. The product is taken in y's dtype, or, if s is wider, in s's and rounded once."""
    if s.dtype == y.dtype:
        y.addmm_(s, b_t, alpha=c)
    else:
        y.add_(s @ b_t, alpha=c)


def _grad_b(dy, s, b, c):
    """c dy^T S in b's dtype, taken as (S^T dy)^T: for N = 1408 0.35 against 0.52 ms in bfloat16, 0.76 against 1.8 in float32."""
    return torch.empty_like(b).copy_((s.t() @ dy).t()).mul_(c)


def sum_rows(dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dbias: the sum over rows in float32 or wider."""
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype)
