"""NF4Weight and quantize_4bit, all implementations: the bits of the reference (which are bitsandbytes'), and refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional as bitsandbytes

from fastpeft.ops import nf4_torch
from fastpeft.ops.nf4 import NestedAbsmax, NF4Weight, quantize_4bit
from fastpeft.ops.weights import QuantizedWeight
from fastpeft.reference import nf4 as reference
from tests.tolerance import assert_bits_equal

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = [(4, 64), (33, 97), (7, 130), (1, 1), (3, 1367), (70, 96)]
IMPLEMENTATIONS = ["torch", "native", pytest.param("triton", marks=pytest.mark.watched)]


def spec(w, quant_type, blocksize, double_quant, dtype):
    """(packed, absmax, w^) by the reference, on the CPU."""
    packed, absmax = reference.quantize(w.cpu(), quant_type, blocksize)
    scales = absmax
    if double_quant:
        code, nested, offset = reference.quantize_absmax(absmax)
        scales = reference.dequantize_absmax(code, nested, reference.dynamic_table(), offset)
        absmax = code
    return packed, absmax, reference.dequantize(packed, scales, quant_type, blocksize, w.shape, dtype)


@pytest.fixture
def implementation(request, monkeypatch):
    """The value for `impl`; "torch" without and "native" with bitsandbytes' routine for dequantising on a CPU."""
    if request.param == "torch":
        monkeypatch.setattr(nf4_torch, "_native", lambda quant_type, dtype: None)
    return "torch" if request.param == "native" else request.param


EACH_IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)


def check(shape, double_quant, quant_type, blocksize, dtype, outs, impl, device):
    w = torch.randn(shape, device=device).to(dtype)
    stored = quantize_4bit(w, quant_type, blocksize=blocksize, double_quant=double_quant, impl=impl)
    for out in outs:
        packed, absmax, exact = spec(w, quant_type, blocksize, double_quant, out)
        assert_bits_equal("packed", stored.packed, packed)
        assert_bits_equal("absmax", stored.absmax, absmax)
        assert_bits_equal(f"{blocksize} {out}", stored.dequantize(out, impl=impl), exact)
        into = torch.full(shape, float("nan"), dtype=out, device=device)
        assert stored.dequantize(out, impl=impl, out=into) is into
        assert_bits_equal("out", into, exact)
    assert stored.dtype == dtype
    assert stored.dequantize(impl=impl).dtype == dtype


