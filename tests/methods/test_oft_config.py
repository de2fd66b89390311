"""OFTConfig: blocks that do not divide, adapters whose sizes PEFT adjusted, PEFT's versions, options of PEFT both ways."""

import json
import warnings

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import OFTConfig, get_peft_model
from fastpeft.checkpoint import CONFIG_NAME
from fastpeft.methods import config_from_dict
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

BAD = {
    "both": ({"r": 4}, "one of r and oft_block_size and 0 for the other, got r=4 and oft_block_size=32"),
    "neither": ({"oft_block_size": 0}, "got r=0 and oft_block_size=0"),
    "negative": ({"oft_block_size": -4}, "oft_block_size a whole number, at least 0, got -4"),
    "fraction": ({"oft_block_size": 0, "r": 2.5}, "r a whole number, at least 0, got 2.5"),
    "dropout": ({"module_dropout": 1.0}, "module_dropout from 0 to less than 1, got 1.0"),
    "eps": ({"coft": True, "eps": 0.0}, "eps above 0, got 0.0"),
    "terms": ({"num_cayley_neumann_terms": 1}, "num_cayley_neumann_terms at least 2, got 1"),
    "bias": ({"bias": "lora_only"}, "bias one of .*oft_only.*, got 'lora_only'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case):
    options, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        OFTConfig(**options)


REFUSED = {
    "block": (
        {"oft_block_size": 24},
        ValueError,
        "model.layers.0.self_attn.q_proj: .*in_features=64, got 24; take 16 or 32",
    ),
    "number": ({"oft_block_size": 0, "r": 5}, ValueError, "in_features=64, got 5; take 4 or 8"),
    "embedding": ({"target_modules": ["embed_tokens"]}, NotImplementedError, "Embedding at model.embed_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_changes(case):
    """PEFT takes another block size with a warning, and saves the one that was asked for."""
    options, error, said = REFUSED[case]
    model = tiny_models.llama()
    before, modules = bits(model), list(model.modules())
    with pytest.raises(error, match=said):
        get_peft_model(model, OFTConfig(**({"target_modules": "all-linear"} | options)))
    assert list(model.modules()) == modules
    for key, tensor in bits(model).items():
        assert_bits_equal(key, tensor, before[key])


def test_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(NotImplementedError, match="Conv2d at 0"):
        get_peft_model(model, OFTConfig(target_modules=["0"], oft_block_size=4))


def _from_peft(folder, make, **options):
    """(state of the base, logits) of a PEFT adapter that does something, saved in folder."""
    torch.manual_seed(0)
    base = make().eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    wrapped = peft.get_peft_model(base, peft.OFTConfig(**options)).eval()
    fill(wrapped, std=0.05)
    wrapped.save_pretrained(folder)
    return state, logits(wrapped)


@pytest.mark.parametrize("sizes", [{"oft_block_size": 24}, {"r": 5, "oft_block_size": 0}], ids=["size", "number"])
def test_an_adapter_whose_sizes_peft_adjusted_is_read_and_written_back(sizes, tmp_path):
    state, expected = _from_peft(tmp_path, tiny_models.llama, target_modules="all-linear", **sizes)
    base = tiny_models.llama().eval()
    base.load_state_dict(state)
    loaded = fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert_close("logits", logits(loaded), expected, LOGITS_EQUAL_TO_PEFT)
    loaded.save_pretrained(tmp_path / "again")
    other = tiny_models.llama().eval()
    other.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(other, tmp_path / "again").eval()
    assert_close("logits", logits(again), expected, LOGITS_EQUAL_TO_PEFT)


def test_trained_biases_go_both_ways(tmp_path):
    options = {"target_modules": ["query", "value"], "oft_block_size": 8, "bias": "oft_only"}
    state, expected = _from_peft(tmp_path, tiny_models.bert, **options)
    base = tiny_models.bert().eval()
    base.load_state_dict(state)
    loaded = fastpeft.PeftModel.from_pretrained(base, tmp_path)
    assert_close("logits", logits(loaded), expected, LOGITS_EQUAL_TO_PEFT)
    loaded.save_pretrained(tmp_path / "again")
    other = tiny_models.bert().eval()
    other.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(other, tmp_path / "again").eval()
    assert_close("logits", logits(again), expected, LOGITS_EQUAL_TO_PEFT)


def test_peft_has_nothing_to_warn_of(tmp_path):
    wrapped = get_peft_model(tiny_models.llama(), OFTConfig(oft_block_size=8))
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path)
    assert [str(w.message) for w in caught if "cayley" in str(w.message) or "keyword" in str(w.message)] == []


def test_adapters_of_older_versions():
    values = OFTConfig().to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config_from_dict(values)
        config_from_dict(values | {"peft_version": "0.21.2@main"})
        config_from_dict(values | {"peft_version": "0.17.0", "use_cayley_neumann": False})
    for version in ("0.17.1", "0.9"):
        with pytest.warns(UserWarning, match="older than 0.18"):
            config_from_dict(values | {"peft_version": version})
    del values["oft_block_size"]
    with pytest.raises(NotImplementedError, match="no oft_block_size"):
        config_from_dict(values)


def test_the_file_says_what_peft_needs(tmp_path):
    get_peft_model(tiny_models.llama(), OFTConfig(oft_block_size=8)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (values["r"], values["oft_block_size"], values["peft_version"]) == (0, 8, "0.18.0")
