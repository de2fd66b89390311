"""Norms, gated activations and the rotary embedding: bound by memory, so the floor is their bytes.

rms_norm    y = x / sqrt(mean x^2 + eps) * w        x, y; dy, x, dx
swiglu      y = silu(g) * u                         g, u, y; dy, g, u, dg, du
rope        q, k turned by cos, sin                 q, k in and out, once each way
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import DTYPE_BYTES, SHORT, Absent, Op, Work
from benchmarks.shapes import SHAPES
from fastpeft.ops.glu import swiglu
from fastpeft.ops.norm import rms_norm
from fastpeft.ops.rope import apply_rope

EPS = 1e-6


@dataclass(frozen=True)
class RowsCase:
    """M rows of a model's width; passes: tensors of that size that a step moves; weight: FLOP per element of a step."""

    model: str
    m: int
    op: str
    dtype: str = "bfloat16"
    backward: bool = True

    def __str__(self) -> str:
        return " ".join([self.model, f"M{self.m}", SHORT[self.dtype], *([] if self.backward else ["forward"])])

    @property
    def width(self) -> int:
        shape = SHAPES[self.model]
        if self.op == "rope":
            return (shape.heads + shape.kv_heads) * shape.head_dim
        return shape.intermediate if self.op == "swiglu" else shape.hidden

    def flops(self) -> float:
        per_element = {"rms_norm": (4, 8), "swiglu": (5, 12), "rope": (3, 3)}[self.op]
        return float(self.m * self.width * (sum(per_element) if self.backward else per_element[0]))

    def bytes(self) -> float:
        passes = {"rms_norm": (2, 3), "swiglu": (3, 5), "rope": (2, 2)}[self.op]
        return self.m * self.width * DTYPE_BYTES[self.dtype] * (sum(passes) if self.backward else passes[0])


def _cases(op: str) -> tuple[RowsCase, ...]:
    models = ("SmolLM2-135M", "Llama-3-8B")
    return tuple(RowsCase(model, m, op, dtype) for model in models for m in (256, 1024, 4096) for dtype in DTYPES)


def _quick(op: str) -> tuple[RowsCase, ...]:
    return tuple(RowsCase("SmolLM2-135M", 1024, op, dtype) for dtype in DTYPES)


DTYPES = ("bfloat16", "float32")


def inputs(case: RowsCase, device: torch.device) -> SimpleNamespace:
    """The tensors of one of the three ops."""
    draw = torch.Generator().manual_seed(0)
    dtype, shape = getattr(torch, case.dtype), SHAPES[case.model]

    def normal(*sizes, grad=case.backward):
        return torch.randn(*sizes, generator=draw).to(device, dtype).requires_grad_(grad)

    if case.op == "rms_norm":
        weight = (1 + 0.1 * normal(case.width, grad=False)).detach()
        return SimpleNamespace(case=case, leaves=[normal(case.m, case.width)], fixed=[weight])
    if case.op == "swiglu":
        return SimpleNamespace(case=case, leaves=[normal(case.m, case.width), normal(case.m, case.width)], fixed=[])
    q, k = normal(1, case.m, shape.heads, shape.head_dim), normal(1, case.m, shape.kv_heads, shape.head_dim)
    frequencies = 1e4 ** -(torch.arange(shape.head_dim // 2) / (shape.head_dim / 2))
    angles = torch.arange(case.m)[:, None] * frequencies
    return SimpleNamespace(case=case, leaves=[q, k], fixed=[angles.cos().to(device), angles.sin().to(device)])


def _plain(given: SimpleNamespace, leaves: list[torch.Tensor]) -> torch.Tensor:
    """As transformers writes them."""
    case, dtype = given.case, leaves[0].dtype
    if case.op == "rms_norm":
        (x,), (weight,) = leaves, given.fixed
        wide = x.to(torch.promote_types(dtype, torch.float32))
        return weight.to(dtype) * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(dtype)
    if case.op == "swiglu":
        return F.silu(leaves[0]) * leaves[1]
    cos, sin = (torch.cat([table, table], -1)[None, :, None].to(dtype) for table in given.fixed)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return torch.cat([turned(leaf).flatten(2) for leaf in leaves], -1)


def with_eager(given: SimpleNamespace) -> Work:
    return Work(lambda: _plain(given, given.leaves), given.leaves, given.fixed)


def with_compile(given: SimpleNamespace) -> Work:
    torch.compiler.reset()
    return Work(torch.compile(lambda: _plain(given, given.leaves)), given.leaves, given.fixed)


def with_library(given: SimpleNamespace) -> Work:
    """PyTorch's own function."""
    if given.case.op != "rms_norm":
        raise Absent("PyTorch has no such function")
    (x,), (weight,) = given.leaves, given.fixed
    return Work(lambda: F.rms_norm(x, (x.shape[-1],), weight, EPS), given.leaves, given.fixed)


def with_liger(given: SimpleNamespace) -> Work:
    if given.leaves[0].device.type != "cuda":
        raise Absent("Liger-Kernel needs a GPU")
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        raise Absent(str(error)) from error
    leaves, fixed = given.leaves, given.fixed
    if given.case.op == "rms_norm":
        return Work(lambda: LigerRMSNormFunction.apply(leaves[0], fixed[0], EPS), leaves, fixed)
    if given.case.op == "swiglu":
        return Work(lambda: LigerSiLUMulFunction.apply(*leaves), leaves)
    cos, sin = (torch.cat([table, table], -1)[None] for table in fixed)

    def forward():
        q, k = LigerRopeFunction.apply(*(leaf.transpose(1, 2) for leaf in leaves), cos, sin)
        return torch.cat([part.transpose(1, 2).flatten(2) for part in (q, k)], -1)

    return Work(forward, leaves, fixed)


def with_fastpeft(given: SimpleNamespace) -> Work:
    leaves, fixed = given.leaves, given.fixed
    if given.case.op == "rms_norm":
        return Work(lambda: rms_norm(leaves[0], fixed[0], eps=EPS), leaves, fixed)
    if given.case.op == "swiglu":
        return Work(lambda: swiglu(*leaves), leaves)

    def forward():
        return torch.cat([part.flatten(2) for part in apply_rope(*leaves, *fixed)], -1)

    return Work(forward, leaves, fixed)


def exact(given: SimpleNamespace, dy: torch.Tensor | None) -> list[torch.Tensor]:
    leaves = [leaf.detach().double().requires_grad_(dy is not None) for leaf in given.leaves]
    wide = SimpleNamespace(case=given.case, fixed=[fixed.double() for fixed in given.fixed])
    y = _plain(wide, leaves)
    return [y.detach()] if dy is None else [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


PROVIDERS: dict[str, Callable[[Any], Work]] = {
    "eager": with_eager,
    "torch.compile": with_compile,
    "torch": with_library,
    "liger": with_liger,
    "fastpeft": with_fastpeft,
}

OPS = tuple(
    Op(name, title, _cases(name), _quick(name), "eager", inputs, PROVIDERS, exact)
    for name, title in (("rms_norm", "RMSNorm"), ("swiglu", "SwiGLU"), ("rope", "Rotary embedding"))
)
