"""What the tests of gated linear units draw, and the value with its gradients in any dtype."""

import torch
import torch.nn.functional as F

from fastpeft.reference.glu import glu as formula

SHAPES = {"aligned": (16, 64), "odd": (33, 97), "one": (1, 1), "3d": (2, 5, 300), "long": (3, 2049)}
EAGER = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def draw(shape, dtype, device, layout: str = "rows"):
    """gate and up with a gradient, and the gradient of h. Wide enough that every activation saturates on both sides."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape

    def normal(*shape):
        return (3 * torch.randn(*shape)).to(device, dtype)

    make = {
        "rows": lambda: normal(*shape),
        "strided": lambda: normal(*shape[:-1], 2 * shape[-1])[..., : shape[-1]],
        "transposed": lambda: normal(*shape[:-2], shape[-1], shape[-2]).mT,
    }[layout]
    return make().requires_grad_(), make().requires_grad_(), make()


def in_dtype(dtype, gate, up, dh, activation):
    """h, dgate, dup by the formula (float64) or by the eager code in `dtype`."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (gate, up)]
    h = formula(*inputs, activation) if dtype == torch.float64 else EAGER[activation](inputs[0]) * inputs[1]
    return [h.detach(), *torch.autograd.grad(h, inputs, dh.to(dtype))]
