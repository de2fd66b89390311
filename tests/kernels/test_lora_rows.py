"""A batch of rows with different adapters: each row against float64 with its own adapter, gradients adapter by adapter."""

from dataclasses import dataclass

import pytest
import torch
import triton

from fastpeft.kernels import lora_rows
from fastpeft.kernels.lora_rows import BASE, plan_rows
from fastpeft.kernels.tiling import padded_rank
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BYTES, PART, INT = 2, 4, 4  # of bfloat16, of float32 partial sums, of int32 tables


@dataclass(frozen=True)
class Case:
    """segments: (rows, adapter), in the order of the batch; ranks: of the adapters."""

    name: str
    segments: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    N: int = 65
    K: int = 97
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"

    @property
    def adapters(self):
        return [adapter for rows, adapter in self.segments for _ in range(rows)]

    @property
    def M(self):
        return len(self.adapters)

    def plan(self, device):
        triples, first = [], 0
        for rows, adapter in self.segments:
            triples.append((first, rows, adapter))
            first += rows
        return plan_rows(triples, len(self.ranks), device)


MIXED = ((33, 1), (5, BASE), (17, 0), (1, 2), (40, 1))
CASES = [
    Case("aligned-bf16", ((32, 0), (32, 1)), (16, 16), 64, 64),
    Case("odd-bf16", MIXED, (5, 16, 3)),
    Case("odd-fp16", MIXED, (5, 16, 3), dtype=FP16),
    Case("odd-fp32", MIXED, (5, 16, 3), dtype=FP32),
    Case("fp32-adapters", MIXED, (5, 16, 3), adapter_dtype=FP32),
    Case("strided", MIXED, (5, 16, 3), layout="rows"),
    Case("transposed-adapters", MIXED, (5, 16, 3), layout="adapters"),
    Case("adapters-without-rows", ((9, 2), (3, BASE)), (4, 5, 6, 7)),
    Case("decode", tuple((1, adapter) for adapter in (3, BASE, 0, 3, 1, 0, 3, BASE, 2)), (5, 16, 3, 8)),
    Case("one-row", ((1, 0),), (1,), 17, 33),
    Case("only-the-base", ((7, BASE),), (5,)),
    Case("one-of-each", ((1, 0),), (1,), 1, 1, FP32),
    Case("an-empty-segment", ((4, 0), (0, 1), (3, 0)), (5, 2)),
    Case("chunks-of-one-adapter", ((70, 1), (200, 0), (3, BASE), (130, 1)), (5, 9), 33, 40),
    Case("wide-ranks", ((20, 0), (14, 1)), (200, 33), 33, 31),
    Case("long-k", ((2, 1), (3, 0)), (4, 2), 5, 2049),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Inputs:
    x: torch.Tensor
    y: torch.Tensor
    dy: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor

    def tensors(self):
        return list(vars(self).values())


def spread(tensor):
    """The same values with gaps between the rows."""
    view = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device)[..., 1:-2]
    return view.copy_(tensor)


def draw(case, device) -> Inputs:
    adapter = case.adapter_dtype or case.dtype
    width = max(padded_rank(r) for r in case.ranks)

    def normal(*shape, std=1.0, dtype=case.dtype):
        return (torch.randn(*shape) * std).to(device, dtype)

    a = normal(len(case.ranks), width, case.K, std=case.K**-0.5, dtype=adapter)
    b = normal(len(case.ranks), case.N, width, dtype=adapter)
    for adapter_index, r in enumerate(case.ranks):
        a[adapter_index, r:] = 0.0
        b[adapter_index, :, r:] = 0.0
    scales = torch.arange(1, len(case.ranks) + 1, dtype=FP32, device=device) / 2
    inputs = Inputs(normal(case.M, case.K), normal(case.M, case.N), normal(case.M, case.N), a, b, scales)
    if case.layout == "rows":
        inputs.x, inputs.y, inputs.dy = spread(inputs.x), spread(inputs.y), spread(inputs.dy)
        inputs.a, inputs.b = spread(a), spread(b)
    elif case.layout == "adapters":
        inputs.a, inputs.b = a.mT.contiguous().mT, b.mT.contiguous().mT
    return inputs


def run_kernels(case, inputs):
    plan = case.plan(inputs.x.device)
    s = lora_rows.rows_down(inputs.x, inputs.a, inputs.scales, plan, precision="ieee")
    y = inputs.y.clone() if inputs.y.is_contiguous() else spread(inputs.y)
    assert lora_rows.rows_up_add_(y, s, inputs.b, plan, precision="ieee") is y
    ds = lora_rows.rows_grad_s(inputs.dy, inputs.b, inputs.scales, plan, precision="ieee")
    da = lora_rows.rows_grad_a(inputs.x, ds, plan, dtype=inputs.a.dtype, precision="ieee")
    db = lora_rows.rows_grad_b(inputs.dy, s, plan, dtype=inputs.b.dtype, precision="ieee")
    return {"s": s, "y": y, "ds": ds, "da": da, "db": db}


