"""Small calls on a CPU stay the model's own: equal bits, nothing counted; from one row more, and on request, they are ours."""

import copy

import peft
import pytest
import torch

import fastpeft
from fastpeft.integrations.acceleration import few_rows
from fastpeft.integrations.acceleration.ledger import Accelerated
from tests import tiny_models
from tests.tolerance import assert_bits_equal

ROWS = 16


@pytest.fixture
def as_before(monkeypatch) -> list[str]:
    """The bound as users have it; the classes of the modules that ran their own forward because of it."""
    monkeypatch.setattr(few_rows, "ROWS", ROWS)
    own, seen = Accelerated.as_before, []

    def spied(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(Accelerated, "as_before", spied)
    return seen


def both(**options):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    untouched = peft.get_peft_model(tiny_models.llama(), config)
    ours = copy.deepcopy(untouched)
    return untouched, ours, fastpeft.accelerate(ours, **options)


def test_few_rows_have_the_bits_of_the_untouched_model(as_before):
    untouched, ours, ledger = both(parts=("lora", "mlp", "norm"))
    ids = tiny_models.token_ids(2, ROWS // 2)
    with torch.no_grad():
        expected, got = (model.eval()(input_ids=ids).logits for model in (untouched, ours))
    assert_bits_equal("logits", got, expected)
    assert {"LlamaMLP", "LlamaRMSNorm", "Linear"} <= set(as_before)
    assert not any(slot.fallbacks for slot in ledger.slots)


@pytest.mark.parametrize(
    ("rows", "grad", "impl"), [(ROWS + 1, False, "auto"), (ROWS, True, "auto"), (ROWS, False, "torch")]
)
def test_more_rows_training_and_a_chosen_impl_run_ours(as_before, rows, grad, impl):
    _, ours, _ = both(impl=impl)
    with torch.set_grad_enabled(grad):
        ours(input_ids=tiny_models.token_ids(1, rows))
    assert as_before == []


def test_a_quantised_base_runs_ours(as_before):
    model = peft.get_peft_model(
        fastpeft.quantize(tiny_models.llama(), "nf4"), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    fastpeft.accelerate(model)
    with torch.no_grad():
        model.eval()(input_ids=tiny_models.token_ids(1, 4))
    assert set(as_before) == {"LlamaRMSNorm"}
