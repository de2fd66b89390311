"""How the parts of accelerate know an activation, and get at a linear's tensors."""

import bitsandbytes
import torch
from torch import nn
from transformers.activations import ACT2FN

import fastpeft
from fastpeft.integrations.acceleration.activations import activation_of
from fastpeft.integrations.acceleration.linears import call_of, options_of
from fastpeft.reference.glu import act as formula
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_close

BF16 = torch.bfloat16


def test_activations_are_what_they_are_taken_for():
    x = torch.linspace(-6, 6, 101)
    known = {name: activation_of(ACT2FN[name]) for name in ACT2FN if name not in ("prelu", "xielu")}
    assert {name for name, kind in known.items() if kind == "silu"} == {"silu", "swish"}
    assert {name for name, kind in known.items() if kind == "gelu"} == {"gelu", "gelu_python"}
    tanh = {"gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"}
    assert {name for name, kind in known.items() if kind == "gelu_tanh"} == tanh
    for name, kind in known.items():
        if kind is not None:
            assert_close(name, ACT2FN[name](x), formula(x, kind), OTHER_ORDER_OF_SUMS)
    assert activation_of(nn.GELU("tanh")) == "gelu_tanh"
    assert activation_of(nn.GELU()) == activation_of(nn.functional.gelu) == "gelu"
    assert activation_of(torch.sigmoid) is None


def test_call_of():
    x = torch.randn(2, 8)
    frozen = nn.Linear(8, 4).requires_grad_(False)
    call = call_of(frozen, x)
    assert call.projection.w is frozen.weight
    assert call.projection.bias is frozen.bias
    assert call_of(nn.Linear(8, 4), x) is None  # its weight trains
    assert call_of(frozen, x.to(BF16)) is None
    assert call_of(nn.Identity(), x) is None
    handle = frozen.register_forward_hook(lambda *_: None)
    assert call_of(frozen, x) is None
    handle.remove()
    lora = fastpeft.LoRALinear(nn.Linear(8, 4), r=2)
    assert call_of(lora, x).projection.a is lora.lora_A["default"].weight
    handle = lora.register_forward_pre_hook(lambda *_: None)
    assert call_of(lora, x) is None
    handle.remove()
    lora.enable_adapters(False)
    assert call_of(lora, x) is None


def test_call_of_bitsandbytes():
    x = torch.randn(2, 64)
    four = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    four.load_state_dict({"weight": torch.randn(64, 64) / 8})
    four = four.to("cpu").requires_grad_(False)
    assert call_of(four, x).projection.w.quant_type == "nf4"
    four.compute_dtype = BF16
    assert call_of(four, x) is None
    eight = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False).requires_grad_(False)
    assert call_of(eight, x) is None  # its forward may round x


def test_options_of():
    x, layers = torch.randn(2, 8), [fastpeft.LoRALinear(nn.Linear(8, 4), r=2, exact=exact) for exact in (True, False)]
    exact, plain = (call_of(layer, x) for layer in layers)
    frozen = call_of(nn.Linear(8, 4).requires_grad_(False), x)
    assert options_of([frozen, frozen], "torch") == ("torch", False)
    assert options_of([frozen, exact], "torch") == ("auto", True)
    assert options_of([plain, exact], "torch") is None
