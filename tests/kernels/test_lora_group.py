"""Projections that share x: every member against float64, and x read once for all of them."""

from dataclasses import dataclass

import pytest
import torch
import triton

from fastpeft.kernels import lora, lora_group
from fastpeft.kernels.lora_group_tiling import down_tile, grad_a_tile, grad_x_tile
from fastpeft.kernels.tiling import INTERPRETER, padded_rank
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BYTES, PART = 2, 4  # of bfloat16; of float32 partial sums
P = 16384  # a threshold: p = 1/4


@dataclass(frozen=True)
class Member:
    """One projection; rank 0: no adapter."""

    N: int
    R: int
    threshold: int = 0
    scale: float = 2.0


@dataclass(frozen=True)
class Case:
    name: str
    M: int
    K: int
    members: tuple[Member, ...]
    dtype: torch.dtype = BF16
    adapter_dtype: torch.dtype | None = None
    layout: str = "contiguous"


QKV = (Member(65, 5), Member(33, 16, scale=0.5), Member(17, 1))
CASES = [
    Case("aligned-bf16", 64, 64, (Member(64, 16), Member(32, 16), Member(32, 16))),
    Case("aligned-fp16", 64, 64, (Member(64, 16), Member(32, 16)), FP16),
    Case("odd-bf16", 33, 97, QKV),
    Case("odd-fp32", 33, 97, QKV, FP32),
    Case("dropout-on-some", 33, 97, (Member(65, 5, P), Member(33, 16), Member(17, 7, 6554))),
    Case("dropout-on-all-fp32", 65, 97, (Member(65, 5, P), Member(33, 20, P)), FP32),
    Case("no-adapter-in-the-middle", 33, 97, (Member(65, 5, P), Member(33, 0), Member(17, 7))),
    Case("one-member", 33, 97, (Member(65, 5, P),)),
    Case("one-row", 1, 33, (Member(17, 1), Member(5, 2, P)), FP16),
    Case("one-of-each", 1, 1, (Member(1, 1), Member(1, 1)), FP32),
    Case("six-members", 33, 40, tuple(Member(9 + i, 3 + i, P * (i % 2)) for i in range(6))),
    Case("wide-ranks", 34, 40, (Member(33, 200), Member(9, 257), Member(8, 128, P))),
    Case("rank-600", 17, 33, (Member(9, 600), Member(9, 2))),
    Case("long-k", 3, 2049, (Member(5, 4), Member(7, 3, P))),
    Case("many-rows", 301, 24, (Member(40, 8), Member(5, 2, P))),
    Case("fp32-adapters", 33, 97, QKV, BF16, FP32),
    Case("strided", 33, 97, QKV, layout="rows"),
    Case("conv1d-weight", 33, 40, QKV, layout="conv1d"),
]
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Inputs:
    x: torch.Tensor
    w: list[torch.Tensor]
    a: list[torch.Tensor | None]
    b: list[torch.Tensor | None]
    dy: list[torch.Tensor]

    def tensors(self):
        return [t for t in (self.x, *self.w, *self.a, *self.b, *self.dy) if t is not None]


def spread(matrix):
    view = torch.zeros(matrix.shape[0], matrix.shape[1] + 3, dtype=matrix.dtype, device=matrix.device)[:, 1:-2]
    return view.copy_(matrix)


def draw(case, device) -> Inputs:
    adapter = case.adapter_dtype or case.dtype

    def normal(*shape, std=1.0, dtype=case.dtype):
        return (torch.randn(*shape) * std).to(device, dtype)

    inputs = Inputs(
        x=normal(case.M, case.K),
        w=[normal(m.N, case.K, std=case.K**-0.5) for m in case.members],
        a=[normal(m.R, case.K, std=case.K**-0.5, dtype=adapter) if m.R else None for m in case.members],
        b=[normal(m.N, m.R, std=m.R**-0.5, dtype=adapter) if m.R else None for m in case.members],
        dy=[normal(case.M, m.N) for m in case.members],
    )
    if case.layout == "rows":
        inputs.x, inputs.dy = spread(inputs.x), [spread(dy) for dy in inputs.dy]
        inputs.w[0] = spread(inputs.w[0])
    elif case.layout == "conv1d":
        inputs.w = [w.mT.contiguous().mT for w in inputs.w]
        inputs.a[1] = inputs.a[1].mT.contiguous().mT
    return inputs


def seed_of(index):
    return 0x1234_5678_9ABC_DEF + index


