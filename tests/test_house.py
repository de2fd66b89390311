"""The test house tests itself: its interpreter, probe, poison and tolerances must catch what they are there to catch."""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests import interpreter, tolerance
from tests.saved_bytes import SavedBytes
from tests.tolerance import assert_bits_equal, assert_close, assert_keep_rate, assert_no_worse
from tests.traffic import OutOfBoundsError, Probe, RaceError

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="tests of the CPU interpreter")


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, N, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs, mask=mask, other=0.0)
    if OP == "add":
        out = x + y
    elif OP == "multiply":
        out = x * y
    elif OP == "scale":
        out = x * 2.5 - y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, -y)
    else:
        out = x
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_kernel(
    x_ptr, w_ptr, y_ptr, M, N, K, stride_xm, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k, mask=(offs_m[:, None] < M) & mask_k[None, :], other=0.0
        )
        w = tl.load(w_ptr + offs_n[:, None] * K + offs_k, mask=(offs_n[:, None] < N) & mask_k[None, :], other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, LOAD_PAST: tl.constexpr, STORE_PAST: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N + LOAD_PAST, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < N + STORE_PAST)


@triton.jit
def _undefined_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N))


@triton.jit
def _accumulate_kernel(x_ptr, y_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    if HOW == "atomic":
        tl.atomic_add(y_ptr + offs, x)
    elif HOW == "read and write":
        tl.store(y_ptr + offs, tl.load(y_ptr + offs) + x)
    elif HOW == "overwrite":
        tl.store(y_ptr + offs, x)
    else:
        tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, x)


@triton.jit
def _sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(x.to(tl.float32), 0))
    tl.store(y_ptr + 1, tl.max(x, 0))


EAGER = {
    "add": torch.add,
    "multiply": torch.multiply,
    "scale": lambda x, y: x * 2.5 - y,
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > y, x, -y),
    "cast": lambda x, y: x,
}


def matmul(x, w, dtype, precision="ieee"):
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    _matmul_kernel[(triton.cdiv(m, 32), triton.cdiv(n, 32))](
        x, w, y, m, n, k, x.stride(0), precision, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16
    )
    return y


