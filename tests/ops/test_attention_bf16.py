"""Attention in bfloat16 by batched products against the float64 specification, on any CPU, and in small tiles."""

import pytest
import torch

from fastpeft import backend
from fastpeft.ops import attention_bf16
from fastpeft.ops.attention import attention
from tests.ops.attention_cases import by_formula, by_op, draw
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16 = torch.bfloat16
CASES = {
    "plain": {},
    "longer keys": {"sq": 33, "sk": 65},
    "one key head": {"kv_heads": 1, "group": 3, "causal": True},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "left window": {"causal": True, "window": 7},
    "left padding": {"padding": "left", "causal": True},
    "right padding": {"padding": "right"},
    "a batch of padding": {"padding": "all", "causal": True, "batch": 3},
    "padding and a window": {"padding": "right", "causal": True, "window": 3},
}


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Every call that can goes through attention_bf16.py; how often it did."""
    monkeypatch.setattr(backend, "cpu_dots_bfloat16", lambda: True)
    monkeypatch.setattr(attention_bf16, "_WORTH", 0)
    seen = []

    def forward(*args, own=attention_bf16.forward):
        seen.append(args[0].shape)
        o, kept = own(*args)
        assert args[-1] or not kept.numel()
        return o, kept

    monkeypatch.setattr(attention_bf16, "forward", forward)
    return seen


def cut_small(patch):
    patch.setattr(attention_bf16, "_TILE", 256)
    patch.setattr(attention_bf16, "_ROWS", 8)
    patch.setattr(attention_bf16, "_WINDOW_ROWS", 5)


@pytest.mark.parametrize("kept", [0, 100], ids=["again", "kept"])
@pytest.mark.parametrize("small", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, small, kept, calls, monkeypatch):
    if small:
        cut_small(monkeypatch)
    monkeypatch.setattr(attention_bf16, "_KEPT", kept)
    tensors, terms, do = draw(**({"sq": 37, "sk": 37, "d": 20, "dtype": BF16} | CASES[name]))
    before = [x.clone() for x in tensors.values()]
    got = by_op(tensors, terms, do, impl="torch")
    assert len(calls) == 1
    exact = by_formula(torch.float64, tensors, terms, do)
    eager = by_formula(None, tensors, terms, do)
    for part, value in got.items():
        assert_no_worse(part, value, exact[part], eager[part])
    for x, kept in zip(tensors.values(), before, strict=True):
        assert_bits_equal("input", x, kept)
    again = by_op(tensors, terms, do, impl="torch")
    for part, value in again.items():
        assert_bits_equal(part, value, got[part])


def test_rows_without_a_visible_key_are_zeros(calls):
    tensors, terms, do = draw(sq=24, sk=24, causal=True, padding="left", dtype=BF16)
    got = by_op(tensors, terms, do, impl="torch")
    hidden = int((~terms["key_padding_mask"][0]).sum())
    assert calls
    for name in ("o", "q"):
        assert (got[name][0, :hidden] == 0).all()
        assert (got[name][0, hidden + 1 :] != 0).any(-1).all()  # of one key the weight is 1, whatever the score
    for name in ("k", "v"):
        assert (got[name][0, :hidden] == 0).all()


@pytest.mark.parametrize("options", [{"sinks": True}, {"softcap": 2.0}, {"bias": (0, 1, 1)}, {"sq": 5, "causal": True}])
def test_what_it_does_not_do_goes_elsewhere(options, calls):
    by_op(*draw(**({"dtype": BF16} | options)), impl="torch")
    assert not calls


def test_only_what_needs_a_gradient_gets_one(calls):
    tensors, _, do = draw(sq=17, sk=17, dtype=BF16, causal=True)
    for name in tensors:
        leaves = {key: x.detach().requires_grad_(key == name) for key, x in tensors.items()}
        attention(**leaves, causal=True, impl="torch").backward(do)
        assert [key for key, x in leaves.items() if x.grad is not None] == [name]
    assert len(calls) == 3


@pytest.mark.parametrize(("tokens", "short"), [(256, False), (16, True)])
def test_only_a_short_sequence_keeps_more_than_the_result(tokens, short, calls, monkeypatch):
    tensors, _, do = draw(batch=1, sq=tokens, sk=tokens, dtype=BF16)
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    weights, every = [], sum(x.numel() for x in leaves.values()) + leaves["q"].numel()

    def taken(*args, own=attention_bf16._weights):
        weights.append(own(*args))
        return weights[-1]

    monkeypatch.setattr(attention_bf16, "_weights", taken)
    with SavedBytes(leaves.values()) as watch:
        o = attention(**leaves, causal=True, impl="torch")
        scores = sum(p.numel() for p in weights)
        assert (scores <= every) is short
        assert watch.total() == 2 * (o.numel() + (scores if short else 0))
        forward = len(weights)
    o.backward(do)
    assert len(weights) == (forward if short else 2 * forward)
    assert len(calls) == 1


def test_nothing_is_kept_for_nobody(calls, monkeypatch):
    places = []
    monkeypatch.setattr(
        attention_bf16, "_Kept", lambda flat, own=attention_bf16._Kept: places.append(flat) or own(flat)
    )
    tensors, _, _ = draw(batch=1, sq=16, sk=16, dtype=BF16)
    attention(**tensors, causal=True, impl="torch")
    attention(**{name: x.requires_grad_() for name, x in tensors.items()}, causal=True, impl="torch")
    assert [flat.numel() > 0 for flat in places] == [False, True]


@pytest.mark.parametrize("name", CASES)
def test_kept_weights_make_no_difference(name, calls, monkeypatch):
    tensors, terms, do = draw(**({"sq": 37, "sk": 37, "d": 20, "dtype": BF16} | CASES[name]))
    got = []
    for kept in (0, 100):
        monkeypatch.setattr(attention_bf16, "_KEPT", kept)
        got.append(by_op(tensors, terms, do, impl="torch"))
    for part, value in got[0].items():
        assert_bits_equal(part, value, got[1][part])


def test_compiled_is_eager(calls):
    torch.compiler.reset()
    tensors, _, do = draw(sq=33, sk=33, dtype=BF16, padding="left")
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v")]

    def call(q, k, v):
        return attention(q, k, v, causal=True, impl="torch")

    o, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves), call(*leaves)
    assert_bits_equal("o", o, expected)
    for name, got, want in zip("qkv", torch.autograd.grad(o, leaves, do), torch.autograd.grad(expected, leaves, do)):
        assert_bits_equal(f"d{name}", got, want)
    assert len(calls) == 2
