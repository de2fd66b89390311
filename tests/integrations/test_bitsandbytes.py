"""Adapters on quantised transformers models: PEFT and bitsandbytes are the oracle for names, files, outputs and gradients."""

import copy
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft.checkpoint import CONFIG_NAME, TENSORS_NAME
from fastpeft.integrations.quantize import quantize
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from fastpeft.model import prepare_model_for_kbit_training
from tests import tiny_models
from tests.tiny_models import fill, flags, inputs, logits, loss
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close, assert_no_worse

KINDS = ["nf4", "int8"]
OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def dense_llama():
    """bitsandbytes' CPU routine takes wrong scales for a 4-bit weight where K is not a multiple of the block size."""
    torch.manual_seed(0)
    return tiny_models.llama(intermediate_size=128)


def llama(kind: str, dtype: torch.dtype = torch.float32):
    model = dense_llama().to(dtype)
    return quantize(model, kind, compute_dtype=dtype, double_quant=kind == "nf4").train()


def make(library, base, **options):
    wrapped = library.get_peft_model(base, library.LoraConfig(**(OPTIONS | options)))
    fill(wrapped)
    return wrapped


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.requires_grad}


def exact(wrapped, base) -> nn.Module:
    """The same model in float64: dequantised weights as dense ones, the same adapters."""
    dense = dense_llama().double()
    for path, module in base.named_modules():
        if is_quantized(module):
            dense.get_submodule(path).weight.data = frozen_weight(module).dequantize(torch.float64)
    others = {k: v for k, v in base.state_dict().items() if not any(part in k for part in ("proj",))}
    dense.load_state_dict(others, strict=False)
    made = make(fastpeft, dense)
    made.load_state_dict({k: v for k, v in wrapped.state_dict().items() if "lora_" in k}, strict=False)
    return made.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_every_gradient_are_no_worse_than_peft_s(kind, dtype):
    """In the adapters' dtype of the base: over a bfloat16 base PEFT takes float32 adapters' products in float32, see below."""
    base = llama(kind, dtype)
    ours, theirs = make(fastpeft, copy.deepcopy(base)), make(peft, copy.deepcopy(base))
    oracle = exact(ours, base)
    if dtype == torch.bfloat16:
        for model in (ours, theirs):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        oracle = exact(ours, base)
    assert_no_worse("logits", logits(ours), logits(oracle), logits(theirs))
    found, expected, reference = gradients(ours), gradients(oracle), gradients(theirs)
    assert set(found) == set(expected) == set(reference)
    assert len(found) == 2 * 21
    for name, gradient in expected.items():
        assert_no_worse(name, found[name], gradient, reference[name])


@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_quantised_models_go_both_ways(kind, direction, tmp_path):
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    base = llama(kind)
    wrapped = make(writer, copy.deepcopy(base))
    wrapped.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close("logits", logits(loaded.train()), logits(wrapped.train()), LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("kind", KINDS)
def test_names_counts_and_files_are_peft_s(kind, tmp_path):
    ours, theirs = (make(library, llama(kind)) for library in (fastpeft, peft))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert flags(ours) == flags(theirs)
    described = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert described[0] == described[1]
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = (load_file(tmp_path / name / TENSORS_NAME) for name in ("ours", "theirs"))
    assert set(one) == set(two)
    for name, tensor in two.items():
        assert_bits_equal(name, one[name], tensor)
    keys = ("r", "lora_alpha", "peft_type", "bias", "use_rslora")
    config = [json.loads((tmp_path / name / CONFIG_NAME).read_text()) for name in ("ours", "theirs")]
    assert [config[0][key] for key in keys] == [config[1][key] for key in keys]


def test_a_full_adapter_counts_the_weights_that_were_packed():
    whole, packed = dense_llama(), llama("nf4")
    counts = [make(fastpeft, model).get_nb_trainable_parameters() for model in (whole, packed)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], r".*\.layers\.[02]\..*_proj", None])
def test_the_same_targets_as_in_the_full_model(kind, targets):
    config = fastpeft.LoraConfig(target_modules=targets)
    assert config.target_paths(llama(kind)) == config.target_paths(dense_llama())


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapters_compute_the_base_s_own_bits(kind):
    base = llama(kind)
    expected = logits(base)
    wrapped = make(fastpeft, base)
    assert not torch.equal(logits(wrapped), expected)
    with wrapped.disable_adapter():
        assert_bits_equal("logits", logits(wrapped), expected)
    wrapped.eval()
    logits(wrapped)
    with wrapped.disable_adapter():
        logits(wrapped)
    wrapped.train()
    with wrapped.disable_adapter():
        assert_bits_equal("logits", logits(wrapped), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_merged_model_is_a_quantised_model_that_transformers_loads(kind, tmp_path):
    wrapped = make(fastpeft, llama(kind))
    own = {name: tensor.clone() for name, tensor in wrapped.get_base_model().state_dict().items()}
    wrapped.merge_adapter(safe_merge=True)
    merged = logits(wrapped)
    wrapped.unmerge_adapter()
    for name, tensor in wrapped.get_base_model().state_dict().items():
        assert_bits_equal(name, tensor, own[name])
    plain = wrapped.merge_and_unload(safe_merge=True)
    assert_bits_equal("logits", logits(plain), merged)
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_bits_equal("logits", logits(again.train()), merged)


def test_a_merge_that_is_not_finite_leaves_the_model_as_it_was():
    wrapped = make(fastpeft, llama("nf4"))
    own = {name: tensor.clone() for name, tensor in wrapped.get_base_model().state_dict().items()}
    last = [p for n, p in wrapped.named_parameters() if "lora_B" in n][-1]
    last.data[0, 0] = float("inf")
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(ValueError, match="not finite"):
            merge(safe_merge=True)
        for name, tensor in wrapped.get_base_model().state_dict().items():
            assert torch.equal(tensor, own[name]) or "lora_" in name, name


def test_a_quantised_module_cannot_be_trained_in_full():
    with pytest.raises(ValueError, match=r"mlp\.up_proj, which is quantised.*skip_modules"):
        make(fastpeft, llama("nf4"), target_modules=["q_proj"], modules_to_save=["up_proj"])
    wrapped = make(fastpeft, llama("nf4"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert gradients(wrapped).keys() >= {"base_model.model.lm_head.modules_to_save.default.weight"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_preparing_for_training_turns_checkpointing_on_and_copies_nothing(kind, reentrant):
    base = llama(kind, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in base.named_parameters()}
    expected = gradients(make(fastpeft, copy.deepcopy(base)))
    prepared = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert {name: p.dtype for name, p in prepared.named_parameters()} == dtypes
    assert not any(p.requires_grad for p in prepared.parameters())
    assert prepared.model.layers[0].gradient_checkpointing
    for name, gradient in gradients(make(fastpeft, prepared)).items():
        assert_bits_equal(name, gradient, expected[name])


def test_transformers_own_trainer_takes_the_wrapped_model(tmp_path):
    """It refuses a quantised model without adapters."""
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False
    )
    rows = [{**{k: v[0] for k, v in inputs(dense_llama()).items()}, "labels": tiny_models.token_ids()[0]}] * 4
    base = llama("nf4")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(base, arguments, train_dataset=rows)
    wrapped = make(fastpeft, base)
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}
    transformers.Trainer(wrapped, arguments, train_dataset=rows).train()
    assert all(not torch.equal(before[name], p) for name, p in wrapped.named_parameters() if p.requires_grad)