def run_plain(case, inputs, dtype, s, ds):
    """The same row by row and adapter by adapter in `dtype`; the products of s and ds take the kernel's own."""
    x, y, dy, a, b = (t.to(dtype) for t in (inputs.x, inputs.y.clone(), inputs.dy, inputs.a, inputs.b))
    s, ds = s.to(dtype), ds.to(dtype)
    out = {
        "s": torch.zeros_like(s),
        "y": y.clone(),
        "ds": torch.zeros_like(s),
        "da": torch.zeros_like(a),
        "db": torch.zeros_like(b),
    }
    for adapter in range(len(case.ranks)):
        rows = [row for row, owner in enumerate(case.adapters) if owner == adapter]
        scale = inputs.scales[adapter].to(dtype)
        out["s"][rows] = x[rows] @ a[adapter].mT * scale
        out["ds"][rows] = dy[rows] @ b[adapter] * scale
        out["y"][rows] = y[rows] + s[rows] @ b[adapter].mT
        out["da"][adapter] = ds[rows].mT @ x[rows]
        out["db"][adapter] = dy[rows].mT @ s[rows]
    return out


@EACH_CASE
def test_every_row_takes_its_own_adapter(case, device):
    inputs = draw(case, device)
    before = [tensor.clone() for tensor in inputs.tensors()]
    got = run_kernels(case, inputs)
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert_bits_equal(f"{case.name}: an input", tensor, copy)
    exact = run_plain(case, inputs, torch.float64, got["s"], got["ds"])
    eager = run_plain(case, inputs, case.dtype, got["s"], got["ds"])
    for name, value in got.items():
        assert_no_worse(f"{case.name}: {name}", value, exact[name], eager[name].to(value.dtype))

    base = [row for row, adapter in enumerate(case.adapters) if adapter == BASE]
    unused = sorted(set(range(len(case.ranks))) - set(case.adapters))
    for name, zeros in (("s", base), ("ds", base), ("da", unused), ("db", unused)):
        assert_bits_equal(f"{case.name}: {name} without adapter", got[name][zeros], torch.zeros_like(got[name][zeros]))
    assert_bits_equal(f"{case.name}: y of the base", got["y"][base], inputs.y[base])


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("odd-bf16", "chunks-of-one-adapter")], ids=str)
def test_two_runs_give_equal_bits(case, device):
    inputs = draw(case, device)
    first, second = run_kernels(case, inputs), run_kernels(case, inputs)
    for name, value in first.items():
        assert_bits_equal(f"{case.name}: {name}", second[name], value)


def test_the_order_of_segments_does_not_matter(device):
    """Rows of one adapter need not be neighbours, nor the segments sorted."""
    segments = [(5, 3, 1), (0, 5, 0), (8, 2, 0)]
    plan = plan_rows(segments, 2, device)
    assert plan.order.tolist() == [0, 1, 2, 3, 4, 8, 9, 5, 6, 7]
    assert plan.tile_adapter.tolist() == [0, 1]
    assert plan.tile_rows.tolist() == [7, 3]
    assert plan.adapters == 2
    for table in plan[:7]:
        assert table.dtype == torch.int32
        assert table.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "segments",
    [[(0, 3, 0), (4, 2, 0)], [(0, 3, 0), (2, 2, 0)], [(1, 3, 0)], [(0, 3, 2)], [(0, 3, -2)]],
    ids=["gap", "overlap", "late-start", "no-such-adapter", "negative-adapter"],
)
def test_a_plan_that_does_not_fit_is_refused(segments):
    with pytest.raises(ValueError, match="plan_rows: expected"):
        plan_rows(segments, 2, "cpu")


def test_y_must_have_contiguous_rows(device):
    case = CASES[0]
    inputs = draw(case, device)
    s = torch.zeros(case.M, 16, dtype=BF16, device=device)
    with pytest.raises(ValueError, match="contiguous last axis"):
        lora_rows.rows_up_add_(inputs.y.mT, s, inputs.b, case.plan(device), precision="ieee")


def test_one_launch_per_pass_whatever_the_number_of_adapters(device, probe):
    if device.type != "cpu":
        pytest.skip("launches are counted in the interpreter")
    case = Case("many", tuple((2, adapter) for adapter in range(24)), (4,) * 24, 40, 64)
    inputs = draw(case, device)
    run_kernels(case, inputs)
    names = [launch.kernel for launch in probe.launches]
    assert names == [
        "_rows_down_kernel",
        "_rows_up_add_kernel",
        "_rows_down_kernel",
        "_rows_grad_kernel",
        "_rows_grad_kernel",
    ]
    down, up, _, grad_a, grad_b = probe.launches
    m, n, k, rank, adapters, block = case.M, case.N, case.K, 16, 24, 16
    tiles = adapters * block  # rows of the tiles: those past a tile's end read row 0
    table = adapters * INT
    assert down.asked == {
        ("x_ptr", "load"): tiles * k * BYTES,
        ("a_ptr", "load"): adapters * rank * k * BYTES,
        ("scales_ptr", "load"): adapters * PART,
        ("order_ptr", "load"): m * INT,
        ("tile_adapter_ptr", "load"): table,
        ("tile_first_ptr", "load"): table,
        ("tile_rows_ptr", "load"): table,
        ("s_ptr", "store"): m * rank * BYTES,
    }
    columns = triton.cdiv(n, 32)
    assert up.asked["y_ptr", "load"] == up.asked["y_ptr", "store"] == m * n * BYTES
    assert up.asked["b_ptr", "load"] == adapters * n * rank * BYTES
    assert up.asked["s_ptr", "load"] == columns * tiles * rank * BYTES
    assert grad_a.asked["x_ptr", "load"] == m * k * BYTES
    assert grad_a.asked["da_ptr", "store"] == adapters * rank * k * BYTES
    assert grad_b.asked["x_ptr", "load"] == m * n * BYTES
