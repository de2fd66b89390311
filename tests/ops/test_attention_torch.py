"""Attention by library calls against the float64 specification: every term with every other, at odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpeft import backend
from fastpeft.ops import attention_torch
from fastpeft.ops.attention import RelativeBias, attention
from fastpeft.ops.attention_terms import Settings, Terms
from fastpeft.ops.attention_tiles import keep_of
from tests.ops.attention_cases import by_formula, by_op, draw
from tests.saved_bytes import SavedBytes
from tests.tolerance import (
    CANCELLED_GRADIENT,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
    assert_keep_rate,
    assert_no_worse,
    is_close,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(tensors, terms, do, **options):
    """The op is no worse than the specification in the working dtype; where gradients cancel, by rounding."""
    got = by_op(tensors, terms, do, impl="torch", **options.pop("op", {}))
    exact = by_formula(torch.float64, tensors, terms, do, **options)
    eager = by_formula(None, tensors, terms, do, **options)
    for name, value in got.items():
        if name == "o" or not is_close(value, exact[name], CANCELLED_GRADIENT):
            assert_no_worse(name, value, exact[name], eager[name].to(value.dtype))


ONE_TERM = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"group": 3},
    "window": {"window": (3, 2)},
    "left window": {"causal": True, "window": 2},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": (1, 1, 1)},
    "bias of keys": {"bias": (0, 0, 0)},
    "bias of heads": {"bias": (0, 1, 1), "causal": True},
    "bias of batches": {"bias": (1, 0, 1), "padding": "left"},
    "relative": {"relative": True},
    "relative causal": {"relative": False, "causal": True},
    "alibi": {"alibi": "heads", "causal": True},
    "alibi of batches": {"alibi": "batch"},
    "sinks": {"sinks": True},
    "sinks causal": {"sinks": True, "causal": True, "window": 4},
    "left padding": {"padding": "left", "causal": True},
    "right padding": {"padding": "right", "causal": True},
    "a batch of padding": {"padding": "all", "sinks": True},
    "packed": {"packed": [(3, 3), (1, 4), (0, 2), (5, 5)], "causal": True},
    "packed relative": {"packed": [(3, 3), (6, 2), (2, 0), (5, 5)], "relative": True, "sinks": True},
    "packed bias": {"packed": [(3, 3), (6, 2), (5, 5)], "bias": (0, 1, 1), "window": (2, 2)},
    "scale": {"scale": 0.3, "bias": (0, 0, 1), "softcap": 2.0},
}
SIZES = {"square": (9, 9), "prefix": (5, 12), "more queries": (11, 4), "one token": (1, 7), "one key": (3, 1)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("term", ONE_TERM)
def test_each_term(term, sizes):
    options = ONE_TERM[term]
    if "packed" in options and sizes != "square":
        pytest.skip("packed sequences have their own lengths")
    sq, sk = SIZES[sizes]
    check(*draw(sq=sq, sk=sk, **options))


@pytest.mark.parametrize("term", [*ONE_TERM, "wide window"])
def test_each_term_in_small_pieces(term, monkeypatch):
    """Tiles and pieces cut as those of long sequences are: partly hidden on either side, wholly visible, and left out."""
    cut_small(monkeypatch)
    options = ONE_TERM.get(term, {"window": (9, 7), "softcap": 3.0})
    check(*draw(sq=23, sk=31, **options))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("term", ["plain", "causal", "bias of heads", "relative", "softcap", "sinks", "left padding"])
def test_half_precision(term, dtype):
    check(*draw(dtype=dtype, sq=33, sk=40, d=20, **ONE_TERM[term]))


@st.composite
def cases(draw_one):
    pick = lambda *values: draw_one(st.sampled_from(values))  # noqa: E731
    case = {
        "kv_heads": pick(1, 2, 3),
        "group": pick(1, 2),
        "d": pick(3, 8, 33),
        "softcap": pick(None, None, 2.0),
        "bias": pick(None, None, (1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)),
        "relative": pick(None, None, True, False),
        "alibi": pick(None, None, "heads", "batch"),
        "sinks": pick(False, True),
    }
    if pick(False, False, True):
        case["packed"] = draw_one(
            st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4).filter(
                lambda pairs: sum(a for a, _ in pairs) and sum(b for _, b in pairs)
            )
        )
    else:
        case |= {"batch": pick(1, 2), "sq": pick(1, 5, 17, 40), "sk": pick(1, 6, 17, 40)}
        case["padding"] = pick(None, None, "left", "right", "all")
    case["causal"] = pick(False, True)
    case["window"] = pick(None, None, 3, (2, 4), (None, 1)) if case["causal"] else pick(None, None, (2, 4), (None, 0))
    return case


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(case=cases(), small=st.booleans())
def test_every_product_of_terms(case, small):
    """With `small` tiles and pieces are cut as those of long sequences are."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            cut_small(patch)
        check(*draw(**case))


def cut_small(patch):
    patch.setattr(attention_torch, "_ROWS", 4)
    patch.setattr(attention_torch, "_MASK", 64)
    patch.setattr(attention_torch.attention_tiles, "_ROWS", 4)
    patch.setattr(attention_torch.attention_tiles, "_WINDOW_ROWS", 3)
    patch.setattr(attention_torch.attention_tiles, "_TILE", 64)


