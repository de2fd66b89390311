"""The LoRA linear as operators of torch.library, for whoever traces instead of running.

torch.compile, torch.export, FakeTensorMode and meta tensors see two opaque operators with known shapes; eager code calls the
autograd.Functions directly, since a custom operator costs a microsecond-scale call more.

    fastpeft::lora_linear           (y, s) of x, w, a, b, bias; differentiable in x, a, b and bias
    fastpeft::lora_linear_backward  (dx, da, db, dbias), of no elements where not asked for
    fastpeft::dequantize            a quantised weight as a tensor, for what is composed of plain calls
    fastpeft::keep_mask             the mask that a seed draws, for what is composed of plain calls
    fastpeft::draw_seed             a seed from torch's default CPU generator, as a tensor: tracing cannot hold a number

A weight is handed over as a list of tensors and a string that says what they are: see `flatten` and `unflatten`.
"""

from collections.abc import Sequence

import torch
from torch.library import custom_op

from fastpeft.ops import dropout, lora_torch, lora_triton
from fastpeft.ops.int8 import Int8Weight
from fastpeft.ops.nf4 import NestedAbsmax, NF4Weight
from fastpeft.ops.weights import FrozenWeight

_DENSE = "dense"
_PASSES = {"torch": lora_torch, "triton": lora_triton}


def flatten(w: FrozenWeight) -> tuple[list[torch.Tensor], str]:
    """(tensors, description): `unflatten` makes the same weight of them again."""
    if isinstance(w, torch.Tensor):
        return [w], _DENSE
    n, k = w.shape
    dtype = str(w.dtype).removeprefix("torch.")
    if isinstance(w, Int8Weight):
        return [w.q, w.row_absmax], f"int8 {n} {k} {dtype}"
    nested = [] if w.nested is None else [w.nested.code, w.nested.absmax, w.nested.offset]
    nested_blocksize = 0 if w.nested is None else w.nested.blocksize
    return [w.packed, w.absmax, *nested], f"{w.quant_type} {n} {k} {dtype} {w.blocksize} {nested_blocksize}"


def unflatten(tensors: Sequence[torch.Tensor], described: str) -> FrozenWeight:
    """The weight that `flatten` took apart; nothing is copied or checked."""
    if described == _DENSE:
        return tensors[0]
    kind, n, k, dtype, *sizes = described.split()
    shape, dtype = (int(n), int(k)), getattr(torch, dtype)
    if kind == "int8":
        return Int8Weight.unchecked(*tensors, dtype=dtype)
    blocksize, nested_blocksize = map(int, sizes)
    packed, absmax, *nested = tensors
    nested = NestedAbsmax(*nested, nested_blocksize) if nested_blocksize else None
    return NF4Weight.unchecked(packed, absmax, shape, blocksize, kind, dtype, nested)


@custom_op("fastpeft::draw_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw_seed_on(device_of: torch.Tensor) -> torch.Tensor:
    """device_of: any tensor on the CPU, which tells a compiled checkpoint whose generator it has to set back."""
    return torch.tensor(dropout.draw_seed())


@draw_seed_on.register_fake
def _(device_of):
    return torch.empty((), dtype=torch.int64)


def draw_seed() -> torch.Tensor:
    """A new seed, as a tensor on the CPU."""
    return draw_seed_on(torch.empty(0, device="cpu"))


@custom_op("fastpeft::keep_mask", mutates_args=())
def keep_mask(like: torch.Tensor, seed: torch.Tensor, threshold: int) -> torch.Tensor:
    return dropout.keep_mask(seed=int(seed), like=like, threshold=threshold)


@keep_mask.register_fake
def _(like, seed, threshold):
    return like.new_empty(like.shape)


@custom_op("fastpeft::dequantize", mutates_args=())
def dequantize(w: Sequence[torch.Tensor], described: str, dtype: torch.dtype) -> torch.Tensor:
    return unflatten(w, described).dequantize(dtype)


@dequantize.register_fake
def _(w, described, dtype):
    _, n, k, *_ = described.split()
    return w[0].new_empty(int(n), int(k), dtype=dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


@custom_op("fastpeft::lora_linear", mutates_args=())
def lora_linear(
    x: torch.Tensor,
    w: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    threshold: int,
    described: str,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [..., N], s [M, padded R] or [M, R]) for x [..., K]; seed: a number on the CPU, read without a synchronisation."""
    number = 0 if seed is None else int(seed)
    rows = _rows(x)
    y, s = _PASSES[impl].forward(rows, unflatten(w, described), a, b, bias, scale, number, threshold)
    return y.view(*x.shape[:-1], y.shape[-1]), s


@lora_linear.register_fake
def _(x, w, a, b, bias, seed, scale, threshold, described, impl):
    rows, r = x.numel() // x.shape[-1], a.shape[0]
    # with kernels, padded_rank of kernels/tiling.py, which tracing must not import Triton for
    columns = r if impl == "torch" else max(16, 1 << (r - 1).bit_length())
    return x.new_empty(*x.shape[:-1], b.shape[0]), x.new_empty(rows, columns)


@custom_op("fastpeft::lora_linear_backward", mutates_args=())
def lora_linear_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    s: torch.Tensor,
    w: Sequence[torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    scale: float,
    threshold: int,
    described: str,
    impl: str,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    number = 0 if seed is None else int(seed)
    weight = unflatten(w, described)
    dx, da, db = _PASSES[impl].backward(
        _rows(dy), _rows(x), s, weight, a, b, scale, number, threshold, tuple(needs[:3])
    )
    nothing = dy.new_empty(0)
    dbias = lora_torch.sum_rows(_rows(dy), bias.dtype) if needs[3] else nothing.clone()
    return (
        nothing.clone() if dx is None else dx.view(x.shape),
        nothing.clone() if da is None else da,
        nothing.clone() if db is None else db,
        dbias,
    )


@lora_linear_backward.register_fake
def _(dy, x, s, w, a, b, bias, seed, scale, threshold, described, impl, needs):
    def like(tensor, needed):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=dy.device) if needed else dy.new_empty(0)

    need_x, need_a, need_b, need_bias = needs
    return like(x, need_x), like(a, need_a), like(b, need_b), like(dy if bias is None else bias, need_bias)


def _keep(ctx, inputs, output):
    x, w, a, b, bias, seed, *ctx.settings = inputs
    ctx.save_for_backward(x, output[1], a, b, bias, seed, *w)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, _):
    x, s, a, b, bias, seed, *w = ctx.saved_tensors
    need_x, _, need_a, need_b, need_bias, *_ = ctx.needs_input_grad
    needs = [need_x, need_a, need_b, bool(need_bias) and bias is not None]
    grads = lora_linear_backward(dy, x, s, w, a, b, bias, seed, *ctx.settings, needs)
    dx, da, db, dbias = (grad if needed else None for grad, needed in zip(grads, needs))
    return dx, [None] * len(w), da, db, dbias, None, None, None, None, None


lora_linear.register_autograd(_differentiate, setup_context=_keep)
