"""The gated MLP with LoRA inside as operators of torch.library, for torch.compile, fake tensors and meta tensors.

    fastpeft::lora_glu_mlp           [y, what the memory policy keeps besides x] of x and the tensors of gate, up and down
    fastpeft::lora_glu_mlp_backward  the gradients that are asked for, in the order x, then a, b, bias of each

Tensors that may be missing are left out of the lists; `present` and `needs` have a flag for each place that one could have.
"""

from collections.abc import Sequence

import torch
from torch.library import custom_op

from fastpeft.ops import custom
from fastpeft.ops.dropout import threshold_of
from fastpeft.ops.lora_group import groups_of
from fastpeft.ops.lora_mlp import Kept, Needs, backward_passes, forward_passes
from fastpeft.ops.lora_torch import Member

_PLACES = 9  # a, b, bias of gate, up, down


def traced_call(x, members, activation, memory, exact, impl):
    """lora_glu_mlp of three Projections that were checked, as an operator."""
    grad = torch.is_grad_enabled()
    optional = [tensor for member in members for tensor in member[1:4]]
    needs = [grad and t is not None and t.requires_grad for t in (x, *optional)]
    flat = [custom.flatten(member.w) for member in members]
    thresholds = [threshold_of(member.dropout_p) if member.a is not None else 0 for member in members]
    seeds = None
    if any(thresholds):
        seeds = torch.stack(
            [
                torch.tensor(member.seed or 0) if member.seed is not None or not threshold else custom.draw_seed()
                for member, threshold in zip(members, thresholds, strict=True)
            ]
        )
    y, *_ = lora_glu_mlp(
        x,
        [tensor for tensors, _ in flat for tensor in tensors],
        [tensor for tensor in optional if tensor is not None],
        seeds,
        [tensor is not None for tensor in optional],
        [float(member.scale) for member in members],
        thresholds,
        needs,
        ";".join(f"{len(tensors)} {described}" for tensors, described in flat),
        activation,
        memory,
        exact,
        impl,
    )
    return y


def _members(weights, adapters, seeds, present, scales, thresholds, described):
    weights, optional = iter(weights), _spread(adapters, present)
    numbers = [0, 0, 0] if seeds is None else seeds.tolist()  # on the CPU: read without a synchronisation
    members = []
    for i, entry in enumerate(described.split(";")):
        count, _, kind = entry.partition(" ")
        w = custom.unflatten([next(weights) for _ in range(int(count))], kind)
        members.append(Member(w, *optional[3 * i : 3 * i + 3], scales[i], numbers[i], thresholds[i]))
    return members


def _spread(tensors, present):
    """The tensors in their places, None in the others."""
    given = iter(tensors)
    return [next(given) if there else None for there in present]


def _needs(flags) -> Needs:
    return Needs(flags[0], *(tuple(three) for three in groups_of(3, flags[1:])))


def _wide(x, exact):
    return torch.promote_types(x.dtype, torch.float32) if exact else x.dtype


@custom_op("fastpeft::lora_glu_mlp", mutates_args=())
def lora_glu_mlp(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    adapters: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    present: Sequence[bool],
    scales: Sequence[float],
    thresholds: Sequence[int],
    needs: Sequence[bool],
    described: str,
    activation: str,
    memory: str,
    exact: bool,
    impl: str,
) -> list[torch.Tensor]:
    members = _members(weights, adapters, seeds, present, scales, thresholds, described)
    rows = x.reshape(-1, x.shape[-1])
    y, kept = forward_passes(rows, members, activation, memory, _wide(x, exact), impl, _needs(needs))
    return [y.view(*x.shape[:-1], y.shape[-1]), *(_alone(tensor) for tensor in kept if tensor is not None)]


