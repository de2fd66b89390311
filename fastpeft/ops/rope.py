"""Rotary position embedding: queries and keys turned by their tokens' angles.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for every pair (x1, x2) of the first R columns; the others pass through
    (dx1, dx2) = (dy1 cos + dy2 sin, dy2 cos - dy1 sin)

Nothing of q or k is kept for backward, only the tables and the positions.
"""

import torch

from fastpeft import backend
from fastpeft.ops import rope_torch
from fastpeft.ops.tracing import traced, transformed
from fastpeft.reference import rope as reference


class _TritonPasses:
    @staticmethod
    def rotate(xs, cos, sin, positions, offset, interleaved, inverse):
        from fastpeft.kernels.rope import rotate as kernel

        q, k = kernel(
            xs[0],
            xs[1] if len(xs) > 1 else None,
            cos,
            sin,
            positions=positions,
            offset=offset,
            interleaved=interleaved,
            inverse=inverse,
        )
        return [q] if k is None else [q, k]


PASSES = {"torch": rope_torch, "triton": _TritonPasses}


class _Rope(torch.autograd.Function):
    """A rotation by `inverse`'s angles; its gradient is the same Function by the opposite ones, so it has every order."""

    @staticmethod
    def forward(ctx, cos, sin, positions, offset, interleaved, inverse, impl, *xs):
        ctx.save_for_backward(cos, sin, positions)
        ctx.settings = offset, interleaved, not inverse, impl
        ctx.set_materialize_grads(False)
        return tuple(PASSES[impl].rotate(xs, cos, sin, positions, offset, interleaved, inverse))

    @staticmethod
    def backward(ctx, *grads):
        cos, sin, positions = ctx.saved_tensors
        needed = [grad is not None and need for grad, need in zip(grads, ctx.needs_input_grad[7:])]
        wanted = [grad for grad, need in zip(grads, needed) if need]
        turned = iter(_Rope.apply(cos, sin, positions, *ctx.settings, *wanted) if wanted else ())
        return *[None] * 7, *[next(turned) if need else None for need in needed]


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    offset: int = 0,
    interleaved: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for every pair of the first R columns of each head of q and k.

    Shapes:  q [B, S, H, D], k [B, S, H_kv, D] or None -> q', k' alike, contiguous; R <= D even.
             cos, sin: tables [P, R/2], or a row per token [B or 1, S, R/2]
    Row:     token (b, s) takes row positions[b, s] (integers, [B or 1, S]) of a table, else row s + offset (decoding)
    Pairs:   (x[i], x[i + R/2]) as in Llama and GPT-NeoX; interleaved: (x[2 i], x[2 i + 1]) as in GPT-J
    Dtypes:  q and k alike, float32, float16, bfloat16 (`torch` and `reference` also float64); rounded once, by `torch` twice
             where tables in half precision are handed over
    Grads:   q, k; never cos or sin
    Raises:  ValueError where shapes, dtypes or devices disagree or a row lies past the table. A position outside the table
             raises IndexError in `torch` and gives NaN in `triton`, which does not read it back to look
    Source:  Su et al. 2021, arXiv:2104.09864
    """
    chosen = backend.resolve(impl, q.device, q.dtype)
    _check(q, k, cos, sin, positions, offset)
    xs = [q] if k is None else [q, k]
    if chosen == "reference" or (transformed() and chosen == "torch"):
        b, s = q.shape[:2]
        wide = torch.promote_types(q.dtype, torch.float32)
        cos, sin = (reference.rows_of(table, b, s, positions, offset).to(wide) for table in (cos, sin))
        out = [reference.apply_rope(x.to(wide), cos, sin, interleaved=interleaved).to(x.dtype) for x in xs]
    elif traced(q):
        from fastpeft.ops.rope_custom import rope_rotate

        out = rope_rotate(xs, cos, sin, positions, offset, interleaved, False, chosen)
    elif torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        out = _Rope.apply(cos, sin, positions, offset, interleaved, False, chosen, *xs)
    else:
        out = PASSES[chosen].rotate(xs, cos, sin, positions, offset, interleaved, False)
    return out[0], None if k is None else out[1]


def _check(q, k, cos, sin, positions, offset):
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"apply_rope: expected floating {name} [B, S, H, D], got {tuple(x.shape)} {x.dtype}")
    if k is not None and (k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or k.dtype != q.dtype):
        raise ValueError(
            f"apply_rope: expected k [B={q.shape[0]}, S={q.shape[1]}, H_kv, D={q.shape[3]}] {q.dtype}, "
            f"got {tuple(k.shape)} {k.dtype}"
        )
    b, s, _, d = q.shape
    if cos.shape != sin.shape or cos.dim() not in (2, 3) or not cos.is_floating_point() or cos.dtype != sin.dtype:
        raise ValueError(
            "apply_rope: expected cos and sin alike, floating [P, R/2] or [B or 1, S, R/2], got "
            f"{tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("apply_rope: expected cos and sin without a gradient, got requires_grad=True; detach them")
    if not 0 < 2 * cos.shape[-1] <= d:
        raise ValueError(
            f"apply_rope: expected cos with R/2 columns, 0 < R <= D = {d}, got {cos.shape[-1]}; a table whose halves repeat each "
            "other is given as its first half"
        )
    if cos.dim() == 3:
        if positions is not None or offset:
            raise ValueError(
                "apply_rope: expected no positions or offset with a row per token [B or 1, S, R/2], got both"
            )
        if cos.shape[0] not in (1, b) or cos.shape[1] != s:
            raise ValueError(f"apply_rope: expected cos [B={b} or 1, S={s}, R/2], got {tuple(cos.shape)}")
    elif positions is None and not 0 <= offset <= cos.shape[0] - s:
        raise ValueError(
            f"apply_rope: expected rows {offset} to {offset + s - 1} in a table of P = {cos.shape[0]} rows"
        )
    if positions is not None:
        integers = positions.dtype in (torch.int32, torch.int64)
        if positions.dim() != 2 or positions.shape[0] not in (1, b) or positions.shape[1] != s or not integers:
            raise ValueError(
                f"apply_rope: expected integer positions [B={b} or 1, S={s}], got {tuple(positions.shape)} {positions.dtype}"
            )
        if offset:
            raise ValueError(f"apply_rope: expected positions or an offset, got both, offset {offset}")
    for name, x in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if x is not None and x.device != q.device:
            raise ValueError(f"apply_rope: expected {name} on {q.device} as q, got {x.device}")
