"""Adapted models under what PyTorch users do to models: compile, trace on fake tensors, copy, move, save."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpeft
from fastpeft import LoraConfig, LoRALinear, get_peft_model
from tests import tiny_models
from tests.tolerance import MERGED_EQUALS_UNMERGED, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_linear(kind: str) -> nn.Module:
    linear = nn.Linear(64, 48)
    if kind == "dense":
        return linear
    return fastpeft.quantize(nn.Sequential(linear), kind, compute_dtype=torch.float32, skip_modules=[])[0]


def randomise(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def tiny_model(kind: str = "dense", **options):
    model = tiny_models.llama()
    if kind != "dense":
        model = fastpeft.quantize(model, kind, compute_dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **options))
    randomise(model)
    return model


def gradients(module, x):
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_a_layer_compiles_without_a_break(kind, options):
    torch.compiler.reset()
    layer = LoRALinear(base_linear(kind), r=4, **options)
    randomise(layer)
    x = torch.randn(3, 5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, grads = gradients(compiled, x)
    expected, eager = gradients(layer, x)
    assert_close("y", y, expected, OTHER_ORDER_OF_SUMS)
    for (name, got), want in zip(grads.items(), eager.values(), strict=True):
        assert_close(name, got, want, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_layer_with_dropout_compiles_without_a_break(options):
    torch.compiler.reset()
    layer = LoRALinear(base_linear("dense"), r=4, lora_dropout=0.5, **options)
    randomise(layer)
    x = torch.randn(3, 5, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    torch.manual_seed(1)
    y = compiled(x)
    torch.manual_seed(1)
    assert_close("y", y, layer(x), OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_model_compiles_without_a_break(kind):
    torch.compiler.reset()
    model = tiny_model(kind)
    compiled = torch.compile(
        lambda ids: model(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    assert_close("logits", compiled(IDS), model(input_ids=IDS, use_cache=False).logits, MERGED_EQUALS_UNMERGED)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.5}, {"use_dora": True}], ids=["lora", "dropout", "dora"])
def test_a_training_step_is_traced_on_fake_tensors(options):
    mode = FakeTensorMode()
    with mode:
        model = tiny_models.llama(num_hidden_layers=1)
    model.requires_grad_(False)
    with mode:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **options))
        ids = torch.zeros(2, 6, dtype=torch.int64)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)


@pytest.mark.parametrize("kind", ["dense", "nf4", "int8"])
def test_a_copy_is_independent(kind):
    model = tiny_model(kind)
    model(input_ids=IDS)
    other = copy.deepcopy(model)
    assert_bits_equal("logits", other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    before = model(input_ids=IDS).logits
    randomise(other)
    assert_bits_equal("unchanged", model(input_ids=IDS).logits, before)
    assert not torch.equal(other(input_ids=IDS).logits, before)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_state_dict_holds_tensors_alone(kind):
    model = tiny_model(kind, use_dora=True)
    model(input_ids=IDS)
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not any("row_squares" in name or "followers" in name for name in state)


def test_moving_to_another_dtype_moves_everything():
    model = tiny_model(use_dora=True)
    model(input_ids=IDS)
    model.to(torch.bfloat16)
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    model.to(torch.float64)
    logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.float64
    assert torch.isfinite(logits).all()


def test_a_model_on_meta_takes_adapters():
    with torch.device("meta"):
        model = tiny_models.llama()
    model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    assert all(p.is_meta for p in model.parameters())
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer(torch.empty(2, 6, 64, device="meta")).shape == (2, 6, 64)
