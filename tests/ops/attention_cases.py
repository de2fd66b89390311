"""What the tests of attention draw: terms of every kind at odd shapes, and the values and gradients that they must give."""

import torch

from fastpeft.ops.attention import RelativeBias, attention
from fastpeft.reference.attention import attention as formula

GRADIENTS = ("q", "k", "v", "bias", "table", "sinks")


def draw(
    *,
    batch=2,
    sq=9,
    sk=9,
    kv_heads=2,
    group=2,
    d=8,
    dtype=torch.float32,
    causal=False,
    window=None,
    softcap=None,
    bias=None,
    relative=None,
    alibi=None,
    sinks=False,
    padding=None,
    packed=None,
    scale=None,
    device="cpu",
):
    """Inputs by name. bias: which of (batch, head, query) it has; relative: bidirectional or not; alibi: "heads" or "batch";
    padding: "left", "right" or "all" (a whole row); packed: lengths of (queries, keys)."""
    heads = kv_heads * group
    if packed:
        batch, sq, sk = 1, sum(a for a, _ in packed), sum(b for _, b in packed)

    def normal(*shape, of=dtype):
        return torch.randn(*shape).to(device, of)

    tensors = {
        "q": normal(batch, sq, heads, d),
        "k": normal(batch, sk, kv_heads, d),
        "v": normal(batch, sk, kv_heads, d),
    }
    terms = {"causal": causal, "window": window, "softcap": softcap, "scale": scale}
    if bias is not None:
        sizes = [size if has else 1 for size, has in zip((batch, heads, sq), bias)]
        tensors["bias"] = normal(*sizes, sk)
    if relative is not None:
        tensors["table"] = normal(8, heads, of=torch.float32)
        terms["relative"] = {"bidirectional": relative, "max_distance": 20}
    if sinks:
        tensors["sinks"] = normal(heads, of=torch.float32)
    if alibi:
        terms["alibi_slopes"] = torch.rand(*((batch, heads) if alibi == "batch" else (heads,)), device=device)
    if padding:
        mask = torch.ones(batch, sk, dtype=torch.bool, device=device)
        cut = max(1, sk // 3)
        mask[0, :cut] = padding != "left"
        mask[0, -cut:] &= padding != "right"
        mask[0] &= padding != "all"
        terms["key_padding_mask"] = mask
    if packed:
        for name, side in (("cu_seqlens_q", 0), ("cu_seqlens_k", 1)):
            lengths = torch.tensor([0, *(pair[side] for pair in packed)], dtype=torch.int32, device=device)
            terms[name] = lengths.cumsum(0, dtype=torch.int32)
    return tensors, terms, normal(batch, sq, heads, d)


def _call(function, tensors, terms, dtype, options):
    """o and the gradients by name, with every tensor in `dtype` (None: as it is)."""
    leaves = {name: (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in tensors.items()}
    named = dict(leaves)
    arguments = {name: value for name, value in terms.items() if name != "relative"}
    table = named.pop("table", None)
    if table is not None:
        named["relative_bias"] = RelativeBias(table, **terms["relative"])
    return function(**named, **arguments, **options), leaves


def by_formula(dtype, tensors, terms, do, **options):
    """{"o", gradients by name} of the specification in `dtype`."""
    terms = dict(terms)
    if isinstance(terms["window"], int):
        terms["window"] = (terms["window"], None)
    o, leaves = _call(formula, tensors, terms, dtype, options)
    grads = torch.autograd.grad(o, list(leaves.values()), do.to(o.dtype))
    return {"o": o.detach()} | dict(zip(leaves, grads))


def by_op(tensors, terms, do, *, impl, **options):
    """{"o", gradients by name} of the public op."""
    o, leaves = _call(attention, tensors, terms, None, {"impl": impl, **options})
    grads = torch.autograd.grad(o, list(leaves.values()), do)
    return {"o": o.detach()} | dict(zip(leaves, grads))
