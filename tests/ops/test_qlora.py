"""lora_linear over quantised bases: value and every gradient against float64, by every implementation and algorithm."""

from dataclasses import replace

import pytest
import torch

from fastpeft.ops import lora as ops
from fastpeft.ops import lora_triton
from fastpeft.ops.algorithms import Problem, candidates
from fastpeft.ops.dropout import LEVELS, threshold_of
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.lora_gemm import decodes_in_loop
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.reference.lora import lora_linear as reference
from tests.ops.lora_cases import BF16, F16, F32, SCALE, SEED, Case, draw, eager, mask, results
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_no_worse

BASES = {
    "nf4": lambda w: quantize_4bit(w, "nf4"),
    "nf4_double": lambda w: quantize_4bit(w, "nf4", double_quant=True),
    "nf4_blocks_of_256": lambda w: quantize_4bit(w, "nf4", blocksize=256, double_quant=True),
    "fp4": lambda w: quantize_4bit(w, "fp4"),
    "int8": quantize_int8,
}
ODD = Case(33, 65, 97, 5)  # blocks run across the ends of rows, N K is odd
IN_BLOCKS = Case(33, 40, 128, 5)  # what the in-loop kernels take
CASES = {
    "odd": ODD,
    "in_blocks": IN_BLOCKS,
    "one_row_rank_1": Case(1, 17, 64, 1),
    "long_k": Case(3, 5, 2048, 4, bias=False),
    "3d_strided_out_of_batch": replace(IN_BLOCKS, m=34, layout="3d"),
    "transposed_x": replace(ODD, layout="transposed"),
    "bfloat16": replace(IN_BLOCKS, dtype=BF16),
    "odd_float16": replace(ODD, dtype=F16),
    "bf16_fp32_adapters_dropout": replace(IN_BLOCKS, dtype=BF16, adapter_dtype=F32, dropout_p=0.3),
    "dropout": replace(ODD, dropout_p=0.3),
}


def check(case, base, impl, device):
    inputs = draw(case, device)
    w = BASES[base](inputs.w)
    keep = mask(case, impl, inputs.x)
    drawn_p = threshold_of(case.dropout_p) / LEVELS
    options = {"scale": SCALE, "dropout_p": drawn_p}
    got = results(lambda x, _, a, b, bias: lora_linear(x, w, a, b, bias, seed=SEED, impl=impl, **options), inputs)
    exact_w = w.dequantize(torch.float64)
    exact = results(
        lambda x, _, a, b, bias: reference(x, exact_w, a, b, bias, keep=keep, **options), inputs, torch.float64
    )
    rounded_w = w.dequantize(case.dtype)

    def composed(x, _, a, b, bias):
        dropped = x if keep is None else x * keep / (1 - drawn_p)
        return eager(x, rounded_w, a, b, bias, dropped)

    compared = results(composed, inputs)
    for name in exact:
        assert_no_worse(name, got[name], exact[name], compared[name])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_no_worse_than_eager(impl, base, case, device):
    check(case, base, impl, device)


@pytest.mark.watched
@pytest.mark.parametrize("case", ["odd", "in_blocks", "bfloat16", "bf16_fp32_adapters_dropout", "one_row_rank_1"])
@pytest.mark.parametrize("base", BASES)
def test_triton_no_worse_than_eager(base, case, device):
    check(CASES[case], base, "triton", device)


ALGORITHMS = ["epilogue", "addmm", "panel", "merge", "in_loop"]


def _force(monkeypatch, algorithm, case, base):
    """Every product by `algorithm`; returns those of y and dx that cannot be."""
    dtype = torch.bfloat16 if case.dtype is None else case.dtype
    w = BASES[base](torch.randn(case.n, case.k))
    in_loop = decodes_in_loop(w, dtype)
    kind = w.quant_type
    for of in ("y", "dx"):
        problem = Problem(of, kind, case.m, case.n, case.k, case.r, dtype, case.dropout_p > 0)
        if algorithm in candidates(problem, in_loop=in_loop):
            monkeypatch.setattr(lora_triton, f"choose_{of}", lambda *asked, **options: algorithm)
        else:
            yield of


