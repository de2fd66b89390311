"""Methods by name, and methods of other packages: what CONTRIBUTING.md shows works in every part of the library."""

import dataclasses
import json
from dataclasses import dataclass

import peft
import pytest
import torch

from fastpeft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_config,
    get_peft_model,
    register_method,
)
from fastpeft.methods import METHODS
from fastpeft.methods.by_name import NAMES, method_names, named_method
from fastpeft.training.config import TrainConfig
from tests import tiny_models
from tests.methods import gain
from tests.tolerance import MERGED_EQUALS_UNMERGED, OTHER_ORDER_OF_SUMS, assert_close

MEANINGS = {
    "lora": LoraConfig(r=3),
    "LoRA": LoraConfig(r=3),
    "rslora": LoraConfig(r=3, use_rslora=True),
    "DoRA": LoraConfig(r=3, use_dora=True),
    "qlora": LoraConfig(r=3),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_names_of_the_lora_family(name):
    assert get_peft_config(name, r=3) == MEANINGS[name]


@pytest.mark.parametrize("name", method_names())
def test_every_name_that_is_listed_makes_a_config_of_its_method(name):
    """The presets are fields of the config, and of TrainConfig."""
    named = named_method(name)
    assert issubclass(named.config_class, PeftConfig)
    assert set(named.options) <= {item.name for item in dataclasses.fields(named.config_class)}
    assert set(named.training) <= {item.name for item in dataclasses.fields(TrainConfig)}
    assert named_method(name.upper().replace("_", "-")) == named


def test_every_method_is_a_name_and_no_other_name_hides_one():
    assert {kind.lower() for kind in METHODS} <= set(method_names())
    assert not {kind.lower() for kind in METHODS} & set(NAMES)


def test_an_option_wins_over_the_name_s_own():
    assert get_peft_config("dora", use_dora=False) == LoraConfig()


def test_peft_s_form():
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": False,
        "r": 4,
        "target_modules": ["q", "v"],
    }
    assert get_peft_config(values) == LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q", "v"])
    assert get_peft_config(values | {"peft_type": PeftType.LORA}, r=5).r == 5
    theirs = json.loads(json.dumps(peft.LoraConfig(r=4).to_dict(), default=list))
    assert get_peft_config(theirs).r == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: get_peft_config("lroa"), r"expected one of \[.*'lora'.*got 'lroa'; did you mean lroa -> \['lora'"),
        (
            lambda: get_peft_config("lora", lora_alph=1),
            r"got \['lora_alph'\]; did you mean lora_alph -> \['lora_alpha'",
        ),
        (lambda: get_peft_config("lora", zzz=1), r"got \['zzz'\]; there are \['alpha_pattern'"),
        (lambda: get_peft_config({"peft_type": "LORA", "lora_alph": 1}), r"lora_alph -> \['lora_alpha'"),
        (lambda: get_peft_config({"r": 1}), "peft_type"),
        (lambda: get_peft_config("lora", r=0), "r=0"),
    ],
    ids=["name", "option", "nothing_near", "mapping", "no_peft_type", "the_config_s_own"],
)
def test_what_is_wrong_is_named(call, said):
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_enums_are_their_names():
    assert TaskType.CAUSAL_LM == "CAUSAL_LM"
    assert set(TaskType) == {item.value for item in peft.TaskType}
    assert set(PeftType) == set(METHODS)
    assert json.dumps(LoraConfig(task_type=TaskType.SEQ_CLS).to_dict()["task_type"]) == '"SEQ_CLS"'
    assert type(LoraConfig(task_type=peft.TaskType.SEQ_CLS).task_type) is str
    assert f"{TaskType.SEQ_CLS} {PeftType.LORA}" == "SEQ_CLS LORA"


def test_a_config_is_saved_and_read(tmp_path):
    config = LoraConfig(r=3, target_modules=["a"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path / "new")
    assert PeftConfig.from_pretrained(tmp_path / "new") == LoraConfig.from_pretrained(tmp_path / "new") == config
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "new")).r == 3
    with gain.registered() as module, pytest.raises(TypeError, match="expected peft_type GAIN, got LORA"):
        module.GainConfig.from_pretrained(tmp_path / "new")


# -- a method of another package ----------------------------------------------------------------------------------------


@pytest.fixture
def method():
    with gain.registered() as module:
        yield module


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.gpt2], ids=lambda make: make.__name__)
def test_the_method_that_contributing_shows(method, make, tmp_path):
    base = make().eval()
    plain = tiny_models.logits(base)
    model = get_peft_model(base, get_peft_config("gain", target_modules="all-linear", limit=0.3)).eval()
    assert torch.equal(tiny_models.logits(model), plain)
    tiny_models.fill(model)
    model.eval()
    changed = tiny_models.logits(model)
    assert not torch.allclose(changed, plain)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert torch.equal(tiny_models.logits(model), plain)
    again = make().eval()
    again.load_state_dict(base_state(model))
    again = PeftModel.from_pretrained(again, tmp_path)
    assert_close("loaded", tiny_models.logits(again), changed, OTHER_ORDER_OF_SUMS)
    assert again.peft_config["default"].limit == 0.3
    assert_close("merged", tiny_models.logits(model.merge_and_unload()), changed, MERGED_EQUALS_UNMERGED)


def base_state(model) -> dict[str, torch.Tensor]:
    """The base model's own state, by its own names."""
    names = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    return {name: value for name, value in names.items() if ".gain." not in name}


def test_a_registered_method_is_a_name_until_it_is_not():
    with gain.registered() as module:
        assert get_peft_config("gain") == module.GainConfig()
        assert register_method(module.GainConfig) is module.GainConfig
    with pytest.raises(ValueError, match="got 'gain'"):
        get_peft_config("gain")


@dataclass
class NoType(PeftConfig):
    """No peft_type."""


@dataclass
class Taken(PeftConfig):
    """LoRA's peft_type."""

    peft_type = "LORA"


@dataclass
class TakenName(PeftConfig):
    """The name of another entry."""

    peft_type = "QLORA"


class NoDataclass(LoraConfig):
    """Fields of its own would be lost."""

    peft_type = "PLAIN"


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (dict, TypeError, "a subclass of PeftConfig"),
        (NoDataclass, TypeError, "put @dataclass above it"),
        (NoType, ValueError, "peft_type in capitals"),
        (Taken, ValueError, "'LORA', which is LoraConfig"),
        (TakenName, ValueError, "'QLORA', which is the name 'qlora'"),
    ],
)
def test_what_cannot_be_registered(kind, error, said):
    before = dict(METHODS)
    with pytest.raises(error, match=said):
        register_method(kind)
    assert before == METHODS
