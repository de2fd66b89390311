"""lora_linear, all implementations, against the float64 reference: y and every gradient no worse than eager code."""

from dataclasses import replace

import pytest
import torch

from fastpeft.ops.dropout import LEVELS, threshold_of
from fastpeft.ops.lora import lora_linear
from fastpeft.reference import lora as reference
from tests.ops.lora_cases import BF16, F16, F32, SCALE, SEED, VARIANTS, Case, choose, draw, eager, mask, results
from tests.tolerance import assert_bits_equal, assert_no_worse


def check(case: Case, impl: str, device) -> None:
    inputs = draw(case, device)
    before = [tensor.clone() for tensor in [*inputs.tensors(), inputs.dy]]
    got = results(
        lambda *t: lora_linear(*t, scale=SCALE, dropout_p=case.dropout_p, seed=SEED, impl=impl),
        inputs,
    )
    keep = mask(case, impl, inputs.x)
    p = threshold_of(case.dropout_p) / LEVELS
    exact = results(
        lambda *t: reference.lora_linear(*t, scale=SCALE, dropout_p=p, keep=keep), inputs, dtype=torch.float64
    )
    plain = results(
        lambda x, *t: eager(x, *t, x if keep is None else x * keep.to(x.dtype) / (1 - p)),
        inputs,
    )
    for name in exact:
        assert_no_worse(f"{name} of {impl}", got[name], exact[name], plain[name])
    for was, now in zip(before, [*inputs.tensors(), inputs.dy]):
        assert_bits_equal("an input", now, was)


ODD = Case(33, 65, 97, 5)
CASES = {
    "aligned": Case(64, 32, 48, 8),
    "odd": ODD,
    "odd_no_bias": replace(ODD, bias=False),
    "one_row_rank_1": Case(1, 65, 97, 1),
    "rank_over_n_and_k": Case(33, 17, 19, 40),
    "long_k": Case(20, 33, 2051, 4),
    "3d": Case(34, 65, 97, 5, layout="3d"),
    "strided_x": replace(ODD, layout="strided"),
    "transposed_x": replace(ODD, layout="transposed"),
    "conv1d_w": replace(ODD, layout="conv1d"),
    "float16": replace(ODD, dtype=F16),
    "bfloat16": replace(ODD, dtype=BF16),
    "bf16_base_fp32_adapters": replace(ODD, dtype=BF16, adapter_dtype=F32),
    "fp16_base_fp32_adapters": replace(ODD, dtype=F16, adapter_dtype=F32),
    "fp32_base_bf16_adapters": replace(ODD, adapter_dtype=BF16),
    "bf16_conv1d_3d_dropout": Case(34, 65, 97, 5, dtype=BF16, adapter_dtype=F32, layout="3d", dropout_p=0.3),
    "dropout": replace(ODD, dropout_p=0.3),
    "dropout_transposed_x": replace(ODD, layout="transposed", dropout_p=0.6),
    "dropout_float16": replace(ODD, dtype=F16, dropout_p=0.1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("variant", ["torch", "composed", "reference"])
def test_no_worse_than_eager(name, variant, device, monkeypatch):
    check(CASES[name], choose(monkeypatch, variant), device)


@pytest.mark.watched
@pytest.mark.parametrize(
    "name",
    [
        "odd",
        "one_row_rank_1",
        "3d",
        "transposed_x",
        "conv1d_w",
        "bf16_base_fp32_adapters",
        "fp32_base_bf16_adapters",
        "dropout",
        "bf16_conv1d_3d_dropout",
    ],
)
def test_triton_no_worse_than_eager(name, device):
    """The wiring of the kernels into autograd; the kernels' own tests have the shapes."""
    check(CASES[name], "triton", device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant, device, monkeypatch):
    impl = choose(monkeypatch, variant)
    inputs = draw(Case(0, 6, 7, 2), device)
    got = results(lambda *t: lora_linear(*t, impl=impl), inputs)
    assert got["y"].shape == (0, 6)
    assert got["dx"].shape == (0, 7)
    for name in ("da", "db", "dbias"):
        assert not got[name].any(), name


@pytest.mark.parametrize("variant", ["torch", "composed"])
def test_w_may_require_a_gradient_where_none_is_taken(variant, monkeypatch):
    choose(monkeypatch, variant)
    inputs = draw(Case(17, 10, 12, 3), "cpu")
    inputs.w.requires_grad_(True)
    with torch.no_grad():
        lora_linear(*inputs.tensors())
    with pytest.raises(ValueError, match="frozen w"):
        lora_linear(*inputs.tensors())


# -- refusals ---------------------------------------------------------------------------------------------------------


def _arguments(**changes):
    arguments = {"x": torch.zeros(4, 7), "w": torch.zeros(6, 7), "a": torch.zeros(2, 7), "b": torch.zeros(6, 2)}
    return arguments | changes


BAD_ARGUMENTS = {
    "x_other_width": ({"x": torch.zeros(4, 8)}, ["x (4, 8)", "w (6, 7)"]),
    "x_scalar": ({"x": torch.zeros(())}, ["x ()"]),
    "w_transposed": ({"w": torch.zeros(7, 6)}, ["w (7, 6)"]),
    "w_one_dimension": ({"w": torch.zeros(7)}, ["w (7,)"]),
    "a_transposed": ({"a": torch.zeros(7, 2)}, ["a (7, 2)"]),
    "a_one_dimension": ({"a": torch.zeros(7)}, ["a (7,)"]),
    "a_rank_0": ({"a": torch.zeros(0, 7), "b": torch.zeros(6, 0)}, ["a (0, 7)"]),
    "b_transposed": ({"b": torch.zeros(2, 6)}, ["b (2, 6)", "is b transposed?"]),
    "b_other_rank": ({"b": torch.zeros(6, 3)}, ["b (6, 3)"]),
    "bias_other_width": ({"bias": torch.zeros(7)}, ["bias (7,)"]),
    "integer_x": ({"x": torch.zeros(4, 7, dtype=torch.int64)}, ["torch.int64"]),
    "integer_w": ({"w": torch.zeros(6, 7, dtype=torch.uint8)}, ["torch.uint8"]),
    "half_x": ({"x": torch.zeros(4, 7, dtype=BF16)}, ["x torch.bfloat16, w torch.float32", "autocast"]),
    "meta_a": ({"a": torch.zeros(2, 7, device="meta")}, ["one device", "meta"]),
    "dropout_one": ({"dropout_p": 1.0}, ["0 <= dropout_p < 1, got 1.0"]),
    "dropout_negative": ({"dropout_p": -0.1}, ["got -0.1"]),
    "dropout_nan": ({"dropout_p": float("nan")}, ["got nan"]),
    "unknown_impl": ({"impl": "cublas"}, ["'cublas'", "'triton'"]),
}


@pytest.mark.parametrize(("changes", "said"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_named(changes, said):
    with pytest.raises(ValueError) as caught:
        lora_linear(**_arguments(**changes))
    assert all(text in str(caught.value) for text in said), caught.value
    assert "\n" not in str(caught.value)
