"""Gated linear units: act(gate) * up, with only gate and up kept for backward.

    h = act(gate) * up
    dgate = dh * up * act'(gate),   dup = dh * act(gate)

act(gate) is computed again in backward; the eager code keeps it, a third tensor of the same size. Nothing is written into an
input, so gate and up may be used elsewhere.
"""

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops import glu_torch
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.tracing import traced, transformed
from fastpeft.reference import glu as reference
from fastpeft.reference.glu import ACTIVATIONS, halves

__all__ = ["ACTIVATIONS", "geglu", "glu", "swiglu"]


class _TritonPasses:
    """The kernels with the signatures of glu_torch.py."""

    GIVES_H = True

    @staticmethod
    def forward(gate, up, activation, out=None):
        from fastpeft.kernels.glu import glu as kernel

        out = None if out is None else _rows(out)
        return kernel(_rows(gate), _rows(up), activation, out).view(gate.shape)

    @staticmethod
    def backward(dh, gate, up, activation, need_gate=True, need_up=True, out_gate=None, out_up=None):
        from fastpeft.kernels.glu import glu_grad

        outputs = {"out_gate": out_gate, "out_up": out_up}
        outputs = {name: None if out is None else _rows(out) for name, out in outputs.items()}
        up = gate if up is None else up  # only dup is asked for, which does not depend on it
        dgate, dup, _ = glu_grad(_rows(dh), _rows(gate), _rows(up), activation, **outputs)
        return dgate.view(dh.shape) if need_gate else None, dup.view(dh.shape) if need_up else None

    @staticmethod
    def backward_and_h(dh, gate, up, activation, out_up=None):
        """(dgate, dup, h) of rows; dgate takes dh's memory, dup may take up's."""
        from fastpeft.kernels.glu import glu_grad

        return glu_grad(dh, gate, up, activation, out_gate=dh, out_up=out_up, with_h=True)


def _rows(x):
    return x.reshape(-1, x.shape[-1])


PASSES = {"torch": glu_torch, "triton": _TritonPasses}


def backward_of_parts(dh, gate, up, activation, impl, need_gate=True, need_up=True):
    """[dgate, dup], or [d] of the packed tensor where up is None."""
    if up is not None or not need_gate:
        return list(PASSES[impl].backward(dh, gate, up, activation, need_gate, need_up))
    d = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    out_gate, out_up = halves(d)
    PASSES[impl].backward(dh, *halves(gate), activation, out_gate=out_gate, out_up=out_up)
    return [d]


class _GLU(torch.autograd.Function):
    """Keeps gate, and up where gate needs a gradient; up is None where gate holds both."""

    @staticmethod
    def forward(ctx, gate, up, activation, impl):
        need_gate = ctx.needs_input_grad[0]
        ctx.save_for_backward(gate, up if need_gate else None)
        ctx.packed, ctx.activation, ctx.impl = up is None, activation, impl
        return PASSES[impl].forward(*(halves(gate) if up is None else (gate, up)), activation)

    @staticmethod
    @first_order_only("glu")
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        need_gate, need_up, *_ = ctx.needs_input_grad
        grads = backward_of_parts(dh, gate, up, ctx.activation, ctx.impl, need_gate, need_up)
        return grads[0], None if ctx.packed else grads[1], None, None


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None, *, impl: str = "auto") -> torch.Tensor:
    """h = gate / (1 + exp(-gate)) * up; see `glu`.

    Source:  Shazeer 2020, arXiv:2002.05202
    """
    return glu(gate, up, "silu", impl=impl)


def geglu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, approximate: str = "none", impl: str = "auto"
) -> torch.Tensor:
    """h = gelu(gate) * up, with gelu by erf ("none") or by its tanh approximation ("tanh"), as F.gelu's; see `glu`.

    Raises:  ValueError for another `approximate`
    Source:  Shazeer 2020, arXiv:2002.05202
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: expected approximate 'none' or 'tanh', got {approximate!r}")
    return glu(gate, up, "gelu" if approximate == "none" else "gelu_tanh", impl=impl)


def glu(
    gate: torch.Tensor, up: torch.Tensor | None = None, activation: str = "silu", *, impl: str = "auto"
) -> torch.Tensor:
    """h = act(gate) * up, act one of "silu", "gelu" (erf), "gelu_tanh".

    Shapes:  gate, up [..., N] -> h [..., N], contiguous; or gate [..., 2N] alone, which holds gate and up side by side and
             is read where it lies. Any strides
    Dtypes:  gate and up alike: float32, float16, bfloat16 (`torch` and `reference` also float64); h as they are
    Grads:   gate, up, first order only. Kept: gate and up
    Raises:  ValueError where shapes, dtypes or devices disagree, or for an unknown activation
    Source:  Shazeer 2020, arXiv:2002.05202
    """
    chosen = backend.resolve(impl, gate.device, gate.dtype)
    _check(gate, up, activation)
    if chosen == "reference":
        wide = torch.promote_types(gate.dtype, torch.float32)
        parts = halves(gate) if up is None else (gate, up)
        return reference.glu(*(part.to(wide) for part in parts), activation).to(gate.dtype)
    if transformed():
        g, u = halves(gate) if up is None else (gate, up)
        return (F.silu(g) if activation == "silu" else F.gelu(g, approximate=glu_torch.APPROXIMATE[activation])) * u
    if traced(gate):
        from fastpeft.ops.glu_custom import glu as operator

        return operator(gate, up, activation, chosen)
    return _GLU.apply(gate, up, activation, chosen)


def _check(gate, up, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: expected an activation of {ACTIVATIONS}, got {activation!r}")
    if gate.dim() < 1 or not gate.is_floating_point():
        raise ValueError(f"glu: expected floating gate [..., N], got {tuple(gate.shape)} {gate.dtype}")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"glu: expected gate and up side by side, [..., 2N], got {tuple(gate.shape)}")
        return
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        raise ValueError(
            f"glu: expected gate and up alike, got {tuple(gate.shape)} {gate.dtype} on {gate.device} and "
            f"{tuple(up.shape)} {up.dtype} on {up.device}"
        )
