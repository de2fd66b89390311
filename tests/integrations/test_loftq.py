"""replace_lora_weights_loftq: A and B take up what quantising lost, from a folder, its shards, or the full model."""

import copy

import pytest
import torch

import fastpeft
from fastpeft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from fastpeft.layers.lora import LoRALinear
from tests import tiny_models
from tests.tiny_models import bits, logits
from tests.tolerance import DECOMPOSED_AND_PUT_TOGETHER, assert_bits_equal, assert_close

R = 16


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return tiny_models.llama().eval()


def quantized(full, kind="nf4", **options):
    base = fastpeft.quantize(copy.deepcopy(full), kind, compute_dtype=torch.float32)
    return get_peft_model(
        base, LoraConfig(**{"r": R, "lora_alpha": R, "target_modules": "all-linear"} | options)
    ).eval()


def layers(wrapped):
    return [(path, layer) for path, layer in wrapped.base_model.layers() if isinstance(layer, LoRALinear)]


def remainders(wrapped, full):
    """||W - (Q + s B A)|| over ||W - Q|| by module."""
    shares = {}
    for path, layer in layers(wrapped):
        w, q = full.get_submodule(path).weight, layer.own_parameters().dense()
        shares[path] = ((w - q - layer.delta_weight("default")).norm() / (w - q).norm()).item()
    return shares


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("alpha", [R, 2 * R], ids=["scale_1", "scale_2"])
def test_much_of_what_was_lost_is_taken_back(full, kind, alpha):
    wrapped = quantized(full, kind, lora_alpha=alpha)
    before = logits(wrapped)
    replace_lora_weights_loftq(wrapped, full)
    assert max(remainders(wrapped, full).values()) < 0.8
    exact = logits(full)
    assert (logits(wrapped) - exact).norm() < 0.9 * (before - exact).norm()


def test_the_values_are_the_leading_triples(full):
    """PEFT's formula, A = sqrt(S) V^T and B = U sqrt(S) of W - Q, at its scale of 1; PEFT itself asks for a GPU."""
    wrapped = quantized(full)
    replace_lora_weights_loftq(wrapped, full)
    path, layer = layers(wrapped)[0]
    residual = full.get_submodule(path).weight - layer.own_parameters().dense()
    u, sigma, vh = torch.linalg.svd(residual.detach(), full_matrices=False)
    a, b = layer.lora_pair("default")
    root = sigma[:R].sqrt()
    assert_close("A", a, root[:, None] * vh[:R], DECOMPOSED_AND_PUT_TOGETHER)
    assert_close("B", b, u[:, :R] * root, DECOMPOSED_AND_PUT_TOGETHER)


@pytest.mark.parametrize("shards", ["1MB", "50KB"])
def test_from_files(full, shards, tmp_path):
    full.save_pretrained(tmp_path, max_shard_size=shards)
    expected, wrapped, itself = quantized(full), quantized(full), quantized(full)
    replace_lora_weights_loftq(expected, full)
    replace_lora_weights_loftq(wrapped, tmp_path)
    itself.get_base_model().config._name_or_path = str(tmp_path)
    replace_lora_weights_loftq(itself)
    for key, tensor in bits(expected).items():
        assert_bits_equal(key, bits(wrapped)[key], tensor)
        assert_bits_equal(key, bits(itself)[key], tensor)


def test_a_callback_chooses(full):
    wrapped, seen = quantized(full), []
    before = bits(wrapped)

    def keep_queries(model, name):
        assert model is wrapped
        seen.append(name)
        return name.endswith("q_proj")

    replace_lora_weights_loftq(wrapped, full, callback=keep_queries)
    assert seen == [path for path, _ in layers(wrapped)]
    for key, tensor in bits(wrapped).items():
        changed = "q_proj.lora_" in key
        assert torch.equal(tensor, before[key]) != changed, key


def test_refused_with_the_adapter_unchanged(full, tmp_path):
    wrapped = quantized(full)
    before = bits(wrapped)
    with pytest.raises(ValueError, match="quantised modules"):
        replace_lora_weights_loftq(get_peft_model(copy.deepcopy(full), LoraConfig()), full)
    with pytest.raises(ValueError, match="'other'"):
        replace_lora_weights_loftq(wrapped, full, adapter_name="other")
    with pytest.raises(ValueError, match=r"q_proj\.weight"):
        replace_lora_weights_loftq(wrapped, tiny_models.small_llama())
    with pytest.raises(ValueError, match="full weight"):
        replace_lora_weights_loftq(wrapped, fastpeft.quantize(copy.deepcopy(full), "nf4"))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        replace_lora_weights_loftq(wrapped, tmp_path)
    with pytest.raises(ValueError, match="model_path"):
        replace_lora_weights_loftq(wrapped)
    with pytest.raises(ValueError, match="DoRA"):
        replace_lora_weights_loftq(quantized(full, use_dora=True), full)
    for key, tensor in bits(wrapped).items():
        assert_bits_equal(key, tensor, before[key])
