"""AdaLoraConfig: PEFT's defaults and checks, when total_step is asked for, files with pruned ranks, and the model's methods."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from peft.utils import constants
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME, TRAINING_NAME
from fastpeft.methods.adalora import ADALORA_TARGETS
from tests import tiny_models
from tests.tiny_models import bits, fill, logits, small_llama
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

NAMES = ["q_proj", "v_proj"]
PATHS = [f"model.layers.0.self_attn.{name}" for name in NAMES]


def config(library=fastpeft, **options):
    return library.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": NAMES} | options)


def test_fields_and_defaults_are_peft_s():
    theirs = {field.name: field for field in dataclasses.fields(peft.AdaLoraConfig)}
    ours = AdaLoraConfig()
    their_config = peft.AdaLoraConfig(total_step=1)
    for field in dataclasses.fields(AdaLoraConfig):
        assert field.name in theirs, field.name
        if field.name != "total_step":
            expected, got = getattr(their_config, field.name), getattr(ours, field.name)
            assert got == expected or (not got and not expected), field.name


def test_the_default_modules_are_peft_s():
    for kind, names in constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING.items():
        ours = ADALORA_TARGETS[kind]
        assert (ours if isinstance(ours, str) else list(ours)) == names, kind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"total_step": 0}, "total_step"),
        ({"total_step": -3}, "total_step"),
        ({"total_step": 2.5}, "total_step"),
        ({"tinit": 10}, "tinit < total_step - tfinal"),
        ({"tinit": 4, "tfinal": 6}, "tinit < total_step - tfinal"),
        ({"tinit": -1}, "tinit"),
        ({"tfinal": -1}, "tfinal"),
        ({"deltaT": 0}, "deltaT"),
        ({"init_r": 0}, "init_r"),
        ({"target_r": 5}, "target_r"),
        ({"target_r": 0}, "target_r"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 0.0}, "beta2"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"use_dora": True}, "use_dora"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"rank_pattern": [True]}, "rank_pattern"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers_to_transform"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config(**options)


def test_options_that_peft_s_adalora_leaves_unused_are_said():
    with pytest.warns(
        UserWarning, match=r"does not use r, use_rslora, init_lora_weights; the rank at the start is init_r"
    ):
        made = config(r=16, use_rslora=True, init_lora_weights="gaussian")
    assert made.init_lora_weights is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config()


def test_total_step_may_wait_until_a_model_is_there():
    model = small_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="expected total_step, the number of optimizer steps"):
        get_peft_model(model, config(total_step=None))
    assert set(bits(model)) == set(before)
    assert config(total_step=None).for_run(7).total_step == 7
    assert config(total_step=9).for_run(9).total_step == 9
    with pytest.raises(ValueError, match="train longer"):
        config(total_step=None, tinit=7).for_run(7)
    with pytest.warns(UserWarning, match="the run ends at 7"):
        config(total_step=9).for_run(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config(total_step=9, tfinal=2).for_run(7)
    assert LoraConfig(r=3).for_run(7) == LoraConfig(r=3)


def test_an_embedding_is_refused_and_the_model_stays():
    model = small_llama()
    before = bits(model)
    with pytest.raises(ValueError, match="AdaLoRA is for linear modules"):
        get_peft_model(model, config(target_modules=["q_proj", "embed_tokens"]))
    assert set(bits(model)) == set(before)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(small_llama(), config(peft, target_modules=["embed_tokens"]))


def test_it_is_no_lora_for_what_only_lora_can():
    wrapped = get_peft_model(small_llama(), config())
    with pytest.raises(NotImplementedError, match="expected LoRA adapters"):
        wrapped.add_weighted_adapter(["default"], [1.0], "mixed", combination_type="svd")


# -- pruned files -----------------------------------------------------------------------------------------------------


PATTERNS = {
    "some": ([True, False, True, False], [False, False, False, True]),
    "rank_0": ([False] * 4, [True, True, False, True]),
    "all": ([True] * 4, [True] * 4),
}


def allocated(library, rows, names_adapter: bool = False):
    """A model whose triples are switched off as after an allocation."""
    torch.manual_seed(1)
    torch_model = small_llama()
    torch.manual_seed(2)
    wrapped = library.get_peft_model(torch_model, config(library, tfinal=2)).eval()
    fill(wrapped)
    suffix = ".default" if names_adapter else ""
    pattern = {f"{path}.lora_E{suffix}": row for path, row in zip(PATHS, rows, strict=True)}
    wrapped.peft_config["default"].rank_pattern = pattern
    wrapped.base_model.update_and_allocate(9)  # after the last allocation: applies the pattern
    return wrapped


@pytest.fixture
def base():
    torch.manual_seed(1)
    return small_llama()


@pytest.mark.parametrize("rows", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("direction", ["from_peft", "to_peft", "own"])
def test_pruned_files_give_the_same_logits(rows, direction, base, tmp_path):
    writer = peft if direction == "from_peft" else fastpeft
    reader = peft if direction == "to_peft" else fastpeft
    wrapped = allocated(writer, rows, names_adapter=writer is peft)
    wrapped.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS_NAME)
    for path, row in zip(PATHS, rows, strict=True):
        assert tensors[f"base_model.model.{path}.lora_E"].shape == (sum(row), 1)
        assert tensors[f"base_model.model.{path}.lora_A"].shape[0] == sum(row)
        assert tensors[f"base_model.model.{path}.lora_B"].shape[1] == sum(row)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert saved == {f"{path}.lora_E": row for path, row in zip(PATHS, rows, strict=True)}
    loaded = reader.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_close("logits", logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


def test_the_same_bytes_of_tensors_as_peft_s(tmp_path):
    """From the same values and the same pattern, both libraries write the same tensors."""
    ours, theirs = (allocated(library, PATTERNS["some"], library is peft) for library in (fastpeft, peft))
    values = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        parameter.data.copy_(values[key])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    mine, peft_s = (load_file(tmp_path / folder / TENSORS_NAME) for folder in ("ours", "theirs"))
    assert set(mine) == set(peft_s)
    for key, tensor in mine.items():
        assert_bits_equal(key, tensor, peft_s[key])


def test_a_triple_that_came_back_since_the_last_allocation_is_saved(base, tmp_path):
    """With deltaT > 1 the optimizer moves E of a masked triple again before the next mask; a file without it would compute
    something else than the model that was saved."""
    wrapped = allocated(fastpeft, PATTERNS["some"])
    layer = wrapped.get_base_model().get_submodule(PATHS[0])
    layer.lora_E["default"].data[1] = 0.5
    wrapped.save_pretrained(tmp_path)
    assert load_file(tmp_path / TENSORS_NAME)[f"base_model.model.{PATHS[0]}.lora_E"].shape == (3, 1)
    assert wrapped.peft_config["default"].rank_pattern[f"{PATHS[0]}.lora_E"] == PATTERNS["some"][0]
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_close("logits", logits(loaded), logits(wrapped), OTHER_ORDER_OF_SUMS)
    there_and_back = fastpeft.get_peft_model_state_dict(wrapped)
    fastpeft.set_peft_model_state_dict(wrapped, there_and_back)
    assert_close("state dict", logits(wrapped), logits(loaded), OTHER_ORDER_OF_SUMS)


def test_loading_into_an_adapter_takes_the_file_s_pattern(base, tmp_path):
    """An earlier checkpoint has another pattern than the model it is loaded into; saving again must prune by its own."""
    early = allocated(fastpeft, PATTERNS["some"])
    early.save_pretrained(tmp_path / "early")
    late = allocated(fastpeft, PATTERNS["rank_0"])
    late.load_adapter(tmp_path / "early", "default", is_trainable=True)
    assert late.peft_config["default"].rank_pattern == early.peft_config["default"].rank_pattern
    assert_close("logits", logits(late), logits(early), OTHER_ORDER_OF_SUMS)
    late.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base, tmp_path / "again")
    assert_close("saved again", logits(again), logits(early), OTHER_ORDER_OF_SUMS)


def test_a_file_whose_tensors_do_not_fit_its_pattern_is_refused(base, tmp_path):
    allocated(fastpeft, PATTERNS["some"]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["rank_pattern"][f"{PATHS[0]}.lora_E"] = [True, False, False, False]
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"3 wrong shape: base_model.model.model.layers.0.self_attn.q_proj.lora_A"):
        PeftModel.from_pretrained(base, tmp_path)


def test_an_adapter_for_inference_has_no_side_file(base, tmp_path):
    allocated(fastpeft, PATTERNS["some"]).save_pretrained(tmp_path)
    assert (tmp_path / TRAINING_NAME).is_file()
    PeftModel.from_pretrained(base, tmp_path).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / TRAINING_NAME).exists()


# -- a loop of one's own ------------------------------------------------------------------------------------------------


def test_the_penalty_is_in_the_loss_in_training_alone():
    wrapped = get_peft_model(small_llama(), config())
    fill(wrapped)
    batch = {**tiny_models.inputs(wrapped), "labels": tiny_models.token_ids()}
    wrapped.eval()
    plain = wrapped(**batch).loss
    wrapped.train()
    penalty = wrapped.base_model.penalty()
    assert penalty > 0
    assert_close("loss", wrapped(**batch).loss, plain + penalty, OTHER_ORDER_OF_SUMS)
    with wrapped.base_model.penalty_apart():
        assert_bits_equal("apart", wrapped(**batch).loss, plain)
    with wrapped.disable_adapter():
        assert wrapped.base_model.penalty() is None
    assert wrapped(input_ids=batch["input_ids"]).loss is None
    assert not isinstance(wrapped(**batch, return_dict=False), dict)
    wrapped.peft_config["default"].orth_reg_weight = 0.0
    assert wrapped.base_model.penalty() is None


def test_other_methods_have_no_schedule_and_no_penalty():
    wrapped = get_peft_model(small_llama(), LoraConfig(r=2)).train()
    fill(wrapped)
    before = bits(wrapped)
    wrapped.base_model.update_and_allocate(1)
    assert wrapped.base_model.penalty() is None
    for key, tensor in bits(wrapped).items():
        assert_bits_equal(key, tensor, before[key])


def test_a_step_without_gradients_says_where_it_belongs():
    wrapped = get_peft_model(small_llama(), config())
    with pytest.raises(ValueError, match=r"call it after optimizer.step\(\) and before"):
        wrapped.update_and_allocate(1)


def test_a_training_of_one_step_ends_at_the_target():
    """Its only step is the last allocation, with no importance from before: that of the step itself counts."""
    wrapped = get_peft_model(small_llama(), config(total_step=1)).train()
    fill(wrapped)
    wrapped(**tiny_models.inputs(wrapped), labels=tiny_models.token_ids()).loss.backward()
    wrapped.update_and_allocate(1)
    assert sum(map(sum, wrapped.peft_config["default"].rank_pattern.values())) == 4


def test_target_r_equal_to_init_r_keeps_all():
    """PEFT's kthvalue has no 0th value to compare with; here nothing is switched off."""
    wrapped = get_peft_model(small_llama(), config(target_r=4)).train()
    fill(wrapped)
    wrapped(**tiny_models.inputs(wrapped), labels=tiny_models.token_ids()).loss.backward()
    wrapped.update_and_allocate(3)
    assert all(all(row) for row in wrapped.peft_config["default"].rank_pattern.values())


def test_a_model_of_one_s_own_without_a_loss_trains():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    wrapped = get_peft_model(model, config(target_modules=["0", "2"])).train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randn(32, 2)
    losses = []
    for step in range(1, 11):
        loss = (wrapped(x) - y).square().mean() + wrapped.base_model.penalty()
        loss.backward()
        optimizer.step()
        wrapped.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(map(sum, wrapped.peft_config["default"].rank_pattern.values())) == 4
