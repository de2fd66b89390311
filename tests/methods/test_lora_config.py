"""LoraConfig: what it refuses, what it spells out, and its way to and from peft's adapter_config.json."""

import dataclasses
import json

import peft
import pytest

from fastpeft import LoraConfig, get_peft_model
from fastpeft.methods import config_from_dict
from tests import tiny_models

BAD = {
    "bias_of_a_gaussian": ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
    "r_zero": ({"r": 0}, "r=0"),
    "r_float": ({"r": 8.0}, "r=8.0"),
    "r_text": ({"r": "8"}, "r='8'"),
    "alpha_nan": ({"lora_alpha": float("nan")}, "lora_alpha, got nan"),
    "alpha_text": ({"lora_alpha": "16"}, "lora_alpha"),
    "dropout_one": ({"lora_dropout": 1}, "lora_dropout < 1, got 1"),
    "dropout_text": ({"lora_dropout": "0.1"}, "lora_dropout"),
    "bias": ({"bias": "some"}, "'some'"),
    "task_type": ({"task_type": "CLASSIFY"}, "'CLASSIFY'"),
    "no_targets": ({"target_modules": []}, "at least one name"),
    "empty_target": ({"target_modules": ""}, "at least one name"),
    "targets_number": ({"target_modules": 5}, "target_modules"),
    "targets_numbers": ({"target_modules": [5]}, "target_modules"),
    "saved_text": ({"modules_to_save": "classifier"}, "modules_to_save"),
    "pattern_without_layers": ({"layers_pattern": "h"}, "layers_to_transform"),
    "layers_of_a_regex": ({"target_modules": "q.*", "layers_to_transform": [1]}, "target_modules as a list"),
    "layers_text": ({"target_modules": ["q"], "layers_to_transform": "1"}, "layers_to_transform"),
    "broken_layers_pattern": (
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h("},
        "layers_pattern",
    ),
    "odd_rank": ({"init_lora_weights": "orthogonal", "r": 3}, "even rank"),
    "loftq_bits": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, "loftq_bits"),
    "loftq_turns": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "loftq_iter"),
    "loftq_word": ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, "loftq_bits"),
    "loftq_unused": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
    "bias_of_a_pissa": ({"lora_bias": True, "init_lora_weights": "pissa"}, "lora_bias"),
    "parameters_with_dropout": ({"target_parameters": ["a"], "lora_dropout": 0.1}, "lora_dropout"),
    "parameters_with_dora": ({"target_parameters": ["a"], "use_dora": True}, "use_dora"),
    "parameters_with_bias": ({"target_parameters": ["a"], "lora_bias": True}, "lora_bias"),
    "parameters_as_text": ({"target_parameters": "a"}, "target_parameters"),
    "rank_pattern_zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "rank_pattern_list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank_pattern_broken": ({"rank_pattern": {"q_proj(": 3}}, "rank_pattern"),
    "alpha_pattern_nan": ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern"),
    "alpha_pattern_broken": ({"alpha_pattern": {"q_proj(": 3}}, "alpha_pattern"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_at_once(options, said):
    """When the config is made, not when the model is wrapped, and never by an AttributeError deep inside."""
    with pytest.raises(ValueError, match=said) as caught:
        LoraConfig(**options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("LoraConfig")


def test_an_unknown_initialisation_is_a_known_gap():
    with pytest.raises(NotImplementedError, match="'corda'"):
        LoraConfig(init_lora_weights="corda")
    with pytest.raises(NotImplementedError, match="'pissa_niter_'"):
        LoraConfig(init_lora_weights="pissa_niter_")


UNSUPPORTED = {
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 4]],
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "megatron_config": {"a": 1},
}


@pytest.mark.parametrize(("key", "value"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_an_adapter_that_needs_what_is_not_here_is_refused(key, value):
    """Left out silently the adapter would compute something else."""
    values = LoraConfig().to_dict() | {key: value}
    with pytest.raises(NotImplementedError, match=key):
        config_from_dict(values)


def test_every_field_of_peft_is_known_or_does_not_change_the_function():
    """A field that a new peft writes must be decided on: supported, refused, or named here as harmless when loading."""
    harmless = {
        "peft_type", "peft_version", "auto_mapping", "inference_mode", "init_lora_weights",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # initial values only
        "megatron_core", "qalora_group_size", "ensure_weight_tying",  # of an option that is refused, or of new modules
    }  # fmt: skip
    ours = {field.name for field in dataclasses.fields(LoraConfig)} | set(LoraConfig.unsupported)
    theirs = set(peft.LoraConfig().to_dict())
    assert theirs - ours - harmless == set()


def test_a_config_of_peft_s_defaults_is_taken():
    config = config_from_dict(json.loads(json.dumps(peft.LoraConfig(r=4, lora_alpha=3).to_dict(), default=list)))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (4, 3)


def test_null_patterns_mean_none():
    config = config_from_dict({"peft_type": "LORA", "rank_pattern": None, "alpha_pattern": None})
    assert config.rank_pattern == config.alpha_pattern == {}


@pytest.mark.parametrize(
    ("values", "error", "said"),
    [
        ({}, ValueError, "peft_type"),
        ({"peft_type": "XLORA"}, NotImplementedError, "'XLORA'"),
        ({"peft_type": ["LORA"]}, NotImplementedError, "LORA"),
    ],
    ids=["none", "other_method", "not_text"],
)
def test_other_methods_are_refused(values, error, said):
    with pytest.raises(error, match=said):
        config_from_dict(values)


FIELDS = {
    "r": 5,
    "lora_alpha": 7,
    "lora_dropout": 0.25,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["k_proj"],
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layers"],
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"q_proj": 2},
    "lora_bias": False,
    "task_type": "CAUSAL_LM",
    "revision": "main",
    "base_model_name_or_path": "some/model",
    "init_lora_weights": "gaussian",
}


def test_every_field_survives_the_way_through_json_and_peft():
    values = json.loads(json.dumps(LoraConfig(**FIELDS).to_dict()))
    assert config_from_dict(values) == LoraConfig(**FIELDS)
    theirs = peft.LoraConfig(**{key: value for key, value in values.items() if key != "peft_type"}).to_dict()
    for key, value in FIELDS.items():
        got = theirs[key]
        assert (sorted(got) if isinstance(got, set) else got) == (sorted(value) if isinstance(got, set) else value), key


def test_sets_are_written_sorted():
    """peft writes sets of names in random order; the same config gives the same file here."""
    assert LoraConfig(target_modules={"b", "c", "a"}).to_dict()["target_modules"] == ["a", "b", "c"]


def test_what_was_left_to_defaults_is_spelled_out():
    model = tiny_models.llama()
    model.config._name_or_path = "some/model"
    wrapped = get_peft_model(model, LoraConfig())
    config = wrapped.peft_config["default"]
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.base_model_name_or_path == "some/model"
    assert config.fan_in_fan_out is False
    assert get_peft_model(tiny_models.gpt2(), LoraConfig()).peft_config["default"].fan_in_fan_out is True


def test_the_user_s_config_is_not_changed():
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    before = dataclasses.replace(config)
    get_peft_model(tiny_models.bert(), config)
    assert config == before


def test_patterns_match_whole_components_and_the_first_wins():
    config = LoraConfig(
        r=2, lora_alpha=2, rank_pattern={r"1.*q_proj": 5, "q_proj": 3, "proj": 7}, alpha_pattern={"layers.0.self_attn.v_proj": 9},
        target_modules=["q_proj", "v_proj"],
    )  # fmt: skip
    model = get_peft_model(tiny_models.llama(num_hidden_layers=2), config)
    layers = {path.removeprefix("model.layers."): layer for path, layer in model.base_model.layers()}
    assert {path: (layer.r["default"], layer.lora_alpha["default"]) for path, layer in layers.items()} == {
        "0.self_attn.q_proj": (3, 2),
        "0.self_attn.v_proj": (2, 9),
        "1.self_attn.q_proj": (5, 2),
        "1.self_attn.v_proj": (2, 2),
    }


def test_differences_are_of_what_is_computed():
    """Names and shapes of the tensors show where an adapter is, however its config spells it; they do not show its scale."""
    one = LoraConfig(target_modules=["a", "b"], base_model_name_or_path="x", inference_mode=True)
    same = LoraConfig(target_modules=".*[ab]", base_model_name_or_path="y", init_lora_weights=False)
    assert one.differences(same) == []
    assert one.differences(dataclasses.replace(same, lora_alpha=1, alpha_pattern={"a": 2})) == [
        "lora_alpha",
        "alpha_pattern",
    ]
    assert one.differences(dataclasses.replace(same, r=4, use_rslora=True)) == ["r", "use_rslora"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["embed_tokens"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "did you mean lm_hed -> \\['lm_head'\\]"),
    ],
    ids=["lora_bias_on_an_embedding", "unknown_saved_module"],
)
def test_options_that_do_not_fit_the_model(options, said):
    with pytest.raises(ValueError, match=said):
        get_peft_model(tiny_models.llama(), LoraConfig(**options))
