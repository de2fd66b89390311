"""Adapters over bitsandbytes' 4-bit and 8-bit linears: reading their weights in place, merging, and bitsandbytes' repacking."""

import copy

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, int8_vectorwise_dequant, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt, LinearNF4
from torch import nn

import fastpeft
from fastpeft.integrations.bitsandbytes import linear_of, unpack
from fastpeft.layers import base_weight
from fastpeft.layers.base_weight import BaseParameters, frozen_weight, is_linear_base, keep_unpacked, weight_shape
from fastpeft.ops.int8 import quantize_int8
from fastpeft.ops.nf4 import NF4Weight
from fastpeft.ops.nf4 import quantize_4bit as pack
from tests.tolerance import MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close

N, K = 64, 128
FOUR_BITS = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]
KINDS = ["nf4", "fp4", "nf4_nested", "int8"]


def base(kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A bitsandbytes linear made and quantised by bitsandbytes itself."""
    torch.manual_seed(0)
    dense = nn.Linear(K, N, bias=bias, dtype=dtype)
    if kind == "int8":
        made = Linear8bitLt(K, N, bias=bias, has_fp16_weights=False)
        made.weight.data = dense.weight.data
    else:
        quant_type, _, nested = kind.partition("_")
        made = Linear4bit(K, N, bias=bias, quant_type=quant_type, compress_statistics=bool(nested), **options)
        made.weight.data = dense.weight.data
    made.bias = dense.bias
    return made.requires_grad_(False).to("cpu")


def adapter(kind: str, **options) -> fastpeft.LoRALinear:
    """A LoRALinear over such a base whose adapter does something."""
    layer = fastpeft.LoRALinear(base(kind), r=4, lora_alpha=8, **options)
    generator = torch.Generator().manual_seed(1)
    for tensor in layer.adapter_tensors("default").values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.1
    return layer


def x(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(2))


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bytes(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert_bits_equal(name, two[name], tensor)


# -- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=["uint8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4_nested", "fp4_nested"])
def test_a_4bit_weight_is_read_in_place(kind, dtype, storage):
    module = base(kind, dtype=dtype, quant_storage=storage)
    weight = frozen_weight(module)
    assert isinstance(weight, NF4Weight)
    assert (weight.shape, weight.dtype, weight.quant_type) == ((N, K), dtype, kind[:3])
    assert weight.packed.data_ptr() == module.weight.data_ptr()
    assert weight.absmax.data_ptr() == module.weight.quant_state.absmax.data_ptr()
    assert_bits_equal("w", weight.dequantize(), dequantize_4bit(module.weight.data, module.weight.quant_state))


@pytest.mark.parametrize("after_a_forward", [False, True])
def test_an_int8_weight_is_read_in_place(after_a_forward):
    """bitsandbytes moves the scales from the parameter to the module in the first forward."""
    module = base("int8")
    if after_a_forward:
        module(x())
    weight = frozen_weight(module)
    scales = module.state.SCB if after_a_forward else module.weight.SCB
    assert weight.q.data_ptr() == module.weight.data_ptr()
    assert weight.row_absmax.data_ptr() == scales.data_ptr()
    assert_bits_equal("w", weight.dequantize(torch.float32), module.weight.data * (scales * (1 / 127.0))[:, None])
    assert_close("w", weight.dequantize(torch.float32), int8_vectorwise_dequant(module.weight.data, scales), 1e-6)


def test_plain_modules_are_read_as_they_are():
    linear = nn.Linear(K, N)
    assert frozen_weight(linear) is linear.weight
    assert weight_shape(linear) == (N, K)
    assert weight_shape(nn.Embedding(5, 3)) == (5, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_again_is_a_look_up(kind):
    module = base(kind)
    first = frozen_weight(module)
    module.train()(x())
    assert frozen_weight(module) is first
    other = copy.deepcopy(module)
    assert frozen_weight(other) is not first
    module.weight = base(kind).weight
    assert frozen_weight(module) is not first


def test_a_scale_that_was_moved_is_seen():
    module = base("nf4_nested")
    first = frozen_weight(module)
    state = module.weight.quant_state
    state.absmax = state.absmax.clone()
    assert frozen_weight(module) is not first


def test_a_state_that_only_the_module_holds_is_found():
    """A move to another kind of device makes a new Params4bit without its quant_state; the module has it."""
    module = base("nf4")
    expected = frozen_weight(module).dequantize()
    module.weight.quant_state = None
    assert_bits_equal("w", frozen_weight(module).dequantize(), expected)


def test_subclasses_are_known_and_lookalikes_are_not():
    class Linear4bit(nn.Module):
        pass

    assert is_linear_base(LinearNF4(K, N))
    assert base_weight.is_linear_4bit(LinearNF4(K, N))
    assert not base_weight.is_linear_4bit(Linear4bit())
    assert not is_linear_base(nn.Embedding(4, 4))


@pytest.mark.parametrize("module", [Linear4bit(K, N), Linear8bitLt(K, N, has_fp16_weights=False)], ids=["4", "8"])
def test_a_module_that_is_not_quantised_yet_is_refused(module):
    with pytest.raises(ValueError, match=r"expected a quantised weight.*\.to\(device\)"):
        frozen_weight(module)


@pytest.mark.parametrize(("set_to", "expected"), [(None, torch.float16), (torch.bfloat16, torch.bfloat16)])
def test_the_compute_dtype_is_bitsandbytes_s(set_to, expected):
    assert base_weight.compute_dtype(base("nf4", compute_dtype=set_to), torch.float16) == expected
    assert base_weight.compute_dtype(nn.Linear(2, 2), torch.float64) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compute_dtype", [None, torch.float32, torch.bfloat16], ids=["none", "float32", "bfloat16"])
def test_the_forward_of_an_adapter_without_effect_is_bitsandbytes_s(dtype, compute_dtype):
    """B is zero: what is left is the base's product, in its compute_dtype, back in x's dtype."""
    module = base("nf4_nested", dtype=dtype, compute_dtype=compute_dtype)
    layer = fastpeft.LoRALinear(module, r=4)
    rows = x(5).to(dtype)
    assert_bits_equal("y", layer.train()(rows).detach(), module.train()(rows))


# -- bitsandbytes' repacking ------------------------------------------------------------------------------------------


def repacked() -> Linear4bit:
    module = base("nf4_nested").eval()
    module(x())
    return module


@pytest.mark.skipif(
    not has_avx512bf16(), reason="only a CPU with AVX512-BF16 has the kernel that bitsandbytes repacks for"
)
def test_plain_bitsandbytes_loses_the_gradient_after_an_eval_forward():
    """The fault that keep_unpacked prevents: without it the tests below would pass for nothing."""
    module, rows = base("nf4_nested"), x().requires_grad_()
    module.train()(rows).sum().backward()
    assert rows.grad is not None
    module.eval()(x())
    assert module.weight.quant_state.packing_format_for_cpu
    with pytest.raises(RuntimeError):  # a leaf's view is changed in place, or there is no graph
        module.train()(x().requires_grad_()).sum().backward()


def step(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of one training forward, x's too."""
    rows = x().requires_grad_()
    layer.zero_grad()
    layer.train()(rows).square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None} | {"x": rows.grad}


