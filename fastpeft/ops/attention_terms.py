"""What enters a score besides q k^T, as the passes of attention take it, and the checks of everything that a caller hands over.

Passes (attention_torch.py, attention_triton.py), tensors in, fresh tensors out:

    forward(q, k, v, terms, settings, keep) -> (o, lse)       lse: whatever the same file's backward wants to have kept;
                                                              keep: it may be more than one number a query
    backward(do, q, k, v, o, lse, terms, settings, needs) -> (dq, dk, dv, dbias, dtable, dsinks), None where not needed
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastpeft.reference.attention import RelativeBias

PASSES = {"torch": "fastpeft.ops.attention_torch", "triton": "fastpeft.ops.attention_triton"}


class Terms(NamedTuple):
    """The tensors of a call beside q, k and v; None where it has none. Shapes: attention.py; table is relative_bias.table."""

    bias: torch.Tensor | None = None
    table: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    key_padding_mask: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    cos: torch.Tensor | None = (
        None  # [B or 1, S, D / 2]: q and k are rotated by the passes, on the way in; kernels only
    )
    sin: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """The numbers of a call. A key at distance d = j - i - offset is seen where -left <= d <= right; None: no bound."""

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    bidirectional: bool = True  # of the relative bias
    max_distance: int = 0
    seed: int = 0
    threshold: int = 0  # of dropout: p = threshold / 65536


def bounds_of(window: int | tuple[int | None, int | None] | None, causal: bool) -> tuple[int | None, int | None]:
    """(left, right) of a window and `causal` together: causal is a right bound of 0."""
    if window is None:
        return None, (0 if causal else None)
    if isinstance(window, tuple) and len(window) == 2:
        left, right = window
    elif isinstance(window, int) and not isinstance(window, bool):
        if not causal:
            raise ValueError(
                f"attention: expected causal=True with a one-sided window, got window={window}, causal=False; "
                "use window=(left, right)"
            )
        left, right = window, None
    else:
        raise TypeError(f"attention: expected window (left, right), left or None, got {window!r}")
    for side in (left, right):
        if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
            raise TypeError(f"attention: expected window (left, right) of int or None, got {window!r}")
        if side is not None and side < 0:
            raise ValueError(
                f"attention: expected window sides >= 0, in tokens, got {window!r}; None is no bound on a side"
            )
    return left, (0 if causal else right)


def check_tensors(q, k, v) -> None:
    """q, k and v fit each other, or ValueError / TypeError."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"attention: expected {name} [B, S, H, D], got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"attention: expected floating {name}, got {tensor.dtype}")
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if k.shape != v.shape:
        raise ValueError(f"attention: expected k and v of one shape [B, Sk, Hkv, D], {shapes}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"attention: expected one batch size B in q, k and v, {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: expected one head dim D in q, k and v, {shapes}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: expected Hkv that divides H, got H={q.shape[2]} query heads and Hkv={k.shape[2]} key heads; {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"attention: expected q, k and v of one dtype on one device, got {q.dtype} on {q.device}, "
            f"{k.dtype} on {k.device} and {v.dtype} on {v.device}"
        )


def check_terms(q: torch.Tensor, sk: int, terms: Terms) -> None:
    """Every term fits q [B, Sq, H, D] and sk keys, or ValueError / TypeError."""
    batch, sq, heads, _ = q.shape
    for name, tensor in zip(terms._fields, terms, strict=True):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"attention: expected {name} on {q.device} as q, got {tensor.device}")
    bias, mask = terms.bias, terms.key_padding_mask
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(
                f"attention: expected floating bias, added to the scores, got {bias.dtype}; "
                "a mask of keys is key_padding_mask [B, Sk]"
            )
        full = (batch, heads, sq, sk)
        if (
            bias.dim() != 4
            or bias.shape[3] != sk
            or any(n not in (1, m) for n, m in zip(bias.shape, full, strict=True))
        ):
            raise ValueError(
                f"attention: expected bias [B={batch} or 1, H={heads} or 1, Sq={sq} or 1, Sk={sk}], got {tuple(bias.shape)}"
            )
    if terms.table is not None and terms.table.shape[1] != heads:
        raise ValueError(
            f"attention: expected relative_bias.table [buckets, H={heads}], got {tuple(terms.table.shape)}"
        )
    slopes, sinks = terms.alibi_slopes, terms.sinks
    if slopes is not None and (tuple(slopes.shape) not in ((heads,), (batch, heads)) or not slopes.is_floating_point()):
        raise ValueError(
            f"attention: expected floating alibi_slopes [H={heads}] or [B={batch}, H={heads}], "
            f"got {tuple(slopes.shape)} {slopes.dtype}"
        )
    if slopes is not None and slopes.requires_grad:
        raise ValueError("attention: expected alibi_slopes without a gradient; detach them, or pass them as a bias")
    if sinks is not None and (tuple(sinks.shape) != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"attention: expected floating sinks [H={heads}], got {tuple(sinks.shape)} {sinks.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"attention: expected key_padding_mask of torch.bool, True = attend, got {mask.dtype}")
    if mask is not None and tuple(mask.shape) != (batch, sk):
        raise ValueError(f"attention: expected key_padding_mask [B={batch}, Sk={sk}], got {tuple(mask.shape)}")
    _check_packed(batch, sq, sk, terms.cu_seqlens_q, terms.cu_seqlens_k)


def _check_packed(batch, sq, sk, cu_q, cu_k) -> None:
    if cu_q is None and cu_k is None:
        return
    if cu_q is None or cu_k is None:
        raise ValueError("attention: expected cu_seqlens_q and cu_seqlens_k together, got one of them")
    if batch != 1:
        raise ValueError(f"attention: expected B=1 with packed sequences, got B={batch}; concatenate them along S")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 2:
            raise ValueError(f"attention: expected {name} int32 [n + 1], got {tuple(cu.shape)} {cu.dtype}")
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"attention: expected as many sequences in cu_seqlens_q as in cu_seqlens_k, got {cu_q.numel() - 1} and "
            f"{cu_k.numel() - 1}"
        )
    if not torch.compiler.is_compiling():
        _check_starts("cu_seqlens_q", cu_q, sq)
        _check_starts("cu_seqlens_k", cu_k, sk)


# Reading the values waits for the device, so a tensor is read once, not once a layer: (version, length) that passed.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _check_starts(name: str, cu: torch.Tensor, length: int) -> None:
    if type(cu) is not torch.Tensor or cu.is_meta:
        return
    state = (None if cu.is_inference() else cu._version, length)
    if state[0] is not None and _CHECKED.get(cu) == state:
        return
    starts = cu.tolist()
    if starts[0] != 0 or starts[-1] != length or any(a > b for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"attention: expected {name} that never falls, from 0 to {length} tokens, got {_shortened(starts)}"
        )
    _CHECKED[cu] = state


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"[{', '.join(map(str, values[:8]))}, ..., {values[-1]}]"


def check_numbers(scale: float | None, softcap: float | None, dropout_p: float) -> None:
    """scale, softcap and dropout_p are in range, or ValueError."""
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"attention: expected a finite scale > 0, got {scale}; None is 1 / sqrt(D)")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"attention: expected a finite softcap > 0, got {softcap}; None is no cap")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"attention: expected 0 <= dropout_p < 1, got {dropout_p}")