def _alone(tensor):
    """The tensor, contiguous, with a storage of its own: an operator's results may not share one."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _shapes_kept(x, ranks, n, needs: Needs, memory, wide, impl):
    """A Kept of (columns, dtype) in place of tensors: what forward_passes keeps."""

    def of_rank(r):  # the kernels' S is padded, as in custom.py
        return None if r is None else (r if impl == "torch" else max(16, 1 << (r - 1).bit_length()), wide)

    keep_h, keep_s = needs.h and memory == "speed", memory != "memory"
    parts = (n, x.dtype) if keep_s and (needs.inner or (needs.h and not keep_h)) else None
    return Kept(
        parts,
        parts,
        (n, x.dtype) if keep_h else None,
        of_rank(ranks[0]) if keep_s and needs.gate[1] else None,
        of_rank(ranks[1]) if keep_s and needs.up[1] else None,
        of_rank(ranks[2]) if needs.keep_s_down(memory) else None,
    )


@lora_glu_mlp.register_fake
def _(x, weights, adapters, seeds, present, scales, thresholds, needs, described, activation, memory, exact, impl):
    rows = x.numel() // x.shape[-1]
    sizes = _weight_rows(weights, described)
    optional = _spread(adapters, present)
    ranks = [None if a is None else a.shape[0] for a in optional[0:_PLACES:3]]
    kept = _shapes_kept(x, ranks, sizes[1], _needs(needs), memory, _wide(x, exact), impl)
    own = [x.new_empty(rows, columns, dtype=dtype) for columns, dtype in filter(None, kept)]
    return [x.new_empty(*x.shape[:-1], sizes[2]), *own]


def _weight_rows(weights, described):
    """N of each weight."""
    weights, sizes = list(weights), []
    for entry in described.split(";"):
        count, _, kind = entry.partition(" ")
        first, weights = weights[0], weights[int(count) :]
        sizes.append(first.shape[0] if kind == "dense" else int(kind.split()[1]))
    return sizes


@custom_op("fastpeft::lora_glu_mlp_backward", mutates_args=())
def lora_glu_mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    kept: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    adapters: Sequence[torch.Tensor],
    seeds: torch.Tensor | None,
    present: Sequence[bool],
    scales: Sequence[float],
    thresholds: Sequence[int],
    needs: Sequence[bool],
    described: str,
    activation: str,
    memory: str,
    exact: bool,
    impl: str,
) -> list[torch.Tensor]:
    members = _members(weights, adapters, seeds, present, scales, thresholds, described)
    wanted, wide = _needs(needs), _wide(x, exact)
    ranks = [None if member.a is None else member.a.shape[0] for member in members]
    shapes = _shapes_kept(x, ranks, members[0].w.shape[0], wanted, memory, wide, impl)
    in_place = Kept(*_spread(kept, [shape is not None for shape in shapes]))
    rows = x.reshape(-1, x.shape[-1])
    dx, grads = backward_passes(dy.reshape(-1, dy.shape[-1]), rows, in_place, members, activation, wide, impl, wanted)
    every = [None if dx is None else dx.view(x.shape), *(gradient for three in grads for gradient in three)]
    return [_alone(gradient) for gradient, need in zip(every, needs, strict=True) if need]


@lora_glu_mlp_backward.register_fake
def _(dy, x, kept, weights, adapters, seeds, present, scales, thresholds, needs, *_):
    every = [x, *_spread(adapters, present)]
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=dy.device) for tensor, need in zip(every, needs) if need
    ]


def _keep(ctx, inputs, output):
    x, weights, adapters, seeds, *ctx.settings = inputs
    ctx.counts = len(output) - 1, len(weights)
    ctx.save_for_backward(x, seeds, *output[1:], *weights, *adapters)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grads):
    x, seeds, *tensors = ctx.saved_tensors
    kept, weights = ctx.counts
    present, needs = ctx.settings[0], ctx.settings[3]
    results = iter(
        lora_glu_mlp_backward(
            grads[0], x, tensors[:kept], tensors[kept : kept + weights], tensors[kept + weights :], seeds, *ctx.settings
        )
    )
    every = [next(results) if need else None for need in needs]
    of_adapters = [gradient for gradient, there in zip(every[1:], present, strict=True) if there]
    return every[0], [None] * weights, of_adapters, *[None] * 10


lora_glu_mlp.register_autograd(_differentiate, setup_context=_keep)