@pytest.mark.watched
@pytest.mark.parametrize("dropout_p", [0.0, 0.3], ids=["whole", "dropout"])
@pytest.mark.parametrize("base", ["nf4_double", "fp4", "int8"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm(algorithm, base, dropout_p, device, monkeypatch):
    from fastpeft.ops import lora_gemm

    monkeypatch.setattr(lora_gemm, "PANEL_BYTES", 16 * 128 * 2)  # several panels, the last one shorter
    case = Case(33, 72, 128, 5, dtype=BF16, dropout_p=dropout_p)
    impossible = list(_force(monkeypatch, algorithm, case, base))
    expected = {
        "merge": {"y", "dx"} if dropout_p or base == "int8" else set(),
        "in_loop": {"y", "dx"} if base == "int8" else set(),
        "addmm": {"dx"} if dropout_p else set(),
        "panel": {"dx"} if dropout_p else set(),
        "epilogue": set(),
    }[algorithm]
    assert set(impossible) == expected
    if len(impossible) < 2:
        check(case, base, "triton", device)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.watched
def test_keeps_s_alone_beside_x(impl, dropout_p, base, device):
    """Nothing of w's size, no mask, no copy of x: S, and a seed that is a number."""
    case = Case(33, 72, 128, 16, dtype=BF16, bias=False)
    inputs = draw(case, device)
    w = BASES[base](inputs.w)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.a, inputs.b)]
    with SavedBytes([*leaves, *w.tensors().values()]) as saved:
        y = lora_linear(leaves[0], w, *leaves[1:], dropout_p=dropout_p, impl=impl)
    assert saved.total() == case.m * 16 * BF16.itemsize
    y.sum().backward()
    assert saved.total() == 0


@pytest.mark.parametrize("base", BASES)
def test_two_runs_give_the_same_bits(base):
    inputs = draw(replace(ODD, dropout_p=0.3), "cpu")
    w = BASES[base](inputs.w)

    def run(x, _, a, b, bias):
        return lora_linear(x, w, a, b, bias, dropout_p=0.3, seed=SEED)

    first, second = results(run, inputs), results(run, inputs)
    for name in first:
        assert_bits_equal(name, first[name], second[name])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_rows(impl, base, device):
    inputs = draw(Case(0, 6, 64, 2), device)
    w = BASES[base](inputs.w)
    got = results(lambda x, _, a, b, bias: lora_linear(x, w, a, b, bias, impl=impl), inputs)
    assert got["y"].shape == (0, 6)
    assert got["dx"].shape == (0, 64)
    assert not any(got[name].any() for name in ("da", "db", "dbias"))


@pytest.mark.parametrize(
    ("changes", "said"),
    {
        "x_other_width": ({"x": torch.zeros(4, 65)}, ["x (4, 65)", "w (6, 64)"]),
        "integer_x": ({"x": torch.zeros(4, 64, dtype=torch.int64)}, ["torch.int64"]),
        "meta_a": ({"a": torch.zeros(2, 64, device="meta")}, ["one device", "meta"]),
        "b_transposed": ({"b": torch.zeros(2, 6)}, ["is b transposed?"]),
    }.values(),
)
def test_bad_arguments_are_named(changes, said):
    arguments = {"x": torch.zeros(4, 64), "a": torch.zeros(2, 64), "b": torch.zeros(6, 2)}
    with pytest.raises(ValueError) as caught:
        lora_linear(w=quantize_4bit(torch.randn(6, 64)), **(arguments | changes))
    assert all(text in str(caught.value) for text in said), caught.value


def test_half_precision_x_needs_no_cast_of_a_quantised_base():
    w = quantize_4bit(torch.randn(6, 64))
    y = ops.lora_linear(torch.randn(4, 64).bfloat16(), w, torch.randn(2, 64), torch.randn(6, 2))
    assert y.dtype == BF16
