"""The DoRA kernels against float64: norms without B A, the gain's backward, the two halves of a dropped input."""

import pytest
import torch
import triton

from fastpeft.kernels import dora, lora
from tests.interpreter import round_to_tf32
from tests.tolerance import assert_bits_equal, assert_no_worse

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SEED, THRESHOLD = 0x1234_5678_9ABC_DEF, 16384  # p = 1/4
EPS = 1e-6
SCALE = 0.5
BYTES, PART = 2, 4  # of bfloat16; of float32 partial sums
EACH_DTYPE = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
SHAPES = pytest.mark.parametrize(("m", "n"), [(33, 65), (64, 128), (1, 1), (301, 97), (3, 2050)])


@pytest.fixture
def interpreted(device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")


def draw(device, *shape, std=1.0, dtype=FP32):
    return (torch.randn(*shape) * std).to(device, dtype)


def spread(matrix):
    """The same values with gaps between the rows."""
    view = torch.zeros(matrix.shape[0], matrix.shape[1] + 3, dtype=matrix.dtype, device=matrix.device)[:, 1:-2]
    return view.copy_(matrix)


def norms(w, a, b, magnitude, precision="ieee"):
    t = dora.dora_products(w, a, precision=precision)
    cast = a.to(w.dtype).float()
    return dora.dora_norm(t, b, cast @ cast.mT, dora.row_squares(w), magnitude, scale=SCALE, eps=EPS)


def composed(w, a, b):
    """||w + scale b a|| by rows, in the dtype of the arguments: what the kernels avoid forming."""
    return (w + SCALE * (b @ a)).norm(dim=1)


@EACH_DTYPE
@pytest.mark.parametrize(("n", "k", "r"), [(65, 97, 5), (64, 64, 16), (1, 1, 1), (5, 2049, 4), (33, 40, 130)])
def test_norm_is_no_worse_than_forming_the_product(n, k, r, dtype, device):
    w, a = draw(device, n, k, dtype=dtype), draw(device, r, k, dtype=dtype)
    b, magnitude = draw(device, n, r, std=r**-0.5), draw(device, n, dtype=dtype)
    norm, gain = norms(w, a, b, magnitude)
    exact = composed(w.double(), a.double(), b.double())
    eager = composed(w.float(), a.float(), b)
    assert_no_worse("norm", norm, exact, eager)
    assert_no_worse("gain", gain, magnitude.double() / exact, magnitude.float() / eager)


@EACH_DTYPE
@pytest.mark.parametrize(("n", "k"), [(65, 97), (1, 1), (3, 4099), (300, 33)])
@pytest.mark.parametrize("layout", ["rows", "conv1d"])
def test_row_squares(n, k, layout, dtype, device):
    w = draw(device, n, k, dtype=dtype)
    view = spread(w) if layout == "rows" else spread(w.mT.contiguous()).mT
    got = dora.row_squares(view)
    assert_no_worse("w_sq", got, w.double().square().sum(1), w.float().square().sum(1))


def test_tf32_products(device):
    """With tf32 the products of w and a are rounded, gram's are not: the norm stays that of rounded operands."""
    w, a, b, magnitude = (draw(device, *shape) for shape in ((33, 65), (5, 65), (33, 5), (33,)))
    norm, _ = norms(w, a, b, magnitude, precision="tf32")
    w_tf32, a_tf32 = (torch.from_numpy(round_to_tf32(t.cpu().numpy())).to(device) for t in (w, a))
    t = w_tf32 @ a_tf32.mT
    square = w.square().sum(1) + 2 * SCALE * (t * b).sum(1) + SCALE**2 * (b @ (a @ a.mT) * b).sum(1)
    assert_no_worse("norm", norm, composed(w.double(), a.double(), b.double()), square.sqrt())


@EACH_DTYPE
@pytest.mark.parametrize("magnitude", [0.0, 3.0])
def test_a_row_of_zeros_gives_nothing_and_no_nan(magnitude, dtype, device):
    """PEFT #2049: magnitude / 0 made the whole output NaN where a row of w is zero and b is still zero."""
    w, a, b = draw(device, 33, 65, dtype=dtype), draw(device, 5, 65, dtype=dtype), torch.zeros(33, 5, device=device)
    w[7] = 0.0
    norm, gain = norms(w, a, b, torch.full((33,), magnitude, device=device))
    assert norm[7].item() == pytest.approx(EPS)
    assert torch.isfinite(gain).all()
    x, dy = draw(device, 9, 65, dtype=dtype), draw(device, 9, 33, dtype=dtype)
    z = (x.float() @ w.float().mT).to(dtype)
    assert_bits_equal("y of the row", (gain * z)[:, 7], torch.zeros(9, device=device))
    _, dmagnitude = dora.dora_backward(dy, z, gain, norm)
    assert dmagnitude[7] == 0
    assert torch.isfinite(dmagnitude).all()


def test_a_square_that_rounds_below_zero_is_zero(device):
    """w = -scale b a exactly: the three terms cancel and may leave a negative rest."""
    a, b = draw(device, 5, 97), draw(device, 33, 5)
    norm, gain = norms(-SCALE * (b @ a), a, b, torch.ones(33, device=device))
    assert torch.isfinite(norm).all()
    assert torch.isfinite(gain).all()
    assert (norm >= EPS).all()


def backward_in(dtype, dy, z, gain, norm):
    dy, z, gain, norm = (tensor.to(dtype) for tensor in (dy, z, gain, norm))
    return gain * dy, (dy * z).sum(0) / norm


@EACH_DTYPE
@SHAPES
def test_backward(m, n, dtype, device):
    dy, z = spread(draw(device, m, n, dtype=dtype)), spread(draw(device, m, n, dtype=dtype))
    gain, norm = draw(device, n), draw(device, n).abs() + 0.5
    dz, dmagnitude = dora.dora_backward(dy, z, gain, norm)
    exact_dz, exact_dm = backward_in(torch.float64, dy, z, gain, norm)
    eager_dz, eager_dm = backward_in(FP32, dy, z, gain, norm)
    assert_no_worse("dz", dz, exact_dz, eager_dz.to(dtype))
    assert_no_worse("dmagnitude", dmagnitude, exact_dm, eager_dm)
    again = dora.dora_backward(dy, z, gain, norm)
    assert_bits_equal("dz again", again[0], dz)
    assert_bits_equal("dmagnitude again", again[1], dmagnitude)


@EACH_DTYPE
@SHAPES
def test_a_dropped_input_and_its_rest(m, n, dtype, device):
    x = spread(draw(device, m, n, dtype=dtype))
    keep = lora.lora_keep(SEED, m, n, THRESHOLD, device)
    dropped, rest = dora.split_dropped(x, seed=SEED, threshold=THRESHOLD)
    expected = torch.where(keep, x.float() * (4 / 3), torch.zeros_like(x, dtype=FP32))
    exact = torch.where(keep, x.double() / 0.75, torch.zeros_like(x, dtype=torch.float64))
    assert_no_worse("dropped", dropped, exact, expected.to(dtype))
    assert_bits_equal("rest", rest, (x.float() - dropped.float()).to(dtype))
    assert_bits_equal("drop_rows", dora.drop_rows(x, seed=SEED, threshold=THRESHOLD), dropped)


@EACH_DTYPE
@SHAPES
def test_combining_the_two_gradients(m, n, dtype, device):
    u, v = spread(draw(device, m, n, dtype=dtype)), draw(device, m, n, dtype=dtype)
    keep = lora.lora_keep(SEED, m, n, THRESHOLD, device)
    mask = keep.double() / 0.75
    exact = u.double() * (1 - mask) + v.double() * mask
    eager = u.float() * (1 - mask.float()) + v.float() * mask.float()
    assert_no_worse("dx", dora.combine_dropped(u, v, seed=SEED, threshold=THRESHOLD), exact, eager.to(dtype))


def test_without_dropout_all_is_kept(device):
    x = draw(device, 5, 33, dtype=BF16)
    dropped, rest = dora.split_dropped(x, seed=SEED, threshold=0)
    assert_bits_equal("dropped", dropped, x)
    assert_bits_equal("rest", rest, torch.zeros_like(x))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "n"), [(67, 65), (64, 512)])
