"""Every method that PEFT has: files go both ways, and forward and gradients are PEFT's."""

import warnings

import peft
import pytest
from safetensors.torch import load_file

import fastpeft
from fastpeft.checkpoint import TENSORS_NAME
from tests.every_method.building import PAIRS, adapted, base, ids, moved, task_loss
from tests.every_method.cases import CASES
from tests.tiny_models import logits
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, LOGITS_EQUAL_TO_PEFT, assert_close

IN_PEFT = [(name, model) for name, model in PAIRS if CASES[name].in_peft and model not in CASES[name].not_in_peft_on]
SAME_NAMES = [(name, model) for name, model in IN_PEFT if CASES[name].same_names]
NOT_IN_PEFT = [name for name, case in CASES.items() if not case.in_peft]


@pytest.mark.parametrize(("name", "model"), IN_PEFT, ids=ids(IN_PEFT))
@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_the_same_logits_from_the_same_files(name, model, direction, tmp_path):
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    wrapped = moved(adapted(name, model, writer), name)
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = reader.PeftModel.from_pretrained(base(model), tmp_path).eval()
    complaints = [str(w.message) for w in caught if "adapter keys" in str(w.message) or "keyword arg" in str(w.message)]
    assert complaints == []
    assert_close("logits", logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize(("name", "model"), SAME_NAMES, ids=ids(SAME_NAMES))
def test_the_same_gradients(name, model):
    """One step of training from the same values gives every parameter PEFT's gradient."""
    theirs, ours = moved(adapted(name, model, peft), name), adapted(name, model)
    values = dict(theirs.named_parameters())
    trained = {key for key, parameter in ours.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, parameter in theirs.named_parameters() if parameter.requires_grad}
    for key, parameter in ours.named_parameters():
        if key in trained:
            parameter.data.copy_(values[key])
    for wrapped in (ours, theirs):
        task_loss(wrapped.train()).backward()
    for key, parameter in ours.named_parameters():
        if key in trained:
            assert_close(key, parameter.grad, values[key].grad, GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize(("name", "model"), IN_PEFT, ids=ids(IN_PEFT))
def test_the_same_tensors_on_disk(name, model, tmp_path):
    shapes = []
    for library in (fastpeft, peft):
        folder = tmp_path / library.__name__
        adapted(name, model, library).save_pretrained(folder)
        shapes.append({key: tensor.shape for key, tensor in load_file(folder / TENSORS_NAME).items()})
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", NOT_IN_PEFT)
def test_peft_does_not_load_what_it_does_not_know(name, tmp_path):
    model = CASES[name].models[0]
    wrapped = adapted(name, model)
    assert not wrapped.peft_config["default"].known_to_peft
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(base(model), tmp_path)
