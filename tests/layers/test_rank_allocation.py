"""The rank allocation: the budget against PEFT's for every step, importance and penalty against plain loops, masks, refusals."""

import types

import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

from fastpeft.layers.adalora import AdaLoRALinear
from fastpeft.layers.rank_allocation import (
    BudgetSchedule,
    allocate,
    apply_pattern,
    forget_importance,
    orthogonality,
    triple_importance,
    update_importance,
)
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

NAME = "default"


def layers(sizes=((7, 5, 3), (4, 6, 2)), seed=0) -> dict[str, AdaLoRALinear]:
    """Wrappers of linears of (in, out) with init_r each."""
    torch.manual_seed(seed)
    made = {f"layer{i}": AdaLoRALinear(nn.Linear(k, n), r=r) for i, (k, n, r) in enumerate(sizes)}
    for layer in made.values():
        for tensor in layer.adapter_tensors(NAME).values():
            tensor.data.normal_()
    return made


def backward(made, seed=1):
    torch.manual_seed(seed)
    for layer in made.values():
        layer.zero_grad()
        layer(torch.randn(8, layer.in_features)).square().sum().backward()


@pytest.mark.parametrize("delta", [1, 3])
@pytest.mark.parametrize(("tinit", "tfinal", "total"), [(0, 0, 20), (4, 5, 20), (0, 19, 20), (18, 1, 20), (3, 0, 5)])
def test_budget_and_steps_of_allocation_are_peft_s(tinit, tfinal, total, delta):
    settings = {"tinit": tinit, "tfinal": tfinal, "total_step": total, "deltaT": delta}
    theirs = RankAllocator.__new__(RankAllocator)
    theirs.peft_config = types.SimpleNamespace(**settings)
    theirs.init_bgt, theirs.target_bgt = 120, 37
    ours = BudgetSchedule(120, 37, **settings)
    for step in range(total + 3):
        budget, masks = theirs.budget_schedule(step)
        assert ours.budget(step) == budget, step
        if step <= ours.last:  # later PEFT repeats the last pattern
            assert ours.allocates(step) == (masks or step == ours.last), step


def test_importance_is_the_formula_s():
    made = layers()
    expected = {}
    for step in range(3):
        backward(made, seed=step)
        update_importance(made, NAME, 0.7, 0.9)
        for path, layer in made.items():
            for key in "ABE":
                parameter = getattr(layer, f"lora_{key}")[NAME]
                own = (parameter * parameter.grad).abs().double()
                mean, uncertainty = expected.get((path, key), (0.0, 0.0))
                mean = 0.7 * mean + 0.3 * own
                expected[path, key] = mean, 0.9 * uncertainty + 0.1 * (own - mean).abs()
    for path, layer in made.items():
        score = {key: expected[path, key][0] * expected[path, key][1] for key in "ABE"}
        rows = range(layer.lora_E[NAME].shape[0])
        exact = [score["E"][i, 0] + score["A"][i].mean() + score["B"][:, i].mean() for i in rows]
        assert_close(path, triple_importance(layer, NAME), torch.stack(exact).detach(), OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("budget", [0, 1, 3, 4, 5, 9])
def test_the_most_important_triples_stay(budget):
    made = layers()
    backward(made)
    update_importance(made, NAME, 0.85, 0.85)
    scores = torch.cat([triple_importance(layer, NAME) for layer in made.values()])
    before = torch.cat([layer.lora_E[NAME].detach().clone().flatten() for layer in made.values()])
    pattern = allocate(made, NAME, budget)
    kept = torch.tensor([value for row in pattern.values() for value in row])
    assert list(pattern) == list(made)
    assert int(kept.sum()) == min(budget, 5)
    if 0 < budget < 5:
        assert scores[kept].min() > scores[~kept].max()
    after = torch.cat([layer.lora_E[NAME].detach().flatten() for layer in made.values()])
    assert_bits_equal("E", after, torch.where(kept, before, torch.zeros(())))


def test_triples_that_tie_go_together():
    """Two equal triples at the edge of the budget: both go, as in PEFT, so fewer than the budget are left."""
    made = layers(((4, 4, 4),))
    held = made["layer0"].importance_of(NAME)
    for key, tensor in held.items():
        scores = torch.tensor([1.0, 2.0, 2.0, 3.0])
        tensor.copy_(scores.view(-1, 1) if "lora_B" not in key else scores)
    assert allocate(made, NAME, 2) == {"layer0": [False, False, False, True]}


def test_a_pattern_is_applied_where_it_names_a_module():
    made = layers()
    before = made["layer1"].lora_E[NAME].detach().clone()
    apply_pattern(made, NAME, {"layer0": [True, False, True]})
    assert made["layer0"].lora_E[NAME].flatten()[1] == 0
    assert int(made["layer0"].lora_E[NAME].count_nonzero()) == 2
    assert_bits_equal("layer1", made["layer1"].lora_E[NAME], before)


def test_a_module_that_took_no_part_has_no_importance():
    made = layers()
    backward({"layer0": made["layer0"]})
    update_importance(made, NAME, 0.85, 0.85)
    assert not triple_importance(made["layer1"], NAME).any()
    assert triple_importance(made["layer0"], NAME).all()


def test_without_any_gradient_it_says_where_to_call_it():
    with pytest.raises(ValueError, match=r"before optimizer.zero_grad"):
        update_importance(layers(), NAME, 0.85, 0.85)


def test_the_penalty_is_the_formula_s_and_has_gradients():
    made = layers()
    exact = []
    for layer in made.values():
        a, b = (getattr(layer, f"lora_{key}")[NAME].detach().double() for key in "AB")
        r = a.shape[0]
        exact += [((a @ a.t() - torch.eye(r)) ** 2).sum().sqrt(), ((b.t() @ b - torch.eye(r)) ** 2).sum().sqrt()]
    penalty = orthogonality(made, NAME)
    assert_close("penalty", penalty, sum(exact) / 4, OTHER_ORDER_OF_SUMS)
    penalty.backward()
    assert made["layer0"].lora_A[NAME].grad.any()
    assert made["layer1"].lora_B[NAME].grad.any()
    assert made["layer0"].lora_E[NAME].grad is None


def test_the_penalty_is_not_rounded_by_autocast():
    made = layers(((64, 64, 8),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = orthogonality(made, NAME)
    assert_bits_equal("penalty", inside, orthogonality(made, NAME))


def test_running_means_are_kept_once_asked_for_and_forgotten():
    made = layers()
    layer = made["layer0"]
    assert layer.importance == {}
    tensors = layer.training_tensors(NAME)
    assert {key for key in tensors if "exp_avg" not in key} == {"lora_A", "lora_B", "lora_E"}
    tensors["lora_A.exp_avg_ipt"].fill_(2.0)
    assert layer.importance_of(NAME)["lora_A.exp_avg_ipt"].eq(2.0).all()
    forget_importance(made, NAME)
    assert layer.importance == {}
    frozen = AdaLoRALinear(nn.Linear(3, 3), frozen=True)
    assert frozen.training_tensors(NAME) == {}
    assert frozen.importance == {}
