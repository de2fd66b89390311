"""The GEMM over tensor descriptors against the one over pointers, which tile takes which, and the gain of the epilogue."""

from dataclasses import dataclass

import pytest
import torch

from fastpeft.kernels import lora
from fastpeft.kernels.launch import record_launches
from fastpeft.kernels.lora_gemm import lora_gemm_pointers
from fastpeft.kernels.lora_tma import lora_gemm_tma, prefers_descriptors, takes_descriptors
from fastpeft.kernels.tiling import GENERIC, Target, TileConfig, choose
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED, THRESHOLD = 11, 16384  # p = 1/4
TILE = TileConfig(block_m=32, block_n=32, block_k=32, block_r=16, num_warps=4, num_stages=2)
HOPPER = Target("sm_90", 132)


@dataclass(frozen=True)
class Case:
    name: str
    M: int
    N: int
    K: int
    R: int
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype = BF16
    bias: bool = False
    gain: bool = False
    threshold: int = 0
    transposed: bool = False


CASES = [
    Case("aligned", 64, 64, 64, 16),
    Case("aligned-fp16-bias", 64, 64, 64, 16, FP16, FP16, bias=True),
    Case("odd-rows-and-rank", 33, 72, 104, 5, bias=True),
    Case("one-row", 1, 40, 32, 1),
    Case("dropout", 33, 72, 104, 5, threshold=THRESHOLD),
    Case("w-by-columns", 33, 72, 104, 5, transposed=True),
    Case("w-by-columns-dropout", 35, 40, 72, 40, threshold=THRESHOLD, transposed=True),
    Case("fp32-adapters", 35, 40, 72, 40, BF16, FP32, bias=True),
    Case("gain", 33, 72, 104, 5, gain=True),
    Case("gain-and-bias", 33, 72, 104, 5, FP16, FP32, bias=True, gain=True),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Inputs:
    x: torch.Tensor
    w: torch.Tensor
    s: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    gain: torch.Tensor | None


def draw(case: Case, device: torch.device, *, grid: float | None = None) -> Inputs:
    """Normal values; with `grid`, multiples of it."""

    def normal(*shape, std=1.0, dtype=case.dtype):
        values = torch.randn(*shape) * std
        return (values if grid is None else (values / grid).round() * grid).to(device, dtype)

    w = normal(case.K, case.N, std=case.K**-0.5).t() if case.transposed else normal(case.N, case.K, std=case.K**-0.5)
    s = normal(case.M, lora.padded_rank(case.R))
    s[:, case.R :] = 0
    return Inputs(
        x=normal(case.M, case.K),
        w=w,
        s=s,
        b=normal(case.N, case.R, std=case.R**-0.5, dtype=case.adapter_dtype),
        bias=normal(case.N, dtype=case.adapter_dtype) if case.bias else None,
        gain=1 + normal(case.N, std=0.1, dtype=FP32) if case.gain else None,
    )


@EACH_CASE
def test_descriptors_and_pointers_give_equal_bits(case, device):
    """On a grid on which float32 sums are exact: the interpreter's BLAS adds in an order that depends on strides."""
    inputs = draw(case, device, grid=1 / 16)
    dropout = {"seed": SEED, "threshold": case.threshold, "precision": "ieee"}
    assert takes_descriptors(inputs.x, inputs.w)
    y, z = lora_gemm_tma(*vars(inputs).values(), TILE, **dropout)
    y_expected, z_expected = lora_gemm_pointers(*vars(inputs).values(), TILE, **dropout)
    assert_bits_equal(f"{case.name}: y", y, y_expected)
    assert (z is None) == (not case.gain)
    if case.gain:
        assert_bits_equal(f"{case.name}: z", z, z_expected)


def test_descriptors_move_the_bytes_that_pointers_move(device, probe):
    """But for rows past M: pointers read row 0 there, descriptors nothing."""
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    inputs = draw(Case("aligned", 64, 64, 64, 16), device)
    for gemm in (lora_gemm_tma, lora_gemm_pointers):
        gemm(*vars(inputs).values(), TILE, seed=0, threshold=0, precision="ieee")
    over_descriptors, over_pointers = (sum(launch.asked.values()) for launch in probe.launches)
    assert over_descriptors == over_pointers


GAIN_CASES = [
    Case("aligned-bf16", 64, 64, 64, 16, gain=True),
    Case("odd-bf16-bias", 33, 65, 97, 5, bias=True, gain=True),
    Case("odd-fp16-fp32-adapters", 33, 65, 97, 5, FP16, FP32, bias=True, gain=True),
    Case("odd-fp32", 33, 65, 97, 5, FP32, FP32, bias=True, gain=True),
    Case("one-row-rank-1", 1, 17, 33, 1, gain=True),
    Case("rank-40", 37, 48, 50, 40, gain=True),
]


@pytest.mark.parametrize("case", GAIN_CASES, ids=lambda case: case.name)
def test_gain_is_no_worse_than_eager(case, device):
    """z = x w^T + s b^T and y = gain z + bias, both from the unrounded sums."""
    inputs = draw(case, device)
    got = lora.lora_epilogue(inputs.x, inputs.w, inputs.s, inputs.b, inputs.bias, gain=inputs.gain, precision="ieee")

    def expected(dtype, gain_dtype):
        x, w, s, b = (t.to(dtype) for t in (inputs.x, inputs.w, inputs.s[:, : case.R], inputs.b))
        z = x @ w.mT + s @ b.mT
        y = inputs.gain.to(gain_dtype) * z + (0 if inputs.bias is None else inputs.bias.to(dtype))
        return y, z

    exact, eager = expected(torch.float64, torch.float64), expected(case.dtype, case.dtype)
    for name, value, *references in zip("yz", got, exact, eager, strict=True):
        assert value.dtype == case.dtype
        assert_no_worse(f"{case.name}: {name}", value, *references)
    without = lora.lora_epilogue(inputs.x, inputs.w, inputs.s, inputs.b, None, precision="ieee")
    assert_bits_equal(f"{case.name}: z and the y of no gain", got[1], without)


def test_down_gives_the_dtype_that_is_asked_for(device):
    """float32 sums of bfloat16 operands, rounded only on request: W A^T of DoRA's norms."""
    x, a = (torch.randn(n, 40, device=device).to(BF16) for n in (33, 5))
    arguments = {"scale": 2.0, "seed": 0, "threshold": 0, "precision": "ieee"}
    exact, eager = 2.0 * (x.double() @ a.double().mT), 2.0 * (x.float() @ a.float().mT)
    wide = lora.lora_down(x, a, **arguments, out_dtype=FP32)
    assert wide.dtype == FP32
    assert_no_worse("s in float32", wide[:, :5], exact, eager)
    assert_bits_equal("s rounded", wide.to(BF16), lora.lora_down(x, a, **arguments))


def matrix(rows, columns, dtype=BF16, *, stride=None, offset=0):
    """[rows, columns] whose rows are `stride` elements apart and begin `offset` elements into their memory."""
    stride = stride or columns
    return torch.empty(rows * stride + offset, dtype=dtype).as_strided((rows, columns), (stride, 1), offset)


@pytest.mark.parametrize(
    ("x", "w", "expected"),
    [
        (matrix(3, 64), matrix(5, 64), True),
        (matrix(3, 64), matrix(64, 40).t(), True),
        (matrix(3, 64, stride=72), matrix(5, 64, stride=80), True),
        (matrix(3, 60), matrix(5, 60), False),
        (matrix(3, 64, stride=66), matrix(5, 64), False),
        (matrix(3, 64), matrix(5, 64, stride=66), False),
        (matrix(3, 64), matrix(64, 39).t(), False),
        (matrix(3, 64), matrix(5, 128)[:, ::2], False),
        (matrix(3, 64, offset=1), matrix(5, 64), False),
        (matrix(3, 64), matrix(5, 64, offset=4), False),
        (matrix(3, 64, offset=8), matrix(5, 64, offset=8), True),
        (matrix(1, 64).expand(3, 64), matrix(5, 64), False),
        (matrix(3, 64, FP32), matrix(5, 64, FP32), False),
    ],
    ids=[
        *("contiguous", "w-by-columns", "wider-rows", "k-60", "x-stride-66", "w-stride-66", "n-39", "w-strided"),
        *("x-address", "w-address", "both-addresses-aligned", "x-expanded", "float32"),
    ],
)
def test_descriptors_hold_aligned_matrices_only(x, w, expected):
    assert takes_descriptors(x, w) == expected


def test_descriptors_are_for_targets_and_tiles_with_a_warpgroup():
    for arch, expected in (("sm_90", True), ("sm_100", True), ("sm_80", False), ("sm_120", False), ("gfx942", False)):
        config = choose("gemm", Target(arch, 100), M=8192, N=4096, R=16, dtype=BF16)
        assert prefers_descriptors(Target(arch, 100), config) == expected, arch
    assert not prefers_descriptors(GENERIC, TILE)
    assert not prefers_descriptors(HOPPER, choose("gemm", HOPPER, M=16, N=4096, R=16, dtype=BF16))


@pytest.mark.parametrize(
    ("k", "arch", "kernel"),
    [
        (4096, "sm_90", "_lora_gemm_tma_kernel"),
        (4097, "sm_90", "_lora_gemm_kernel"),
        (4096, "sm_100", "_lora_gemm_tma_kernel"),
        (4096, "sm_80", "_lora_gemm_kernel"),
        (4096, "gfx942", "_lora_gemm_kernel"),
    ],
)
def test_forward_and_grad_x_take_the_form_of_their_target(k, arch, kernel):
    def empty(*shape):
        return torch.empty(*shape, dtype=BF16, device="meta")

    x, w, s, b, a, dy = empty(8192, k), empty(4096, k), empty(8192, 16), empty(4096, 4), empty(4, k), empty(8192, 4096)
    with record_launches(Target(arch, 100)) as launches:
        lora.lora_epilogue(x, w, s, b, None, precision="ieee")
        lora.lora_grad_x(dy, w, s, a, seed=0, threshold=THRESHOLD, precision="ieee")
    assert [launch.kernel.__name__ for launch in launches] == [kernel, kernel]