def run_kernels(case, inputs):
    """{name of each result: tensor}: s, then ds from the float64 equation so that one kernel's error is tested at a time."""
    members = [
        None if a is None else (a, m.scale, seed_of(i), m.threshold)
        for i, (a, m) in enumerate(zip(inputs.a, case.members, strict=True))
    ]
    s = lora_group.group_down(inputs.x, members, precision="ieee")
    ds = [padded(tensor, case.dtype) for tensor in ds_of(case, inputs, torch.float64)]
    dropout = [None if m is None else (m[0], m[2], m[3]) for m in members]
    da = lora_group.group_grad_a(inputs.x, ds, dropout, precision="ieee")
    dx = lora_group.group_grad_x(grad_x_members(case, inputs, ds), precision="ieee")
    return s, da, dx


def grad_x_members(case, inputs, ds):
    return [
        (inputs.dy[i], inputs.w[i], ds[i], inputs.a[i], seed_of(i), member.threshold)
        for i, member in enumerate(case.members)
    ]


def ds_of(case, inputs, dtype):
    """ds_i [M, R_i] = c_i dy_i b_i in `dtype`."""
    return [
        None if b is None else dy.to(dtype) @ b.to(dtype) * (m.scale / (1 - m.threshold / 65536))
        for dy, b, m in zip(inputs.dy, inputs.b, case.members, strict=True)
    ]


def padded(ds, dtype):
    if ds is None:
        return None
    out = torch.zeros(ds.shape[0], padded_rank(ds.shape[1]), dtype=dtype, device=ds.device)
    out[:, : ds.shape[1]] = ds
    return out


def run_plain(case, inputs, dtype):
    """The same by plain products in `dtype`; ds rounded to the working dtype, as the kernels get it."""
    x = inputs.x.to(dtype)
    ds = ds_of(case, inputs, torch.float64)
    s, da, dx = [], [], torch.zeros_like(x)
    for i, member in enumerate(case.members):
        dx = dx + inputs.dy[i].to(dtype) @ inputs.w[i].to(dtype)
        if inputs.a[i] is None:
            s.append(None)
            da.append(None)
            continue
        a, grad = inputs.a[i].to(dtype), ds[i].to(case.dtype).to(dtype)
        keep = lora.lora_keep(seed_of(i), case.M, case.K, member.threshold, x.device)
        kept = torch.where(keep, x, torch.zeros_like(x))
        s.append(kept @ a.mT * (member.scale / (1 - member.threshold / 65536)))
        da.append(grad.mT @ kept)
        dx = dx + torch.where(keep, grad @ a, torch.zeros_like(x))
    return s, da, dx


@EACH_CASE
def test_every_member_is_no_worse_than_eager(case, device):
    inputs = draw(case, device)
    before = [tensor.clone() for tensor in inputs.tensors()]
    s, da, dx = run_kernels(case, inputs)
    for tensor, copy in zip(inputs.tensors(), before, strict=True):
        assert_bits_equal(f"{case.name}: an input", tensor, copy)
    exact_s, exact_da, exact_dx = run_plain(case, inputs, torch.float64)
    eager_s, eager_da, eager_dx = run_plain(case, inputs, case.dtype)
    assert_no_worse("dx", dx, exact_dx, eager_dx)
    for i, member in enumerate(case.members):
        if not member.R:
            assert s[i] is None
            assert da[i] is None
            continue
        assert s[i].shape == (case.M, padded_rank(member.R))
        assert s[i].is_contiguous()
        assert_bits_equal(f"padding of s {i}", s[i][:, member.R :], torch.zeros_like(s[i][:, member.R :]))
        assert_no_worse(f"s {i}", s[i][:, : member.R], exact_s[i], eager_s[i])
        assert_no_worse(f"da {i}", da[i], exact_da[i], eager_da[i].to(inputs.a[i].dtype))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("dropout-on-some", "many-rows")], ids=lambda c: c.name)
def test_two_runs_give_equal_bits(case, device):
    inputs = draw(case, device)
    first, second = run_kernels(case, inputs), run_kernels(case, inputs)
    for one, two in zip((*first[0], *first[1], first[2]), (*second[0], *second[1], second[2]), strict=True):
        assert_bits_equal(case.name, two, one)


def test_members_one_by_one(device):
    """Where the weights cannot all be dense at once: a float32 sum goes from call to call, and is rounded once."""
    case = next(c for c in CASES if c.name == "dropout-on-some")
    inputs = draw(case, device)
    members = grad_x_members(case, inputs, [padded(ds, BF16) for ds in ds_of(case, inputs, torch.float64)])
    dx = None
    for member in members[:-1]:
        dx = lora_group.group_grad_x([member], precision="ieee", add=dx, dtype=FP32)
    dx = lora_group.group_grad_x(members[-1:], precision="ieee", add=dx)
    assert_no_worse("dx", dx, run_plain(case, inputs, torch.float64)[2], run_plain(case, inputs, BF16)[2])


