"""Attention, [B, S, H, D] in and out, with the gradients of q, k, v and of a learnt bias.

FLOP  4 B H S^2 D forward (half of it where causal), 2.5 times that backward
Bytes q, k, v, o and their gradients once; a bias and its gradient once
Masks and biases are made beforehand; making them is not timed.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import DTYPE_BYTES, SHORT, Absent, Op, Work
from fastpeft.ops.attention import RelativeBias, attention


@dataclass(frozen=True)
class AttentionCase:
    """Sizes and terms. bias: "", "learnt" [1, H, S, S], "fixed" or "relative" (T5's table)."""

    batch: int
    tokens: int
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = False
    padded: bool = False
    window: int = 0
    softcap: float = 0.0
    bias: str = ""
    backward: bool = True

    def __str__(self) -> str:
        heads = f"H{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads < self.heads else "")
        terms = [name for name in ("causal", "padded") if getattr(self, name)]
        terms += [f"window{self.window}"] if self.window else []
        terms += [f"softcap{self.softcap:g}"] if self.softcap else []
        terms += [f"{self.bias}-bias"] if self.bias else []
        terms += [] if self.backward else ["forward"]
        return " ".join([f"{self.batch}x{self.tokens}", heads, f"D{self.head_dim}", SHORT[self.dtype], *terms])

    def flops(self) -> float:
        seen = min(self.window, self.tokens) if self.window else self.tokens / (2 if self.causal else 1)
        forward = 4.0 * self.batch * self.heads * self.tokens * seen * self.head_dim
        return 3.5 * forward if self.backward else forward

    def bytes(self) -> float:
        q, kv = (self.batch * self.tokens * heads * self.head_dim for heads in (self.heads, self.kv_heads))
        bias = self.heads * self.tokens**2 if self.bias in ("learnt", "fixed") else 0
        forward = 2 * q + 2 * kv + bias
        backward = 4 * q + 4 * kv + bias * (2 if self.bias == "learnt" else 1)
        return DTYPE_BYTES[self.dtype] * (forward + (backward if self.backward else 0))


LENGTHS = (512, 1024, 2048, 4096)
"""Of one kind of case, for the plot of memory over the sequence length."""

CASES = (
    *(
        AttentionCase(batch, tokens, kv_heads=kv_heads, dtype=dtype, causal=causal, backward=backward)
        for dtype in ("float32", "bfloat16")
        for batch, tokens in ((16, 64), (4, 256), (1, 1024))
        for kv_heads, causal in ((8, False), (2, True))
        for backward in (False, True)
    ),
    AttentionCase(4, 256, 9, 3, dtype="bfloat16", causal=True),
    AttentionCase(4, 256, padded=True),
    AttentionCase(1, 1024, bias="fixed"),
    *(AttentionCase(1, tokens, heads=2, kv_heads=2, causal=True) for tokens in LENGTHS),
    AttentionCase(1, 1024, bias="learnt"),
    AttentionCase(1, 1024, bias="learnt", dtype="bfloat16"),
    AttentionCase(4, 256, bias="learnt"),
    AttentionCase(1, 1024, bias="relative"),
    AttentionCase(1, 1024, softcap=30.0, causal=True),
    AttentionCase(1, 2048, window=256, causal=True, heads=4, kv_heads=4),
    AttentionCase(4, 2048, 32, 8, 128, dtype="bfloat16", causal=True),
)
QUICK = (
    AttentionCase(4, 256, 9, 3, dtype="bfloat16", causal=True),
    AttentionCase(16, 64),
    AttentionCase(1, 1024, kv_heads=2, causal=True, backward=False),
    AttentionCase(1, 1024, bias="learnt"),
)


def inputs(case: AttentionCase, device: torch.device) -> SimpleNamespace:
    """q, k, v, and the bias and mask in every form that a provider takes."""
    draw = torch.Generator().manual_seed(0)
    dtype, s = getattr(torch, case.dtype), case.tokens

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(device, dtype)

    q = normal(case.batch, s, case.heads, case.head_dim)
    k, v = (normal(case.batch, s, case.kv_heads, case.head_dim) for _ in range(2))
    bias = normal(1, case.heads, s, s) if case.bias in ("learnt", "fixed") else None
    table = torch.randn(32, case.heads, generator=draw).to(device) if case.bias == "relative" else None
    padding = mask = None
    if case.padded:
        padding = (torch.arange(s) < torch.linspace(s // 2, s, case.batch).long()[:, None]).to(device)
        mask = padding[:, None, None, :]
    if case.window:
        distance = torch.arange(s, device=device) - torch.arange(s, device=device)[:, None]
        mask = (distance <= 0) & (distance > -case.window)
    leaves = [q, k, v] + [t for t, name in ((bias, "learnt"), (table, "relative")) if case.bias == name]
    for leaf in leaves:
        leaf.requires_grad_(case.backward)
    exempt = [tensor for tensor in (bias, mask, padding) if tensor is not None]
    return SimpleNamespace(
        case=case, q=q, k=k, v=v, bias=bias, table=table, padding=padding, mask=mask, leaves=leaves, exempt=exempt
    )


def _work(given: SimpleNamespace, forward) -> Work:
    return Work(forward, given.leaves, given.exempt)


def with_fastpeft(given: SimpleNamespace) -> Work:
    case = given.case

    def forward():
        return attention(
            given.q,
            given.k,
            given.v,
            causal=case.causal,
            window=case.window - 1 if case.window else None,
            softcap=case.softcap or None,
            bias=given.bias,
            relative_bias=None if given.table is None else RelativeBias(given.table),
            key_padding_mask=given.padding,
        )

    return _work(given, forward)


def _added(given: SimpleNamespace, table: torch.Tensor | None) -> torch.Tensor | None:
    """The bias [1, H, S, S]: of a table, gathered as transformers' T5 does it."""
    if table is None:
        return given.bias
    positions = torch.arange(given.case.tokens, device=table.device)
    buckets = RelativeBias(table).buckets(positions - positions[:, None])
    return table[buckets].permute(2, 0, 1)[None]


def with_sdpa(given: SimpleNamespace) -> Work:
    case = given.case
    if case.softcap:
        raise Absent("scaled_dot_product_attention has no softcap")

    def forward():
        q, k, v = (tensor.transpose(1, 2) for tensor in (given.q, given.k, given.v))
        mask = given.mask if given.mask is not None else _added(given, given.table)
        mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
        causal = case.causal and mask is None
        grouped = case.kv_heads < case.heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)

    return _work(given, forward)


def _plain(given: SimpleNamespace, q, k, v, bias) -> torch.Tensor:
    case, s = given.case, given.case.tokens
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(case.heads // case.kv_heads, 1) for tensor in (k, v))
    scores = q @ k.mT * case.head_dim**-0.5
    if case.softcap:
        scores = torch.tanh(scores / case.softcap) * case.softcap
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    if given.mask is not None:
        scores = scores.masked_fill(~given.mask, float("-inf"))
    elif case.causal:
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    wide = torch.promote_types(q.dtype, torch.float32)
    return (scores.softmax(-1, dtype=wide).to(q.dtype) @ v).transpose(1, 2)


def with_eager(given: SimpleNamespace) -> Work:
    if given.case.batch * given.case.heads * given.case.tokens**2 > 2**27:
        raise Absent("its scores would take more than 512 MB")
    return _work(given, lambda: _plain(given, given.q, given.k, given.v, _added(given, given.table)))


def with_flash_attn(given: SimpleNamespace) -> Work:
    case = given.case
    if given.q.device.type != "cuda":
        raise Absent("flash-attn needs a GPU")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise Absent(str(error)) from error
    if case.bias or case.padded or case.dtype == "float32":
        raise Absent("flash-attn has no additive bias, no dense padding mask and no float32")
    window = (case.window - 1, 0) if case.window else (-1, -1)
    return _work(
        given,
        lambda: flash_attn_func(
            given.q, given.k, given.v, causal=case.causal, window_size=window, softcap=case.softcap
        ),
    )


def with_xformers(given: SimpleNamespace) -> Work:
    case = given.case
    if given.q.device.type != "cuda":
        raise Absent("xformers' memory-efficient attention needs a GPU")
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention
    except ImportError as error:
        raise Absent(str(error)) from error
    if case.bias or case.padded or case.window or case.softcap or case.kv_heads < case.heads:
        raise Absent("measured for plain heads, causal or not, only")
    mask = LowerTriangularMask() if case.causal else None
    return _work(given, lambda: memory_efficient_attention(given.q, given.k, given.v, attn_bias=mask))


def with_flex(given: SimpleNamespace) -> Work:
    case = given.case
    if given.q.device.type != "cuda":
        raise Absent("FlexAttention has no backward on a CPU")
    if case.bias == "relative" or case.padded or case.window:
        raise Absent("measured for causal masks, softcap and a dense bias only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s = case.tokens
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, s, s, device="cuda") if case.causal else None

    def score(value, b, h, q, kv):
        value = torch.tanh(value / case.softcap) * case.softcap if case.softcap else value
        return value if given.bias is None else value + given.bias[0, h, q, kv]

    compiled = torch.compile(flex_attention)

    def forward():
        q, k, v = (tensor.transpose(1, 2) for tensor in (given.q, given.k, given.v))
        return compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=case.kv_heads < case.heads).transpose(
            1, 2
        )

    return _work(given, forward)


def exact(given: SimpleNamespace, dy: torch.Tensor | None) -> list[torch.Tensor]:
    """The plain form in float64."""
    leaves = [leaf.detach().double().requires_grad_(dy is not None) for leaf in given.leaves]
    bias = None if given.bias is None else given.bias.detach().double()
    if given.case.bias == "learnt":
        bias = leaves[3]
    elif given.case.bias == "relative":
        bias = _added(given, leaves[3])
    o = _plain(given, *leaves[:3], bias)
    return [o.detach()] if dy is None else [o.detach(), *torch.autograd.grad(o, leaves, dy.double())]


OP = Op(
    "attention",
    "Attention",
    CASES,
    QUICK,
    baseline="sdpa",
    inputs=inputs,
    providers={
        "sdpa": with_sdpa,
        "eager": with_eager,
        "flash-attn": with_flash_attn,
        "xformers": with_xformers,
        "FlexAttention": with_flex,
        "fastpeft": with_fastpeft,
    },
    exact=exact,
)
