"""The rotation as an operator of torch.library, for torch.compile, fake tensors and meta tensors.

fastpeft::rope_rotate   each x of a list rotated; differentiable any number of times in them
"""

from collections.abc import Sequence

import torch
from torch.library import custom_op

from fastpeft.ops.rope import PASSES


@custom_op("fastpeft::rope_rotate", mutates_args=())
def rope_rotate(
    xs: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    impl: str,
) -> list[torch.Tensor]:
    return PASSES[impl].rotate(xs, cos, sin, positions, offset, interleaved, inverse)


@rope_rotate.register_fake
def _(xs, cos, sin, positions, offset, interleaved, inverse, impl):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in xs]


def _keep(ctx, inputs, output):
    _, cos, sin, positions, *ctx.settings = inputs
    ctx.save_for_backward(cos, sin, positions)


def _differentiate(ctx, grads):
    cos, sin, positions = ctx.saved_tensors
    offset, interleaved, inverse, impl = ctx.settings
    dxs = rope_rotate(list(grads), cos, sin, positions, offset, interleaved, not inverse, impl)
    return dxs, *[None] * 7


rope_rotate.register_autograd(_differentiate, setup_context=_keep)
