"""The in-loop 4-bit GEMM against a float64 oracle and the eager code it replaces: bitsandbytes' dequantise, then matmul."""

from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import lora, nf4_gemm, nf4_tiling
from fastpeft.kernels.nf4 import Packed
from fastpeft.kernels.tiling import GENERIC, INTERPRETER, Target
from tests.interpreter import round_to_tf32
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED = 0x1234_5678_9ABC_DEF
THRESHOLD = 16384  # p = 1/4
COMPILED_BLOCKSIZE = 256  # on a CPU bitsandbytes compiles code for larger ones: 4 s
TARGETS = [Target(arch, 100) for arch in ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "sm_999", "gfx942", "gfx1100")]


@dataclass(frozen=True)
class Case:
    name: str
    M: int
    N: int
    K: int
    R: int | None = None
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype | None = None
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: bool = False
    bias: bool = False
    threshold: int = 0
    layout: str = "contiguous"
    precision: str = "ieee"


CASES = [
    Case("aligned", 67, 64, 128, 16),
    Case("one-row", 1, 33, 128, 1, bias=True),
    Case("five-rows-dropout", 5, 65, 192, 5, threshold=THRESHOLD),
    Case("sixteen-rows-fp16", 16, 96, 256, 16, FP16, bias=True, threshold=THRESHOLD),
    Case("thirty-three-rows", 33, 40, 128, 40, bias=True),
    Case("tall-dropout", 67, 33, 128, 5, threshold=THRESHOLD, bias=True),
    Case("tall-rank-40-dropout", 67, 33, 64, 40, threshold=THRESHOLD),
    Case("no-lora", 5, 33, 128, bias=True),
    Case("no-lora-tall", 67, 33, 128),
    Case("fp4", 5, 33, 128, 5, quant_type="fp4"),
    Case("fp4-nested", 67, 33, 128, 5, quant_type="fp4", nested=True),
    Case("nested", 16, 64, 256, 16, nested=True, bias=True),
    Case("nested-many-groups", 5, 67, 256, 3, blocksize=32, nested=True),
    Case("nested-odd-number-of-blocks", 67, 33, 64, 3, nested=True, threshold=THRESHOLD),
    Case("blocksize-32", 16, 33, 96, 5, blocksize=32),
    Case("blocksize-32-tall", 67, 33, 96, 5, blocksize=32, nested=True),
    Case("blocksize-128", 16, 33, 256, 5, blocksize=128),
    Case("blocksize-4096", 5, 3, 4096, 5, blocksize=4096, bias=True),
    Case("long-n", 5, 197, 32, 5, blocksize=32),
    Case("one-of-each", 1, 1, 32, 1, blocksize=32, threshold=THRESHOLD),
    Case("fp32", 16, 33, 128, 5, FP32, bias=True, threshold=THRESHOLD),
    Case("fp32-tall", 67, 33, 128, 5, FP32),
    Case("tf32", 16, 33, 128, 5, FP32, precision="tf32"),
    Case("fp32-adapters-over-bf16", 16, 33, 128, 5, BF16, FP32, bias=True),
    Case("fp32-adapters-over-fp16-tall", 67, 33, 128, 16, FP16, FP32, threshold=THRESHOLD),
    Case("strided-rows", 33, 65, 128, 5, layout="rows"),
    Case("strided-columns", 67, 40, 64, 5, layout="columns"),
    Case("transposed-adapters", 16, 65, 128, 5, layout="adapters", threshold=THRESHOLD),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Inputs:
    w: Packed
    w_eager: torch.Tensor  # bitsandbytes' dequantised weight, in x's dtype
    x: torch.Tensor
    dy: torch.Tensor
    s: torch.Tensor | None
    ds: torch.Tensor | None
    a: torch.Tensor | None
    b: torch.Tensor | None
    bias: torch.Tensor | None

    def tensors(self):
        return [t for t in (*self.w, *vars(self).values()) if isinstance(t, torch.Tensor)]


def quantised(w: torch.Tensor, quant_type: str, blocksize: int, nested: bool) -> tuple[Packed, torch.Tensor]:
    """A weight as bitsandbytes packs it, and as it dequantises it, in w's dtype."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        w.contiguous(), blocksize=min(blocksize, COMPILED_BLOCKSIZE), quant_type=quant_type, compress_statistics=nested
    )
    if blocksize > COMPILED_BLOCKSIZE:
        absmax = torch.rand(w.numel() // blocksize, device=w.device)
        index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().long()
        w_eager = (state.code.float()[index] * absmax.repeat_interleave(blocksize)).to(w.dtype).view_as(w)
        return Packed(packed.flatten(), absmax, state.code.float(), tuple(w.shape), blocksize), w_eager
    double = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if nested else ()
    weight = Packed(packed.flatten(), state.absmax, state.code.float(), tuple(w.shape), blocksize, *double)
    return weight, functional.dequantize_4bit(packed, state)


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

    def padded(tensor):
        return torch.nn.functional.pad(tensor, (0, lora.padded_rank(case.R) - case.R))

    w, w_eager = quantised(normal(case.N, case.K, std=case.K**-0.5), case.quant_type, case.blocksize, case.nested)
    lo_ra = {"s": None, "ds": None, "a": None, "b": None}
    if case.R is not None:
        lo_ra = {
            "s": padded(normal(case.M, case.R)),
            "ds": padded(normal(case.M, case.R)),
            "a": normal(case.R, case.K, std=case.K**-0.5, dtype=adapter),
            "b": normal(case.N, case.R, std=case.R**-0.5, dtype=adapter),
        }
    bias = normal(case.N, dtype=adapter) if case.bias else None
    inputs = Inputs(w, w_eager, normal(case.M, case.K), normal(case.M, case.N), **lo_ra, bias=bias)
    if case.layout in ("rows", "columns"):
        inputs.x, inputs.dy = spread(inputs.x, case.layout), spread(inputs.dy, case.layout)
    elif case.layout == "adapters":
        inputs.a, inputs.b = spread(inputs.a, "transposed"), spread(inputs.b, "transposed")
    return inputs


def run_kernels(case: Case, inputs: Inputs) -> dict[str, torch.Tensor]:
    y = nf4_gemm.nf4_lora_gemm(inputs.x, inputs.w, inputs.s, inputs.b, inputs.bias, precision=case.precision)
    dropout = {"seed": SEED, "threshold": case.threshold, "precision": case.precision}
    return {"y": y, "dx": nf4_gemm.nf4_lora_grad_x(inputs.dy, inputs.w, inputs.ds, inputs.a, **dropout)}


def composed(case: Case, inputs: Inputs, keep: torch.Tensor | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same values from matrix products in `dtype` over the dequantised weight."""

    def cast(tensor):
        tensor = tensor.to(dtype)
        if case.precision == "tf32" and dtype == FP32:  # eager float32 on a CPU has no tf32: its inputs are rounded
            tensor = torch.from_numpy(round_to_tf32(tensor.cpu().numpy())).to(tensor.device)
        return tensor

    w = cast(inputs.w_eager)
    y, dx = cast(inputs.x) @ w.t(), cast(inputs.dy) @ w
    if case.R is not None:
        low_rank = cast(inputs.ds)[:, : case.R] @ cast(inputs.a)
        y += cast(inputs.s)[:, : case.R] @ cast(inputs.b).t()
        dx += low_rank if keep is None else low_rank * keep
    return {"y": y if inputs.bias is None else y + inputs.bias.to(dtype), "dx": dx}


@EACH_CASE
def test_y_and_dx_are_no_worse_than_eager(case, device):
    inputs = draw(case, device)
    before = [t.clone() for t in inputs.tensors()]
    got = run_kernels(case, inputs)
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert_bits_equal(f"{case.name}: an input", tensor, copy)
    keep = lora.lora_keep(SEED, case.M, case.K, case.threshold, device) if case.threshold else None
    exact, eager = composed(case, inputs, keep, torch.float64), composed(case, inputs, keep, case.dtype)
    for name, value in got.items():
        assert_no_worse(f"{case.name}: {name}", value, exact[name], eager[name])
        assert value.is_contiguous()


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("nested", "tall-dropout")], ids=lambda c: c.name)
def test_two_runs_give_equal_bits(case, device):
    inputs = draw(case, device)
    first, second = run_kernels(case, inputs), run_kernels(case, inputs)
    for name, value in first.items():
        assert_bits_equal(f"{case.name}: {name}", second[name], value)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("blocksize", "nested"), [(32, True), (64, False), (128, True)])
