"""Models under Hugging Face PEFT whose LoRA layers run our ops: every family, every way in, everything that PEFT does to them."""

import copy
import io

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fastpeft
from fastpeft.integrations.acceleration import accelerate_new_layers
from fastpeft.integrations.acceleration.peft_lora import FastLora
from fastpeft.layers import shared_input
from fastpeft.ops import lora_group
from tests import tiny_models
from tests.tiny_models import fill, logits, loss
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

pytestmark = pytest.mark.usefixtures("as_functions")

DECODER = {
    "vocab_size": tiny_models.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}


def decoder(family: str, **options):
    config = getattr(transformers, f"{family}Config")(**DECODER, **options)
    return lambda: getattr(transformers, f"{family}ForCausalLM")(config)


def roberta():
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**ENCODER, num_labels=3))


def gemma3():
    config = transformers.Gemma3TextConfig(**DECODER, head_dim=8)
    return transformers.Gemma3ForCausalLM(config)


# the model, how many linears its "all-linear" finds in two layers, and its groups in these
FAMILIES = {
    "llama": (decoder("Llama"), 14, 4),
    "mistral": (decoder("Mistral"), 14, 4),
    "qwen2": (decoder("Qwen2"), 14, 4),
    "qwen3": (decoder("Qwen3", head_dim=8), 14, 4),
    "gemma2": (decoder("Gemma2", head_dim=8), 14, 4),
    "gemma3": (gemma3, 14, 4),
    "phi": (decoder("Phi"), 12, 2),
    "phi3": (decoder("Phi3"), 8, 0),
    "gpt2": (tiny_models.gpt2, 8, 0),
    "bert": (tiny_models.bert, 12 + 2, 2),
    "roberta": (roberta, 12 + 2, 2),
    "distilbert": (tiny_models.distilbert, 12 + 2, 2),
    "t5": (tiny_models.t5, 2 * 6 + 2 * 10, 6),
}


@pytest.fixture
def groups(monkeypatch):
    """How many members every lora_linear_group had."""
    sizes = []

    def spy(x, members, **options):
        sizes.append(len(members))
        return lora_group.lora_linear_group(x, members, **options)

    monkeypatch.setattr(shared_input, "lora_linear_group", spy)
    return sizes


def peft_model(base=None, adapters=("default",), seed=0, **options):
    """A small Llama, or `base`, under PEFT with adapters that do something, in eval mode."""
    torch.manual_seed(seed)
    base = FAMILIES["llama"][0]() if base is None else base
    options = {"r": 4, "target_modules": "all-linear"} | options
    model = peft.get_peft_model(base, peft.LoraConfig(**options), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, peft.LoraConfig(**options))
    for index, name in enumerate(adapters):
        model.set_adapter(name)
        fill(model, seed=index + 1)
    model.set_adapter(adapters[0])
    return model.eval()


def gradients(model):
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, other):
    value, grads = gradients(model)
    expected, expected_grads = gradients(other)
    assert_close("loss", value, expected, GRADIENTS_THROUGH_A_MODEL)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        assert_close(name, grad, expected_grads[name], GRADIENTS_THROUGH_A_MODEL)


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_lora_layer_of_a_family_is_replaced(family, groups):
    make, linears, expected_groups = FAMILIES[family]
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} if family == "gpt2" else {}
    model = peft_model(make(), **options)
    untouched = copy.deepcopy(model)
    classes = [type(module) for module in model.modules()]
    before = logits(model)
    ledger = fastpeft.accelerate(model, parts=["lora"])
    layers = lora_layers(model)
    assert len(layers) == linears
    assert all(isinstance(layer, FastLora) for layer in layers)
    assert f"{linears} of {linears} replaced" in ledger.summary()
    assert f"{expected_groups} groups" in ledger.summary()
    assert_close("logits", logits(model), before, LOGITS_EQUAL_TO_PEFT)
    assert_same_step(model, untouched)
    assert not ledger.fallbacks
    assert bool(groups) == bool(expected_groups)
    fastpeft.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any(name.startswith("_fastpeft") for module in model.modules() for name in module.__dict__)
    assert_bits_equal("restored", logits(model), before)


# -- what runs together ------------------------------------------------------------------------------------------------


