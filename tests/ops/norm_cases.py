"""What the tests of the norms draw, and the value with its gradients by the formula in any dtype."""

from dataclasses import dataclass

import torch

from fastpeft.ops.norm import layer_norm, rms_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {
    "aligned": (4, 16, 64),
    "odd": (3, 11, 33),
    "one-row": (1, 65),
    "narrow": (97, 7),
    "heads": (2, 5, 3, 24),
    "long": (2, 2049),
}
# of x and of the weight
DTYPES = {
    "bf16": (BF16, BF16),
    "bf16-fp32": (BF16, FP32),
    "fp32-bf16": (FP32, BF16),
    "fp16": (FP16, FP16),
    "fp32": (FP32, FP32),
}
NAMES = ("y", "h", "dx", "dresidual", "dweight", "dbias")


@dataclass(frozen=True)
class Variant:
    """One way to call an op."""

    centred: bool = False
    offset: float = 0.0
    residual: bool = False
    weight: bool = True
    bias: bool = False
    eps: float = 1e-5


VARIANTS = {
    "rms": Variant(),
    "rms-offset-residual": Variant(offset=1.0, residual=True),
    "rms-bare": Variant(weight=False),
    "layer": Variant(centred=True, bias=True),
    "layer-residual": Variant(centred=True, bias=True, residual=True),
    "layer-no-bias": Variant(centred=True),
    "layer-bare-residual": Variant(centred=True, weight=False, residual=True),
}


def draw(variant: Variant, shape: tuple[int, ...], x_dtype, w_dtype, device, dtype=None):
    """(inputs that want gradients by name, gradients of y and h); x is far from centred."""
    inputs = {"x": (torch.randn(*shape) + 0.5).to(device, x_dtype)}
    if variant.residual:
        inputs["residual"] = torch.randn(*shape).to(device, x_dtype)
    if variant.weight:
        inputs["weight"] = (torch.randn(shape[-1]) * 0.3 + 1 - variant.offset).to(device, w_dtype)
    if variant.bias:
        inputs["bias"] = torch.randn(shape[-1]).to(device, w_dtype)
    grads = [torch.randn(*shape).to(device, x_dtype if dtype is None else dtype)]
    if variant.residual:
        grads.append(torch.randn(*shape).to(device, x_dtype))
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}, grads


def call(variant: Variant, inputs, **options):
    """[y] or [y, h]."""
    x, residual, weight, bias = (inputs.get(name) for name in ("x", "residual", "weight", "bias"))
    if variant.centred:
        out = layer_norm(x, weight, bias, eps=variant.eps, residual=residual, **options)
    else:
        out = rms_norm(x, weight, eps=variant.eps, offset=variant.offset, residual=residual, **options)
    return [out] if residual is None else list(out)


def run(variant: Variant, inputs, grads, **options) -> dict[str, torch.Tensor]:
    """Outputs and gradients by name."""
    outputs = call(variant, inputs, **options)
    found = torch.autograd.grad(outputs, list(inputs.values()), grads)
    values = dict(zip(("y", "h"), (out.detach() for out in outputs)))
    return values | {f"d{name}": grad for name, grad in zip(inputs, found)}


def in_dtype(dtype, variant: Variant, inputs, grads) -> dict[str, torch.Tensor]:
    """The formula in `dtype`; None: in float32, of inputs and with results as they are."""
    if dtype is not None:
        inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        grads = [grad.to(dtype) for grad in grads]
    return run(variant, inputs, grads, impl="reference")
