"""What every method promises, on every kind of model it runs on."""

import copy
import json

import pytest
import torch

import fastpeft
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.methods import config_from_dict
from tests.every_method.building import PAIRS, Training, adapted, base, ids, moved, task_loss
from tests.every_method.cases import CASES
from tests.tiny_models import bits, logits
from tests.tolerance import (
    GRADIENTS_THROUGH_A_MODEL,
    LOGITS_EQUAL_TO_PEFT,
    MERGED_EQUALS_UNMERGED,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
)

every_pair = pytest.mark.parametrize(("name", "model"), PAIRS, ids=ids(PAIRS))


@every_pair
def test_a_fresh_adapter_leaves_the_function_as_it_was_or_says_that_it_does_not(name, model):
    wrapped, plain = adapted(name, model), logits(base(model))
    after = logits(wrapped)
    if CASES[name].identity:
        assert_close("logits", after, plain, LOGITS_EQUAL_TO_PEFT)
    else:
        same_length = after[..., -plain.shape[-2] :, :] if after.dim() == 3 else after
        assert (same_length - plain).abs().max() > LOGITS_EQUAL_TO_PEFT, "identity=False, but nothing changed"


@every_pair
def test_it_learns(name, model):
    wrapped = adapted(name, model)
    losses = Training(wrapped, name).run(CASES[name].steps)
    final = task_loss(wrapped).item()
    assert final < CASES[name].factor * losses[0], f"{losses[0]:.3f} -> {final:.3f}"


@every_pair
def test_it_trains_only_what_it_should(name, model):
    wrapped = adapted(name, model)
    trained = {key for key, parameter in wrapped.named_parameters() if parameter.requires_grad}
    before = bits(wrapped)
    Training(wrapped, name).run(20)
    after = bits(wrapped)
    assert trained
    for key in after:
        if key not in trained and not _is_state(key, wrapped):
            assert_bits_equal(key, after[key], before[key])
    moved_keys = [key for key in trained if not torch.equal(after[key], before[key])]
    assert moved_keys, "nothing was trained"


def _is_state(key: str, wrapped) -> bool:
    """True for another name of a trained parameter, and for buffers that belong to an adapter."""
    trained = {id(p) for p in wrapped.parameters() if p.requires_grad}
    parameters = dict(wrapped.named_parameters(remove_duplicate=False))
    return id(parameters[key]) in trained if key in parameters else ".default" in key


@every_pair
def test_merging(name, model):
    wrapped = moved(adapted(name, model), name)
    expected, before = logits(wrapped), bits(wrapped)
    if not CASES[name].mergeable:
        for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
            with pytest.raises(NotImplementedError, match="merge"):
                merge()
        for key, tensor in bits(wrapped).items():
            assert_bits_equal(key, tensor, before[key])
        return
    wrapped.merge_adapter(safe_merge=True)
    assert_close("merged", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)
    wrapped.unmerge_adapter()
    for key, tensor in bits(wrapped).items():
        assert_bits_equal(key, tensor, before[key])
    plain = wrapped.merge_and_unload(safe_merge=True)
    assert not [module for module in plain.modules() if isinstance(module, AdapterLayer)]
    assert type(plain) is type(base(model))
    assert_close("unloaded", logits(plain), expected, MERGED_EQUALS_UNMERGED)


@every_pair
def test_saved_and_loaded(name, model, tmp_path):
    wrapped = moved(adapted(name, model), name)
    wrapped.save_pretrained(tmp_path)
    loaded = fastpeft.PeftModel.from_pretrained(base(model), tmp_path)
    assert_close("logits", logits(loaded), logits(wrapped), OTHER_ORDER_OF_SUMS)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "again")
    again = fastpeft.PeftModel.from_pretrained(base(model), tmp_path / "again")
    assert_bits_equal("logits", logits(again), logits(loaded))


@every_pair
def test_training_goes_on_after_loading(name, model, tmp_path):
    """Six steps are the same six steps with a file in between."""
    whole, first = adapted(name, model), adapted(name, model)
    expected = Training(whole, name)
    expected.run(6)
    begun = Training(first, name)
    begun.run(3)
    first.save_pretrained(tmp_path)
    second = fastpeft.PeftModel.from_pretrained(base(model), tmp_path, is_trainable=True)
    assert_bits_equal("after loading", logits(second), logits(first))
    continued = Training(second, name)
    continued.step = 3
    continued.optimizer.load_state_dict(begun.optimizer.state_dict())
    continued.run(3)
    assert_bits_equal("after six steps", logits(second), logits(whole))


@every_pair
def test_the_config_on_disk_says_all(name, model):
    wrapped = adapted(name, model)
    config = wrapped.peft_config["default"]
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.differences(config) == []
    assert type(again) is type(config)


@every_pair
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_gradient_checkpointing(name, model, reentrant):
    wrapped = moved(adapted(name, model), name).train()
    if CASES[name].checkpointing:
        expected = _gradients(wrapped)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if not CASES[name].checkpointing:
        with pytest.raises((ValueError, NotImplementedError), match="checkpointing"):
            task_loss(wrapped)
        return
    for key, gradient in _gradients(wrapped).items():
        assert_close(key, gradient, expected[key], GRADIENTS_THROUGH_A_MODEL)


def _gradients(wrapped) -> dict[str, torch.Tensor]:
    wrapped.zero_grad()
    torch.manual_seed(2)
    task_loss(wrapped).backward()
    return {key: p.grad.clone() for key, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_over_nf4(name):
    model = next(model for model in ("llama", "bert", "t5", "gpt2") if model in CASES[name].models)
    quantized = fastpeft.quantize(base(model), "nf4")
    if not CASES[name].over_nf4:
        with pytest.raises((ValueError, NotImplementedError)):
            adapted(name, model, over=quantized)
        return
    wrapped = moved(adapted(name, model, over=quantized), name)
    gradients = _gradients(wrapped.train())
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    losses = Training(wrapped, name).run(5)
    assert losses[-1] < losses[0]


@every_pair
def test_switching_disabling_and_deleting(name, model):
    plain = logits(base(model))
    wrapped = moved(adapted(name, model), name)
    first = logits(wrapped)
    wrapped.add_adapter("second", CASES[name].config(fastpeft, model))
    wrapped.set_adapter("second")
    moved(wrapped.eval(), name, seed=7)
    second = logits(wrapped)
    assert first.shape != second.shape or not torch.equal(first, second)
    wrapped.set_adapter("default")
    assert_bits_equal("first again", logits(wrapped), first)
    with wrapped.disable_adapter():
        assert_bits_equal("disabled", logits(wrapped), plain)
    assert_bits_equal("enabled again", logits(wrapped), first)
    assert_bits_equal("a copy", logits(copy.deepcopy(wrapped)), first)
    wrapped.delete_adapter("default")
    assert_bits_equal("second alone", logits(wrapped), second)
    wrapped.delete_adapter("second")
    assert_bits_equal("none", logits(wrapped), plain)


@every_pair
def test_unloading_gives_the_base_back(name, model):
    before = bits(base(model))
    wrapped = moved(adapted(name, model), name)
    plain = wrapped.unload()
    after = bits(plain)
    assert set(after) == set(before)
    for key, tensor in after.items():
        assert_bits_equal(key, tensor, before[key])
