"""One LoRA layer of Hugging Face PEFT by our ops: its results, its fallbacks, and what it is when all is undone."""

import copy
import pickle

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft.integrations.acceleration import linears
from fastpeft.integrations.acceleration.ledger import LEDGER, SLOT
from fastpeft.integrations.acceleration.peft_lora import FastLora
from fastpeft.layers import shared_input
from tests.peft_layers import BYTES_K, BYTES_N, K, R, accelerated, base, step, wrapped
from tests.saved_bytes import SavedBytes
from tests.tolerance import (
    MEAN_OF_DRAWS_SIGMAS,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
    assert_no_worse,
)

pytestmark = pytest.mark.usefixtures("as_functions")


def exact_layer(kind: str, dtype: torch.dtype, **options) -> nn.Module:
    """PEFT's dense layer in float64 over the values that the base's bytes stand for."""
    stored = base(kind, dtype)
    if kind in ("linear", "conv1d"):
        dense = stored.double()
    else:
        w = stored.weight
        values = dequantize_4bit(w.data, w.quant_state) if kind == "nf4" else int8_vectorwise_dequant(w.data, w.SCB)
        dense = nn.Linear(BYTES_K, BYTES_N)
        dense.weight, dense.bias = nn.Parameter(values.double(), requires_grad=False), stored.bias
        dense = dense.double().requires_grad_(False)
    return wrapped(dense, adapter_dtype=options.pop("adapter_dtype", torch.float32), **options).double()


OPTIONS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "two": {"adapters": 2},
    "two_biases": {"adapters": 2, "lora_bias": True},
}
DTYPES = {
    "float32": (torch.float32, torch.float32, False),
    "bfloat16": (torch.bfloat16, torch.bfloat16, False),
    "float32_over_bfloat16": (torch.bfloat16, torch.float32, False),
    "exact_over_bfloat16": (torch.bfloat16, torch.float32, True),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "int8"])
def test_output_and_gradients_are_peft_s(kind, option, dtypes):
    """Against PEFT's layer, with adapters in the dtype in which the products are taken."""
    dtype, adapter_dtype, exact = DTYPES[dtypes]
    if exact and option == "dora":
        return  # test_falls_back
    options = OPTIONS[option]
    oracle = step(exact_layer(kind, dtype, adapter_dtype=adapter_dtype, **options), torch.float64, values_of=dtype)
    eager_dtype = adapter_dtype if exact else dtype
    eager = step(wrapped(base(kind, dtype), adapter_dtype=eager_dtype, **options), dtype)
    layer = wrapped(base(kind, dtype), adapter_dtype=adapter_dtype, **options)
    ledger = accelerated(layer, exact=exact)
    got = step(layer, dtype)
    assert not ledger.fallbacks
    assert set(got) == set(eager)
    for name, value in got.items():
        assert_no_worse(name, value, oracle[name], eager[name].to(value.dtype))


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["lora", "dora", "two"])
def test_under_autocast(kind, x_dtype, option):
    """The result has PEFT's dtype, which is x's over 4 bits and the autocast dtype otherwise."""
    layers = [wrapped(base(kind, torch.float32), **OPTIONS[option]) for _ in range(2)]
    ledger = accelerated(layers[1])
    with torch.autocast("cpu", torch.bfloat16):
        eager, got = (step(layer, x_dtype) for layer in layers)
    assert not ledger.fallbacks
    oracle = step(exact_layer(kind, torch.float32, **OPTIONS[option]), torch.float64, values_of=x_dtype)
    half = step(wrapped(base(kind, torch.bfloat16), adapter_dtype=torch.bfloat16, **OPTIONS[option]), torch.bfloat16)
    for name, value in got.items():
        assert value.dtype == eager[name].dtype, name
        assert_no_worse(name, value, oracle[name], half[name].to(value.dtype))


@pytest.mark.parametrize("rows", [(1,), (), (0, 4)], ids=["one_row", "vector", "empty"])
def test_other_shapes(rows):
    layers = [wrapped(base("linear", torch.float32)) for _ in range(2)]
    accelerated(layers[1])
    eager, got = (step(layer, torch.float32, rows) for layer in layers)
    for name, value in got.items():
        assert_close(name, value, eager[name], OTHER_ORDER_OF_SUMS)


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["lora", "dora", "two"])
def test_dropout_repeats_with_the_seed_and_is_unbiased(option):
    draws, layer = 400, wrapped(base("linear", torch.float32), lora_dropout=0.4, **OPTIONS[option])
    without = wrapped(base("linear", torch.float32), **OPTIONS[option])
    ledger = accelerated(layer)
    x = torch.randn(2, K)
    ys = []
    with torch.no_grad():
        for seed in (1, 1, *range(2, draws)):
            torch.manual_seed(seed)
            ys.append(layer(x))
        expected = without(x)
    assert_bits_equal("same seed", ys[0], ys[1])
    assert not torch.equal(ys[1], ys[2])
    values = torch.stack(ys[1:])
    sigma = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected).abs() <= MEAN_OF_DRAWS_SIGMAS * sigma).all()
    assert not ledger.fallbacks
    layer.eval()
    assert_close("eval", layer(x), expected, OTHER_ORDER_OF_SUMS)


