"""Backward passes that are not differentiable themselves say so, by name, when somebody differentiates them."""

import functools
from collections.abc import Callable

import torch


def first_order_only(op: str) -> Callable:
    """Decorate a Function's backward: it runs without a graph, and differentiating its results raises RuntimeError.

    As torch.autograd.function.once_differentiable, with a message that names the op and what to do.
    """
    message = (
        f"{op}: expected first-order gradients only, got a second differentiation; its fused backward has none. "
        "Use impl='reference', which can be differentiated any number of times"
    )

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return outputs
            # With create_graph=True every result depends on x, a or b too, not only on dy: all of them refuse.
            refuse = torch._C._functions.DelayedError(message, len(outputs))
            return refuse(*[None if out is None else out.detach().requires_grad_(True) for out in outputs])

        return wrapper

    return decorate
