"""Rotary position embedding, written the way the paper states it.

    (y1, y2) = (x1 cos - x2 sin, x2 cos + x1 sin) for every pair (x1, x2) of the first R columns; the others pass through

Half-split pairs are (x[i], x[i + R/2]), as in GPT-NeoX and Llama; interleaved ones (x[2 i], x[2 i + 1]), as in GPT-J.

Shapes:  x [B, S, H, D], cos, sin [B or 1, S, R/2] with R <= D, a row per token -> y [B, S, H, D]
Dtypes:  any floating dtype up to float64; everything is promoted by PyTorch's own rules
Source:  Su et al. 2021, arXiv:2104.09864, section 3.4.2
"""

import torch


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Every pair of columns turned by its token's angle."""
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x1, x2 = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if interleaved else torch.cat((y1, y2), dim=-1)
    return torch.cat((y, rest.to(y.dtype)), dim=-1)


def rows_of(
    table: torch.Tensor, batch: int, tokens: int, positions: torch.Tensor | None = None, offset: int = 0
) -> torch.Tensor:
    """[B or 1, S, R/2]: the row of each token, from a table [P, R/2] by position, or from a row per token as it is."""
    if table.dim() == 3:
        return table
    if positions is None:
        return table[None, offset : offset + tokens]
    return table[positions]
