"""Linears with one input computed together: same values as apart, and nothing handed over that is not the same."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft import LoraConfig, get_peft_model
from fastpeft.layers import shared_input
from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.shared_input import link_siblings, sharing
from fastpeft.ops import lora_group
from tests import tiny_models
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

K, R = 40, 3


@pytest.fixture(autouse=True)
def _as_functions(monkeypatch):
    """The sizes here would all run as plain calls."""
    monkeypatch.setattr(lora_group, "composed_is_faster", lambda *call: False)


@pytest.fixture
def groups(monkeypatch):
    """How many members every lora_linear_group had."""
    sizes = []

    def spy(x, members, **options):
        sizes.append(len(members))
        return lora_group.lora_linear_group(x, members, **options)

    monkeypatch.setattr(shared_input, "lora_linear_group", spy)
    return sizes


class Attention(nn.Module):
    """q, k and v of one input, in this order."""

    def __init__(self, **options):
        super().__init__()
        for name, n in (("q_proj", 24), ("k_proj", 16), ("v_proj", 16)):
            layer = LoRALinear(nn.Linear(K, n), R, lora_alpha=6, **options)
            nn.init.normal_(layer.lora_B["default"].weight)
            setattr(self, name, layer)

    def forward(self, x, y=None):
        other = x if y is None else y
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], dim=-1)


def linked(**options) -> Attention:
    torch.manual_seed(1)
    model = Attention(**options)
    assert link_siblings(model) == 1
    return model


def outcome(model, x, call=None):
    x = x.detach().requires_grad_(True)
    y = (call or model)(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    result = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            result[name], parameter.grad = parameter.grad, None
    return result


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name in expected:
        assert_close(name, got[name], expected[name], OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}], ids=["", "dropout"])
def test_together_is_as_apart(options, groups):
    """With dropout too: the seeds are drawn in the same order."""
    model, x = linked(**options), torch.randn(33, K)
    with sharing(False):
        torch.manual_seed(7)
        apart = outcome(model, x)
    assert groups == []
    torch.manual_seed(7)
    together = outcome(model, x)
    assert groups == [3]
    assert_same(together, apart)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "two_forwards_then_backward"])
def test_gradient_checkpointing(use_reentrant, twice, groups):
    """Both passes group alike: what forward and recomputation save is compared where hooks are used."""
    model, x = linked(lora_dropout=0.3), torch.randn(33, K)

    def run(x, recompute):
        call = (lambda t: checkpoint(model, t, use_reentrant=use_reentrant)) if recompute else model
        return call(x) + call(x * 2) if twice else call(x)

    torch.manual_seed(7)
    expected = outcome(model, x, lambda t: run(t, False))
    torch.manual_seed(7)
    got = outcome(model, x, lambda t: run(t, True))
    for name in expected:
        assert_bits_equal(name, got[name], expected[name])
    assert set(groups) == {3}


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_a_wrong_group_under_checkpointing(use_reentrant):
    """k and v read another input: found out in the first forward pass, which its recomputation must repeat all the same."""
    model, x = linked(), torch.randn(33, K)
    expected = outcome(model, x, lambda t: model(t, t * 2))
    for _ in range(2):
        got = outcome(model, x, lambda t: checkpoint(lambda t: model(t, t * 2), t, use_reentrant=use_reentrant))
        assert_same(got, expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0)  # what an optimizer does: another version


def test_a_follower_that_does_not_come_is_let_go(groups):
    model, x = linked(), torch.randn(33, K)
    first = model(x, x * 2)
    assert_same({"y": first}, {"y": model(x, x * 2)})
    model.v_proj(x)
    assert groups == [3]
    assert model.q_proj.followers.modules == []


def test_nothing_stays_after_the_step():
    model, x = linked(), torch.randn(33, K).requires_grad_(True)
    hidden = x * 1.0
    y = model.q_proj(hidden)  # k and v are waited for in vain
    waiting = weakref.ref(next(iter(shared_input._state.input.waiting.values())).y)
    assert waiting() is not None
    y.sum().backward()
    del y, hidden
    gc.collect()
    assert waiting() is None
    model(x)
    assert shared_input._state.input is None, "all was fetched"


CHANGES = {
    "input_in_place": lambda model, x: x.add_(1),
    "adapter_in_place": lambda model, x: model.k_proj.lora_A["default"].weight.add_(1),
    "base_in_place": lambda model, x: model.k_proj.base_layer.weight.mul_(2),
    "adapter_replaced": lambda model, x: setattr(
        model.k_proj.lora_B["default"], "weight", nn.Parameter(torch.ones(16, R))
    ),
    "scale": lambda model, x: model.k_proj.scaling.update(default=7.0),
    "disabled": lambda model, x: model.k_proj.enable_adapters(False),
    "merged": lambda model, x: (model.k_proj.lora_B["default"].weight.mul_(2), model.k_proj.merge()),
    "no_adapter": lambda model, x: model.k_proj.set_adapter([]),
    "base_hook": lambda model, x: model.k_proj.base_layer.register_forward_hook(lambda *call: call[2] + 1),
    "own_hook": lambda model, x: model.k_proj.register_forward_hook(lambda *call: call[2] + 1),
    "own_pre_hook": lambda model, x: model.k_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_result_is_handed_over_only_if_nothing_changed(change):
    """Between q's call and k's something that k depends on changes: k must notice."""
    model, x = linked(), torch.randn(33, K)
    model.q_proj(x)
    CHANGES[change](model, x)
    got = model.k_proj(x)
    with sharing(False):
        assert_close("k", got, model.k_proj(x), OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("mode", ["grad", "autocast", "dropout"])
def test_another_mode_is_another_result(mode):
    model, x = linked(lora_dropout=0.5).eval(), torch.randn(33, K)
    with torch.no_grad():
        model.q_proj(x)
    if mode == "grad":
        assert model.k_proj(x).requires_grad
    if mode == "autocast":
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.k_proj(x).dtype == torch.bfloat16
    if mode == "dropout":
        with torch.no_grad():
            model.k_proj.train()
            got = model.k_proj(x)
            assert not torch.equal(got, model.k_proj.eval()(x))


def test_no_grad_inference_and_an_equal_input(groups):
    """Equal values in another tensor object are another input."""
    model, x = linked(), torch.randn(33, K)
    with torch.no_grad():
        expected = model(x)
        assert groups == [3]
        model.q_proj(x)
        model.k_proj(x.clone())
        model.v_proj(x.clone())
    with torch.inference_mode():
        assert_close("inference", model(x.clone()).clone(), expected, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_share_among_themselves(duplicate, groups):
    model, x = linked(), torch.randn(33, K)
    keys = list(Attention().state_dict())
    assert list(model.state_dict()) == keys
    model.q_proj(x)
    twin = duplicate(model)
    assert twin.q_proj.followers.modules == [twin.k_proj, twin.v_proj]
    with torch.no_grad():
        twin.k_proj.lora_B["default"].weight.zero_()
    y = twin(x)
    with sharing(False):
        assert_close("twin", y, twin(x), OTHER_ORDER_OF_SUMS)
        assert not torch.equal(model(x), twin(x))


def test_different_settings_go_alone(groups):
    model, x = linked(), torch.randn(33, K)
    model.k_proj.exact, model.v_proj.impl = True, "reference"
    with sharing(False):
        apart = model(x)
    groups.clear()
    assert_close("y", model(x), apart, OTHER_ORDER_OF_SUMS)
    assert 3 not in groups
    assert 2 not in groups


MODELS = {
    "llama": (tiny_models.llama, 6),
    "bert": (tiny_models.bert, 2),
    "t5": (tiny_models.t5, 6),
    "gpt2": (tiny_models.gpt2, 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name, groups):
    """Groups are found by name; decoder cross-attention reads two inputs. Values and gradients are those of linears alone."""
    make, count = MODELS[name]
    model = get_peft_model(make(), LoraConfig(r=4, target_modules="all-linear")).double().eval()
    tiny_models.fill(model)
    assert link_siblings(model) == count

    def gradients():
        model.zero_grad()
        loss = tiny_models.loss(model)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    with sharing(False):
        apart = gradients()
    for _ in range(2):
        assert_same(gradients(), apart)
    assert all(
        len(module.followers.modules) in (1, 2) for module in model.modules() if getattr(module, "followers", None)
    )
    assert len([size for size in groups if size > 1]) == 2 * count