def test_the_decoded_weight_is_bitsandbytes_bit_for_bit(dtype, quant_type, blocksize, nested, device):
    """x = I gives w^T, dy = I gives w: products with 1 and 0 are exact."""
    n, k = 33, 128
    w, expected = quantised(torch.randn(n, k).to(device, dtype), quant_type, blocksize, nested)
    y = nf4_gemm.nf4_lora_gemm(torch.eye(k, dtype=dtype, device=device), w, None, None, None, precision="ieee")
    assert_bits_equal("w from the forward", y.t(), expected)
    one = torch.eye(n, dtype=dtype, device=device)
    dx = nf4_gemm.nf4_lora_grad_x(one, w, None, None, seed=0, threshold=0, precision="ieee")
    assert_bits_equal("w from the gradient", dx, expected)


def test_few_rows_give_the_bits_of_many(device):
    """A row's result does not depend on the rows beside it, as long as the contraction is cut alike."""
    case = Case("rows", 16, 33, 128, 5, bias=True)
    inputs = draw(case, device)
    whole = run_kernels(case, inputs)["y"]
    inputs.x, inputs.s = inputs.x[:5], inputs.s[:5]
    few = nf4_gemm.nf4_lora_gemm(inputs.x, inputs.w, inputs.s, inputs.b, inputs.bias, precision="ieee")
    assert_bits_equal("five of sixteen rows", few, whole[:5])


