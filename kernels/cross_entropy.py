"""Cross-entropy of rows of logits and, in the same launch, its gradient by the logits.

    u = logit_scale (logits + bias),   z = softcap tanh(u / softcap), or u without a softcap
    lse = log sum_v exp z_v
    loss = lse - (1 - e) z_label - e / V sum_v z_v + z_loss lse^2                        e: label_smoothing
    dlogits = g ((1 + 2 z_loss lse) exp(z - lse) - e / V - (1 - e) [v = label]) logit_scale (1 - (z / softcap)^2)
    g = factor weights[m]

A row whose label is ignore_index: loss 0, dlogits 0, and its logits are not read. A label outside 0..V-1 gives NaN.

Shapes:  logits [M, V] with contiguous rows, any stride between them; labels [M] integers; bias [V], factor [], weights [M] or
         none -> losses [M]; dlogits [M, V], written into `out`, which may be the logits themselves
Dtypes:  logits, out, bias any of float32, float16, bfloat16; sums, losses, factor and weights float32
Traffic: logits are read once for the losses and once more for dlogits, which are written once: one program owns a row, and
         the second read of a row of 256 KiB comes out of the cache
"""

import torch
import triton
import triton.language as tl

from fastpeft.kernels.launch import launch, target_of
from fastpeft.kernels.tiling import Target, TileConfig

# 16 elements per thread: two loads of 16 bytes of bfloat16 under way, and a maximum and a sum per element in registers.
_BLOCK = 4096
_ELEMENTS_PER_LANE = 16


@triton.jit
def _capped(logits, bias_ptr, offs_v, mask_v, softcap, logit_scale):
    """z of float32 logits at columns offs_v; mask_v: those that exist, None for all."""
    if bias_ptr is not None:
        if mask_v is None:
            logits += tl.load(bias_ptr + offs_v).to(tl.float32)
        else:
            logits += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * (2.0 * tl.sigmoid(2.0 * (z / softcap)) - 1.0)
    return z


