"""Who may see whom, as booleans: True = attend. Attention takes these rules without a mask; here they are for looking at.

All stand the last query beside the last key: query i beside key i + Sk - Sq.
"""

import torch


def causal_mask(sq: int, sk: int | None = None, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """[Sq, Sk]: keys up to the query's own."""
    return window_mask(sq, sk, right=0, device=device)


def window_mask(
    sq: int,
    sk: int | None = None,
    *,
    left: int | None = None,
    right: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """[Sq, Sk]: keys at most `left` tokens before and `right` tokens behind the query's own; None is no bound."""
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"window_mask: expected {name} >= 0 or None, got {side}")
    sk = sq if sk is None else sk
    distance = torch.arange(sk, device=device) - (torch.arange(sq, device=device) + sk - sq)[:, None]
    visible = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


def padding_mask(lengths: torch.Tensor, tokens: int | None = None, *, side: str = "right") -> torch.Tensor:
    """[B, S]: the first, or with side "left" the last, lengths[b] of S tokens; S = max(lengths) by default."""
    if side not in ("left", "right"):
        raise ValueError(f"padding_mask: expected side 'left' or 'right', got {side!r}")
    tokens = int(lengths.max()) if tokens is None else tokens
    place = torch.arange(tokens, device=lengths.device)
    kept = lengths[:, None]
    return place < kept if side == "right" else place >= tokens - kept