def test_what_the_loop_supports(device):
    def weight(n, k, blocksize, offset=0):
        packed = torch.zeros(n * k // 2 + offset, dtype=torch.uint8, device=device)[offset:]
        absmax = torch.ones(-(-n * k // blocksize), device=device)
        return Packed(packed, absmax, torch.zeros(16, device=device), (n, k), blocksize)

    supported = [(1, 32, 32), (3, 64, 64), (5, 4096, 4096), (7, 96, 32)]
    assert all(nf4_gemm.in_loop_supports(weight(*sizes)) for sizes in supported)
    refused = [(1, 64, 128), (2, 96, 64), (4, 33, 32), (4, 48, 32), (4, 8192, 8192), (4, 64, 16), (4, 64, 64, 8)]
    assert not any(nf4_gemm.in_loop_supports(weight(*sizes)) for sizes in refused)
    x = torch.zeros(1, 96, dtype=BF16, device=device)
    with pytest.raises(ValueError, match=r"expected K a multiple .* got a weight \(2, 96\) of blocksize 64"):
        nf4_gemm.nf4_lora_gemm(x, weight(2, 96, 64), None, None, None, precision="ieee")


@pytest.mark.parametrize("op", ["gemm", "grad"])
@pytest.mark.parametrize("target", [*TARGETS, GENERIC, INTERPRETER], ids=lambda target: target.arch)
def test_every_size_has_a_tile_whose_packed_side_divides_the_row(op, target):
    for dtype in (BF16, FP16, FP32):
        for m in (1, 16, 17, 33, 64, 65, 512, 8192, 10**6):
            for packed_row in (32, 96, 576, 4096, 14336):
                n, k = (4097, packed_row) if op == "gemm" else (packed_row, 4097)
                config = nf4_tiling.choose_nf4(op, target, M=m, N=n, K=k, R=40, dtype=dtype)
                assert packed_row % (config.block_k if op == "gemm" else config.block_n) == 0, config
                assert min(config.block_m, config.block_n, config.block_k, config.block_r) >= 16, config
                if m <= nf4_tiling.SKINNY_ROWS and target != INTERPRETER:
                    assert config.block_m < max(32, 2 * m), config


def test_only_few_rows_split_the_contraction():
    target = Target("sm_90", 132)
    config = nf4_tiling.choose_nf4("gemm", target, M=16, N=4096, K=4096, R=16, dtype=BF16)
    tiles = 4096 // config.block_n
    parts = nf4_tiling.split_contraction(16, 4096, config, tiles, target)
    assert 2 * target.processors <= parts * tiles <= 4 * target.processors
    assert nf4_tiling.split_contraction(65, 4096, config, tiles, target) == 1
    assert nf4_tiling.split_contraction(1, 64, config, 1, target) == 1