def rope_rows(q, k, rope) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B or 1, S, R / 2], a row per token of q [B, S, H, D] and k, or ValueError."""
    (batch, tokens, _, d), (cos, sin) = q.shape, rope
    columns = cos.shape[-1] if cos.dim() else 0
    half = d // 2 if columns == d else columns
    leading = tuple(cos.shape[:-1])
    fits = leading in ((tokens,), (1, tokens), (batch, tokens)) and 0 < half <= d // 2 and d % 2 == 0
    if tokens != k.shape[1] or not fits or cos.shape != sin.shape:
        raise ValueError(
            f"attention: expected rope (cos, sin) [S={tokens}, R/2 or D={d}] or [B={batch} or 1, S, ...], D even, for as many "
            f"keys as queries, got {tuple(cos.shape)}, {tuple(sin.shape)} and {k.shape[1]} keys; rotate q and k beforehand"
        )
    return tuple(table.reshape(-1, tokens, columns)[..., :half] for table in (cos, sin))


def check_on_load(d: int, cos: torch.Tensor) -> None:
    """Tiles of this head dim can be rotated when they are loaded, or NotImplementedError."""
    if d < 16 or d & (d - 1) or 2 * cos.shape[-1] != d:
        raise NotImplementedError(
            f"attention: expected a head dim D that is a power of two from 16 on, rotated as a whole, for rope_on_load, got "
            f"D={d} and R={2 * cos.shape[-1]}; leave rope_on_load=False"
        )


def relative_of(terms: Terms, settings: Settings) -> RelativeBias | None:
    """The RelativeBias that a table and the settings make."""
    if terms.table is None:
        return None
    return RelativeBias(terms.table, settings.bidirectional, settings.max_distance)
