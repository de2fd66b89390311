"""IA3Config: the modules PEFT takes by default, and which of them on the input; what is refused; files that PEFT reads."""

import peft
import pytest
from peft.utils import constants

import fastpeft
from fastpeft import IA3Config, get_peft_model
from fastpeft.methods.ia3 import FEEDFORWARD, IA3_TARGETS
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

MODELS = {name: getattr(tiny_models, name) for name in ("llama", "gpt2", "bert", "t5", "gemma3")}


def test_the_defaults_are_peft_s():
    for ours, theirs in (
        (IA3_TARGETS, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        (FEEDFORWARD, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING),
    ):
        for kind, names in theirs.items():
            assert sorted(ours[kind]) == sorted(names), kind


@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        "roberta",
        "distilbert",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "t5",
        "bart",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
    ],
)
def test_the_usual_architectures_have_defaults(kind):
    assert set(FEEDFORWARD[kind]) < set(IA3_TARGETS[kind])


@pytest.mark.parametrize("name", [*MODELS, "distilbert"])
def test_default_modules_and_sides(name):
    wrapped = get_peft_model(getattr(tiny_models, name)(), IA3Config())
    ours = {path: layer.is_feedforward["default"] for path, layer in wrapped.base_model.layers()}
    assert set(ours.values()) == {False, True}
    if name in MODELS:
        theirs = peft.get_peft_model(MODELS[name](), peft.IA3Config())
        found = {path: m.is_feedforward for path, m in theirs.base_model.model.named_modules() if hasattr(m, "ia3_l")}
        assert ours == found
    again = get_peft_model(getattr(tiny_models, name)(), wrapped.peft_config["default"])
    assert {path: layer.is_feedforward["default"] for path, layer in again.base_model.layers()} == ours


OPTIONS = {
    "all_linear": {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]},
    "default_side": {"target_modules": ["q_proj", "up_proj"]},
    "default_side_all_linear": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*\.(q_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
    "part_of_a_name": {"target_modules": ["self_attn.q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_reads_what_is_saved_and_computes_the_same(options, tmp_path):
    """PEFT itself cannot read back its own all-linear adapter with feedforward_modules by name."""
    base = tiny_models.llama().eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    wrapped = get_peft_model(base, IA3Config(**options)).eval()
    fill(wrapped)
    sides = {path: layer.is_feedforward["default"] for path, layer in wrapped.base_model.layers()}
    assert all(side == path.endswith("down_proj") for path, side in sides.items())
    wrapped.save_pretrained(tmp_path)
    for library in (peft, fastpeft):
        other = tiny_models.llama().eval()
        other.load_state_dict(state)
        loaded = library.PeftModel.from_pretrained(other, tmp_path).eval()
        assert_close("logits", logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


REFUSED = {
    "no_subset": (
        lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=["down_proj"]),
        ValueError,
        r"feedforward_modules among target_modules \['k_proj'\], got \['down_proj'\]",
    ),
    "no_list": (lambda: IA3Config(feedforward_modules=3), ValueError, "feedforward_modules a list of names, got 3"),
    "embedding": (
        lambda: IA3Config(target_modules=["embed_tokens"], feedforward_modules=[]),
        NotImplementedError,
        "Embedding at model.embed_tokens",
    ),
    "norm": (lambda: IA3Config(target_modules=["norm"], feedforward_modules=[]), ValueError, "LlamaRMSNorm at"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_changes(case):
    make, error, said = REFUSED[case]
    model = tiny_models.llama()
    before, modules = bits(model), list(model.modules())
    with pytest.raises(error, match=said):
        get_peft_model(model, make())
    assert list(model.modules()) == modules
    for key, tensor in bits(model).items():
        assert_bits_equal(key, tensor, before[key])


def test_an_unknown_architecture_needs_both_lists():
    model = tiny_models.llama()
    model.config.model_type = "unknown"
    with pytest.raises(ValueError, match="no default feedforward_modules for model_type 'unknown'"):
        get_peft_model(model, IA3Config(target_modules=["k_proj"]))
    get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