def test_groups_survive_what_is_done_to_adapters(groups):
    """q, k, v and gate, up are one op again after switching, disabling, merging, modes and both kinds of checkpointing."""
    model = peft_model(adapters=("default", "other"))
    untouched = copy.deepcopy(model)
    fastpeft.accelerate(model, parts=["lora"])

    def check(sizes=(3, 2, 3, 2)):
        groups.clear()
        assert_close("logits", logits(model), logits(untouched), LOGITS_EQUAL_TO_PEFT)
        assert [size for size in groups if size > 1] == list(sizes)

    check()
    for both in (model, untouched):
        both.set_adapter("other")
    check()
    with model.disable_adapter(), untouched.disable_adapter():
        check(sizes=())
    check()
    for both in (model, untouched):
        both.merge_adapter()
    check(sizes=())
    for both in (model, untouched):
        both.unmerge_adapter()
    check()
    for both in (model, untouched):
        both.base_model.set_adapter(["default", "other"])
    check(sizes=())
    for both in (model, untouched):
        both.set_adapter("default")
    for reentrant in (True, False):
        for both in (model, untouched):
            both.enable_input_require_grads()
            both.gradient_checkpointing_enable({"use_reentrant": reentrant})
            both.train()
        groups.clear()
        assert_same_step(model, untouched)
        assert groups.count(3) == groups.count(2) == 4  # forward pass and recomputation of two layers
        for both in (model, untouched):
            both.gradient_checkpointing_disable()
            both.eval()
    check()


def test_dropout_in_a_model_repeats_with_the_seed():
    model = peft_model(lora_dropout=0.3).train()
    ledger = fastpeft.accelerate(model)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gradients(model))
    for name, grad in runs[0][1].items():
        assert_bits_equal(name, runs[1][1][name], grad)
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not ledger.fallbacks


# -- what PEFT does with its layers --------------------------------------------------------------------------------------