def test_the_backward_reads_dy_and_z_once(m, n, probe):
    dy, z = draw("cpu", m, n, dtype=BF16), draw("cpu", m, n, dtype=BF16)
    dora.dora_backward(dy, z, torch.ones(n), torch.ones(n))
    both, total = probe.launches
    parts = both.asked["dmagnitude_ptr", "store"] // (n * PART)
    assert both.asked == {
        ("dy_ptr", "load"): m * n * BYTES,
        ("z_ptr", "load"): m * n * BYTES,
        ("gain_ptr", "load"): parts * n * PART,
        ("norm_ptr", "load"): parts * n * PART,
        ("dz_ptr", "store"): m * n * BYTES,
        ("dmagnitude_ptr", "store"): parts * n * PART,
    }
    assert parts > 1
    assert total.asked == {("parts_ptr", "load"): parts * n * PART, ("out_ptr", "store"): n * PART}


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("m", "k"), [(67, 97), (64, 512)])
def test_one_read_of_each_large_tensor(m, k, probe):
    x, v = draw("cpu", m, k, dtype=BF16), draw("cpu", m, k, dtype=BF16)
    dora.split_dropped(x, seed=SEED, threshold=THRESHOLD)
    dora.combine_dropped(x, v, seed=SEED, threshold=THRESHOLD)
    dora.row_squares(x)
    split, combine, squares = probe.launches[:3]
    all_bytes = m * k * BYTES
    assert split.asked == {
        ("x_ptr", "load"): all_bytes,
        ("dropped_ptr", "store"): all_bytes,
        ("rest_ptr", "store"): all_bytes,
    }
    assert combine.asked == {
        ("u_ptr", "load"): all_bytes,
        ("v_ptr", "load"): all_bytes,
        ("dx_ptr", "store"): all_bytes,
    }
    row_tiles = triton.cdiv(m, 8)
    assert squares.asked["w_ptr", "load"] == row_tiles * 8 * k * BYTES  # rows past N read row 0
