"""Outputs whose logits wait until somebody asks for them: what computes them, what does not, and what they are then."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import transformers
from accelerate.utils.operations import convert_to_fp32
from torch.utils._pytree import tree_leaves

from fastpeft.integrations.acceleration.deferred_logits import DeferredLogits
from tests import tiny_models
from tests.integrations.causal_models import FAMILIES, batch, only_loss
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_bits_equal, assert_close


def is_computed(output) -> bool:
    raw = dict.get(output, "logits")
    return not isinstance(raw, DeferredLogits) or raw._computed is not None


def test_logits_wait_until_they_are_asked_for():
    model = tiny_models.llama().train()
    expected = model(**batch(), output_hidden_states=True)
    only_loss(model)
    output = model(**batch(), output_hidden_states=True)
    assert isinstance(output, type(expected))
    assert list(output.keys()) == list(expected.keys())
    assert len(output.hidden_states) == len(expected.hidden_states)
    walked = [output.values(), output.items(), tree_leaves(output), copy.copy(output), "logits" in output]
    walked += [output[0], output["loss"], output[:1], output.loss, output.cache, list(output), len(output)]
    again = torch.utils._pytree.tree_map(lambda leaf: leaf, output)
    widened = convert_to_fp32(output)
    assert not any(is_computed(of) for of in (output, again, widened)), walked
    for name, of in (("again", again), ("widened", widened)):
        assert_bits_equal(name, of.logits, expected.logits)
    for way in (
        lambda o: o.logits,
        lambda o: o["logits"],
        lambda o: o[1],
        lambda o: o.get("logits"),
        lambda o: o.to_tuple()[1],
    ):
        fresh = model(**batch(), output_hidden_states=True)
        assert_bits_equal("logits", way(fresh), expected.logits)
        assert way(fresh) is fresh.logits


def test_a_copy_and_a_pickle():
    model = tiny_models.llama().train()
    only_loss(model)
    output = model(**batch(), use_cache=False)
    assert output.keys() == {"loss", "logits"}
    apart = type(output)(loss=output.loss.detach(), logits=DeferredLogits(torch.ones(1, 2, 64), model.lm_head, None))
    copied = copy.deepcopy(apart)
    assert not is_computed(apart)
    assert not is_computed(copied)
    assert dict.get(copied, "logits").head is model.lm_head
    read = pickle.loads(pickle.dumps(type(output)(loss=output.loss.detach(), logits=output.logits.detach())))
    assert type(read) is transformers.modeling_outputs.CausalLMOutputWithPast
    assert_bits_equal("logits", read.logits, output.logits)


def test_mixed_precision_by_accelerate_widens_logits_on_demand():
    model = tiny_models.llama().bfloat16().train()
    only_loss(model)
    output = model(**batch())
    widened = convert_to_fp32(output)
    assert not is_computed(widened)
    assert_bits_equal("logits", widened.logits, output.logits.float())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_a_loss_of_the_users_own_gets_logits_with_their_graph(family):
    model = FAMILIES[family]().train()

    def gradients():
        model.zero_grad()
        output = model(**batch())
        with torch.no_grad():
            assert not output.logits.requires_grad or not is_deferred
        (output.loss + output.logits.square().mean()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    is_deferred = False
    expected = gradients()
    only_loss(model)
    is_deferred = True
    for name, grad in gradients().items():
        assert_close(name, grad, expected[name], GRADIENTS_THROUGH_A_MODEL)


def test_logits_of_a_head_that_has_changed_are_refused():
    model = tiny_models.llama().train()
    only_loss(model)
    output = model(**batch())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(RuntimeError, match="before the head's weight changes"):
        output.logits  # noqa: B018


def test_hidden_states_die_with_the_output():
    model = tiny_models.llama().train()
    only_loss(model)
    output = model(**batch())
    hidden = weakref.ref(dict.get(output, "logits").hidden)
    loss = output.loss
    del output
    gc.collect()
    assert hidden() is None
    loss.backward()
