"""LNTuningConfig: the norms PEFT takes by default, in every usual architecture; what is refused."""

import peft
import pytest
from peft.utils import constants

from fastpeft import LNTuningConfig, get_peft_model
from fastpeft.methods.layernorm_tuning import NORM_TARGETS
from tests import tiny_models
from tests.tiny_models import fill


def test_the_defaults_are_peft_s():
    for kind, names in constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.items():
        if kind not in ("llava", "blip-2"):  # vision models, which name more than norms
            assert sorted(NORM_TARGETS[kind]) == sorted(names), kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "gemma3", "distilbert"])
def test_default_modules(name):
    wrapped = get_peft_model(getattr(tiny_models, name)(), LNTuningConfig())
    ours = {path for path, _ in wrapped.base_model.layers()}
    assert ours
    assert all("norm" in path.lower() or "ln_" in path for path in ours)
    if name in constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING:
        theirs = peft.get_peft_model(getattr(tiny_models, name)(), peft.LNTuningConfig())
        found = {p for p, m in theirs.base_model.model.named_modules() if hasattr(m, "ln_tuning_layers")}
        assert ours == found


def test_what_is_no_norm_is_refused_before_the_model_changes():
    model = tiny_models.llama()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=r"LNTuningConfig: target_modules: model.layers.0.mlp: .*LlamaMLP"):
        get_peft_model(model, LNTuningConfig(target_modules=["mlp"]))
    assert list(model.modules()) == modules


def test_two_adapters_are_not_merged_into_one_norm():
    wrapped = get_peft_model(tiny_models.llama().eval(), LNTuningConfig(), "a")
    wrapped.add_adapter("b", LNTuningConfig())
    fill(wrapped)
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ValueError, match="at most one active adapter"):
            merge(adapter_names=["a", "b"])
    assert not any(layer.merged for _, layer in wrapped.base_model.layers())
