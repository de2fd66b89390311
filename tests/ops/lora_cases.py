"""Inputs of lora_linear by shape, dtype and layout, what eager code makes of them, and a function's value and gradients."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastpeft.ops import lora as ops
from fastpeft.ops.dropout import keep_mask, threshold_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SCALE = 1.7
SEED = 1234567890123456789

VARIANTS = ["torch", "composed", "reference", "triton"]
"""The implementations; `composed` is what `torch` does for small calls, which the sizes here would all be."""


def choose(monkeypatch, variant: str) -> str:
    """The `impl` that runs this variant, whatever the size of the call."""
    monkeypatch.setattr(ops, "_is_small", lambda *call: variant == "composed")
    return "torch" if variant == "composed" else variant


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype | None = None
    layout: str = "rows"  # rows, 3d, strided, transposed, conv1d (w is a transposed view)
    bias: bool = True
    dropout_p: float = 0.0


@dataclass
class Inputs:
    """x, w, a, b, bias in the working dtypes, and the gradient of y."""

    x: torch.Tensor
    w: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor

    def tensors(self):
        return [self.x, self.w, self.a, self.b, *([] if self.bias is None else [self.bias])]


def draw(case: Case, device) -> Inputs:
    generator = torch.Generator().manual_seed(case.m * 7919 + case.n)
    adapter = case.adapter_dtype or case.dtype

    def normal(*shape, dtype=case.dtype, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(device, dtype)

    x = {
        "rows": lambda: normal(case.m, case.k),
        "conv1d": lambda: normal(case.m, case.k),
        "3d": lambda: normal(2, case.m // 2, case.k),
        "strided": lambda: normal(case.m, 2 * case.k)[:, : case.k],
        "transposed": lambda: normal(case.k, case.m).t(),
    }[case.layout]()
    w = normal(case.k, case.n).t() if case.layout == "conv1d" else normal(case.n, case.k)
    return Inputs(
        x=x,
        w=w,
        a=normal(case.r, case.k, dtype=adapter, std=case.k**-0.5),
        b=normal(case.n, case.r, dtype=adapter),
        bias=normal(case.n) if case.bias else None,
        dy=normal(*x.shape[:-1], case.n),
    )


def mask(case: Case, impl: str, x: torch.Tensor) -> torch.Tensor | None:
    """The mask that `impl` draws for SEED."""
    threshold = threshold_of(case.dropout_p)
    if not threshold:
        return None
    if impl == "triton":
        from fastpeft.kernels.lora import lora_keep

        return lora_keep(SEED, x.numel() // x.shape[-1], x.shape[-1], threshold, x.device).view(x.shape)
    return keep_mask(seed=SEED, like=x, threshold=threshold).bool()


def results(function, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """y, dx, da, db, dbias of function(x, w, a, b, bias), all in `dtype` if one is given."""
    convert = (lambda t: t.detach().to(dtype)) if dtype else (lambda t: t.detach())
    leaves = {
        name: convert(tensor).requires_grad_(True)
        for name, tensor in (("x", inputs.x), ("a", inputs.a), ("b", inputs.b), ("bias", inputs.bias))
        if tensor is not None
    }
    y = function(leaves["x"], convert(inputs.w), leaves["a"], leaves["b"], leaves.get("bias"))
    gradients = torch.autograd.grad(y, list(leaves.values()), convert(inputs.dy))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients)}}


def eager(x, w, a, b, bias, dropped):
    """What a user would write: everything in x's dtype."""
    low_rank = F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, w, None if bias is None else bias.to(x.dtype)) + low_rank * SCALE


def kernels_mask(*, seed: int, like: torch.Tensor, threshold: int) -> torch.Tensor:
    """What `keep_mask` is to the torch implementation: the mask that the kernels draw."""
    from fastpeft.kernels.lora import lora_keep

    return lora_keep(seed, like.numel() // like.shape[-1], like.shape[-1], threshold, like.device).view(like.shape)


def moved(tensor: torch.Tensor | None, device) -> torch.Tensor | None:
    """A leaf on `device`, wanting a gradient as before."""
    return None if tensor is None else tensor.detach().to(device).requires_grad_(tensor.requires_grad)
