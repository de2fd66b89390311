"""The loss of a language model's head: cross-entropy of x W^T, with dx; W is frozen.

FLOP  2 M V K forward and again for dx
Bytes W twice, x and dx once: the logits need never exist
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import DTYPE_BYTES, SHORT, Absent, Op, Work
from benchmarks.shapes import SHAPES
from fastpeft.ops.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class LossCase:
    """M tokens under a model's head; a quarter of the labels are ignored."""

    model: str
    m: int
    dtype: str = "bfloat16"
    backward: bool = True

    def __str__(self) -> str:
        return f"{self.model} M{self.m} {SHORT[self.dtype]}"

    def flops(self) -> float:
        shape = SHAPES[self.model]
        return (4.0 if self.backward else 2.0) * self.m * shape.vocabulary * shape.hidden

    def bytes(self) -> float:
        shape = SHAPES[self.model]
        return 2.0 * DTYPE_BYTES[self.dtype] * (shape.vocabulary + self.m) * shape.hidden


CASES = tuple(
    LossCase(model, m, dtype)
    for model, rows in (("SmolLM2-135M", (256, 1024, 4096)), ("Llama-3-8B", (256, 1024)))
    for m in rows
    for dtype in ("bfloat16", "float32")
)
QUICK = (LossCase("SmolLM2-135M", 256), LossCase("SmolLM2-135M", 1024))


def inputs(case: LossCase, device: torch.device) -> SimpleNamespace:
    draw = torch.Generator().manual_seed(0)
    shape, dtype = SHAPES[case.model], getattr(torch, case.dtype)
    w = (torch.randn(shape.vocabulary, shape.hidden, generator=draw) * shape.hidden**-0.5).to(device, dtype)
    x = torch.randn(case.m, shape.hidden, generator=draw).to(device, dtype).requires_grad_(case.backward)
    labels = torch.randint(shape.vocabulary, (case.m,), generator=draw)
    labels[torch.rand(case.m, generator=draw) < 0.25] = -100
    return SimpleNamespace(case=case, x=x, w=w, labels=labels.to(device))


def _plain(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: all logits, in float32 for the softmax."""
    logits = F.linear(x, w)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def with_eager(given: SimpleNamespace) -> Work:
    return Work(lambda: _plain(given.x, given.w, given.labels), [given.x], [given.w, given.labels])


def with_compile(given: SimpleNamespace) -> Work:
    torch.compiler.reset()
    step = torch.compile(_plain)
    return Work(lambda: step(given.x, given.w, given.labels), [given.x], [given.w, given.labels])


def with_liger(given: SimpleNamespace) -> Work:
    if given.x.device.type != "cuda":
        raise Absent("Liger-Kernel needs a GPU")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise Absent(str(error)) from error

    def forward():
        return LigerFusedLinearCrossEntropyFunction.apply(given.x, given.w, given.labels)[0]

    return Work(forward, [given.x], [given.w, given.labels])


def with_fastpeft(given: SimpleNamespace) -> Work:
    return Work(lambda: linear_cross_entropy(given.x, given.w, given.labels), [given.x], [given.w, given.labels])


def exact(given: SimpleNamespace, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """In float64, a few rows at a time."""
    x, w, labels = given.x.detach().double(), given.w.double(), given.labels
    kept = labels != -100
    loss, dx = 0.0, torch.zeros_like(x)
    for rows in kept.nonzero()[:, 0].split(128):
        part = x[rows].requires_grad_()
        one = F.cross_entropy(part @ w.t(), labels[rows], reduction="sum") / kept.sum()
        dx[rows] = torch.autograd.grad(one, part)[0]
        loss += one.detach()
    return [loss] if dy is None else [loss, dx * dy.double()]


OP = Op(
    "linear_cross_entropy",
    "Linear + cross-entropy",
    CASES,
    QUICK,
    baseline="eager",
    inputs=inputs,
    providers={"eager": with_eager, "torch.compile": with_compile, "liger": with_liger, "fastpeft": with_fastpeft},
    exact=exact,
)
