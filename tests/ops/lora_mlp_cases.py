"""Inputs of lora_glu_mlp, its value and gradients in float64, and what eager code makes of them."""

import torch
import torch.nn.functional as F

from fastpeft.ops.dropout import LEVELS, keep_mask, threshold_of
from fastpeft.ops.lora_group import Projection
from fastpeft.reference.glu import glu as glu_formula
from fastpeft.reference.lora_group import lora_linear_group as linears
from tests.ops.glu_cases import EAGER

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
M, K, N = 33, 65, 97
NAMES = ("gate", "up", "down")
RANKS, SEEDS = (5, 3, 8), (11, 22, 33)


def draw(dtype, adapter_dtype=F32, *, layout="rows", dropout=(0.0,) * 3, adapters=(True,) * 3, bias=True, rows=M):
    """x, [gate, up, down], dy: leaves that require a gradient, but for w. Values of h are of order one."""
    generator = torch.Generator().manual_seed(7)
    normal = lambda *shape, std=1.0: torch.randn(*shape, generator=generator) * std  # noqa: E731
    x = {"rows": lambda: normal(rows, K), "3d": lambda: normal(3, 11, K), "transposed": lambda: normal(K, rows).t()}
    x = x[layout]()
    members = [
        Projection(
            normal(n, k, std=k**-0.5).to(dtype),
            normal(r, k, std=k**-0.5).to(adapter_dtype).requires_grad_() if adapted else None,
            normal(n, r, std=r**-0.5).to(adapter_dtype).requires_grad_() if adapted else None,
            normal(n).to(dtype).requires_grad_() if bias and k == K else None,
            1.5,
            p,
            seed,
        )
        for n, k, r, p, seed, adapted in zip((N, N, K), (K, K, N), RANKS, dropout, SEEDS, adapters)
    ]
    return x.to(dtype).requires_grad_(), members, normal(*x.shape).to(dtype)


def leaves_of(x, members):
    named = {"x": x}
    for role, member in zip(NAMES, members):
        for name, tensor in zip(("a", "b", "bias"), member[1:4]):
            if tensor is not None and tensor.requires_grad:
                named[f"{role}.{name}"] = tensor
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def outcome(function, x, members, dy):
    leaves = leaves_of(x, members)
    y = function(x, members)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def keep_of(member, like):
    threshold = threshold_of(member.dropout_p)
    return keep_mask(seed=member.seed, like=like, threshold=threshold).bool() if threshold else None


def eager(activation, wide=None):
    """What a user would write in x's dtype; wide: the low-rank path in this dtype, as PEFT's."""

    def linear(x, member):
        y = F.linear(x, member.w, None if member.bias is None else member.bias.to(x.dtype))
        if member.a is None:
            return y
        keep, low = keep_of(member, x), x.to(wide or x.dtype)
        dropped = low if keep is None else low * keep / (1 - member.dropout_p)
        return (y + F.linear(F.linear(dropped, member.a.to(low.dtype)), member.b.to(low.dtype)) * member.scale).to(
            x.dtype
        )

    def mlp(x, members):
        gate, up, down = members
        return linear(EAGER[activation](linear(x, gate)) * linear(x, up), down)

    return mlp


def exact(x, members, dy, activation):
    wide = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    keeps = [keep_of(member, like) for member, like in zip(members, (x, x, x.new_empty(*x.shape[:-1], N)))]
    members = [
        Projection(*map(wide, member[:4]), member.scale, threshold_of(member.dropout_p) / LEVELS) for member in members
    ]

    def mlp(x, members):
        g, u = linears(x, members[:2], keeps[:2])
        return linears(glu_formula(g, u, activation), members[2:], keeps[2:])[0]

    return outcome(mlp, wide(x), members, dy.double())
