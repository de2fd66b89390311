"""EVA: components, ranks and files are PEFT's, and the incremental decomposition is the whole one."""

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA

import fastpeft
from fastpeft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from fastpeft.model.eva import get_eva_state_dict
from fastpeft.ops.incremental_svd import IncrementalSVD
from tests import tiny_models
from tests.tiny_models import bits, fill, logits
from tests.tolerance import (
    DECOMPOSED_AND_PUT_TOGETHER,
    LOGITS_EQUAL_TO_PEFT,
    MERGED_EQUALS_UNMERGED,
    assert_bits_equal,
    assert_close,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def batches(count=3, rows=8, length=12, **more):
    generator = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        ids = torch.randint(0, tiny_models.VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, length - 3 :] = 0
        labels = ids.clone()
        labels[:, :2] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels} | more)
    return made


def started(library=fastpeft, **options):
    torch.manual_seed(0)
    eva = library.EvaConfig(
        **{key: options.pop(key) for key in ("rho", "tau", "whiten", "use_label_mask") if key in options}
    )
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | options
    model = tiny_models.llama(hidden_size=32, num_hidden_layers=2)
    return library.get_peft_model(model, library.LoraConfig(init_lora_weights="eva", eva_config=eva, **config)).eval()


CASES = {
    "default": {},
    "no_redistribution": {"rho": 1.0},
    "far": {"rho": 4.0, "tau": 0.9},
    # PEFT divides in place, once for every module that shares an input: these share none
    "whitened": {"whiten": True, "use_label_mask": False, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 2}},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_components_and_ranks_are_peft_s(options, tmp_path):
    ours, theirs = started(**options), started(peft, **options)
    initialize_lora_eva_weights(ours, batches())
    peft.initialize_lora_eva_weights(theirs, batches(), show_progress_bar=False)
    found = {key: tensor for key, tensor in bits(ours).items() if "lora_A" in key}
    expected = {key: tensor for key, tensor in bits(theirs).items() if "lora_A" in key}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, DECOMPOSED_AND_PUT_TOGETHER)
    for field in ("rank_pattern", "alpha_pattern", "r", "lora_alpha"):
        assert getattr(ours.peft_config["default"], field) == getattr(theirs.peft_config["default"], field)
    assert sum(tensor.shape[0] for tensor in found.values()) == sum(
        module.r["default"] for module in started(**options).modules() if isinstance(module, fastpeft.LoRALinear)
    )


def test_the_function_is_unchanged_and_files_go_to_peft(tmp_path):
    wrapped = started(rho=3.0)
    before, names = logits(wrapped), {key for key, p in wrapped.named_parameters() if p.requires_grad}
    initialize_lora_eva_weights(wrapped, batches())
    assert_close("logits", logits(wrapped), before, LOGITS_EQUAL_TO_PEFT)
    assert {key for key, p in wrapped.named_parameters() if p.requires_grad} <= names
    assert wrapped.peft_config["default"].rank_pattern
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = tiny_models.llama(hidden_size=32, num_hidden_layers=2)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close("in peft", logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


def test_what_was_computed_can_be_given():
    first, second = started(), started()
    found = get_eva_state_dict(first, batches())
    initialize_lora_eva_weights(first, batches())
    initialize_lora_eva_weights(second, eva_state_dict=found)
    for key, tensor in bits(first).items():
        if "lora_A" in key:
            assert_bits_equal(key, bits(second)[key], tensor)


def test_a_module_without_rank_stands_as_it_was():
    wrapped = started()
    found = get_eva_state_dict(wrapped, batches())
    path = "model.layers.0.self_attn.k_proj"
    initialize_lora_eva_weights(wrapped, eva_state_dict=found | {path: found[path][:0]})
    assert type(wrapped.get_base_model().get_submodule(path)) is torch.nn.Linear


def test_over_a_quantised_base():
    torch.manual_seed(0)
    base = fastpeft.quantize(tiny_models.llama(hidden_size=32, num_hidden_layers=2), "nf4")
    wrapped = get_peft_model(base, LoraConfig(r=2, init_lora_weights="eva")).eval()
    before = logits(wrapped)
    initialize_lora_eva_weights(wrapped, batches())
    assert_close("logits", logits(wrapped), before, LOGITS_EQUAL_TO_PEFT)


REFUSED = {
    "other_start": (lambda: started(), {"adapter_name": "x"}, "'eva'"),
    "nothing": (lambda: started(), {}, "dataloader"),
    "empty": (lambda: started(), {"dataloader": []}, "empty"),
    "small": (lambda: started(), {"dataloader": batches(rows=1, length=6), "max_batches": 20}, "larger batches"),
    "narrow": (lambda: started(r=20), {"dataloader": batches()}, "at most"),
}


@pytest.mark.parametrize(("make", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_adapter_unchanged(make, options, said):
    """Batches too small for one component would be gone through for ever in PEFT."""
    wrapped = make()
    before = bits(wrapped)
    with pytest.raises(ValueError, match=said):
        initialize_lora_eva_weights(wrapped, **options)
    for key, tensor in bits(wrapped).items():
        assert_bits_equal(key, tensor, before[key])
    assert not any(module._forward_pre_hooks for module in wrapped.modules())
    assert not wrapped.base_model.disabled


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="rho"):
        EvaConfig(rho=0.5)
    with pytest.raises(ValueError, match="tau"):
        EvaConfig(tau=1.5)
    config = LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.5})
    assert config.eva_config == EvaConfig(rho=1.5)
    assert config.to_dict()["eva_config"]["rho"] == 1.5


@pytest.mark.parametrize(("n", "k", "count"), [(40, 33, 5), (12, 64, 3), (300, 9, 4)], ids=str)
def test_batches_have_the_components_of_all_rows(n, k, count):
    """Against one decomposition of all rows in float64, where a few directions stand out; and against PEFT's batch by batch."""
    generator = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(k, count, generator=generator))[0].t()
    scales = 10.0 * 2.0 ** -torch.arange(count)
    parts = [
        (torch.randn(n, count, generator=generator) * scales) @ basis
        + 0.01 * torch.randn(n, k, generator=generator)
        + 3.0
        for _ in range(4)
    ]
    svd, theirs = IncrementalSVD(count), IncrementalPCA(n_components=count, lowrank=True, lowrank_seed=42)
    for part in parts:
        svd.add(part)
        if 2 * count <= min(n, k):
            theirs.partial_fit(part)
            assert_close("PEFT's", svd.components.double(), theirs.components_.double(), DECOMPOSED_AND_PUT_TOGETHER)
            assert_close(
                "explained", svd.explained.double(), theirs.explained_variance_ratio_.double(), MERGED_EQUALS_UNMERGED
            )
    whole = torch.cat(parts).double()
    _, _, vh = torch.linalg.svd(whole - whole.mean(dim=0), full_matrices=False)
    similarity = (svd.components.double() * vh[:count]).sum(dim=1).abs()
    assert similarity.min() > 0.99
    with pytest.raises(ValueError, match="rows and columns"):
        svd.add(parts[0][: count - 1])