def test_sums_in_float32_on_request(device):
    """The products that DoRA's norm needs keep their float32 bits."""
    x, a = torch.randn(33, 97).bfloat16().to(device), torch.randn(5, 97).bfloat16().to(device)
    (s,) = lora_group.group_down(x, [(a, 1.0, 0, 0)], precision="ieee", dtype=FP32)
    assert_no_worse("s", s[:, :5], x.double() @ a.double().mT, x.float() @ a.float().mT)


def test_different_adapter_dtypes(device):
    x, ds = torch.randn(33, 97).to(device, BF16), torch.randn(33, 16).to(device, BF16)
    members = [(torch.empty(16, 97, dtype=dtype, device=device), 0, 0) for dtype in (BF16, FP32)]
    da = lora_group.group_grad_a(x, [ds, ds], members, precision="ieee")
    exact = ds.double().mT @ x.double()
    assert_no_worse("bfloat16", da[0], exact, exact.to(BF16))
    assert_no_worse("float32", da[1], exact, ds.float().mT @ x.float())


TRAFFIC = [(67, 97), (64, 128)]
MEMBERS = (Member(65, 5), Member(33, 16, P), Member(17, 20))


@pytest.fixture
def interpreted(device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "k"), TRAFFIC)
def test_down_reads_x_once_for_all_members(m, k, probe):
    x = torch.randn(m, k).bfloat16()
    adapters = [torch.randn(member.R, k).bfloat16() for member in MEMBERS]
    lora_group.group_down(x, [(a, 1.0, 1, 0) for a in adapters], precision="ieee")
    down, total = probe.launches
    columns = sum(padded_rank(member.R) for member in MEMBERS)
    config = down_tile(INTERPRETER, m, columns, BF16, BYTES, False)
    row_tiles = triton.cdiv(m, config.block_m)
    parts = down.asked["s_ptr", "store"] // (m * columns * PART)
    assert down.asked == {
        ("x_ptr", "load"): row_tiles * config.block_m * k * BYTES,  # rows past M read row 0
        **{(f"a{i}_ptr", "load"): row_tiles * a.numel() * BYTES for i, a in enumerate(adapters)},
        ("s_ptr", "store"): parts * m * columns * PART,
    }
    assert parts > 1
    assert total.asked == {
        ("parts_ptr", "load"): parts * m * columns * PART,
        ("out_ptr", "store"): m * columns * BYTES,
    }


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "k"), TRAFFIC)
def test_grad_a_reads_x_once_for_all_members(m, k, probe):
    x = torch.randn(m, k).bfloat16()
    widths = [padded_rank(member.R) for member in MEMBERS]
    ds = [torch.zeros(m, width, dtype=BF16) for width in widths]
    members = [(torch.empty(member.R, k, dtype=BF16), 1, member.threshold) for member in MEMBERS]
    lora_group.group_grad_a(x, ds, members, precision="ieee")
    grad, total = probe.launches
    tiles = triton.cdiv(k, grad_a_tile(INTERPRETER, sum(widths), BF16, True).block_k)
    ranks = sum(member.R for member in MEMBERS)
    parts = grad.asked["da_ptr", "store"] // (ranks * k * PART)
    assert grad.asked == {
        ("x_ptr", "load"): m * k * BYTES,
        **{(f"ds{i}_ptr", "load"): tiles * m * width * BYTES for i, width in enumerate(widths)},
        ("da_ptr", "store"): parts * ranks * k * PART,
    }
    assert parts > 1
    assert total.asked == {("parts_ptr", "load"): parts * ranks * k * PART, ("out_ptr", "store"): ranks * k * BYTES}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "k"), TRAFFIC)
def test_grad_x_writes_dx_once_and_reads_it_never(m, k, probe):
    def normal(*shape):
        return torch.randn(*shape).bfloat16()

    members = [
        (normal(m, x.N), normal(x.N, k), normal(m, padded_rank(x.R)), normal(x.R, k), 1, x.threshold) for x in MEMBERS
    ]
    lora_group.group_grad_x(members, precision="ieee")
    (gemm,) = probe.launches
    config = grad_x_tile(INTERPRETER, m, k, 20, BF16, 1, False)
    row_tiles, column_tiles = triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_n)
    rows = column_tiles * row_tiles * config.block_m
    expected = {("dx_ptr", "store"): m * k * BYTES}
    for i, member in enumerate(MEMBERS):
        expected[f"dy{i}_ptr", "load"] = rows * member.N * BYTES
        expected[f"w{i}_ptr", "load"] = row_tiles * member.N * k * BYTES
        expected[f"ds{i}_ptr", "load"] = rows * padded_rank(member.R) * BYTES
        expected[f"a{i}_ptr", "load"] = row_tiles * member.R * k * BYTES
    assert gemm.asked == expected
