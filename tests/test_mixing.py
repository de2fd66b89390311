"""add_weighted_adapter: every combination type gives PEFT's tensors, and what cannot be mixed is refused before."""

import copy

import peft
import pytest
import torch

import fastpeft
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close

TYPES = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3, "svd_clamp": 0.9, "svd_full_matrices": False}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.3}),
    ("dare_linear", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6}),
    ("dare_ties_svd", {"density": 0.6}),
    ("magnitude_prune", {"density": 0.5}),
    ("magnitude_prune_svd", {"density": 0.5}),
]
IDS = [f"{kind}-{len(options)}" for kind, options in TYPES]
MODELS = {
    "llama": (tiny_models.small_llama, ["q_proj", "v_proj"], ["v_proj", "down_proj", "embed_tokens"]),
    "gpt2": (tiny_models.gpt2, ["c_attn"], ["c_attn", "mlp.c_fc"]),
}


def with_two(library, model="llama", *, ranks=(4, 4), alphas=(8, 2)):
    make, *targets = MODELS[model]
    torch.manual_seed(0)
    wrapped = library.get_peft_model(
        make().eval(), library.LoraConfig(r=ranks[0], lora_alpha=alphas[0], target_modules=targets[0]), "a"
    )
    fill(wrapped, seed=1)
    wrapped.add_adapter("b", library.LoraConfig(r=ranks[1], lora_alpha=alphas[1], target_modules=targets[1]))
    wrapped.set_adapter("b")
    fill(wrapped, seed=2)
    return wrapped.eval()


def mixed_values(wrapped):
    return {key: tensor for key, tensor in bits(wrapped).items() if ".mix" in key and "lora_" in key}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.0, -0.5]], ids=["positive", "signed"])
@pytest.mark.parametrize(("kind", "options"), TYPES, ids=IDS)
def test_the_values_are_peft_s(kind, options, weights, model, monkeypatch):
    values, plain = [], torch.bernoulli
    for library in (fastpeft, peft):
        wrapped = with_two(library, model)
        draws = torch.Generator().manual_seed(5)  # of the masks alone: the libraries draw fresh adapters differently
        monkeypatch.setattr(torch, "bernoulli", lambda p, g=draws: plain(p, generator=g))
        wrapped.add_weighted_adapter(["a", "b"], weights, "mix", combination_type=kind, **options)
        wrapped.set_adapter("mix")
        values.append((mixed_values(wrapped), logits(wrapped.eval())))
    (ours, our_logits), (theirs, their_logits) = values
    assert ours.keys() == theirs.keys()
    assert ours
    for key in theirs:
        assert_close(key, ours[key], theirs[key], LOGITS_EQUAL_TO_PEFT)
    assert_close("logits", our_logits, their_logits, LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_different_ranks_add_up_exactly(kind):
    """cat, and svd at the full rank, are the weighted sum of both updates: a function of the two active together."""
    wrapped = with_two(fastpeft, ranks=(2, 5))
    wrapped.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", combination_type=kind, svd_rank=7)
    wrapped.set_adapter(["a", "b"])
    expected = logits(wrapped)
    wrapped.set_adapter("mix")
    assert_close("logits", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)


def test_rslora_scales_once():
    """PEFT keeps use_rslora in the mixture, whose scale is then sqrt(r), not 1."""
    torch.manual_seed(0)
    wrapped = fastpeft.get_peft_model(
        tiny_models.small_llama(), fastpeft.LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"]), "a"
    ).eval()
    fill(wrapped)
    expected = logits(wrapped)
    wrapped.add_weighted_adapter(["a"], [1.0], "mix")
    wrapped.set_adapter("mix")
    assert_close("logits", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)


def test_layers_that_only_one_adapter_has_keep_their_choice(tmp_path):
    """layers_to_transform of the first adapter must not decide where the mixture is; PEFT loads what was saved."""
    torch.manual_seed(0)
    base = tiny_models.llama().eval()
    config = {"r": 2, "target_modules": ["q_proj"]}
    wrapped = fastpeft.get_peft_model(copy.deepcopy(base), fastpeft.LoraConfig(layers_to_transform=[0], **config), "a")
    fill(wrapped, seed=1)
    wrapped.add_adapter("b", fastpeft.LoraConfig(layers_to_transform=[2], **config))
    wrapped.set_adapter("b")
    fill(wrapped.eval(), seed=2)
    wrapped.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", combination_type="cat")
    wrapped.set_adapter(["a", "b"])
    expected = logits(wrapped)
    wrapped.set_adapter("mix")
    assert_close("logits", logits(wrapped), expected, MERGED_EQUALS_UNMERGED)
    wrapped.save_pretrained(tmp_path, selected_adapters=["mix"])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "mix").eval()
    assert_close("in peft", logits(loaded), expected, MERGED_EQUALS_UNMERGED)


