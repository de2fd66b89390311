"""BOFTConfig: several butterfly factors against PEFT with its CUDA extension replaced, one-factor files, refusals."""

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft

import fastpeft
from fastpeft import BOFTConfig, get_peft_model
from tests import tiny_models
from tests.tiny_models import bits, fill, logits, loss
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

BAD = {
    "both": ({"boft_block_num": 4}, "one of boft_block_size and boft_block_num and 0 for the other, got 4 and 4"),
    "neither": ({"boft_block_size": 0}, "got 0 and 0"),
    "factors": ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor a whole number, at least 1, got 0"),
    "dropout": ({"boft_dropout": -0.1}, "boft_dropout from 0 to less than 1, got -0.1"),
    "bias": ({"bias": "oft_only"}, "bias one of .*boft_only"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case):
    options, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        BOFTConfig(**options)


REFUSED = {
    "size": (
        {"boft_block_size": 5},
        ValueError,
        "self_attn.q_proj: expected boft_block_size a divisor of in_features=64",
    ),
    "factors": ({"boft_block_size": 8, "boft_n_butterfly_factor": 5}, ValueError, "a multiple of 16 of them"),
    "embedding": ({"target_modules": ["embed_tokens"]}, NotImplementedError, "Embedding at model.embed_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_changes(case):
    options, error, said = REFUSED[case]
    model = tiny_models.llama()
    before, modules = bits(model), list(model.modules())
    with pytest.raises(error, match=said):
        get_peft_model(model, BOFTConfig(**options))
    assert list(model.modules()) == modules
    for key, tensor in bits(model).items():
        assert_bits_equal(key, tensor, before[key])


class BlockDiagonal:
    """What PEFT's CUDA extension computes."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.fixture
def with_extension(monkeypatch):
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", BlockDiagonal)


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_several_factors_are_peft_s(factors, direction, with_extension, tmp_path):
    options = {"target_modules": "all-linear", "boft_n_butterfly_factor": factors}
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    base = tiny_models.bert().eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    wrapped = writer.get_peft_model(base, writer.BOFTConfig(**options)).eval()
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    other = tiny_models.bert().eval()
    other.load_state_dict(state)
    loaded = reader.PeftModel.from_pretrained(other, tmp_path, is_trainable=True).eval()
    assert_close("logits", logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)
    for model in (wrapped, loaded):
        loss(model).backward()
    theirs = dict(wrapped.named_parameters())
    for key, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert_close(key, parameter.grad, theirs[key].grad, GRADIENTS_THROUGH_A_MODEL)


def test_a_file_with_the_first_factor_alone_is_read(tmp_path):
    """PEFT without its extension trains one factor, whatever boft_n_butterfly_factor says, and saves what it says."""
    base = tiny_models.llama().eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    theirs = peft.get_peft_model(base, peft.BOFTConfig(boft_n_butterfly_factor=2)).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    other = tiny_models.llama().eval()
    other.load_state_dict(state)
    loaded = fastpeft.PeftModel.from_pretrained(other, tmp_path)
    assert_close("logits", logits(loaded), logits(theirs), LOGITS_EQUAL_TO_PEFT)
