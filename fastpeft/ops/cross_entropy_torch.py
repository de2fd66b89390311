"""One chunk of the linear cross-entropy in PyTorch's own operators: logits, and losses and dlogits of their rows.

The CPU, one thread, M = 1024, K = 576, V = 49152 (AMD Zen 4, bfloat16 instructions, no AMX), seconds of the whole M:

    rows of a chunk               32     64     128    256    512    1024
    logits, bfloat16              0.53   0.36   0.31   0.29   0.29   0.29
    dlogits w, bfloat16           0.56   0.41   0.35   0.30   0.30   0.29
    logits, float32                      1.20   0.79   0.71   0.69

    float32 rows in the scratch   1      2      4      8      16     64     the whole chunk, out of place
    softmax of a chunk of 256     0.083  0.077  0.070  0.064  0.063  0.069  0.26

So a chunk has 256 rows, and its softmax runs over a few rows at a time in float32 that stay in the cache; the probabilities go
back into the chunk. A product of half precision comes rounded: the CPU has no product that returns float32.
"""

from typing import NamedTuple

import torch

ROWS = 256
MIN_ROWS = 64
CHUNK_BYTES = 64 * 2**20
SCRATCH_BYTES = 2 * 2**20


class Terms(NamedTuple):
    """The constants of the loss: see fastpeft/reference/cross_entropy.py."""

    ignore_index: int
    label_smoothing: float
    softcap: float | None
    logit_scale: float
    z_loss: float


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def scratch(rows: int, v: int, like: torch.Tensor) -> torch.Tensor:
    """The chunk's logits [rows, V], to be written by `project`."""
    return torch.empty(rows, v, dtype=like.dtype, device=like.device)


def chunk_rows(v: int, like: torch.Tensor) -> int:
    """How many rows of V logits are held at once."""
    return min(ROWS, max(MIN_ROWS, CHUNK_BYTES // max(1, v * like.element_size())))


def project(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out = x w^T + bias"""
    return torch.mm(x, w.t(), out=out) if bias is None else torch.addmm(bias, x, w.t(), out=out)


def row_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    factor: torch.Tensor | None,
    weights: torch.Tensor | None,
    want: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(losses [m] wide, dlogits [m, V] in the buffer of the logits); the bias is in the logits already."""
    m, v = logits.shape
    to = wide(logits.dtype)
    losses = torch.empty(m, dtype=to, device=logits.device)
    step = min(m, max(1, SCRATCH_BYTES // (v * to.itemsize)))
    rows = None if logits.dtype == to else torch.empty(step, v, dtype=to, device=logits.device)
    for first in range(0, m, step):
        part = slice(first, min(m, first + step))
        piece = logits[part]
        z = piece if rows is None else rows[: piece.shape[0]].copy_(piece)
        gain = factor if weights is None else weights[part, None] if factor is None else factor * weights[part, None]
        losses[part] = _in_place(z, labels[part], terms, gain, want)
        if want and rows is not None:
            piece.copy_(z)
    return losses, logits if want else None


def _in_place(z, labels, terms: Terms, gain, want: bool) -> torch.Tensor:
    """The losses of the rows of z [m, V], which becomes their gradient times `gain`."""
    ignored = (labels == terms.ignore_index)[:, None]
    at = torch.where(ignored, 0, labels[:, None])
    slope = None
    if terms.logit_scale != 1.0:
        z.mul_(terms.logit_scale)
    if terms.softcap is not None:
        z.div_(terms.softcap).tanh_()
        slope = torch.square(z).neg_().add_(1.0) if want else None
        z.mul_(terms.softcap)
    kept, v = 1.0 - terms.label_smoothing, z.shape[1]
    top = z.amax(-1, keepdim=True)
    loss = (top - z.gather(-1, at)).mul_(kept)
    if terms.label_smoothing:
        loss += (top - z.mean(-1, keepdim=True)).mul_(terms.label_smoothing)
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    loss += total.log()
    if terms.z_loss:
        lse = total.log().add_(top)
        loss += lse.square().mul_(terms.z_loss)
    if want:
        g = z.new_full((), terms.logit_scale) if gain is None else gain * terms.logit_scale
        rate = lse.mul(2.0 * terms.z_loss).add_(1.0).div_(total) if terms.z_loss else total.reciprocal()
        z.mul_(rate * g)
        if terms.label_smoothing:
            z.sub_(g * (terms.label_smoothing / v))
        z.scatter_add_(-1, at, (-kept * g).expand_as(total))
        if slope is not None:
            z.mul_(slope)
        if z.device.type != "cpu":  # a CPU is given no row that is ignored: in_chunks
            z.masked_fill_(ignored, 0.0)
    return loss.masked_fill_(ignored, 0.0)[:, 0]
