"""Which modules a config means: by name, by pattern, by default; and what is said when it means none."""

import peft
import pytest
from torch import nn

from fastpeft import LoraConfig, NoTargetError, get_peft_model
from fastpeft.methods.targets import (
    DEFAULT_TARGETS,
    base_modules,
    find_targets,
    layer_index,
    names_module,
    names_peft_agrees_on,
    paths_of_saved_modules,
)
from tests import tiny_models


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.out_proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Toy(nn.Module):
    """model.layers.{0..11}.{proj,out_proj,norm}, an embedding, a shared linear under two names, and a norm of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(12))
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.norm = nn.LayerNorm(8)
        self.input_norm = nn.LayerNorm(8)


@pytest.fixture(scope="module")
def toy() -> nn.Module:
    return Toy()


def layers(*numbers: int, names=("proj",)) -> list[str]:
    return [f"model.layers.{i}.{name}" for i in numbers for name in names]


EVERY = range(12)
SELECTIONS = {
    "last_component": ({"target_modules": ["proj"]}, layers(*EVERY)),
    "two_components": (
        {"target_modules": ["3.proj", "1.out_proj"]},
        ["model.layers.1.out_proj", "model.layers.3.proj"],
    ),
    "whole_path": ({"target_modules": ["model.layers.7.proj"]}, layers(7)),
    "embedding": ({"target_modules": ["embed"]}, ["embed"]),
    "tuple": ({"target_modules": ("embed", "proj")}, ["embed", *layers(*EVERY)]),
    "regex": ({"target_modules": r"model\.layers\.1\d\.(out_)?proj"}, layers(10, 11, names=("proj", "out_proj"))),
    "regex_is_for_the_whole_path": ({"target_modules": r".*\.1\.proj"}, layers(1)),
    "all_linear": ({"target_modules": "all-linear"}, [*layers(*EVERY, names=("proj", "out_proj")), "first"]),
    "all_linear_capitals": ({"target_modules": "ALL-LINEAR", "exclude_modules": "model.*"}, ["first"]),
    "shared_once": ({"target_modules": ["first", "again"]}, ["first"]),
    "shared_by_its_second_name": ({"target_modules": ["again"]}, ["again"]),
    "exclude_list": (
        {"target_modules": ["proj"], "exclude_modules": [f"{i}.proj" for i in range(2, 12)]},
        layers(0, 1),
    ),
    "exclude_regex": ({"target_modules": ["proj"], "exclude_modules": r".*\.\d\.proj"}, layers(10, 11)),
    "one_layer": ({"target_modules": ["proj"], "layers_to_transform": 0}, layers(0)),
    "layers": ({"target_modules": ["proj"], "layers_to_transform": [1, 11]}, layers(1, 11)),
    "layers_pattern": (
        {"target_modules": ["proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
        layers(1),
    ),
    "inside_a_saved_module": (
        {"target_modules": ["proj"], "modules_to_save": [f"layers.{i}" for i in range(1, 12)]},
        layers(0),
    ),
}


@pytest.mark.parametrize(("options", "expected"), SELECTIONS.values(), ids=SELECTIONS)
def test_selection(toy, options, expected):
    assert find_targets(toy, **options) == expected


def test_names_are_whole_components():
    """A bare endswith would take out_proj for "proj" and layer 11 for "1"."""
    assert names_module("proj", "layers.1.proj")
    assert names_module("1.proj", "layers.1.proj")
    assert names_module("layers.1.proj", "layers.1.proj")
    assert not names_module("proj", "layers.1.out_proj")
    assert not names_module("1.proj", "layers.11.proj")
    assert not names_module("layers.1", "layers.1.proj")


@pytest.mark.parametrize(
    ("path", "pattern", "index"),
    [
        ("model.layers.11.mlp.up", None, 11),
        ("model.layers.2.mlp.experts.7.up", None, 2),
        ("model.layers.2.mlp.experts.7.up", "experts", 7),
        ("h.3.attn", "h", 3),
        ("transformer.h.3.attn", ["layers", "h"], 3),
        ("model.layers.2.mlp", "h", None),
        ("lm_head", None, None),
    ],
)
def test_layer_index(path, pattern, index):
    assert layer_index(path, pattern) == index


MODELS = [
    tiny_models.llama,
    tiny_models.gpt2,
    tiny_models.bert,
    tiny_models.distilbert,
    tiny_models.t5,
    tiny_models.gemma3,
]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("spec", [None, "all-linear"], ids=["default", "all_linear"])
def test_the_same_modules_as_peft(make, spec):
    if spec is None and make is tiny_models.distilbert:
        pytest.skip("peft has no default for DistilBERT")
    ours = get_peft_model(make(), LoraConfig(target_modules=spec))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules=spec))
    assert {n for n, _ in ours.named_parameters()} == {n for n, _ in theirs.named_parameters()}


def test_default_targets_are_peft_s():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    different = {
        kind: (names, THEIRS[kind])
        for kind, names in DEFAULT_TARGETS.items()
        if kind in THEIRS and set(names) != set(THEIRS[kind])
    }
    assert different == {}


def test_all_linear_leaves_the_classification_head_to_be_saved():
    names = find_targets(tiny_models.bert(), "all-linear", task_type="SEQ_CLS")
    assert "classifier" not in names
    assert "bert.pooler.dense" in names
    assert "classifier" in find_targets(tiny_models.bert(), "all-linear")


def test_all_linear_of_a_wrapped_model_is_that_of_the_plain_one():
    model = tiny_models.tied_llama()
    expected = find_targets(model, "all-linear")
    get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"]))
    assert find_targets(model, "all-linear") == expected
    assert not any("base_layer" in path or "lora_" in path for path, _ in base_modules(model))


# -- nothing found ------------------------------------------------------------------------------------------------------

NO_TARGETS = {
    "typo": ({"target_modules": ["porj", "proj"]}, ["['porj']", "did you mean porj -> ['proj'", "embed"]),
    "suffix_of_a_component": ({"target_modules": ["roj"]}, ["['roj']"]),
    "regex_without_a_match": ({"target_modules": "proj"}, ["'proj'", "out_proj"]),
    "all_excluded": ({"target_modules": ["proj"], "exclude_modules": ["proj"]}, ["exclude_modules=['proj']"]),
    "no_such_layer": ({"target_modules": ["proj"], "layers_to_transform": [12]}, ["layers_to_transform=[12]"]),
    "no_default": ({"target_modules": None}, ["no default for model_type None", "'all-linear'", "proj"]),
    "many_names": ({"target_modules": [f"x{i}" for i in range(20)]}, ["x0", "and 12 more"]),
}


@pytest.mark.parametrize(("options", "said"), NO_TARGETS.values(), ids=NO_TARGETS)
def test_nothing_found_names_what_exists(toy, options, said):
    with pytest.raises(NoTargetError) as caught:
        find_targets(toy, **options)
    assert all(text in str(caught.value) for text in said), caught.value
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_loading_lets_a_name_match_nothing(toy):
    assert find_targets(toy, ["first", "absent"], strict=False) == ["first"]


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_broken_pattern_is_a_value_error_that_names_the_field(toy, field):
    options = {"target_modules": ["proj"]} | {field: "proj("}
    with pytest.raises(ValueError, match=rf"{field}: expected a regular expression, got 'proj\('"):
        find_targets(toy, **options)


def test_a_wrapper_for_this_module_is_missing(toy):
    with pytest.raises(ValueError, match=r"got LayerNorm at model.layers.0.norm"):
        get_peft_model(Toy(), LoraConfig(target_modules=["norm"]))


@pytest.mark.parametrize("name", ["out_proj", r".*self_attn\.out_proj"])
def test_multihead_attention_is_refused(name):
    """torch.nn.MultiheadAttention reads out_proj.weight without calling it: an adapter there would train nothing."""
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    with pytest.raises(NotImplementedError, match="MultiheadAttention"):
        find_targets(model, [name] if name == "out_proj" else name)
    assert find_targets(model, "all-linear") == ["linear1", "linear2"]


# -- modules to save ----------------------------------------------------------------------------------------------------


def test_modules_to_save_are_whole_components(toy):
    """peft's bare endswith takes input_norm for "norm"."""
    paths = paths_of_saved_modules(toy, ["norm"])
    assert "norm" in paths
    assert "model.layers.0.norm" in paths
    assert "input_norm" not in paths
    with pytest.raises(NoTargetError, match="modules_to_save: no module is named"):
        paths_of_saved_modules(toy, ["orm"])
    assert paths_of_saved_modules(toy, ["classifier"], optional=["classifier"]) == []


def test_saved_names_are_made_unambiguous_for_peft():
    model = tiny_models.llama()
    assert names_peft_agrees_on(model, ["lm_head"]) == ["lm_head"]
    assert names_peft_agrees_on(model, ["norm"]) == ["model.norm"]
    assert names_peft_agrees_on(model, ["absent"]) == ["absent"]
