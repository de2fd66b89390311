"""Where accelerate's part "mlp" leaves an MLP, or a call, to the model's own code."""

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig
from fastpeft.integrations.acceleration import mlp as part
from tests import tiny_models
from tests.integrations.mlp_cases import adapted, assert_same, causal, mlps, one_op_calls, step
from tests.tolerance import (
    assert_bits_equal,
)

BF16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    return one_op_calls(monkeypatch)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_the_linears_are_honoured(kind, name, calls):
    model = adapted("llama")
    want = step(model)
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    seen = []
    for module in mlps(model):
        getattr(getattr(module, name), f"register_{kind}_hook")(lambda *_: seen.append(1))
    assert_same(step(model), want)
    assert len(seen) == 2
    assert not calls
    assert not ledger.fallbacks  # glu runs between the linears


def test_a_hook_that_changes_a_linears_output_changes_the_result(calls):
    model = adapted("llama")
    fastpeft.accelerate(model, parts=["mlp"])
    for module in mlps(model):
        module.down_proj.register_forward_hook(lambda m, args, y: y * 0)
    module = mlps(model)[0]
    assert not module(torch.randn(3, 32, requires_grad=True)).any()


def test_calls_that_fall_back_are_counted_with_the_reason(calls):
    model = adapted("llama")
    want = step(model)
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    seen = []
    handle = mlps(model)[0].act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert_same(step(model), want)
    assert len(seen) == 1
    handle.remove()
    mlps(model)[1].act_fn = nn.ReLU()
    step(model)
    reasons = {why: count for (_, why), count in ledger.fallbacks.items()}
    assert reasons == {"a hook on act_fn": 1, "act_fn is another one than when the model was accelerated": 1}
    assert "1 calls ran the model's own code: a hook on act_fn" in ledger.summary()


def test_adapters_that_do_not_act_in_one_op_run_their_own_forward(calls):
    model = adapted("llama")
    fastpeft.accelerate(model, parts=["mlp"])
    with model.disable_adapter():
        without = tiny_models.logits(model)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["gate_proj", "up_proj"]))
    tiny_models.fill(model, seed=4)
    model.set_adapter("other")
    got = step(model)
    assert not calls  # down_proj has no such adapter: it runs its base
    fastpeft.restore(model)
    assert_same(got, step(model))
    with model.disable_adapter():
        assert_bits_equal("without", tiny_models.logits(model), without)


def test_an_unknown_activation_and_another_forward_are_kept_with_the_reason():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * self.gate_proj.in_features)

    model = causal("Llama", hidden_act="relu")
    model.model.layers[1].mlp = Scaled()
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    whys = {kept.path: kept.why for kept in ledger.kept}
    assert whys == {
        "model.layers.0.mlp": "its activation is ReLU",
        "model.layers.1.mlp": "its forward is another than down_proj(act(gate_proj(x)) * ...)",
    }
    assert not ledger.slots


def test_a_packed_mlp_with_the_gate_behind_is_kept():
    class UpFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(32, 96), nn.Linear(48, 32)
            self.activation_fn = nn.SiLU()

        def forward(self, x):
            up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.activation_fn(gate))

    model = causal("Llama")
    model.model.layers[0].mlp = UpFirst()
    ledger = fastpeft.accelerate(model, parts=["mlp"])
    assert [kept.path for kept in ledger.kept] == ["model.layers.0.mlp"]
    assert [slot.path for slot in ledger.slots] == ["model.layers.1.mlp"]


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.bert, tiny_models.t5, tiny_models.mixtral])
def test_models_without_gated_mlps_are_left_alone(build):
    model = build()
    before = [type(module) for module in model.modules()]
    assert not fastpeft.accelerate(model, parts=["mlp"]).slots
    assert [type(module) for module in model.modules()] == before


def test_a_copy_and_a_pickle_are_the_models_own():
    model = adapted("llama", "bare")
    fastpeft.accelerate(model, parts=["mlp"])
    again = copy.deepcopy(model)
    assert [type(module).__name__ for module in mlps(again)] == ["LlamaMLP"] * 2
    assert not any(isinstance(module, part.FastGatedMLP) for module in mlps(again))
    assert list(again.state_dict()) == list(model.state_dict())