@pytest.mark.parametrize("implementation", ["torch", "native", "reference"], indirect=True)
@pytest.mark.parametrize("quant_type", reference.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["float_absmax", "double_quant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape, double_quant, quant_type, implementation, device):
    dtypes = itertools.cycle([F32, BF16, F16])
    for blocksize, dtype in zip(reference.BLOCKSIZES, dtypes):
        check(shape, double_quant, quant_type, blocksize, dtype, (F32, BF16, F16, F64), implementation, device)


@pytest.mark.watched
@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize(("shape", "blocksize"), [((33, 97), 64), ((70, 96), 256)], ids=str)
def test_triton_bits_of_the_reference(shape, blocksize, quant_type, double_quant, device):
    """The wiring of the kernels; their own tests have the shapes and dtypes."""
    check(shape, double_quant, quant_type, blocksize, BF16, (BF16,), "triton", device)


@pytest.mark.parametrize("quant_type", reference.QUANT_TYPES)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_bytes_of_bitsandbytes(dtype, quant_type):
    """More than one chunk and a short last block; values on bounds, a block of zeros and a subnormal block among them."""
    w = torch.randn(515, 513) * torch.logspace(-4, 4, 515)[:, None]
    w[3] = 0.0
    w[5] *= 1e-40
    bounds, _ = reference.ranks(quant_type)
    w[7, :15], w[7, 15:] = bounds, 0.5
    w = w.to(dtype)
    for blocksize in (32, 64, 4096):
        stored = quantize_4bit(w, quant_type, blocksize=blocksize, impl="torch")
        packed, state = bitsandbytes.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type)
        assert_bits_equal("packed", stored.packed, packed.view(-1))
        assert_bits_equal("absmax", stored.absmax, state.absmax)


@pytest.mark.parametrize("quant_type", reference.QUANT_TYPES)
def test_every_bin_beside_its_borders(quant_type):
    """float32 neighbours of all 15 bounds out to four bins on each side, and both ends of [-1, 1], in blocks of absmax 1."""
    bounds, _ = reference.ranks(quant_type)
    steps = torch.arange(-127, 127) / 127 * 4 / nf4_torch._HALF_BINS
    w = torch.cat([(bounds[:, None] + steps).clamp(-1, 1), torch.linspace(-1, 1, 254).expand(15, -1)])
    near = (bounds.view(torch.int32)[:, None] + torch.arange(-127, 127, dtype=torch.int32)).view(F32)
    w = torch.cat([w, near.nan_to_num(0.0).clamp(-1, 1)])
    w = torch.cat([w, torch.ones(len(w), 1), -torch.ones(len(w), 1)], 1)  # 256 columns
    stored = quantize_4bit(w, quant_type, blocksize=256, impl="torch")
    assert_bits_equal("packed", stored.packed, reference.quantize(w, quant_type, 256)[0])


@EACH_IMPLEMENTATION
def test_two_runs_give_the_same_bits_and_the_input_stays(implementation, device):
    w = torch.randn(70, 96, device=device)
    before = w.clone()
    first, second = (quantize_4bit(w, double_quant=True, impl=implementation) for _ in range(2))
    for name, tensor in first.tensors().items():
        assert_bits_equal(name, tensor, second.tensors()[name])
    assert_bits_equal("w", w, before)
    assert_bits_equal("w^", *(stored.dequantize(impl=implementation) for stored in (first, second)))


def test_strided_weight():
    w = torch.randn(40, 66)
    for view in (w.t(), w[:, ::2], w[1:, 1:]):
        stored, plain = quantize_4bit(view), quantize_4bit(view.contiguous())
        assert_bits_equal("packed", stored.packed, plain.packed)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_whole_of_a_weight(double_quant):
    """4.5 bits a weight in blocks of 64, 4.13 with double quantisation; NF4Weight is a QuantizedWeight."""
    stored = quantize_4bit(torch.randn(256, 256), double_quant=double_quant)
    blocks = 256 * 256 // 64
    nested = blocks + 256 * 4 + blocks // 256 * 4 + 4
    assert sum(t.numel() * t.element_size() for t in stored.tensors().values()) == 256 * 128 + (
        nested if double_quant else blocks * 4
    )
    assert isinstance(stored, QuantizedWeight)
    assert (stored.shape, stored.ndim, stored.device.type) == ((256, 256), 2, "cpu")
    assert stored.to("cpu") is stored
    moved = stored.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    packed = stored.as_packed()
    assert packed.shape == (256, 256)
    assert (packed.nested_code is not None) == double_quant
    assert packed.nested_blocksize == (256 if double_quant else 0)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_weight_without_memory(double_quant):
    """A model on "meta" is laid out as it will be, before its weights are read."""
    stored = quantize_4bit(torch.empty(33, 97, dtype=BF16, device="meta"), double_quant=double_quant)
    real = quantize_4bit(torch.randn(33, 97).to(BF16), double_quant=double_quant)
    assert {name: (t.shape, t.dtype) for name, t in stored.tensors().items()} == {
        name: (t.shape, t.dtype) for name, t in real.tensors().items()
    }
    assert {t.device.type for t in stored.tensors().values()} == {"meta"}
    assert (stored.dequantize().shape, stored.dequantize(F32).dtype) == ((33, 97), F32)
    replace(stored)  # the checks read no values


# -- refusals ---------------------------------------------------------------------------------------------------------


@EACH_IMPLEMENTATION
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (3, 40), (69, 96)], ids=str)
def test_weights_that_are_not_finite(place, value, implementation, device):
    """bitsandbytes stores them, as a block of zeros or of NaN; the last place lies in the short last block."""
    w = torch.randn(70, 97, device=device)
    w[place] = value
    with pytest.raises(ValueError, match=rf"w\[{place[0]}, {place[1]}\] = {value}"):
        quantize_4bit(w, impl=implementation)


def test_a_weight_that_is_not_finite_in_a_later_chunk():
    w = torch.randn(600, 512)
    w[599, 511] = float("nan")
    with pytest.raises(ValueError, match=r"w\[599, 511\] = nan"):
        quantize_4bit(w)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"w": torch.zeros(4)}, r"\(4,\)"),
        ({"w": torch.zeros(0, 4)}, r"\(0, 4\)"),
        ({"w": torch.zeros(4, 4, dtype=F64)}, "float64"),
        ({"w": torch.zeros(4, 4, dtype=torch.int8)}, "int8"),
        ({"w": torch.zeros(4, 4), "quant_type": "nf3"}, "'nf3'"),
        ({"w": torch.zeros(4, 4), "blocksize": 48}, "48"),
        ({"w": torch.zeros(4, 4), "blocksize": 16}, "16"),
        ({"w": torch.zeros(4, 4), "blocksize": 8192}, "8192"),
        ({"w": torch.zeros(4, 4), "impl": "cuda"}, "'cuda'"),
    ],
)
def test_quantize_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit(**arguments)