@triton.jit
def _with_block(
    highest,
    total,
    plain,
    logits_row,
    bias_ptr,
    offs_v,
    V,
    softcap,
    logit_scale,
    label_smoothing,
    MASKED: tl.constexpr,
):
    """The running maximum, sum of exponentials and sum of every lane, with one more block of columns."""
    if MASKED:
        mask_v = offs_v < V
        logits = tl.load(logits_row + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    else:
        mask_v = None
        logits = tl.load(logits_row + offs_v).to(tl.float32)
    z = _capped(logits, bias_ptr, offs_v, mask_v, softcap, logit_scale)
    if label_smoothing is not None:
        plain += tl.where(mask_v, z, 0.0) if MASKED else z
    if MASKED:
        z = tl.where(mask_v, z, float("-inf"))
    higher = tl.maximum(highest, z)
    return higher, total * tl.exp(highest - higher) + tl.exp(z - higher), plain


@triton.jit
def _store_gradient(
    out_row,
    logits_row,
    bias_ptr,
    offs_v,
    V,
    label,
    top,
    log_sum,
    gain,
    kept,
    g,
    softcap,
    logit_scale,
    label_smoothing,
    MASKED: tl.constexpr,
):
    """dlogits of one block of columns; `out_row` may be `logits_row`: an element is read before it is written."""
    if MASKED:
        mask_v = offs_v < V
        logits = tl.load(logits_row + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    else:
        mask_v = None
        logits = tl.load(logits_row + offs_v).to(tl.float32)
    z = _capped(logits, bias_ptr, offs_v, mask_v, softcap, logit_scale)
    d = gain * tl.exp((z - top) - log_sum) - tl.where(offs_v == label, kept, 0.0)
    if label_smoothing is not None:
        d -= label_smoothing / V
    if softcap is not None:
        d = d * (1.0 - (z / softcap) * (z / softcap))
    d = (d * g).to(out_row.dtype.element_ty)
    if MASKED:
        tl.store(out_row + offs_v, d, mask=mask_v)
    else:
        tl.store(out_row + offs_v, d)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits_ptr,
    out_ptr,
    labels_ptr,
    bias_ptr,
    factor_ptr,
    weights_ptr,
    losses_ptr,
    V,
    stride_lm,
    stride_om,
    ignore_index,
    softcap,
    logit_scale,
    label_smoothing,
    z_loss,
    BLOCK_V: tl.constexpr,
):  # grid (M,)
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    logits_row = logits_ptr + row * stride_lm
    offs_block = tl.arange(0, BLOCK_V)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if out_ptr is not None:
            zeros = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK_V):
                offs_v = first + offs_block
                tl.store(out_ptr + row * stride_om + offs_v, zeros, mask=offs_v < V)
    else:
        known = (label >= 0) & (label < V)
        # before anything is written over it
        at_label = tl.load(logits_row + label, mask=known, other=float("nan")).to(tl.float32)
        at_label = _capped(at_label, bias_ptr, label, known, softcap, logit_scale)

        highest = tl.full((BLOCK_V,), -1e30, tl.float32)  # finite: the difference of two is a number
        total = tl.zeros((BLOCK_V,), tl.float32)
        plain = tl.zeros((BLOCK_V,), tl.float32)
        whole = V // BLOCK_V * BLOCK_V
        for first in range(0, whole, BLOCK_V):
            highest, total, plain = _with_block(
                highest, total, plain, logits_row, bias_ptr, first + offs_block, V, softcap, logit_scale, label_smoothing,
                MASKED=False
            )  # fmt: skip
        if whole < V:
            highest, total, plain = _with_block(
                highest, total, plain, logits_row, bias_ptr, whole + offs_block, V, softcap, logit_scale, label_smoothing,
                MASKED=True
            )  # fmt: skip
        top = tl.max(highest, axis=0)
        log_sum = tl.log(
            tl.sum(total * tl.exp(highest - top), axis=0)
        )  # lse = top + log_sum, kept apart: top may be large

        kept = 1.0
        loss = log_sum
        if label_smoothing is not None:
            kept = 1.0 - label_smoothing
            loss -= label_smoothing * (tl.sum(plain, axis=0) / V - top)
        loss -= kept * (at_label - top)
        gain = 1.0
        if z_loss is not None:
            lse = top + log_sum
            loss += z_loss * lse * lse
            gain = 1.0 + 2.0 * z_loss * lse
        tl.store(losses_ptr + row, loss)

        if out_ptr is not None:
            g = logit_scale
            if factor_ptr is not None:
                g *= tl.load(factor_ptr)
            if weights_ptr is not None:
                g *= tl.load(weights_ptr + row)
            out_row = out_ptr + row * stride_om
            for first in range(0, whole, BLOCK_V):
                _store_gradient(
                    out_row, logits_row, bias_ptr, first + offs_block, V, label, top, log_sum, gain, kept, g, softcap,
                    logit_scale, label_smoothing, MASKED=False
                )  # fmt: skip
            if whole < V:
                _store_gradient(
                    out_row, logits_row, bias_ptr, whole + offs_block, V, label, top, log_sum, gain, kept, g, softcap,
                    logit_scale, label_smoothing, MASKED=True
                )  # fmt: skip


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    out: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    label_smoothing: float,
    z_loss: float,
) -> torch.Tensor:
    """losses [M] as the module's docstring says; dlogits go to `out`, or nowhere. `out` may be `logits`: the caller's scratch."""
    m, v = logits.shape
    losses = torch.empty(m, dtype=torch.float32, device=logits.device)
    if m == 0:
        return losses
    config = _tile(v, target_of(logits.device))
    launch(
        _cross_entropy_kernel,
        (m,),
        config,
        logits,
        out,
        labels.contiguous(),
        bias,
        factor,
        None if weights is None else weights.contiguous(),
        losses,
        v,
        logits.stride(0),
        0 if out is None else out.stride(0),
        ignore_index,
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(label_smoothing) if label_smoothing else None,
        float(z_loss) if z_loss else None,
        BLOCK_V=config.block_n,
    )
    return losses


def padded(v: int) -> int:
    """Elements from row to row of a scratch of V columns, for loads of 16 bytes."""
    return triton.cdiv(v, 64) * 64


def _tile(v: int, target: Target) -> TileConfig:
    lanes = 64 if target.arch.startswith("gfx9") else 32
    block = min(_BLOCK, max(128, triton.next_power_of_2(v)))
    num_warps = min(8, max(1, block // (_ELEMENTS_PER_LANE * lanes)))
    return TileConfig(block_m=1, block_n=block, block_k=1, block_r=1, num_warps=num_warps, num_stages=1)
