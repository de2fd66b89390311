"""What our ops do not compute of a LoRA layer is left to Hugging Face PEFT's own forward, and counted by reason."""

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn

from tests.peft_layers import BYTES_K, K, N, accelerated, base, step, wrapped
from tests.tolerance import assert_bits_equal


def _hooked_base(layer):
    layer.base_layer.register_forward_hook(lambda module, inputs, y: y + 1)


def _hooked_adapter(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, inputs, y: y + 1)


def _own_forward_of_the_base(layer):
    layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], N)


def _training_base(layer):
    layer.base_layer.weight.requires_grad_(True)


def _other_linear(layer):
    class Bounded(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    layer.lora_B["default"].__class__ = Bounded


def _dropout_of_another_kind(layer):
    layer.lora_dropout["default"] = nn.AlphaDropout(0.0)


def _dropout_of_everything(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0)


def _unknown_variant(layer):
    class Doubled(peft_layer.LoraVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            return result * 2

    layer.lora_variant["default"] = Doubled()


FALLBACKS = {
    "disabled": ({}, lambda layer: layer.enable_adapters(False), "its adapters are disabled"),
    "merged": ({}, lambda layer: layer.merge(), "its adapters are merged into the weight"),
    "no_adapter": (
        {},
        lambda layer: setattr(layer, "_active_adapter", ["absent"]),
        "no active adapter has tensors here",
    ),
    "hooked_base": ({}, _hooked_base, "its base layer trains, is hooked or has a forward of its own"),
    "own_forward": ({}, _own_forward_of_the_base, "its base layer trains, is hooked or has a forward of its own"),
    "training_base": ({}, _training_base, "its base layer trains, is hooked or has a forward of its own"),
    "hooked_adapter": ({}, _hooked_adapter, "its adapter's own linears are hooked"),
    "other_linear": ({}, _other_linear, "its adapter is made of Linear and Bounded"),
    "dropout": ({}, _dropout_of_another_kind, "dropout by AlphaDropout"),
    "dropout_1": ({}, _dropout_of_everything, "dropout of everything, or in another mode than its layer"),
    "variant": ({}, _unknown_variant, "variant Doubled"),
    "dora_beside": (
        {"use_dora": True, "adapters": 2},
        lambda layer: None,
        "DoRA beside another active adapter: PEFT scales what that one adds too",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_falls_back(case):
    """What we do not compute is PEFT's own, to the bit, and the reason is counted; afterwards ours runs again."""
    options, change, why = FALLBACKS[case]
    layers = [wrapped(base("linear", torch.float32), **options) for _ in range(2)]
    ledger = accelerated(layers[1])
    for layer in layers:
        change(layer)
    assert layers[1].shared_call(torch.randn(2, K)) is None
    eager, got = (step(layer, torch.float32) if case not in ("disabled", "merged") else None for layer in layers)
    if eager is None:
        x = torch.randn(2, K)
        eager, got = ({"y": layer(x)} for layer in layers)
    for name, value in eager.items():
        assert_bits_equal(name, got[name], value)
    assert dict(ledger.fallbacks) == {("lora", why): 1}
    assert f"1 calls ran the model's own code: {why}" in ledger.summary()


def test_arguments_of_peft_fall_back():
    layers = [wrapped(base("linear", torch.float32), adapters=2).eval() for _ in range(2)]
    ledger = accelerated(layers[1])
    x = torch.randn(3, K)
    mixed = [layer(x, adapter_names=["default", "__base__", "other"]) for layer in layers]
    assert_bits_equal("mixed", mixed[1], mixed[0])
    layers[1](x, alora_offsets=[1, 2, None])
    layers[1](x, adapter_names=None)  # the same as no argument
    assert dict(ledger.fallbacks) == {
        ("lora", "adapter_names: one batch with several adapters"): 1,
        ("lora", "called with alora_offsets"): 1,
    }


def test_dtypes_that_peft_refuses_are_refused_by_peft():
    layer = wrapped(base("linear", torch.float32), adapter_dtype=torch.bfloat16)
    ledger = accelerated(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, K, dtype=torch.bfloat16))
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, K))
    assert dict(ledger.fallbacks) == {
        ("lora", "x in torch.bfloat16 over a base in torch.float32"): 1,
        ("lora", "cast_input_dtype_enabled is off"): 1,
    }


def test_exact_dora_and_int8_in_eval_mode_fall_back():
    """dora_linear has no exact way, and bitsandbytes rounds x to int8 in eval mode: its bits stay."""
    layer = wrapped(base("linear", torch.bfloat16), use_dora=True)
    ledger = accelerated(layer, exact=True)
    layer(torch.randn(2, K, dtype=torch.bfloat16))
    assert dict(ledger.fallbacks) == {("lora", "exact=True: dora_linear rounds to x's dtype"): 1}
    layers = [wrapped(base("int8", torch.float32)).eval() for _ in range(2)]
    ledger = accelerated(layers[1])
    x = torch.randn(4, BYTES_K)
    assert_bits_equal("y", layers[1](x), layers[0](x))
    assert sum(ledger.fallbacks.values()) == 1