STORED = quantize_4bit(torch.linspace(-1, 1, 33 * 130).view(33, 130), double_quant=True)
PLAIN = replace(STORED, absmax=STORED.float_absmax().clone(), nested=None)


def damaged(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


DAMAGED = {
    "packed_short": (STORED, {"packed": STORED.packed[:-1]}, "expected packed"),
    "packed_two_dimensions": (STORED, {"packed": STORED.packed.view(-1, 1)}, "expected packed"),
    "packed_float": (STORED, {"packed": STORED.packed.float()}, "expected packed"),
    "packed_strided": (STORED, {"packed": STORED.packed.repeat(2)[::2]}, "not contiguous"),
    "absmax_of_another_weight": (PLAIN, {"absmax": torch.ones(4)}, "of another weight, or damaged"),
    "absmax_half": (PLAIN, {"absmax": PLAIN.absmax.half()}, "expected absmax torch.float32"),
    "absmax_not_nested": (STORED, {"nested": None}, "expected absmax torch.float32"),
    "absmax_on_another_device": (PLAIN, {"absmax": PLAIN.absmax.to("meta")}, "on meta"),
    "absmax_nan": (PLAIN, {"absmax": damaged(PLAIN.absmax, 5, float("nan"))}, "nan at 5 "),
    "absmax_infinite": (PLAIN, {"absmax": damaged(PLAIN.absmax, 6, float("inf"))}, "inf at 6 "),
    "absmax_negative": (PLAIN, {"absmax": damaged(PLAIN.absmax, 7, -1.0)}, "-1.0 at 7 "),
    "nested_code": (
        STORED,
        {"nested": STORED.nested._replace(code=torch.zeros(16))},
        r"nested.code torch.float32 \(256,\)",
    ),
    "nested_code_nan": (
        STORED,
        {"nested": STORED.nested._replace(code=damaged(STORED.nested.code, 9, float("nan")))},
        "nested.code finite, got nan at 9",
    ),
    "nested_offset": (
        STORED,
        {"nested": STORED.nested._replace(offset=torch.tensor(float("inf")))},
        "nested.offset finite",
    ),
    "nested_blocksize": (STORED, {"nested": STORED.nested._replace(blocksize=128)}, "got 128"),
    "shape": (STORED, {"shape": (33, 131)}, "expected packed"),
    "shape_empty": (STORED, {"shape": (0, 130)}, "shape"),
    "blocksize": (STORED, {"blocksize": 100}, "100"),
    "blocksize_of_another_weight": (STORED, {"blocksize": 128}, "blocks of 128"),
    "quant_type": (STORED, {"quant_type": "int4"}, "'int4'"),
    "dtype": (STORED, {"dtype": torch.int32}, "torch.int32"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_quantisation_state(name):
    stored, changes, message = DAMAGED[name]
    with pytest.raises(ValueError, match=message) as error:
        replace(stored, **changes)
    assert "\n" not in str(error.value)


def test_nested_defaults():
    assert NestedAbsmax(*STORED.nested[:3]).blocksize == 256
    assert NF4Weight(**vars(STORED)).nested is STORED.nested


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(33, 131),
        torch.empty(33, 130, dtype=BF16),
        torch.empty(130, 33).t(),
        torch.empty(33, 130, device="meta"),
    ],
)
def test_an_out_that_does_not_fit(out):
    with pytest.raises(ValueError, match=r"expected out \(33, 130\)"):
        STORED.dequantize(F32, out=out)


def test_without_bitsandbytes(monkeypatch):
    """The routine is looked for once; where bitsandbytes is missing or its routine is another, library calls are used."""
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    assert nf4_torch._native.__wrapped__("nf4", F32) is None
    monkeypatch.undo()

    def wrong(packed, absmax, flat, blocksize, blocks):
        flat.fill_(1.0)

    assert not nf4_torch._is_exact(wrong, "nf4", F32, 64)
