"""One attention case: inputs drawn once, the float64 reference, the eager reference in the working dtype, and the kernels."""

import dataclasses
from dataclasses import dataclass

import torch

from fastpeft.kernels.lora import lora_keep
from fastpeft.ops.attention import RelativeBias, attention
from fastpeft.reference import attention as reference
from fastpeft.reference.rope import apply_rope
from tests.tolerance import assert_bits_equal, assert_no_worse

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SEED = 0x1234_5678_9ABC_DEF
BUCKETS, FAR = 8, 12  # of the relative bias: some distances are exact, some share a bucket, some are beyond the last


@dataclass(frozen=True)
class Case:
    """What one call has; see `attention`. bias: its (B, H, Sq) sides, "1" or "full" each, or None."""

    sq: int = 37
    sk: int = 45
    heads: int = 2
    kv_heads: int = 1
    batch: int = 2
    d: int = 16
    dtype: torch.dtype = F32
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    bias: tuple[bool, bool, bool] | None = None
    bidirectional: bool | None = None
    alibi: bool = False
    sinks: bool = False
    padding: bool = False
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    dropout_p: float = 0.0
    strided: bool = False
    rope: int = 0  # batches of the tables: q and k are rotated by the kernels


def draw(case: Case, device) -> tuple[dict, dict, torch.Tensor]:
    """(inputs with gradient, other arguments, do): everything that the case's call gets, in the working dtype."""
    generator = torch.Generator().manual_seed(case.sq * 7919 + case.sk)

    def normal(*shape, dtype=case.dtype):
        tensor = torch.randn(*shape, generator=generator).to(dtype)
        if case.strided and len(shape) == 4:  # heads before tokens, with gaps
            padded = torch.zeros(shape[0], shape[2], shape[1], shape[3] + 8, dtype=dtype)
            tensor = padded[..., 8:].transpose(1, 2).copy_(tensor)
        return tensor.to(device)

    batch, sq, sk, heads = case.batch, case.sq, case.sk, case.heads
    kv = (batch, sk, case.kv_heads, case.d)
    inputs = {"q": normal(batch, sq, heads, case.d), "k": normal(*kv), "v": normal(*kv)}
    others: dict = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    if case.bias is not None:
        of_batch, of_head, of_row = case.bias
        shape = (batch if of_batch else 1, heads if of_head else 1, sq if of_row else 1, sk)
        inputs["bias"] = normal(*shape)
    if case.bidirectional is not None:
        inputs["table"] = normal(BUCKETS, heads)
    if case.sinks:
        inputs["sinks"] = normal(heads)
    if case.alibi:
        others["alibi_slopes"] = normal(batch, heads, dtype=F32).abs()
    if case.padding:
        mask = torch.rand(batch, sk, generator=generator) < 0.6
        mask[0, : sk // 2] = False
        mask[-1] &= batch == 1  # a batch without a key
        others["key_padding_mask"] = mask.to(device)
    if case.packed is not None:
        starts = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in case.packed)
        others["cu_seqlens_q"], others["cu_seqlens_k"] = starts
    if case.rope:
        angles = torch.rand(case.rope, sq, case.d // 2, generator=generator) * 6
        others["rope"] = (angles.cos().to(device), angles.sin().to(device))
    return inputs, others, normal(batch, sq, heads, case.d)


def run(function, case: Case, inputs: dict, others: dict, do: torch.Tensor, dtype: torch.dtype) -> dict:
    """{"o": o, "dNAME": gradient of each input} of `function` in `dtype`."""
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
    terms = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
    if "table" in leaves:
        terms["relative_bias"] = RelativeBias(leaves["table"], case.bidirectional, FAR)
    o = function(leaves["q"], leaves["k"], leaves["v"], **others, **terms)
    o.backward(do.to(dtype))
    return {"o": o.detach(), **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def kernels_of(case: Case):
    """The public op on the kernels."""

    def function(*args, **options):
        options["rope_on_load"] = "rope" in options
        return attention(*args, **options, dropout_p=case.dropout_p, seed=SEED, impl="triton")

    return function


def keep_of(case: Case, device) -> torch.Tensor | None:
    """The mask that the kernels draw, [B, H, Sq, Sk]."""
    if not case.dropout_p:
        return None
    threshold = round(case.dropout_p * 65536)
    keep = lora_keep(SEED, case.batch * case.heads * case.sq, case.sk, threshold, device)
    return keep.view(case.batch, case.heads, case.sq, case.sk)


def exactly(case: Case, inputs: dict, others: dict, do: torch.Tensor, keep) -> dict:
    """What `run` gives, by the reference in float64."""

    def function(q, k, v, rope=None, **options):
        q, k = _rotated(q, k, rope)
        return reference.attention(q, k, v, **options, dropout_p=case.dropout_p, keep=keep)

    return run(function, case, inputs, others, do, torch.float64)


def _rotated(q, k, rope):
    if rope is None:
        return q, k
    return tuple(apply_rope(x, *(table.to(x.dtype) for table in rope)) for x in (q, k))


def composed(case: Case, inputs: dict, others: dict, do: torch.Tensor, keep) -> dict:
    """What `run` gives, by plain calls in the working dtype, with the kernels' form of the softmax's gradient.

    ds = p (dp - rowsum(do o)) leaves a rounding where a query sees one key and dp = do o: autograd's softmax leaves none there,
    which no kernel that keeps only o could reach.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    q, k, v = leaves["q"], leaves["k"], inputs["v"]
    terms = {"bias": leaves["bias"]} if "bias" in leaves else {}
    if "table" in leaves:
        terms["relative_bias"] = RelativeBias(leaves["table"], case.bidirectional, FAR)
    others = dict(others)
    s = reference.scores(*_rotated(q, k, others.pop("rope", None)), **others, **terms)
    with torch.no_grad():
        sink = (
            inputs["sinks"].to(s.dtype).view(1, -1, 1, 1)
            if "sinks" in inputs
            else torch.full_like(s[..., :1], -torch.inf)
        )
        lse = torch.cat([s, sink.expand_as(s[..., :1])], -1).logsumexp(-1, keepdim=True)
        hidden = lse == -torch.inf
        p = torch.where(hidden, 0.0, (s - lse).exp())
        kept = torch.ones_like(p) if keep is None else keep.to(p.dtype) / (1 - case.dropout_p)
        of_group = [t.repeat_interleave(case.heads // case.kv_heads, 2) for t in (inputs["k"], v)]
        o = torch.einsum("bhij,bjhd->bihd", (p * kept).to(v.dtype), of_group[1])
        delta = (do * o).sum(-1).transpose(1, 2)[..., None]
        dp = torch.einsum("bihd,bjhd->bhij", do, of_group[1]) * kept
        ds = p * (dp - delta)
        dv = torch.einsum("bhij,bihd->bjhd", (p * kept).to(v.dtype), do)
        dv = dv.unflatten(2, (case.kv_heads, -1)).sum(3)
    s.backward(ds)
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items()} | {"dv": dv}
    if "sinks" in inputs:
        share = torch.where(hidden, 0.0, (sink - lse).exp())
        grads["dsinks"] = -(share * delta).sum((0, 2, 3)).to(inputs["sinks"].dtype)
    return {"o": o, **grads}


def check(case: Case, device) -> dict:
    """Forward and every gradient of the kernels against float64: no worse than eager code, inputs unchanged. Returns them."""
    inputs, others, do = draw(case, device)
    tensors = [*inputs.values(), *(t for t in others.values() if isinstance(t, torch.Tensor)), do]
    before = [tensor.clone() for tensor in tensors]
    got = run(kernels_of(case), case, inputs, others, do, case.dtype)
    for tensor, kept in zip(tensors, before, strict=True):
        assert_bits_equal("input", tensor, kept)
    keep = keep_of(case, device)
    exact = exactly(case, inputs, others, do, keep)
    eager = composed(case, inputs, others, do, keep)
    assert set(got) == set(exact)
    for name, tensor in got.items():
        assert_no_worse(f"{name} of {describe(case)}", tensor, exact[name], eager[name])
    return got


def describe(case: Case) -> str:
    """The fields that are not the default."""
    fields = dataclasses.fields(case)
    changed = {f.name: getattr(case, f.name) for f in fields if getattr(case, f.name) != f.default}
    return " ".join(f"{name}={value}" for name, value in changed.items()) or "plain"
