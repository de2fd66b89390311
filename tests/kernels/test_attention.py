"""The attention kernels against float64: forward and every gradient, over the product of everything that enters a score."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastpeft.kernels.attention_call import AttentionCall, aligned_bias
from fastpeft.kernels.attention_tiling import _TABLE, choose_attention
from fastpeft.kernels.tiling import Target
from fastpeft.ops.attention import attention
from fastpeft.reference.attention import attention as reference
from tests.kernels.attention_cases import BF16, F16, F32, SEED, Case, check, describe, draw, kernels_of, run
from tests.tolerance import assert_bits_equal, assert_no_worse

PACKED = ((0, 10, 10, 37), (0, 12, 20, 45))  # longer and shorter keys than queries, and a sequence of keys alone

NAMED = [
    Case(),
    Case(dtype=F16, causal=True),
    Case(sq=45, sk=37, causal=True, sinks=True),  # the first rows see nothing but the sink
    Case(sq=45, sk=37, causal=True, dtype=BF16),  # the first rows see nothing
    Case(sq=1, sk=45, causal=True, dtype=BF16),  # decode
    Case(sq=1, sk=1, batch=1),
    Case(sq=37, sk=1, d=17),
    Case(sq=128, sk=128, batch=1, causal=True, d=32),  # even: no row is masked
    Case(sq=128, sk=128, batch=1, window=(20, 9), d=32, dtype=BF16),
    Case(d=80, heads=1, dtype=BF16),
    Case(d=256, heads=1, batch=1, sq=33, sk=33, dtype=BF16),
    Case(heads=3, kv_heads=3),
    Case(heads=6, kv_heads=2, causal=True, strided=True),
    Case(window=(7, 3)),
    Case(window=(5, None), causal=True, alibi=True),
    Case(window=(0, 0), sq=40, sk=40),
    Case(softcap=2.0, dtype=F32),
    Case(padding=True, dtype=BF16),
    Case(padding=True, sinks=True, causal=True),
    Case(padding=True, sq=101, sk=101, window=(60, 5)),  # tiles of padding alone, of one batch all
    Case(padding=True, sq=128, sk=128, bias=(True, True, True), causal=True, dtype=BF16),
    Case(bias=(True, True, True), causal=True, window=(9, None)),  # tiles that are skipped have a gradient of zero
    Case(bias=(True, False, True)),
    Case(bias=(False, True, True), dropout_p=0.25, dtype=BF16),
    Case(bias=(False, False, False), softcap=3.0),
    Case(bias=(True, True, False), padding=True),
    Case(bidirectional=True, dtype=BF16),
    Case(bidirectional=False, causal=True),
    Case(bidirectional=True, sq=70, sk=21, batch=1),
    Case(packed=PACKED, batch=1, causal=True),
    Case(packed=PACKED, batch=1, window=(4, 2), sinks=True, dtype=BF16),
    Case(packed=PACKED, batch=1, bidirectional=True, bias=(False, True, True)),
    Case(dropout_p=0.5, causal=True),
    Case(rope=1, sq=45, causal=True),
    Case(rope=2, sq=45, causal=True, heads=4, kv_heads=2, dtype=BF16, strided=True),
    Case(rope=1, sq=128, sk=128, batch=1, d=32, dtype=BF16),  # even: no row is masked
    Case(rope=1, sq=37, sk=37, batch=1, packed=((0, 10, 37), (0, 10, 37)), bias=(False, True, True)),
    Case(rope=2, sq=45, padding=True, bias=(True, False, True), window=(20, 3), softcap=3.0),
]


@pytest.mark.parametrize("case", NAMED, ids=describe)
def test_forward_and_gradients(case, device):
    check(case, device)


@st.composite
def any_case(draw):
    """Every term is there or not, independently; shapes are odd and small."""
    flag, maybe = st.booleans(), lambda strategy: st.one_of(st.none(), strategy)
    sq, sk = draw(st.integers(1, 36)), draw(st.integers(1, 36))
    kv_heads = draw(st.integers(1, 2))
    packed = draw(flag)
    causal = draw(flag)
    side = maybe(st.integers(0, 20))
    return Case(
        sq=sq,
        sk=sk,
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.integers(1, 2)),
        batch=1 if packed else draw(st.integers(1, 2)),
        d=draw(st.sampled_from([1, 16, 24])),
        dtype=draw(st.sampled_from([F32, BF16])),
        causal=causal,
        window=draw(maybe(st.tuples(side, side))),
        softcap=draw(maybe(st.just(2.5))),
        bias=draw(maybe(st.tuples(flag, flag, flag))),
        bidirectional=draw(maybe(flag)),
        alibi=draw(flag),
        sinks=draw(flag),
        padding=draw(flag),
        packed=tuple((0, *sorted(draw(st.tuples(*[st.integers(0, n)] * 2))), n) for n in (sq, sk)) if packed else None,
        dropout_p=draw(st.sampled_from([0.0, 0.25])),
        strided=draw(flag),
    )


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.generate],
)
@given(case=any_case())
def test_any_combination(case, device):
    check(case, device)


def test_two_backwards_have_equal_bits(device):
    case = Case(bias=(False, True, True), bidirectional=True, sinks=True, causal=True, dropout_p=0.25, dtype=BF16)
    inputs, others, do = draw(case, device)
    once, again = (run(kernels_of(case), case, inputs, others, do, case.dtype) for _ in range(2))
    for name, tensor in once.items():
        assert_bits_equal(name, again[name], tensor)


def test_rows_without_a_visible_key_are_zeros(device):
    case = Case(sq=45, sk=37, causal=True)
    inputs, others, do = draw(case, device)
    got = run(kernels_of(case), case, inputs, others, do, F32)
    assert (got["o"][:, :8] == 0).all()
    assert (got["dq"][:, :8] == 0).all()
    assert (got["o"][:, 8:] != 0).any(-1).all()


def test_a_bias_of_minus_infinity_hides_keys(device):
    """-inf - -inf is NaN where a whole tile of a row is hidden."""
    q, k, v = (torch.randn(1, 40, 1, 16, device=device) for _ in range(3))
    bias = torch.zeros(1, 1, 40, 40, device=device)
    bias[..., :35] = float("-inf")
    bias[..., 3, :] = float("-inf")
    o = attention(q, k, v, bias=bias, impl="triton")
    exact, eager = (reference(*(t.to(dtype) for t in (q, k[:, 35:], v[:, 35:]))) for dtype in (torch.float64, F32))
    exact[:, 3] = eager[:, 3] = 0
    assert_no_worse("o", o, exact, eager)


def test_only_asked_gradients_are_computed(device, probe):
    q, k, v = (torch.randn(1, 20, 1, 16, device=device) for _ in range(3))
    attention(q.requires_grad_(), k, v, impl="triton").sum().backward()
    assert q.grad is not None
    if device.type == "cpu":
        assert [launch.kernel for launch in probe.launches] == ["_attention_fwd_kernel", "_attention_dq_kernel"]


def test_a_second_differentiation_is_refused(device):
    q, k, v = (torch.randn(1, 9, 1, 16, device=device, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(attention(q, k, v, impl="triton").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: expected first-order gradients only"):
        dq.sum().backward()


def test_no_tokens(device):
    q, k = (torch.randn(2, s, 2, 16, device=device, requires_grad=True) for s in (3, 0))
    o = attention(q, k, k, impl="triton")
    o.sum().backward()
    assert (o == 0).all()
    assert (q.grad == 0).all()
    assert k.grad.shape == k.shape


def test_a_bias_is_copied_only_where_its_rows_are_misaligned(device):
    bias = torch.randn(2, 1, 5, 48, device=device)
    assert aligned_bias(bias).data_ptr() == bias.data_ptr()
    copy = aligned_bias(bias[..., :33])
    assert copy.stride() == (240, 240, 48, 1)
    assert_bits_equal("copy", copy[..., :33], bias[..., :33])


def test_query_tiles_of_the_backward_divide_those_that_write_lse_and_delta():
    for arch in (*_TABLE, "interpreter", "gfx1100", "sm_120"):
        for d in (16, 64, 80, 128, 256):
            for dtype in (F32, BF16):
                call = AttentionCall(1.0)
                angles = torch.zeros(1, 1, d // 2)
                tables = [call, dataclasses.replace(call, distances=torch.zeros(1, 9), seed=SEED)]
                tables.append(dataclasses.replace(call, cos=angles, sin=angles))
                for terms in tables:
                    fwd, dq, dkdv = (
                        choose_attention(kernel, Target(arch, 1), D=d, dtype=dtype, call=terms)
                        for kernel in ("fwd", "dq", "dkdv")
                    )
                    assert fwd.block_m % dkdv.block_m == 0, (arch, d, dtype)
                    assert dq.block_m % dkdv.block_m == 0, (arch, d, dtype)
                    assert terms.distances is None or dq.block_m <= dq.block_n, (arch, d, dtype)
