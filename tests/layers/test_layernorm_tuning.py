"""NormTuning: the active adapter's copy computes; one at a time; half precision; what is no norm."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastpeft.layers.layernorm_tuning import NormTuning
from tests.tolerance import assert_bits_equal

NORMS = {
    "layer_norm": lambda: nn.LayerNorm(16),
    "no_bias": lambda: nn.LayerNorm(16, bias=False),
    "llama": lambda: LlamaRMSNorm(16),
    "rms_norm": lambda: nn.RMSNorm(16),
}


def wrap(base, name: str = "default", seed: int = 0, **options):
    layer = NormTuning(base, adapter_name=name, **options)
    torch.manual_seed(seed)
    for parameter in layer.ln_tuning_layers[name].parameters():
        parameter.data.add_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("norm", NORMS)
def test_the_copy_computes_and_merges(norm):
    base = NORMS[norm]()
    layer, x = wrap(base), torch.randn(3, 16)
    own = layer.ln_tuning_layers["default"]
    assert_bits_equal("y", layer(x), own(x))
    before = base.weight.detach().clone()
    layer.merge()
    assert_bits_equal("merged", layer(x), own(x))
    layer.unmerge()
    assert_bits_equal("weight", base.weight.detach(), before)
    assert_bits_equal("y", layer(x), own(x))
    layer.enable_adapters(False)
    assert_bits_equal("off", layer(x), base(x))


def test_it_saves_weight_and_bias_by_peft_s_names():
    assert set(wrap(nn.LayerNorm(4)).adapter_tensors("default")) == {"ln_tuning_layers.weight", "ln_tuning_layers.bias"}


def test_only_one_copy_can_act_or_be_merged():
    layer = wrap(nn.LayerNorm(16), "a")
    layer.absorb(wrap(layer.base_layer, "b", seed=1))
    with pytest.raises(ValueError, match=r"at most one active adapter.*\['a', 'b'\]"):
        layer.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="at most one"):
        layer.merge(["a", "b"])
    assert not layer.merged
    layer.merge(["b"])
    with pytest.raises(ValueError, match="at most one"):
        layer.merge(["a"])
    assert layer.merged_adapters == ["b"]


@pytest.mark.parametrize("norm", NORMS)
def test_in_half_precision_the_copy_is_float32(norm):
    base = NORMS[norm]().bfloat16()
    layer, x = wrap(base), torch.randn(3, 16, dtype=torch.bfloat16)
    own = layer.ln_tuning_layers["default"]
    assert own.weight.dtype == torch.float32
    assert_bits_equal("y", layer(x), own(x.float()).bfloat16())
    assert wrap(base, autocast_adapter_dtype=False).ln_tuning_layers["default"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("module", [nn.Identity(), nn.Sequential(nn.Linear(2, 2)), nn.GRUCell(2, 2)])
def test_what_is_no_norm_is_refused(module):
    with pytest.raises(TypeError, match="a weight and perhaps a bias"):
        NormTuning(module)