REFUSED = {
    "unknown": ({"adapters": ["a", "c"]}, ValueError, "'c'"),
    "weights": ({"weights": [1.0]}, ValueError, "one weight"),
    "infinite": ({"weights": [1.0, float("inf")]}, ValueError, "finite"),
    "type": ({"combination_type": "mean"}, ValueError, "combination_type"),
    "density": ({"combination_type": "ties"}, ValueError, "density"),
    "sign": ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, ValueError, "majority_sign"),
    "ranks": ({"combination_type": "linear"}, ValueError, "one rank"),
    "name": ({"adapter_name": "a"}, ValueError, "new name"),
}


@pytest.mark.parametrize(("options", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_model_changes(options, error, said):
    wrapped = with_two(fastpeft, ranks=(2, 4))
    before = bits(wrapped)
    arguments = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "mix"} | options
    with pytest.raises(error, match=said):
        wrapped.add_weighted_adapter(**arguments)
    after = bits(wrapped)
    assert after.keys() == before.keys()
    assert list(wrapped.peft_config) == ["a", "b"]


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_more_than_a_product_is_refused(option):
    """PEFT mixes these without a word, and leaves magnitudes, biases or the changed base out."""
    wrapped = tiny_models.trained(**option)
    with pytest.raises(ValueError, match=next(iter(option))):
        wrapped.add_weighted_adapter(["default"], [1.0], "mix")


def test_scales_by_peft_s_names():
    """set_scale, scale_layer and unscale_layer give PEFT's scales, and a merged adapter is not rescaled.

    On linear modules: PEFT's scale_layer passes over embeddings.
    """
    ours, theirs = with_two(fastpeft, "gpt2"), with_two(peft, "gpt2")
    for wrapped in (ours, theirs):
        layers = [module for module in wrapped.modules() if hasattr(module, "scale_layer")]
        wrapped.set_adapter("b")
        for layer in layers:
            layer.set_scale("a", 0.25)
            layer.scale_layer(3.0)
            layer.unscale_layer(2.0)
    assert _scales(ours) == _scales(theirs)
    assert_close("logits", logits(ours), logits(theirs), LOGITS_EQUAL_TO_PEFT)
    for wrapped in (ours, theirs):
        for layer in [module for module in wrapped.modules() if hasattr(module, "scale_layer")]:
            layer.unscale_layer()
    assert _scales(ours) == _scales(theirs)
    ours.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        next(module for module in ours.modules() if "b" in getattr(module, "r", {})).set_scale("b", 1.0)


def _scales(wrapped):
    return [dict(module.scaling) for module in wrapped.modules() if hasattr(module, "scale_layer")]


def test_rescaling_for_a_while():
    from peft.helpers import rescale_adapter_scale

    ours, theirs = with_two(fastpeft), with_two(peft)
    before = logits(ours)
    with fastpeft.rescale_adapter_scale(ours, 0.5), rescale_adapter_scale(theirs, 0.5):
        assert_close("logits", logits(ours), logits(theirs), LOGITS_EQUAL_TO_PEFT)
    assert_bits_equal("afterwards", logits(ours), before)
    with pytest.raises(ValueError, match="LoRA"), fastpeft.rescale_adapter_scale(tiny_models.small_llama(), 0.5):
        pass