@pytest.mark.parametrize("kind", KINDS)
def test_an_eval_forward_changes_nothing(kind):
    layer = adapter(kind)
    before, bytes_before = step(layer), stored(layer.base_layer)
    with torch.no_grad():
        layer.eval()(x())
        layer.enable_adapters(False)
        layer(x())
        layer.enable_adapters(True)
    assert_same_bytes(bytes_before, stored(layer.base_layer))
    for name, gradient in step(layer).items():
        assert_bits_equal(name, gradient, before[name])
    assert {"x", "lora_A.default.weight", "lora_B.default.weight"} <= set(before)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
def test_a_repacked_module_is_refused_with_what_to_do():
    model = nn.Sequential(base("nf4"), repacked())
    for give in (
        lambda: fastpeft.LoRALinear(model[1]),
        lambda: fastpeft.get_peft_model(model, fastpeft.LoraConfig(target_modules="all-linear")),
        lambda: fastpeft.prepare_for_training(model),
        lambda: frozen_weight(model[1]),
    ):
        with pytest.raises(ValueError, match=r"rounded its scales to bfloat16.*unpack\(model\)"):
            give()
    assert model[0].support_avx512bf16_for_cpu, "the first module was changed before the second was refused"


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")
def test_unpack_accepts_the_rounding():
    """The codes come back; the scales are bfloat16's."""
    whole, rounded = base("nf4_nested"), repacked()
    unpack(rounded)
    assert_bits_equal("codes", frozen_weight(rounded).packed, frozen_weight(whole).packed)
    scales = frozen_weight(whole).float_absmax().to(torch.bfloat16).float()
    assert_bits_equal("scales", frozen_weight(rounded).float_absmax(), scales)
    with torch.no_grad():
        assert_bits_equal("y", rounded.eval()(x()), rounded.train()(x()))
    assert not base_weight.is_repacked(rounded)


def test_every_linear_of_a_wrapped_model_is_kept_unpacked():
    """Those that get no adapter too: they pass the gradient on."""
    model = nn.Sequential(base("nf4"), nn.ReLU(), nn.Linear(N, K), base("fp4"))
    fastpeft.get_peft_model(model, fastpeft.LoraConfig(target_modules=["0"]))
    assert not any(module.support_avx512bf16_for_cpu for module in model.modules() if isinstance(module, Linear4bit))
    keep_unpacked(nn.Linear(2, 2))  # nothing to do


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merging_requantises_the_sum_and_unmerging_restores_the_bytes(kind):
    layer = adapter(kind)
    module, own, before = layer.base_layer, layer.base_layer.weight, stored(layer.base_layer)
    y = layer(x()).detach()
    total = frozen_weight(module).dequantize(torch.float32) + layer.delta_weight("default")
    layer.merge()
    expected = requantised(total, kind)
    assert_bits_equal("merged", frozen_weight(module).dequantize(torch.float32), expected.dequantize(torch.float32))
    assert type(module.weight) is type(own)
    assert_close("y", layer(x()), x() @ expected.dequantize(torch.float32).t() + module.bias, MERGED_EQUALS_UNMERGED)
    layer.unmerge()
    assert module.weight is own
    assert_same_bytes(before, stored(module))
    assert_bits_equal("y", layer(x()).detach(), y)