def test_the_life_of_adapters_is_peft_s(tmp_path, capsys):
    """State dict, files to the byte, counts, switching, adding, deleting, merging: as on an untouched copy."""
    model = peft_model(modules_to_save=["lm_head"])
    untouched = copy.deepcopy(model)
    fastpeft.accelerate(model)
    printed = []
    for index, both in enumerate((untouched, model)):
        both.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
        both.save_pretrained(tmp_path / str(index))
    assert printed[0] == printed[1]
    for name in ("adapter_model.safetensors", "README.md"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    assert peft.LoraConfig.from_pretrained(tmp_path / "0") == peft.LoraConfig.from_pretrained(tmp_path / "1")
    assert list(model.state_dict()) == list(untouched.state_dict())

    def same():
        assert_close("logits", logits(model), logits(untouched), LOGITS_EQUAL_TO_PEFT)

    for both in (model, untouched):
        both.add_adapter("other", peft.LoraConfig(r=3, target_modules="all-linear"))
        both.set_adapter("other")
        fill(both, seed=3)
    same()
    for both in (model, untouched):
        both.set_adapter("default")
        both.delete_adapter("other")
    same()
    for both in (model, untouched):
        both.merge_adapter()
        both.unmerge_adapter()
    same()
    y = logits(model)
    merged = [both.merge_and_unload() for both in (model, untouched)]
    assert not any(isinstance(module, FastLora) for module in merged[0].modules())
    assert_bits_equal("merged", logits(merged[0]), logits(merged[1]))
    assert_close("merged", logits(merged[0]), y, GRADIENTS_THROUGH_A_MODEL)
    fastpeft.restore(model)


def test_copies_and_pickles_are_not_accelerated():
    model = peft_model()
    fastpeft.accelerate(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert not any(isinstance(module, FastLora) for module in other.modules())
        assert_close("logits", logits(other), logits(model), LOGITS_EQUAL_TO_PEFT)
        assert fastpeft.accelerate(other).slots


def test_what_is_not_lora_on_a_linear_is_kept_with_the_reason():
    model = peft_model(target_modules=["embed_tokens", "q_proj"])
    ledger = fastpeft.accelerate(model, parts=["lora"])
    assert [(item.path.rpartition(".")[2], item.why) for item in ledger.kept] == [
        ("embed_tokens", "LoRA, but not on a linear that is dense or bitsandbytes'")
    ]
    base = FAMILIES["llama"][0]()
    model = peft.get_peft_model(
        base, peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    ledger = fastpeft.accelerate(model, parts=["lora"])
    assert not ledger.slots
    assert "4 kept: not LoRA, or with a forward of its own" in ledger.summary()


def test_accelerating_again_finds_new_layers():
    model = peft_model(target_modules=["q_proj"])
    assert len(fastpeft.accelerate(model, parts=["lora"]).slots) == 2
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    ledger = fastpeft.accelerate(model, parts=["lora"])
    assert len(ledger.slots) == len(lora_layers(model)) == 4
    assert "2 groups" in ledger.summary()


def test_fastpeft_s_own_layers_are_named():
    model = fastpeft.get_peft_model(FAMILIES["llama"][0](), fastpeft.LoraConfig(target_modules=["q_proj"]))
    assert "2 linears are fastpeft's own layers" in fastpeft.accelerate(model, parts=["lora"]).summary()


# -- ways in ---------------------------------------------------------------------------------------------------------------


def test_add_adapter_of_transformers(monkeypatch):
    """Its layers sit in the bare model. transformers asks for a newer PEFT than every version of it needs here."""
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **versions: None)
    torch.manual_seed(0)
    model = FAMILIES["llama"][0]()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"]))
    fill(model)
    model.eval()
    before = logits(model)
    ledger = fastpeft.accelerate(model, parts=["lora"])
    assert len(ledger.slots) == 6
    assert_close("logits", logits(model), before, LOGITS_EQUAL_TO_PEFT)
    model.disable_adapters()
    logits(model)
    assert ledger.fallbacks == {("lora", "its adapters are disabled"): 6}
    fastpeft.restore(model)
    model.enable_adapters()
    assert_bits_equal("restored", logits(model), before)


def test_trainer_trains_and_saves_what_plain_peft_loads(tmp_path):
    """Three steps of transformers.Trainer: accelerated or with layers made so, the adapters are those of the untouched run."""
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 97, (12, 8)).tolist()]
    trained = {}
    for name in ("untouched", "accelerated", "new_layers"):
        torch.manual_seed(0)
        base = FAMILIES["llama"][0]()
        clean = copy.deepcopy(base)
        config = peft.LoraConfig(r=4, target_modules="all-linear")
        model = peft.get_peft_model(base, accelerate_new_layers(config) if name == "new_layers" else config)
        if name == "accelerated":
            fastpeft.accelerate(model, parts=["lora"])
        assert any(isinstance(module, FastLora) for module in model.modules()) == (name != "untouched")
        arguments = transformers.TrainingArguments(
            tmp_path / name, per_device_train_batch_size=4, max_steps=3, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, learning_rate=1e-2, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        trainer.save_model(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(clean, tmp_path / name).eval()
        assert not any(isinstance(module, FastLora) for module in loaded.modules())
        trained[name] = logits(loaded)
        if name != "untouched":
            assert peft.LoraConfig.from_pretrained(tmp_path / name) == peft.LoraConfig.from_pretrained(
                tmp_path / "untouched"
            )
    assert_close("accelerated", trained["accelerated"], trained["untouched"], GRADIENTS_THROUGH_A_MODEL)
    assert_close("new layers", trained["new_layers"], trained["untouched"], GRADIENTS_THROUGH_A_MODEL)


def test_layers_that_are_made_accelerated(groups, tmp_path):
    """They are PEFT's own by class, form groups at once, and restore and accelerate know them."""
    base = FAMILIES["llama"][0]()
    clean = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear")).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    config = accelerate_new_layers(peft.LoraConfig.from_pretrained(tmp_path))
    made = peft.PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path, config=config).eval()
    layers = lora_layers(made)
    assert len(layers) == 14
    assert all(isinstance(layer, FastLora) for layer in layers)
    assert_close("logits", logits(made), expected, LOGITS_EQUAL_TO_PEFT)
    assert [size for size in groups if size > 1] == [3, 2, 3, 2]
    again = peft.PeftModel.from_pretrained(clean, tmp_path, config=config).eval()  # the same config, another model
    groups.clear()
    assert_close("logits", logits(again), expected, LOGITS_EQUAL_TO_PEFT)
    assert [size for size in groups if size > 1] == [3, 2, 3, 2]
    assert len(fastpeft.accelerate(made, parts=["lora"]).slots) == 14
    for both in (made, again):
        fastpeft.restore(both)
        assert all(type(layer) is peft.tuners.lora.Linear for layer in lora_layers(both))
        assert not any(name.startswith("_fastpeft") for module in both.modules() for name in module.__dict__)
        assert_bits_equal("restored", logits(both), expected)


@pytest.mark.parametrize("first", [True, False])
def test_other_custom_modules_stay_the_users(first):
    class Own(peft.tuners.lora.Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) + 1

    config = peft.LoraConfig(target_modules=["0", "1"])
    if first:
        accelerate_new_layers(config)
    config._register_custom_module({nn.Linear: Own})
    if not first:
        accelerate_new_layers(config)
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4))
    peft.inject_adapter_in_model(config, model)
    assert type(model[0]) is Own
    assert type(model[1]) is peft.tuners.lora.Embedding
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig, got IA3Config"):
        accelerate_new_layers(peft.IA3Config())


def test_layers_of_two_models_are_not_siblings():
    """A config that has served one model serves another: paths are the same, layers are not."""
    config = accelerate_new_layers(peft.LoraConfig(target_modules=["q", "k"]))
    first, second = (nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for names in (("q", "k"), ("q",)))
    for model in (first, second):
        peft.inject_adapter_in_model(config, model)
    assert first["q"].followers.modules == [first["k"]]
    assert second["q"].followers is None
