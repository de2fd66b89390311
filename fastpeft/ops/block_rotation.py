"""Rotations by blocks, and the skew-symmetric matrices that they are made of.

    y = x blockdiag(R_1, ..., R_b),    R = (I - Q) (I + Q)^-1 or a polynomial in Q,    Q = -Q^T

R is made in float32 (float64 where the base is); x is rotated in its own dtype. In half precision x + x (R - I) is taken,
so that a rotation by less than the dtype's resolution is not rounded to none.
"""

import torch

JOINED_WIDTH = 32
"""Small blocks are joined to block-diagonal ones of about this width. x [1024, 1024] on one core (EPYC Zen 5): blocks of 4
alone 6.0 ms, joined 1.0 ms; blocks of 8 alone 1.4 ms, joined 1.0 ms; joined to 64 1.4 ms; a dense rotation 13.4 ms."""


def rotate_blocks(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """y[..., b, :] = x[..., b, :] R_b for consecutive blocks of the last dimension; one R serves all blocks.

    Shapes:  x [..., K], rotation [K / C, C, C] or [1, C, C] -> y [..., K]
    Dtypes:  x float32, float64 or half; y has x's dtype, or autocast's
    Grads:   x and rotation; kept for backward: x, and the blocks joined to JOINED_WIDTH
    Raises:  ValueError where the blocks do not fill K
    """
    count, size, _ = rotation.shape
    width = x.shape[-1]
    if width != count * size and (count != 1 or width % size):
        raise ValueError(
            f"rotate_blocks: expected x [..., K={count * size}], got {tuple(x.shape)} and blocks of {size}"
        )
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    half = x.dtype in (torch.float16, torch.bfloat16)
    if half:
        rotation = rotation - torch.eye(size, device=x.device, dtype=rotation.dtype)
    blocks = _joined(rotation.to(x.dtype), width // size)
    joined = blocks.shape[-1]
    if count == 1:
        rows = x.reshape(-1, joined)
        return (torch.addmm(rows, rows, blocks[0]) if half else rows @ blocks[0]).view(x.shape)
    rows = x.reshape(-1, width // joined, joined).transpose(0, 1)
    turned = torch.baddbmm(rows, rows, blocks) if half else torch.bmm(rows, blocks)
    return turned.transpose(0, 1).reshape(x.shape)


def _joined(rotation: torch.Tensor, blocks: int) -> torch.Tensor:
    """The blocks as fewer, wider ones: as many neighbours as divide `blocks` and stay within JOINED_WIDTH."""
    count, size, _ = rotation.shape
    most = max(1, min(blocks, JOINED_WIDTH // size))
    neighbours = next(n for n in range(most, 0, -1) if blocks % n == 0)
    if neighbours == 1:
        return rotation
    if count == 1:
        rotation = rotation.expand(neighbours, size, size)
    groups = rotation.reshape(-1, neighbours, size, 1, size)
    on_diagonal = torch.eye(neighbours, device=rotation.device, dtype=rotation.dtype).view(neighbours, 1, neighbours, 1)
    return (groups * on_diagonal).reshape(-1, neighbours * size, neighbours * size)


def upper_indices(size: int) -> torch.Tensor:
    """Places of the strict upper triangle of a [C, C] matrix in its flattened form, row by row."""
    rows, columns = torch.triu_indices(size, size, 1)
    return rows * size + columns


def skew_from_upper(upper: torch.Tensor, size: int, indices: torch.Tensor) -> torch.Tensor:
    """Q = U - U^T of strict upper triangles [b, C (C - 1) / 2], row by row -> [b, C, C]. indices: upper_indices(C)"""
    flat = upper.new_zeros(upper.shape[0], size * size).index_copy(1, indices, upper)
    u = flat.view(-1, size, size)
    return u - u.transpose(1, 2)


def cayley(q: torch.Tensor) -> torch.Tensor:
    """R = (I - Q) (I + Q)^-1 for skew-symmetric Q [b, C, C]: orthogonal."""
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        return torch.linalg.solve(eye + q, eye - q, left=False)


def cayley_neumann(q: torch.Tensor, terms: int) -> torch.Tensor:
    """R = I + 2 Q + 2 Q^2 + ... + 2 Q^(d-1) + Q^d, which is near (I + Q) (I - Q)^-1 for small Q [b, C, C].

    d = terms - 1, but 3 terms are PEFT's 4 (d = 3), and 2 terms are I + 2 Q. Powers are summed two at a time in Q^2, so d = 4
    takes two products instead of three.
    Raises:  ValueError for less than 2 terms, of which nothing could be learned
    """
    if terms < 2:
        raise ValueError(f"cayley_neumann: expected at least 2 terms, got {terms}")
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    if terms == 2:
        return eye + 2 * q
    d = max(terms, 4) - 1
    factors = [1, *[2] * (d - 1), 1]
    with torch.autocast(q.device.type, enabled=False):
        squared = q @ q
        if d % 2:
            total, power = factors[d] * q + factors[d - 1] * eye, d - 3
        else:
            total, power = factors[d] * squared + (factors[d - 1] * q + factors[d - 2] * eye), d - 4
        for even in range(power, -1, -2):
            total = torch.baddbmm(factors[even + 1] * q + factors[even] * eye, squared, total)
    return total
