"""The specification of attention against SDPA where SDPA has the case, and against itself where it has not."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastpeft.reference.attention import RelativeBias, attention, distance_buckets, weights
from tests.tolerance import assert_no_worse

F64 = torch.float64


def draw(sq, sk, heads=4, kv_heads=2, batch=2, d=8):
    return (torch.randn(batch, s, h, d, dtype=F64) for s, h in ((sq, heads), (sk, kv_heads), (sk, kv_heads)))


def sdpa(q, k, v, **options):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (3, 7), (1, 9)])
def test_equals_sdpa(sq, sk):
    q, k, v = draw(sq, sk)
    bias = torch.randn(2, 4, sq, sk, dtype=F64)
    distance = torch.arange(sk) - (torch.arange(sq) + sk - sq)[:, None]
    assert_no_worse("plain", attention(q, k, v), sdpa(q, k, v), sdpa(q, k, v))
    assert_no_worse("bias", attention(q, k, v, bias=bias), *[sdpa(q, k, v, attn_mask=bias)] * 2)
    assert_no_worse("causal", attention(q, k, v, causal=True), *[sdpa(q, k, v, attn_mask=distance <= 0)] * 2)
    window = (distance >= -2) & (distance <= 1)
    assert_no_worse("window", attention(q, k, v, window=(2, 1)), *[sdpa(q, k, v, attn_mask=window)] * 2)


def test_rows_without_a_visible_key_are_zeros_with_zero_gradients():
    q, k, v = (tensor.requires_grad_() for tensor in draw(7, 3))
    o = attention(q, k, v, causal=True)
    assert (o[:, :4] == 0).all()
    assert (o[:, 4:] != 0).all()
    o.sum().backward()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (q, k, v))
    assert (q.grad[:, :4] == 0).all()


def test_packed_sequences_are_separate_ones():
    (q, k, v), ends_q, ends_k = draw(9, 12, batch=1), (0, 2, 2, 9), (0, 5, 6, 12)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32) for ends in (ends_q, ends_k))
    table = torch.randn(8, 4, dtype=F64)
    terms = {"causal": True, "relative_bias": RelativeBias(table, max_distance=8), "sinks": torch.randn(4, dtype=F64)}
    packed = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **terms)
    alone = [
        attention(q[:, a:b], k[:, c:d], v[:, c:d], **terms)
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    ]
    assert_no_worse("packed", packed, *[torch.cat(alone, dim=1)] * 2)


def test_a_sink_takes_its_share():
    q, k, _ = draw(5, 5)
    sinks = torch.tensor([0.0, 1.0, -2.0, float("-inf")], dtype=F64)
    p = weights(q, k, sinks=sinks)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / math.sqrt(8)
    norm = scores.exp().sum(-1, keepdim=True) + sinks.exp().view(4, 1, 1)
    assert_no_worse("p", p, *[scores.exp() / norm] * 2)


def test_buckets_are_t5s():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-300, 301)
    for bidirectional in (True, False):
        for buckets, far in ((32, 128), (8, 20), (64, 256)):
            got = distance_buckets(distance, buckets, bidirectional, far)
            expected = modeling.T5Attention._relative_position_bucket(distance, bidirectional, buckets, far)
            assert torch.equal(got, expected), (bidirectional, buckets, far)


def test_relative_bias_refuses_what_has_no_buckets():
    with pytest.raises(ValueError, match="expected floating table"):
        RelativeBias(torch.zeros(32))
    with pytest.raises(ValueError, match="max_distance=8"):
        RelativeBias(torch.zeros(32, 2), max_distance=8)
