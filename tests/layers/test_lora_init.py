"""How A and B begin: against the formulas in float64, and what cannot begin so is refused with the module untouched."""

import bitsandbytes
import pytest
import torch
from torch import nn

from fastpeft import LoRALinear
from fastpeft.layers.lora_init import loftq, olora, pissa, round_trip
from tests.tolerance import (
    DECOMPOSED_AND_PUT_TOGETHER,
    LOGITS_EQUAL_TO_PEFT,
    MERGED_EQUALS_UNMERGED,
    assert_bits_equal,
    assert_close,
)

N, K, R = 33, 65, 5


def weight(n=N, k=K):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(3))


def linear(dtype=torch.float32):
    layer = nn.Linear(K, N, dtype=dtype)
    layer.weight.data = weight().to(dtype)
    return layer


@pytest.mark.parametrize(("n", "k"), [(N, K), (K, N), (8, 8), (1, 7)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_pissa_is_the_best_approximation_of_its_rank(n, k, scale):
    w, r = weight(n, k), min(R, n, k)
    a, b = pissa(w, r, scale)
    u, sigma, vh = torch.linalg.svd(w.double(), full_matrices=False)
    exact = (u[:, :r] * sigma[:r]) @ vh[:r]
    assert_close("s B A", scale * (b @ a), exact.float(), DECOMPOSED_AND_PUT_TOGETHER)
    assert_close("evenly", a.norm(dim=1), b.norm(dim=0), DECOMPOSED_AND_PUT_TOGETHER)


def test_subspace_iterations_come_close_and_are_repeated():
    w = (torch.randn(N, R) @ torch.randn(R, K)) + 1e-3 * weight()  # fast decay: what iterations are for
    before = torch.get_rng_state()
    first, again = pissa(w, R, 1.0, "pissa_niter_8"), pissa(w, R, 1.0, "pissa_niter_8")
    assert_bits_equal("random state", torch.get_rng_state(), before)
    for name, one, other in zip("AB", first, again, strict=True):
        assert_bits_equal(name, one, other)
    exact = pissa(w, R, 1.0)
    assert_close("B A", first[1] @ first[0], exact[1] @ exact[0], DECOMPOSED_AND_PUT_TOGETHER)


def test_olora_is_the_first_rows_of_a_qr():
    w = weight()
    a, b = olora(w, R, 2.0)
    assert_close("orthonormal", b.t() @ b, torch.eye(R), DECOMPOSED_AND_PUT_TOGETHER)
    assert_close("first columns", (b @ a)[:, :R], w[:, :R], DECOMPOSED_AND_PUT_TOGETHER)


@pytest.mark.parametrize("bits", [4, 8])
def test_round_trip_is_bitsandbytes_s(bits):
    w = weight()
    if bits == 4:
        packed, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
        theirs = bitsandbytes.functional.dequantize_4bit(packed, state)
    else:
        rows, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(w.half())
        theirs = bitsandbytes.functional.int8_vectorwise_dequant(rows, absmax)
    assert_close("W", round_trip(w, bits), theirs, LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_loftq_takes_back_much_of_what_quantising_lost(bits, scale):
    """||W - (Q + s B A)|| is below 0.8 ||W - quantised(W)|| at a quarter of the full rank, and more turns lose less."""
    w = weight(64, 64)
    lost = (w - round_trip(w, bits)).norm()
    errors = []
    for turns in (1, 5):
        a, b, q = loftq(w, 16, scale, bits, turns)
        assert_bits_equal("held in these bits", round_trip(q, bits), q) if bits == 4 else None
        errors.append((w - (q + scale * (b @ a))).norm())
    assert errors[0] < 0.8 * lost
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "orthogonal", "eva"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_function_at_the_start_is_the_base_s(kind, dtype):
    base = linear(dtype)
    x = torch.randn(7, K, dtype=dtype)
    expected = base(x)
    layer = LoRALinear(base, 4, 8, init_lora_weights=kind)
    assert_close("y", layer(x), expected, MERGED_EQUALS_UNMERGED)
    moved = not torch.equal(layer.base_layer.weight, weight().to(dtype))
    assert moved == kind.startswith(("pissa", "olora"))


@pytest.mark.parametrize("kind", ["pissa", "olora", "loftq"])
def test_the_base_s_own_parameter_comes_back(kind):
    base = linear()
    own = base.weight
    layer = LoRALinear(base, 4, init_lora_weights=kind)
    assert base.weight is not own
    assert not base.weight.requires_grad
    layer.enable_adapters(False)
    assert base.weight is own
    layer.enable_adapters(True)
    assert base.weight is not own
    changed = base.weight
    layer.merge()
    layer.unmerge()
    assert base.weight is changed
    layer.to(torch.float64)
    layer.delete_adapter("default")
    assert base.weight is own
    assert own.dtype == torch.float64  # it went where the module went
    assert_bits_equal("W", own.data.float(), weight())


REFUSED = {
    "rank": ({"r": N + 1, "init_lora_weights": "pissa"}, ValueError, f"at most {N}"),
    "scale": ({"lora_alpha": -1.0, "init_lora_weights": "pissa"}, ValueError, "above 0"),
    "unknown": ({"init_lora_weights": "corda"}, NotImplementedError, "corda"),
    "bits": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, ValueError, "loftq_bits"),
}


@pytest.mark.parametrize(("options", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_module_untouched(options, error, said):
    base = linear()
    own = base.weight
    with pytest.raises(error, match=said):
        LoRALinear(base, **options)
    assert base.weight is own


def test_a_weight_that_is_not_finite_is_refused():
    """LAPACK's own message says nothing about the cause."""
    base = linear()
    base.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        LoRALinear(base, init_lora_weights="pissa")