@pytest.mark.parametrize("term", ["causal", "bias", "left padding", "window", "packed"])
def test_dropout_is_a_function_of_the_seed(term):
    tensors, terms, do = draw(sq=14, sk=14, **ONE_TERM[term])
    given_terms = Terms(
        tensors.get("bias"),
        key_padding_mask=terms.get("key_padding_mask"),
        cu_seqlens_q=terms.get("cu_seqlens_q"),
        cu_seqlens_k=terms.get("cu_seqlens_k"),
    )
    left, right = terms["window"] or (None, None)
    numbers = Settings(1.0, left, 0 if terms["causal"] else right, seed=7, threshold=16384)
    keep = keep_of(tensors["q"], tensors["k"], given_terms, numbers)
    check(tensors, terms, do, op={"dropout_p": 0.25, "seed": 7}, dropout_p=0.25, keep=keep)
    other = by_op(tensors, terms, do, impl="torch", dropout_p=0.25, seed=8)
    assert not torch.equal(other["o"], by_op(tensors, terms, do, impl="torch", dropout_p=0.25, seed=7)["o"])


def test_dropout_keeps_the_rate():
    q = torch.zeros(2, 300, 4, 2)
    keep = keep_of(q, q, Terms(), Settings(1.0, seed=3, threshold=16384))
    assert_keep_rate("keep", keep, 0.25)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"bias": (0, 1, 1)}, {"relative": True, "softcap": 3.0}, {"sinks": True, "padding": "left"}],
)
def test_two_backwards_have_the_same_bits(options):
    tensors, terms, do = draw(sq=37, sk=37, **options)
    for name, first in by_op(tensors, terms, do, impl="torch").items():
        assert_bits_equal(name, by_op(tensors, terms, do, impl="torch")[name], first)


@pytest.mark.parametrize("options", [{}, {"bias": (0, 1, 1)}, {"relative": False}, {"window": 100}])
def test_four_thousand_tokens(options):
    """1 x 4096: no worse than the specification on the last rows, whose gradients are taken alone."""
    tensors, terms, do = draw(batch=1, sq=4096, sk=4096, kv_heads=1, group=1, d=8, causal=True, **options)
    last = 5
    do[:, :-last] = 0
    got = by_op(tensors, terms, do, impl="torch")
    tensors["q"], do = tensors["q"][:, -last:], do[:, -last:]
    if "bias" in tensors:
        tensors["bias"] = tensors["bias"][:, :, -last:]
    exact, eager = (by_formula(dtype, tensors, terms, do) for dtype in (torch.float64, FP32))
    for name in exact:
        part = got[name][:, -last:] if name in ("o", "q") else got[name]
        part = part[:, :, -last:] if name == "bias" else part
        assert_no_worse(name, part, exact[name], eager[name])


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"softcap": 5.0}, {"sinks": True}, {"window": 64}])
def test_saved_bytes_grow_with_the_length(options):
    def saved(length):
        tensors, terms, _ = draw(batch=1, sq=length, sk=length, causal=True, **options)
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        table = leaves.pop("table", None)
        if table is not None:
            leaves["relative_bias"] = RelativeBias(table, **terms["relative"])
        terms.pop("relative", None)
        with SavedBytes(tensors.values()) as watch:
            o = attention(**leaves, **terms, impl="torch")
            total = watch.total()
        del o
        return total

    short, long = saved(256), saved(1024)
    assert long == 4 * short
    assert short == 256 * 4 * (8 + 1) * 4  # o and lse, of 4 heads, in float32


def test_only_what_needs_a_gradient_gets_one():
    tensors, terms, do = draw(bias=(0, 1, 1), sinks=True)
    for name in tensors:
        leaves = {key: x.detach().requires_grad_(key == name) for key, x in tensors.items()}
        attention(**leaves, **terms, impl="torch").backward(do)
        assert [key for key, x in leaves.items() if x.grad is not None] == [name]


def test_wide_and_native_bfloat16_agree(monkeypatch):
    """With matrix instructions for bfloat16 nothing is widened; both roundings are within the specification's."""
    monkeypatch.setattr(backend, "cpu_multiplies_bfloat16", lambda: True)
    tensors, terms, do = draw(sq=150, sk=150, causal=True, dtype=BF16, d=16)
    native = by_op(tensors, terms, do, impl="torch")
    monkeypatch.setattr(backend, "cpu_multiplies_bfloat16", lambda: False)
    wide = by_op(tensors, terms, do, impl="torch")
    exact = by_formula(torch.float64, tensors, terms, do)
    for name, value in wide.items():
        assert_no_worse(name, value, exact[name], native[name])


def test_heads_first_memory_is_read_as_it_is():
    """transformers keeps [B, H, S, D]: its transposed views give the same bits as contiguous tensors."""
    tensors, terms, do = draw(causal=True, sq=21, sk=21)
    views = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in tensors.items()}
    strided = {name: x.mT.contiguous().mT for name, x in tensors.items()}
    expected = by_op(tensors, terms, do, impl="torch")
    for other in (views, strided):
        for name, value in by_op(other, terms, do, impl="torch").items():
            assert_close(name, value, expected[name], OTHER_ORDER_OF_SUMS)
