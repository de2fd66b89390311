"""Projections of one input by the fused kernels: x is read once for all S and once for all dA, dx is one sum.

Equations: lora_group.py. The passes have the signatures of lora_torch.py's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops.dropout import LEVELS
from fastpeft.ops.lora_gemm import choose_y, kind_of, product_y
from fastpeft.ops.lora_torch import Member
from fastpeft.ops.weights import dense


def group_forward(rows: torch.Tensor, members: Sequence[Member], wide: torch.dtype):
    """(y_i), (s_i): s_i [M, padded R_i], None without an adapter. `wide` other than rows' dtype is not to be had here."""
    if wide != rows.dtype:
        raise NotImplementedError(
            f"lora_linear_group: expected exact=False with impl='triton', whose low-rank products are taken in {rows.dtype} "
            "and summed in float32; use impl='torch' for exact ones"
        )
    precision = backend.matmul_precision(rows.device)
    s = group_down(rows, members, wide)
    outputs = []
    for member, s_i in zip(members, s, strict=True):
        if s_i is None:
            bias = None if member.bias is None else member.bias.to(rows.dtype)
            outputs.append(F.linear(rows, dense(member.w, rows.dtype), bias))
            continue
        algorithm = choose_y(rows, member.w, member.a.shape[0], dropout=member.threshold > 0)
        outputs.append(
            product_y(
                rows,
                member.w,
                s_i,
                member.a,
                member.b,
                member.bias,
                scale=member.scale,
                precision=precision,
                algorithm=algorithm,
            )
        )
    return outputs, s


def group_down(rows: torch.Tensor, members: Sequence[Member], wide: torch.dtype) -> list[torch.Tensor | None]:
    """(s_i) as group_forward gives them."""
    from fastpeft.kernels import lora_group

    adapters = [None if m.a is None else (m.a, m.scale, m.seed, m.threshold) for m in members]
    return lora_group.group_down(rows, adapters, precision=backend.matmul_precision(rows.device))


def group_backward(dys, rows, s, members, need_x, needs_a, needs_b, wide):
    """dx, (da_i), (db_i). A dy_i is None where nothing used that output; rows is None without any da, s_i without db_i."""
    from fastpeft.kernels.lora import lora_down, lora_grad_s_b
    from fastpeft.kernels.lora_group_grad import group_grad_a

    used = [i for i, dy in enumerate(dys) if dy is not None]
    ds, das, dbs = [None] * len(dys), [None] * len(dys), [None] * len(dys)
    if not used:
        return None, das, dbs
    precision = backend.matmul_precision(dys[used[0]].device)
    for i in used:
        m, dy = members[i], dys[i]
        if m.a is None:
            continue
        if needs_b[i]:
            ds[i], dbs[i] = lora_grad_s_b(dy, m.b, s[i], scale=m.scale, threshold=m.threshold, precision=precision)
        elif need_x or needs_a[i]:
            c = m.scale / (1.0 - m.threshold / LEVELS)
            ds[i] = lora_down(dy, m.b.t(), scale=c, seed=0, threshold=0, precision=precision)
    dx = _grad_x([(dys[i], members[i], ds[i]) for i in used], precision) if need_x else None
    wanted = [i for i in used if needs_a[i] and ds[i] is not None]
    if wanted:
        adapters = [(members[i].a, members[i].seed, members[i].threshold) for i in wanted]
        for i, da in zip(
            wanted, group_grad_a(rows, [ds[i] for i in wanted], adapters, precision=precision), strict=True
        ):
            das[i] = da
    return dx, das, dbs


def _grad_x(parts, precision):
    """The sum over (dy, member, ds), rounded once. Dense weights go into one launch; a quantised one is written out when its
    turn comes, and its part is added to a float32 sum."""
    from fastpeft.kernels.lora_group_grad import group_grad_x

    def entry(dy, member, ds):
        return dy, dense(member.w, dy.dtype), ds, member.a, member.seed, member.threshold

    if all(kind_of(member.w) == "dense" for _, member, _ in parts):
        return group_grad_x([entry(*part) for part in parts], precision=precision)
    total = None
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        dtype = part[0].dtype if last else torch.float32
        total = group_grad_x([entry(*part)], precision=precision, add=total, dtype=dtype)
    return total