# ---- the interpreter's bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.watched
@pytest.mark.parametrize("op", ["add", "multiply", "scale", "maximum", "where"])
def test_bfloat16_arithmetic_is_torchs(device, op):
    x, y = (torch.randn(1000, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(x)
    _binary_kernel[(4,)](x, y, out, 1000, op, BLOCK=256)
    assert_bits_equal(op, out, EAGER[op](x, y))


@pytest.mark.watched
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.int32),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_casts_round_as_torch_does(device, source, target):
    x = torch.cat((torch.randn(900) * 100, torch.arange(-50, 50) / 16)).to(device=device, dtype=source)
    if source.is_floating_point and target.is_floating_point:
        x[:4] = torch.tensor([float("inf"), float("-inf"), 1e-30, -0.0], dtype=source)
    out = torch.empty(1000, dtype=target, device=device)
    _binary_kernel[(4,)](x, x, out, 1000, "cast", BLOCK=256)
    assert_bits_equal("cast", out, x.to(target))


@pytest.mark.watched
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dot_is_no_worse_than_torch(device, dtype):
    x, w = (torch.randn(*shape, device=device).to(dtype) for shape in ((50, 72), (40, 72)))
    exact = x.double() @ w.double().T
    assert_no_worse("dot", matmul(x, w, dtype), exact, x @ w.T)


@interpreted
@pytest.mark.watched
def test_tf32_dot_rounds_its_operands(device):
    x, w = torch.randn(32, 64), torch.randn(32, 64)
    exact = x.double() @ w.double().T
    error = {precision: tolerance.rms(matmul(x, w, torch.float32, precision) - exact) for precision in ("ieee", "tf32")}
    assert error["ieee"] < 3e-6 < 3e-4 < error["tf32"] < 1e-2, error
    third = np.array([1 / 3, np.inf, 1 + 2**-11], np.float32)
    rounded = interpreter.round_to_tf32(third)
    assert rounded.tolist() == [0.333251953125, np.inf, 1 + 2**-10]


@pytest.mark.watched
def test_bfloat16_reductions(device):
    x = torch.randn(256, device=device).bfloat16()
    out = torch.empty(2, device=device)
    _sum_kernel[(1,)](x, out, BLOCK=256)
    assert_close("sum", out[0], x.float().sum(), tolerance.MERGED_EQUALS_UNMERGED)
    assert out[1] == x.max().float()


@pytest.mark.watched
def test_bfloat16_atomic_add_accumulates(device):
    x = torch.randint(-8, 8, (4 * 32,), device=device).bfloat16()
    y = torch.zeros(32, dtype=torch.bfloat16, device=device)
    _accumulate_kernel[(4,)](x, y, "atomic", BLOCK=32)
    assert_bits_equal("atomic", y, x.view(4, 32).float().sum(0).bfloat16())


@interpreted
def test_installing_twice_changes_nothing():
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    interpreter.install()
    assert InterpreterBuilder.create_dot is before


# ---- poison --------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masked_lanes_without_other_read_nan(dtype):
    x, y = torch.ones(16, dtype=dtype), torch.zeros(32, dtype=dtype)
    _undefined_kernel[(1,)](x, y, 16, BLOCK=32)
    assert torch.isnan(y[16:]).all()
    assert (y[:16] == 1).all()


@interpreted
def test_masked_integer_lanes_without_other_read_0x5a():
    x, y = torch.ones(16, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    _undefined_kernel[(1,)](x, y, 16, BLOCK=32)
    assert (y[16:] == 0x5A5A5A5A).all()
    assert interpreter.poison((3,), np.dtype(np.uint8)).tolist() == [0x5A] * 3
    assert np.isnan(interpreter.poison((2, 2), np.dtype(ml_dtypes.bfloat16)).astype(np.float32)).all()


def test_unwritten_outputs_read_nan(poisoned_memory, device):
    x = torch.zeros(4, 4, device=device)
    for out in (torch.empty(4, device=device), torch.empty_like(x), x.new_empty(3), torch.empty_like(x.bfloat16())):
        assert torch.isnan(out).all()
    assert (torch.empty(4, dtype=torch.int32, device=device) == torch.iinfo(torch.int32).max).all()


def test_poison_ends_with_its_test():
    assert not torch.are_deterministic_algorithms_enabled()


# ---- the probe -----------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize(("load_past", "store_past", "kind"), [(1, 0, "load"), (0, 3, "store")])
def test_probe_finds_accesses_out_of_bounds(load_past, store_past, kind):
    x, y = torch.randn(100), torch.zeros(100)
    with Probe() as probe, pytest.raises(OutOfBoundsError, match=rf"{kind} of \d lane.*1 element\(s\) past the end"):
        _copy_kernel[(4,)](x, y, 100, load_past, store_past, BLOCK=32)
    assert len(probe.faults) == 1
    with Probe(strict=False) as probe:
        _copy_kernel[(4,)](x, y, 100, load_past, store_past, BLOCK=32)
    assert len(probe.faults) == 1
    assert kind in probe.faults[0]
    assert "test_house.py" in probe.launches[0].file
    assert_bits_equal("what is in bounds is still done", y, x)


@interpreted
def test_probe_finds_accesses_between_the_rows_of_a_view():
    """A view's extent covers its neighbours' columns: an extent check alone accepted a read of column K."""
    whole = torch.randn(8, 40)
    w, y = torch.randn(16, 33), torch.empty(8, 16)
    with Probe(strict=False) as probe:
        # K = 33 is right for w, and one too many for x
        _matmul_kernel[(1, 1)](whole[:, :32], w, y, 8, 16, 33, 40, "ieee", BLOCK_M=32, BLOCK_N=32, BLOCK_K=16)
    assert "load of 8 lane(s) out of bounds" in probe.faults[0]
    assert "in a gap between its rows" in probe.faults[0]


@interpreted
@pytest.mark.parametrize("how", ["read and write", "overwrite"])
def test_probe_finds_races(how):
    x, y = torch.randn(4 * 32), torch.zeros(32)
    with Probe(), pytest.raises(RaceError, match="y_ptr"):
        _accumulate_kernel[(4,)](x, y, how, BLOCK=32)
    with Probe(strict=False) as probe:
        _accumulate_kernel[(4,)](x, y, how, BLOCK=32)
    (race,) = probe.launches[0].races()
    assert (race.tensor, race.element, race.programs, race.count) == ("y_ptr", 0, (0, 1, 2, 3), 32)


@interpreted
def test_probe_finds_a_race_between_two_names_of_one_tensor():
    x = torch.randn(4 * 32)
    with Probe(), pytest.raises(RaceError):
        _accumulate_kernel[(4,)](x, x[32:], "overwrite", BLOCK=32)


@interpreted
@pytest.mark.parametrize("how", ["atomic", "apart"])
def test_probe_accepts_what_does_not_race(how):
    with Probe() as probe:
        _accumulate_kernel[(4,)](torch.randn(4 * 32), torch.zeros(4 * 32), how, BLOCK=32)
    assert probe.launches[0].races() == []


@interpreted
def test_probe_counts_bytes_as_the_closed_form():
    m, n, k, size = 64, 96, 32, 2
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    with Probe() as probe:
        matmul(x, w, torch.bfloat16)
    tiles_m, tiles_n = m // 32, n // 32
    assert probe.bytes_asked(0) == {
        ("x_ptr", "load"): tiles_n * m * k * size,
        ("w_ptr", "load"): tiles_m * n * k * size,
        ("y_ptr", "store"): m * n * size,
    }
    launch = probe.launches_of("_matmul_kernel")[0]
    assert launch.unique_bytes(("x_ptr", "load")) == m * k * size
    assert launch.program_bytes(("x_ptr", "load")) == tiles_n * m * k * size
    assert "x_ptr" in launch.report()


@interpreted
def test_probe_leaves_the_interpreter_as_it_was():
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    before = InterpreterBuilder.create_masked_load, GridExecutor.__call__
    with Probe():
        assert InterpreterBuilder.create_masked_load is not before[0]
    assert (InterpreterBuilder.create_masked_load, GridExecutor.__call__) == before


# ---- tolerances ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trio():
    """(exact, eager, got): a bfloat16 matrix product, its oracle, and an equally good second version."""
    x, w = torch.randn(64, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    exact = x.double() @ w.double().T
    return exact, x @ w.T, exact.bfloat16()


def test_no_worse_accepts_the_eager_code_and_the_rounded_oracle(trio):
    exact, eager, got = trio
    assert_no_worse("eager", eager, exact, eager)
    assert_no_worse("rounded", got, exact, eager)


PLANTED = {
    "scaled by 1 + 2 eps": lambda y: y * (1 + 2**-6),
    "one wrong element": lambda y: y.index_put((torch.tensor(63), torch.tensor(63)), torch.tensor(0.0).to(y)),
    "one column zero": lambda y: y.index_fill(1, torch.tensor(5), 0.0),
    "two rows exchanged": lambda y: y[torch.tensor([1, 0, *range(2, 64)])],
    "one NaN": lambda y: y.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(float("nan")).to(y)),
    "one infinity": lambda y: y.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(float("inf")).to(y)),
    "another shape": lambda y: y[:63],
    "another dtype": lambda y: y.float(),
    "biased by one unit in the last place": lambda y: torch.nextafter(y.float() * (1 + 2**-7), y.float()).bfloat16(),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_no_worse_rejects_planted_errors(trio, fault):
    exact, eager, got = trio
    with pytest.raises(AssertionError, match="y: "):
        assert_no_worse("y", PLANTED[fault](got), exact, eager)


def test_no_worse_refuses_a_bad_oracle(trio):
    exact, eager, got = trio
    with pytest.raises(ValueError, match="float64"):
        assert_no_worse("y", got, exact.float(), eager)
    with pytest.raises(ValueError, match="eager is not finite"):
        assert_no_worse("y", got, exact, eager / 0)


def test_bits_equal():
    x = torch.tensor([1.0, float("nan"), 0.0]).bfloat16()
    assert_bits_equal("x", x, x.clone())
    for other in (torch.tensor([1.0, float("nan"), -0.0]).bfloat16(), x.float(), x[:2]):
        with pytest.raises(AssertionError):
            assert_bits_equal("x", other, x)


def test_close_and_keep_rate():
    x = torch.full((100,), 10.0)
    assert_close("x", x + 5e-6, x, tolerance.LOGITS_EQUAL_TO_PEFT)
    with pytest.raises(AssertionError, match="largest difference"):
        assert_close("x", x + 2e-5, x, tolerance.LOGITS_EQUAL_TO_PEFT)
    assert_keep_rate("keep", torch.rand(100, 1000) >= 0.1, 0.1)
    with pytest.raises(AssertionError, match="expected a rate"):
        assert_keep_rate("keep", torch.rand(100, 1000) >= 0.11, 0.1)


# ---- saved bytes ---------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_storages_once_and_leaves_parameters_out():
    layer = torch.nn.Linear(32, 16)
    x = torch.randn(8, 32)
    with SavedBytes(layer) as saved:
        loss = layer(x).square().sum()
    assert [(row.nbytes, row.shape) for row in saved.storages()] == [(8 * 32 * 4, (8, 32)), (8 * 16 * 4, (8, 16))]
    assert saved.total() == 8 * 32 * 4 + 8 * 16 * 4
    loss.backward()
    assert saved.total() == 0
