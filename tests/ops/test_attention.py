"""The public op of attention: what it refuses, and the reference behind it."""

import pytest
import torch

from fastpeft.ops.attention import RelativeBias, attention


def draw(sq=6, sk=6, heads=4, kv_heads=2, batch=2, d=8):
    return tuple(torch.randn(batch, s, h, d) for s, h in ((sq, heads), (sk, kv_heads), (sk, kv_heads)))


def call(**terms):
    q, k, v = draw()
    return attention(q, k, v, impl="reference", **terms)


def test_keys_have_the_queries_head_dim():
    q, k, v = draw()
    with pytest.raises(ValueError, match=r"expected one head dim D.*\(2, 6, 2, 7\)"):
        attention(q, k[..., :7], v[..., :7])


def test_key_heads_divide_query_heads():
    q, k, v = draw(heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="expected Hkv that divides H, got H=4 query heads and Hkv=3"):
        attention(q, k, v)


def test_tensors_are_alike():
    q, k, v = draw()
    with pytest.raises(ValueError, match="of one dtype"):
        attention(q, k.double(), v)
    with pytest.raises(ValueError, match=r"expected q \[B, S, H, D\]"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match="one batch size"):
        attention(q[:1], k, v)
    with pytest.raises(ValueError, match="k and v of one shape"):
        attention(q, k, v[:, :5])
    with pytest.raises(TypeError, match="floating k"):
        attention(q, k.int(), v)


REFUSED = [
    ({"bias": torch.zeros(6, 6)}, ValueError, r"expected bias \[B=2 or 1, H=4 or 1, Sq=6 or 1, Sk=6\], got \(6, 6\)"),
    ({"bias": torch.zeros(2, 4, 6, 1)}, ValueError, r"got \(2, 4, 6, 1\)"),
    ({"bias": torch.zeros(2, 3, 6, 6)}, ValueError, r"got \(2, 3, 6, 6\)"),
    (
        {"bias": torch.ones(1, 1, 6, 6, dtype=torch.bool)},
        TypeError,
        "got torch.bool; a mask of keys is key_padding_mask",
    ),
    ({"window": (-1, 0)}, ValueError, r"expected window sides >= 0.*got \(-1, 0\)"),
    ({"window": -3, "causal": True}, ValueError, "got -3"),
    ({"window": 3}, ValueError, "expected causal=True with a one-sided window"),
    ({"window": (1.5, 0)}, TypeError, "got .1.5, 0."),
    ({"window": "4"}, TypeError, "got '4'"),
    ({"sinks": torch.zeros(2)}, ValueError, r"expected floating sinks \[H=4\], got \(2,\)"),
    ({"alibi_slopes": torch.zeros(3)}, ValueError, r"\[H=4\] or \[B=2, H=4\], got \(3,\)"),
    ({"alibi_slopes": torch.zeros(4, requires_grad=True)}, ValueError, "without a gradient"),
    ({"relative_bias": RelativeBias(torch.zeros(32, 2))}, ValueError, r"\[buckets, H=4\], got \(32, 2\)"),
    ({"key_padding_mask": torch.ones(2, 6)}, TypeError, "True = attend, got torch.float32"),
    ({"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"\[B=2, Sk=6\], got \(2, 5\)"),
    ({"softcap": 0.0}, ValueError, "softcap > 0, got 0.0"),
    ({"scale": float("nan")}, ValueError, "scale > 0, got nan"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p < 1, got 1.0"),
    ({"rope": (torch.zeros(5, 4), torch.zeros(5, 4))}, ValueError, r"\[S=6, R/2 or D=8\].*got \(5, 4\)"),
    ({"rope": (torch.zeros(6, 5), torch.zeros(6, 5))}, ValueError, r"got \(6, 5\)"),
    ({"rope": (torch.zeros(3, 6, 4), torch.zeros(3, 6, 4))}, ValueError, r"\[B=2 or 1, S, ...\].*got \(3, 6, 4\)"),
    ({"cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32)}, ValueError, "together"),
]


@pytest.mark.parametrize(
    ("terms", "error", "words"), REFUSED, ids=[f"{next(iter(case[0]))}-{i}" for i, case in enumerate(REFUSED)]
)
def test_refuses(terms, error, words):
    with pytest.raises(error, match=words):
        call(**terms)


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([0, 4, 2, 6], r"never falls, from 0 to 6 tokens, got \[0, 4, 2, 6\]"),
        ([0, 2, 5], r"got \[0, 2, 5\]"),
        ([1, 2, 6], r"got \[1, 2, 6\]"),
    ],
)
def test_packed_starts_cover_the_tokens(starts, words):
    q, k, v = draw(batch=1)
    cu = torch.tensor(starts, dtype=torch.int32)
    for _ in range(2):  # what was refused once is read again
        with pytest.raises(ValueError, match=words):
            attention(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="expected cu_seqlens_q int32"):
        attention(q, k, v, cu_seqlens_q=cu.long(), cu_seqlens_k=cu)
    good = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected B=1 with packed sequences, got B=2"):
        attention(*draw(), cu_seqlens_q=good, cu_seqlens_k=good)
    attention(q, k, v, cu_seqlens_q=good, cu_seqlens_k=good, impl="reference")
    good[1] = 7  # a tensor that was changed is read again
    with pytest.raises(ValueError, match=r"got \[0, 7, 6\]"):
        attention(q, k, v, cu_seqlens_q=good, cu_seqlens_k=good, impl="reference")


def test_reference_drops_by_seed():
    q, k, v = draw()
    once, again, other = (attention(q, k, v, dropout_p=0.5, seed=seed, impl="reference") for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_autocast_takes_rotated_queries_beside_values_in_half_precision():
    """A rotary embedding gives float32 under autocast: training with --bf16 was refused."""
    q, k, v = draw()
    mixed = q, k, v.bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        attention(*mixed, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(*mixed, causal=True)
        same = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, same)
