"""The dense copy of a quantised base, and merging into it."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig, get_peft_model
from fastpeft.integrations.dequantize import dequantize
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close


def quantized(kind: str, maker=tiny_models.llama):
    torch.manual_seed(0)
    return fastpeft.quantize(maker().eval(), kind, compute_dtype=torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_values_are_those_of_the_bytes(kind):
    model = quantized(kind)
    expected = {
        path: frozen_weight(module).dequantize(torch.float32)
        for path, module in model.named_modules()
        if is_quantized(module)
    }
    assert dequantize(model) is model
    for path, weight in expected.items():
        module = model.get_submodule(path)
        assert type(module) is nn.Linear
        assert not module.weight.requires_grad
        assert_bits_equal(path, module.weight.detach(), weight)


@pytest.mark.parametrize(("kind", "maker"), [("nf4", tiny_models.llama), ("int8", tiny_models.bert)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_merging_into_the_dense_copy_rounds_nothing_to_few_bits(kind, maker, use_dora, tmp_path):
    """merge_and_unload over a quantised base quantises the sum again: its logits are far from the adapter's beside the base."""
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora)
    wrapped = get_peft_model(quantized(kind, maker), config).eval()
    fill(wrapped)
    expected = logits(wrapped)
    plain = dequantize(wrapped).merge_and_unload()
    assert_close("merged", logits(plain), expected, MERGED_EQUALS_UNMERGED)
    again = get_peft_model(quantized(kind, maker), config).eval()
    fill(again)
    rounded = logits(again.merge_and_unload())
    assert (rounded - expected).abs().max() > 10 * (logits(plain) - expected).abs().max()
    plain.save_pretrained(tmp_path)
    assert_bits_equal("reloaded", logits(type(plain).from_pretrained(tmp_path).eval()), logits(plain))


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="dense already"):
        dequantize(tiny_models.small_llama())
    wrapped = get_peft_model(quantized("nf4"), LoraConfig(target_modules=["q_proj"]))
    fill(wrapped)
    wrapped.merge_adapter()
    before = bits(wrapped)
    with pytest.raises(ValueError, match=r"\['default'\] are merged"):
        dequantize(wrapped)
    for name, tensor in bits(wrapped).items():
        assert_bits_equal(name, tensor, before[name])


def test_the_dtype_is_the_model_s_own_or_the_one_asked_for():
    model = fastpeft.quantize(tiny_models.llama().to(torch.bfloat16), "nf4")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    dequantize(wrapped)
    base = wrapped.get_base_model().model.layers[0].self_attn
    assert base.q_proj.base_layer.weight.dtype == base.o_proj.weight.dtype == torch.bfloat16
    assert dequantize(quantized("nf4"), torch.float16).model.layers[0].mlp.up_proj.weight.dtype == torch.float16
