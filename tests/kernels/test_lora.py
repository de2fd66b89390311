"""The LoRA kernels against a float64 oracle and the eager code they replace, launcher by launcher and put together."""

from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import lora
from fastpeft.reference.lora import lora_linear
from tests.interpreter import round_to_tf32
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCALE = 2.0
SEED = 0x1234_5678_9ABC_DEF
THRESHOLD = 16384  # p = 1/4


@dataclass(frozen=True)
class Case:
    name: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype | None = None
    bias: bool = False
    threshold: int = 0
    layout: str = "contiguous"
    precision: str = "ieee"


CASES = [
    Case("aligned-bf16", 64, 64, 64, 16),
    Case("aligned-fp16-bias", 64, 64, 64, 16, FP16, bias=True),
    Case("aligned-fp32", 64, 64, 64, 16, FP32),
    Case("odd-bf16-bias", 33, 65, 97, 5, bias=True),
    Case("odd-fp32-bias", 33, 65, 97, 5, FP32, bias=True),
    Case("odd-bf16-dropout", 33, 65, 97, 5, threshold=THRESHOLD),
    Case("odd-fp32-dropout", 33, 65, 97, 5, FP32, threshold=THRESHOLD),
    Case("one-row-rank-1", 1, 17, 33, 1),
    Case("one-row-rank-1-dropout", 1, 17, 33, 1, FP16, threshold=THRESHOLD),
    Case("one-of-each", 1, 1, 1, 1, FP32),
    Case("long-k", 3, 5, 2048, 4),
    Case("long-k-dropout", 3, 5, 2049, 4, threshold=THRESHOLD),
    Case("last-part-of-k-is-shorter", 3, 5, 576, 4),
    Case("long-n", 5, 2050, 7, 3, bias=True),
    Case("many-rows", 301, 40, 24, 8, threshold=THRESHOLD),
    Case("rank-40", 37, 48, 50, 40),
    Case("rank-128-dropout", 35, 33, 64, 128, threshold=THRESHOLD),
    Case("rank-200", 34, 33, 31, 200),
    Case("fp32-adapters-over-bf16", 33, 65, 97, 5, BF16, FP32, bias=True),
    Case("fp32-adapters-over-fp16-dropout", 64, 64, 64, 16, FP16, FP32, threshold=THRESHOLD),
    Case("strided-rows", 33, 65, 97, 5, layout="rows"),
    Case("strided-columns", 33, 40, 36, 5, layout="columns"),
    Case("conv1d-weight", 33, 65, 97, 5, layout="conv1d"),
    Case("transposed-adapters", 33, 65, 97, 5, layout="adapters", threshold=THRESHOLD),
    Case("tf32", 48, 33, 64, 8, FP32, precision="tf32"),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Inputs:
    x: torch.Tensor
    w: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    dy: torch.Tensor

    def tensors(self):
        return [t for t in (self.x, self.w, self.a, self.b, self.bias, self.dy) if t is not None]


def spread(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with gaps between the rows, between the columns, or stored transposed."""
    rows, columns = matrix.shape
    if layout == "rows":
        view = torch.zeros(rows, columns + 3, dtype=matrix.dtype, device=matrix.device)[:, 1 : columns + 1]
    elif layout == "columns":
        view = torch.zeros(rows, 2 * columns, dtype=matrix.dtype, device=matrix.device)[:, ::2]
    else:
        view = torch.zeros(columns, rows, dtype=matrix.dtype, device=matrix.device).t()
    return view.copy_(matrix)


def draw(case: Case, device: torch.device) -> Inputs:
    adapter = case.adapter_dtype or case.dtype

    def normal(*shape, std=1.0, dtype=case.dtype):
        return (torch.randn(*shape) * std).to(device, dtype)

    inputs = Inputs(
        x=normal(case.M, case.K),
        w=normal(case.N, case.K, std=case.K**-0.5),
        a=normal(case.R, case.K, std=case.K**-0.5, dtype=adapter),
        b=normal(case.N, case.R, std=case.R**-0.5, dtype=adapter),
        bias=normal(case.N, dtype=adapter) if case.bias else None,
        dy=normal(case.M, case.N),
    )
    if case.layout in ("rows", "columns"):
        inputs.x, inputs.dy = spread(inputs.x, case.layout), spread(inputs.dy, case.layout)
        inputs.w = spread(inputs.w, case.layout)
    elif case.layout == "conv1d":
        inputs.w = spread(inputs.w, "transposed")
    elif case.layout == "adapters":
        inputs.a, inputs.b = spread(inputs.a, "transposed"), spread(inputs.b, "transposed")
    return inputs


def run_kernels(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Forward and backward of the LoRA linear, as its autograd.Function composes the launchers."""
    dropout = {"seed": SEED, "threshold": case.threshold, "precision": case.precision}
    x, w, a, b, dy = inputs.x, inputs.w, inputs.a, inputs.b, inputs.dy
    s = lora.lora_down(x, a, scale=SCALE, **dropout)
    y = lora.lora_epilogue(x, w, s, b, inputs.bias, precision=case.precision)
    ds, db = lora.lora_grad_s_b(dy, b, s, scale=SCALE, threshold=case.threshold, precision=case.precision)
    dx = lora.lora_grad_x(dy, w, ds, a, **dropout)
    da = lora.lora_grad_a(x, ds, a, **dropout)
    return {"s": s, "y": y, "ds": ds, "db": db, "dx": dx, "da": da}


def run_reference(case: Case, inputs: Inputs, keep: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same values from the reference in `dtype`, gradients by autograd; s and ds by their formulas."""
    p = case.threshold / 65536
    x, a, b = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.a, inputs.b))
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    y = lora_linear(
        x.to(dtype), inputs.w.to(dtype), a.to(dtype), b.to(dtype), bias, scale=SCALE, dropout_p=p, keep=keep
    )
    y.backward(inputs.dy.to(dtype))
    dropped = x.to(dtype) if keep is None else x.to(dtype) * keep
    c = SCALE / (1 - p)
    with torch.no_grad():
        s, ds = c * (dropped @ a.to(dtype).mT), c * (inputs.dy.to(dtype) @ b.to(dtype))
    return {"s": s, "y": y.detach(), "ds": ds, "db": b.grad, "dx": x.grad, "da": a.grad}


def run_oracle(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> dict[str, torch.Tensor]:
    exact = Inputs(*(None if t is None else t.double() for t in vars(inputs).values()))
    return run_reference(case, exact, keep, torch.float64)


def rounded_to_tf32(inputs: Inputs) -> Inputs:
    def rounded(tensor):
        return torch.from_numpy(round_to_tf32(tensor.cpu().numpy())).to(tensor.device)

    return Inputs(*(None if t is None else rounded(t) for t in vars(inputs).values()))


@EACH_CASE
def test_every_output_is_no_worse_than_eager(case, device):
    inputs = draw(case, device)
    before = [t.clone() for t in inputs.tensors()]
    got = run_kernels(case, inputs)
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert_bits_equal(f"{case.name}: an input", tensor, copy)

    for name in ("s", "ds"):
        padding = got[name][:, case.R :]
        assert_bits_equal(f"{case.name}: padding of {name}", padding, torch.zeros_like(padding))
        assert got[name].shape == (case.M, lora.padded_rank(case.R))
        got[name] = got[name][:, : case.R]
    keep = lora.lora_keep(SEED, case.M, case.K, case.threshold, device) if case.threshold else None
    exact, eager = run_oracle(case, inputs, keep), run_reference(case, inputs, keep, case.dtype)
    if case.precision == "tf32":  # eager float32 on a CPU has no tf32: its inputs are rounded instead
        eager = run_reference(case, rounded_to_tf32(inputs), keep, case.dtype)
    for name, value in got.items():
        assert_no_worse(f"{case.name}: {name}", value, exact[name], eager[name])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("odd-bf16-dropout", "many-rows")], ids=lambda c: c.name
)
def test_two_runs_give_equal_bits(case, device):
    inputs = draw(case, device)
    first, second = run_kernels(case, inputs), run_kernels(case, inputs)
    for name, value in first.items():
        assert_bits_equal(f"{case.name}: {name}", second[name], value)


def test_scale_and_dropout_probability_are_not_compiled_in(device):
    """Other values of scale, seed and threshold change the result, and a zero scale leaves the base product."""
    case = Case("scales", 8, 8, 16, 2, FP32)
    inputs = draw(case, device)
    zero = lora.lora_down(inputs.x, inputs.a, scale=0.0, seed=SEED, threshold=0, precision="ieee")
    assert_bits_equal("s at scale 0", zero.abs(), torch.zeros_like(zero))
    one = lora.lora_down(inputs.x, inputs.a, scale=1.0, seed=SEED, threshold=0, precision="ieee")
    four = lora.lora_down(inputs.x, inputs.a, scale=4.0, seed=SEED, threshold=0, precision="ieee")
    assert_bits_equal("s at scale 4", four, 4 * one)
    seeds = [lora.lora_down(inputs.x, inputs.a, scale=1.0, seed=n, threshold=32768, precision="ieee") for n in (1, 2)]
    assert not torch.equal(*seeds)


def test_dropped_infinities_do_not_reach_the_low_rank_path(device):
    """keep selects, it does not multiply: 0 * inf would be NaN."""
    keep = lora.lora_keep(SEED, 32, 64, THRESHOLD, device)
    x = torch.where(keep, 1.0, float("inf"))
    s = lora.lora_down(x, torch.ones(2, 64, device=device), scale=1.0, seed=SEED, threshold=THRESHOLD, precision="ieee")
    assert torch.isfinite(s).all(), f"expected finite s, got {s}"
