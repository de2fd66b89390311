"""The linear cross-entropy as operators of torch.library, for torch.compile.

    fastpeft::linear_cross_entropy            (loss, dx, dw, dbias, rest): see loss_and_gradients in cross_entropy.py
    fastpeft::linear_cross_entropy_backward   (dx, dw, dbias) of losses per row, where dw or dbias is asked for

Gradients that are not asked for are tensors of no elements.
"""

import torch
from torch.library import custom_op

from fastpeft.ops import cross_entropy
from fastpeft.ops.cross_entropy_torch import Terms, wide

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _or_nothing(grads, x: torch.Tensor) -> list[torch.Tensor]:
    return [x.new_empty(0) if grad is None else grad for grad in grads]


def _like(tensors, needs, x: torch.Tensor) -> list[torch.Tensor]:
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else x.new_empty(0)
        for t, need in zip(tensors, needs)
    ]


@custom_op("fastpeft::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    num_items: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    reduction: str,
    impl: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    terms = Terms(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    loss, *grads, rest = cross_entropy.loss_and_gradients(x, w, bias, labels, num_items, terms, reduction, impl, needs)
    return loss, *_or_nothing(grads, x), rest.clone()


@linear_cross_entropy.register_fake
def _(
    x, w, bias, labels, num_items, ignore_index, label_smoothing, softcap, logit_scale, z_loss, reduction, impl, needs
):
    def wide_empty(*shape):
        return x.new_empty(*shape, dtype=wide(x.dtype))

    if reduction == "none":
        again = needs[1] or needs[2]
        grads = _like((x, w, bias), (needs[0] and not again, False, False), x)
        return wide_empty(x.shape[0]), *grads, wide_empty(())
    return wide_empty(()), *_like((x, w, bias), needs, x), wide_empty(())


@custom_op("fastpeft::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    logit_scale: float,
    z_loss: float,
    impl: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    terms = Terms(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    _, *grads = cross_entropy.in_chunks(x, w, bias, labels, terms, impl, needs, None, dy)
    return tuple(_or_nothing(grads, x))


@linear_cross_entropy_backward.register_fake
def _(dy, x, w, bias, labels, ignore_index, label_smoothing, softcap, logit_scale, z_loss, impl, needs):
    return tuple(_like((x, w, bias), needs, x))


def _keep(ctx, inputs, output):
    x, w, bias, labels, _, *terms, reduction, impl, needs = inputs
    ctx.again = reduction == "none" and (needs[1] or needs[2])
    ctx.save_for_backward(*((x, w, bias, labels) if ctx.again else output[1:]))
    ctx.settings, ctx.needs = (*terms, impl), needs
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    if ctx.again:
        grads = linear_cross_entropy_backward(dy, *ctx.saved_tensors, *ctx.settings, ctx.needs)
    else:
        *grads, rest = ctx.saved_tensors
        grads = [cross_entropy.scaled(grad, dy * rest) if need else None for grad, need in zip(grads, ctx.needs)]
    return *(grad if need else None for grad, need in zip(grads, ctx.needs)), *[None] * 10


linear_cross_entropy.register_autograd(_differentiate, setup_context=_keep)