def requantised(weight: torch.Tensor, kind: str):
    if kind == "int8":
        return quantize_int8(weight.detach())
    return pack(weight.detach(), kind[:3], double_quant=kind.endswith("nested"))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "nf4_nested"])
def test_merged_bytes_are_peft_s(kind):
    """PEFT merges in the same way; nested scales are coded apart, see fastpeft.quantize."""
    layer = adapter(kind)
    theirs = peft_layer(layer)
    theirs.merge()
    layer.merge()
    assert_bits_equal("packed", layer.base_layer.weight.data, theirs.base_layer.weight.data)
    if kind != "nf4_nested":
        assert_bits_equal("scales", *(m.base_layer.weight.quant_state.absmax for m in (layer, theirs)))
    assert layer.base_layer.weight.quant_state.dtype == torch.float32


def peft_layer(layer: fastpeft.LoRALinear) -> nn.Module:
    """PEFT's layer over a copy of the base with the same adapter."""
    model = nn.Sequential(copy.deepcopy(layer.base_layer))
    model.is_loaded_in_4bit = True
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    theirs = wrapped.base_model.model[0]
    for holder in ("lora_A", "lora_B"):
        getattr(theirs, holder)["default"].weight.data = getattr(layer, holder)["default"].weight.detach().clone()
    return theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_of_the_adapter_is_merged_as_it_acts(kind):
    """PEFT's 4-bit merge adds it without its scale."""
    layer = adapter(kind, lora_bias=True)
    own = layer.base_layer.bias.detach().clone()
    layer.merge()
    expected = own + 2 * layer.lora_B["default"].bias.detach()
    assert_bits_equal("bias", layer.base_layer.bias.detach(), expected)
    layer.unmerge()
    assert_bits_equal("bias", layer.base_layer.bias.detach(), own)


def test_a_bias_where_the_base_has_none():
    layer = fastpeft.LoRALinear(base("nf4", bias=False), r=4, lora_bias=True)
    layer.lora_B["default"].bias.data.fill_(3.0)
    layer.merge()
    assert_bits_equal("bias", layer.base_layer.bias.detach(), torch.full((N,), 3.0 * layer.scaling["default"]))
    layer.unmerge()
    assert layer.base_layer.bias is None


@pytest.mark.parametrize("kind", KINDS)
def test_switching_off_while_merged(kind):
    layer = adapter(kind)
    before = stored(layer.base_layer)
    layer.merge()
    merged = stored(layer.base_layer)
    layer.enable_adapters(False)
    assert_same_bytes(before, stored(layer.base_layer))
    layer.enable_adapters(True)
    assert_same_bytes(merged, stored(layer.base_layer))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_sum_that_is_not_finite_is_refused(kind, safe_merge):
    layer = adapter(kind)
    before = stored(layer.base_layer)
    layer.lora_B["default"].weight.data[3, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge(safe_merge=safe_merge)
    assert_same_bytes(before, stored(layer.base_layer))
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_layer_can_be_copied_and_unmerged(kind):
    layer = adapter(kind)
    before = stored(layer.base_layer)
    layer.merge()
    other = copy.deepcopy(layer)
    other.unmerge()
    assert_same_bytes(before, stored(other.base_layer))
    assert layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_baked_modules_are_bitsandbytes_s(kind):
    layer = adapter(kind)
    baked = layer.bake(None)
    assert type(baked) in (Linear4bit, Linear8bitLt)
    again = type(baked)(
        K, N, bias=True, **({"has_fp16_weights": False} if kind == "int8" else {"quant_type": kind[:3]})
    )
    with torch.no_grad():
        assert torch.isfinite(baked.train()(x())).all()
    state = baked.state_dict()
    assert any(key.endswith(("SCB", "absmax")) for key in state)
    assert again.in_features == K


# -- giving back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant_type", "nested"), FOUR_BITS)
def test_a_packed_weight_becomes_a_module_on_the_same_storage(quant_type, nested):
    torch.manual_seed(0)
    dense = torch.randn(N, K)
    packed = pack(dense, quant_type, double_quant=nested)
    module = linear_of(packed, compute_dtype=torch.float32)
    assert module.weight.data_ptr() == packed.packed.data_ptr()
    data, state = quantize_4bit(dense, quant_type=quant_type, compress_statistics=nested)
    assert_bits_equal("bytes", module.weight.data, data)
    assert_bits_equal(
        "w", bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state), packed.dequantize()
    )
    assert_bits_equal("code", module.weight.quant_state.code, state.code)
    assert not module.support_avx512bf16_for_cpu
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_parameters_taken_and_put_back_are_the_same_objects():
    module = base("int8")
    module(x())
    own = BaseParameters.of(module)
    weight = module.weight
    own.with_values(torch.ones(N, K), None).install(module)
    assert module.weight is not weight
    own.install(module)
    assert module.weight is weight
