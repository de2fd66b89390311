"""float32 products through oneDNN: float32's accuracy, no setting left behind, refused where it would not be float32."""

import pytest
import torch

from fastpeft.ops import fast_matmul
from fastpeft.ops.attention import attention
from fastpeft.ops.fast_matmul import FLOAT32_ERROR, fast_float32_matmul, float32_path

CPU = torch.device("cpu")


@pytest.fixture
def fresh():
    """The check is made anew, and forgotten after the test."""
    fast_matmul._onednn.cache_clear()
    yield
    fast_matmul._onednn.cache_clear()


def test_the_product_is_float32_and_no_setting_is_left_behind():
    before, state = torch.get_float32_matmul_precision(), torch.get_rng_state()
    x, w = torch.randn(64, 512), torch.randn(512, 64)
    exact = x.double() @ w.double()
    torch.set_rng_state(state)
    with fast_float32_matmul(CPU) as on:
        assert torch.get_float32_matmul_precision() == ("medium" if on else before)
        assert on == float32_path(CPU).allowed
        assert ((x @ w - exact).norm() / exact.norm()).item() < FLOAT32_ERROR
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_put_back_after_an_error_and_inside_itself(fresh, monkeypatch):
    monkeypatch.setattr(fast_matmul, "_has_amx", lambda: False)
    monkeypatch.setattr(fast_matmul, "_product_error", lambda: 1e-7)

    def failing_step():
        with fast_float32_matmul(CPU) as on, fast_float32_matmul(CPU) as inner:
            assert on
            assert inner
            assert torch.get_float32_matmul_precision() == "medium"
            raise KeyError("a step that fails")

    with pytest.raises(KeyError, match="a step that fails"):
        failing_step()
    assert torch.get_float32_matmul_precision() == "highest"
    assert fast_matmul._entered == []


def test_a_users_own_setting_stays(fresh):
    torch.set_float32_matmul_precision("medium")
    try:
        with fast_float32_matmul(CPU) as on:
            assert not on
        assert torch.get_float32_matmul_precision() == "medium"
        assert "'medium') is set already" in float32_path(CPU).why
    finally:
        torch.set_float32_matmul_precision("highest")


def test_it_is_refused_with_a_reason(fresh, monkeypatch):
    assert float32_path(torch.device("cuda")) == (False, "the model is on cuda, not on a CPU")
    monkeypatch.setattr(fast_matmul, "_has_amx", lambda: True)
    assert float32_path(CPU) == (False, "this CPU has AMX, with which oneDNN would compute in bfloat16")
    with fast_float32_matmul(CPU) as on:
        assert not on
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("error", [2e-3, float("nan")], ids=["bfloat16's error", "not a number"])
def test_accuracy_is_checked_once(fresh, monkeypatch, error):
    measured = []
    monkeypatch.setattr(fast_matmul, "_has_amx", lambda: False)
    monkeypatch.setattr(fast_matmul, "_product_error", lambda: measured.append(error) or error)
    for _ in range(3):
        with fast_float32_matmul(CPU) as on:
            assert not on
    assert "which is not float32's" in float32_path(CPU).why
    assert measured == [error]


def test_flash_attention_keeps_mkl_in_both_passes(fresh, monkeypatch):
    monkeypatch.setattr(fast_matmul, "_has_amx", lambda: False)
    monkeypatch.setattr(fast_matmul, "_product_error", lambda: 1e-7)
    seen = {}
    for name in ("", "_backward"):
        full = f"_scaled_dot_product_flash_attention_for_cpu{name}"
        own = getattr(torch.ops.aten, full)

        def spied(*args, own=own, name=name, **kwargs):
            seen[name] = torch.get_float32_matmul_precision()
            return own(*args, **kwargs)

        monkeypatch.setattr(torch.ops.aten, full, spied)
    q, k, v = (torch.randn(2, 33, 3, 32, requires_grad=True) for _ in range(3))
    plain = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
    assert seen == {}  # scaled_dot_product_attention itself
    with fast_float32_matmul(CPU) as on:
        assert on
        grads = torch.autograd.grad(attention(q, k, v, causal=True).square().sum(), (q, k, v))
        assert torch.get_float32_matmul_precision() == "medium"
    assert seen == {"": "highest", "_backward": "highest"}
    for grad, other in zip(grads, plain, strict=True):
        assert torch.equal(grad, other)
