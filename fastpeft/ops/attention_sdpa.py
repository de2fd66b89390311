"""Calls that PyTorch's scaled_dot_product_attention does as well as anything on a CPU: they go there with nothing around.

The check is made first and costs less than the rest of the op's: a layer of 64 tokens takes 0.5 ms, and Python that runs after a
large product finds none of itself in the cache. Half precision is among them only where it is not widened, float32 only where
products do not go through oneDNN: attention_torch.py.
"""

import math

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops import attention_bf16, fast_matmul

WIDE_FORWARD_FROM = 128  # queries from which on bfloat16 is widened for the forward pass


def _as_it_is(q, k, v) -> bool:
    """Is the kernel to get the dtype that the caller has?"""
    if q.dtype == torch.float32:
        return not fast_matmul.entered()  # its products must stay with MKL, in backward too
    if q.dtype == torch.float64:
        return True
    if torch.compiler.is_compiling():
        return False  # the operator finds out where the graph runs
    if q.dtype == torch.bfloat16 and attention_bf16.worth(q, k):
        return False
    if q.dtype == torch.bfloat16 and backend.cpu_multiplies_bfloat16():
        return True
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    return q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and q.shape[1] < WIDE_FORWARD_FROM)


def covers(q, k, v, scale, causal, bias, key_padding_mask) -> bool:
    """On the CPU, not to be widened, sizes that fit, causal over a square or one query, at most one mask, without a gradient."""
    if not q.device.type == k.device.type == v.device.type == "cpu" or not q.dtype == k.dtype == v.dtype:
        return False
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or not _as_it_is(q, k, v):
        return False
    (batch, sq, heads, d), (kv_batch, sk, kv_heads, kv_d) = q.shape, k.shape
    if kv_batch != batch or kv_d != d or not kv_heads or heads % kv_heads or not q.numel() or not k.numel():
        return False
    causal = causal and sq > 1  # one query, beside the last key, sees all of them
    if (causal and sq != sk) or not (scale is None or 0 < scale < math.inf) or torch.is_autocast_enabled("cpu"):
        return False
    if bias is None and key_padding_mask is None:
        return True
    if causal or (bias is not None and key_padding_mask is not None):
        return False
    if bias is None:
        return key_padding_mask.dtype == torch.bool and tuple(key_padding_mask.shape) == (batch, sk)
    full = (batch, heads, sq, sk)
    fits = bias.dim() == 4 and bias.shape[3] == sk and all(n in (1, m) for n, m in zip(bias.shape, full, strict=True))
    return fits and bias.dtype == q.dtype and bias.device == q.device and not bias.requires_grad


def by_sdpa(q, k, v, scale, causal, bias, key_padding_mask) -> torch.Tensor:
    """o [B, Sq, H, D] of a call that `covers` admits."""
    mask = bias if key_padding_mask is None else key_padding_mask[:, None, None, :]
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        mask,
        is_causal=causal and q.shape[1] > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return o.transpose(1, 2)