def test_bytes_kept_for_backward():
    """x as it came and S; PEFT keeps a float32 copy of x, and with dropout a dropped one and a mask."""
    kept = {}
    for name in ("peft", "ours"):
        for p in (0.0, 0.1):
            layer = wrapped(base("linear", torch.bfloat16), lora_dropout=p)
            if name == "ours":
                accelerated(layer)
            x = torch.randn(64, K, dtype=torch.bfloat16, requires_grad=True)
            with SavedBytes([*layer.parameters(), x]) as saved:
                y = layer(x)
                kept[name, p] = saved.total()
            del y
    assert kept["ours", 0.0] == kept["ours", 0.1] == 64 * R * 2
    assert kept["peft", 0.0] >= 64 * K * 4


# -- in place, and undone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "nf4", "int8"])
def test_restore_leaves_no_trace(kind):
    layer = wrapped(base(kind, torch.float32), use_dora=kind != "int8")  # of that PEFT has one forward, not two
    own, before = type(layer), [set(module.__dict__) for module in layer.modules()]
    switch = getattr(layer.base_layer, linears._CPU_PACKING, None)
    y = step(layer, torch.float32)
    ledger = accelerated(layer)
    assert isinstance(layer, own)
    assert isinstance(layer, FastLora)
    assert type(layer).__name__ == own.__name__
    assert repr(layer).startswith("lora.")
    step(layer, torch.float32)
    shared_input.link_children("", {"q": layer, "k": wrapped(base("linear", torch.float32)), "v": layer})
    ledger.restore()
    assert type(layer) is own
    assert getattr(layer.base_layer, linears._CPU_PACKING, None) == switch
    assert [set(module.__dict__) for module in layer.modules()] == before
    for name, value in step(layer, torch.float32).items():
        assert_bits_equal(name, value, y[name])


def test_a_copy_and_a_pickle_are_peft_s_own():
    layer = wrapped(base("nf4", torch.float32))
    own = type(layer)
    accelerated(layer)
    y = step(layer, torch.float32)["y"]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is own is PeftLinear4bit
        assert not {SLOT, LEDGER, "impl", "exact", "followers", "_row_squares"} & set(other.__dict__)
        assert_close("y", step(other, torch.float32)["y"], y, OTHER_ORDER_OF_SUMS)


def test_4bit_weights_are_read_in_place_and_never_repacked():
    """In eval mode bitsandbytes reorders the bytes for this CPU and rounds the scales: gradients are lost from then on."""
    layer = wrapped(base("nf4", torch.bfloat16), adapter_dtype=torch.bfloat16)
    layer.base_layer.support_avx512bf16_for_cpu = True
    stored = {name: tensor.clone() for name, tensor in layer.base_layer.state_dict().items()}
    address = layer.base_layer.weight.data_ptr()
    ledger = accelerated(layer)
    x = torch.randn(4, BYTES_K, dtype=torch.bfloat16)
    layer.eval()
    with torch.no_grad():
        layer.enable_adapters(False)
        layer(x)  # bitsandbytes' own forward, before we have read anything
        layer.enable_adapters(True)
        layer(x)
    assert layer.shared_call(x).projection.w.packed.data_ptr() == address
    for name, tensor in layer.base_layer.state_dict().items():
        assert_bits_equal(name, tensor, stored[name])
    assert step(layer.train(), torch.bfloat16)["dx"].abs().max() > 0
    ledger.restore()
    assert layer.base_layer.support_avx512bf16_for_cpu is True


def test_a_changed_scale_mode_or_dtype_is_seen():
    layers = [wrapped(base("linear", torch.float32), use_dora=True) for _ in range(2)]
    accelerated(layers[1])
    x = torch.randn(2, K)

    def compare(change):
        for layer in layers:
            change(layer)
        assert_close("y", layers[1](x), layers[0](x), OTHER_ORDER_OF_SUMS)

    compare(lambda layer: None)
    compare(lambda layer: layer.set_scale("default", 3.0))
    compare(lambda layer: nn.init.normal_(layer.base_layer.weight, std=0.1, generator=torch.Generator().manual_seed(6)))
    compare(lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight * 2, False)))
    compare(lambda layer: layer.merge())
    compare(lambda layer: layer.unmerge())
    compare(lambda layer: layer.eval())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant):
    layer = wrapped(base("linear", torch.float32), lora_dropout=0.3)
    accelerated(layer)
    gradients = []
    for checkpointed in (False, True):
        layer.zero_grad()
        torch.manual_seed(7)
        x = torch.randn(6, K, requires_grad=True)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        gradients.append([x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
    for one, other in zip(*gradients, strict=True):
        assert_bits_equal("gradient", other, one)


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_compiled(kind):
    layer = wrapped(base(kind, torch.float32))
    accelerated(layer)
    eager = step(layer, torch.float32)
    torch._dynamo.reset()
    layer.compile(backend="eager", fullgraph=True)
    for name, value in step(layer, torch.float32).items():
        assert_close(name, value, eager[name], OTHER_ORDER_OF_SUMS)


def test_fake_tensors():
    layer = wrapped(base("linear", torch.bfloat16))
    accelerated(layer)
    mode = FakeTensorMode()
    for module in layer.modules():
        for name, held in module._parameters.items():
            module._parameters[name] = None if held is None else mode.from_tensor(held, static_shapes=True)
    with mode:
        x = torch.randn(4, K, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape
        assert layer.lora_A["default"].weight.grad.shape == (R, K)
