"""The gated linear unit as an operator of torch.library, for torch.compile, fake tensors and meta tensors.

fastpeft::glu           h of gate and up, or of both in one tensor; differentiable in them
fastpeft::glu_backward  [dgate, dup], or the gradient of the one tensor
"""

import torch
from torch.library import custom_op

from fastpeft.ops.glu import PASSES, backward_of_parts
from fastpeft.reference.glu import halves


@custom_op("fastpeft::glu", mutates_args=())
def glu(gate: torch.Tensor, up: torch.Tensor | None, activation: str, impl: str) -> torch.Tensor:
    return PASSES[impl].forward(*(halves(gate) if up is None else (gate, up)), activation)


@glu.register_fake
def _(gate, up, activation, impl):
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    return torch.empty(shape, dtype=gate.dtype, device=gate.device)


@custom_op("fastpeft::glu_backward", mutates_args=())
def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, activation: str, impl: str
) -> list[torch.Tensor]:
    return backward_of_parts(dh, gate, up, activation, impl)


@glu_backward.register_fake
def _(dh, gate, up, activation, impl):
    def fresh():
        return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)

    return [fresh()] if up is None else [fresh(), fresh()]


def _keep(ctx, inputs, output):
    gate, up, *ctx.settings = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, dh):
    gate, up = ctx.saved_tensors
    grads = glu_backward(dh, gate, up, *ctx.settings)
    return grads[0], None if up is None else grads[1], None, None


glu.register_autograd(_differentiate, setup_context=_keep)
