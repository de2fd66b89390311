"""PeftModel as its users use it: counts, switching, training, checkpointing of activations, and what passes through."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LoraConfig, PeftModel, get_peft_model, prepare_for_training
from fastpeft.model import require_input_gradients
from tests import tiny_models
from tests.tiny_models import bits, fill, flags, logits, loss, token_ids
from tests.tolerance import (
    MERGED_EQUALS_UNMERGED,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
)

MODELS = [tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.t5, tiny_models.gemma3]
every_model = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def make_peft(make=tiny_models.llama, filled=True, **options) -> PeftModel:
    wrapped = get_peft_model(make(), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))
    if filled:
        fill(wrapped)
    return wrapped.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- counts -------------------------------------------------------------------------------------------------------------


@every_model
def test_counts_and_their_text_are_peft_s(make, capsys):
    options = {"r": 4, "target_modules": "all-linear", "modules_to_save": None}
    ours, theirs = (
        get_peft_model(make(), LoraConfig(**options)),
        peft.get_peft_model(make(), peft.LoraConfig(**options)),
    )
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()
    our_text = capsys.readouterr().out
    theirs.print_trainable_parameters()
    assert our_text == capsys.readouterr().out


def test_the_table_is_of_what_is_trained():
    wrapped = make_peft(r=4, target_modules=["q_proj"])
    table = wrapped.trainable_parameter_table()
    assert table[0] == {
        "name": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "shape": [4, 64],
        "dtype": "float32",
        "numel": 256,
    }
    assert sum(row["numel"] for row in table) == wrapped.get_nb_trainable_parameters()[0]


# -- the same function --------------------------------------------------------------------------------------------------


@every_model
def test_a_new_adapter_changes_no_bit(make):
    model = make().eval()
    expected = logits(model)
    assert_bits_equal("logits", logits(get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()), expected)


@every_model
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_disable_adapter_is_the_base_model(make, merged):
    model = make().eval()
    base, before = logits(model), bits(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    if merged:
        wrapped.merge_adapter()
    y = logits(wrapped)
    assert not torch.equal(y, base)
    with wrapped.disable_adapter():
        assert_bits_equal("disabled", logits(wrapped), base)
        with wrapped.disable_adapter():
            pass
        assert_bits_equal("after an inner context", logits(wrapped), base)
    assert_bits_equal("enabled", logits(wrapped), y)
    with pytest.raises(KeyError), wrapped.disable_adapter():
        raise KeyError
    assert_bits_equal("enabled after an exception", logits(wrapped), y)
    assert wrapped.unload() is model
    for name, tensor in bits(model).items():
        assert_bits_equal(name, tensor, before[name])


@every_model
def test_merge_and_unload_is_the_plain_model(make):
    wrapped = make_peft(make)
    y, kind = logits(wrapped), type(wrapped.get_base_model())
    wrapped.merge_adapter()
    assert_close("merged", logits(wrapped), y, MERGED_EQUALS_UNMERGED)
    wrapped.unmerge_adapter()
    assert_bits_equal("unmerged", logits(wrapped), y)
    plain = wrapped.merge_and_unload(safe_merge=True)
    assert type(plain) is kind
    assert set(plain.state_dict()) == set(make().state_dict())
    assert_close("plain", logits(plain), y, MERGED_EQUALS_UNMERGED)


def test_merge_and_unload_takes_the_named_adapters_and_the_trained_copies():
    wrapped = make_peft(tiny_models.bert, task_type="SEQ_CLS", bias="all")
    y = logits(wrapped)
    wrapped.add_adapter("other", LoraConfig(target_modules=["query"], init_lora_weights=False))
    wrapped.set_adapter("other")
    plain = wrapped.merge_and_unload(adapter_names=["default"])
    assert isinstance(plain.classifier, nn.Linear)
    assert_close("plain", logits(plain), y, MERGED_EQUALS_UNMERGED)


def test_several_active_adapters_add_up():
    wrapped = make_peft()
    wrapped.add_adapter("two", LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    base = wrapped.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 64)
    with torch.no_grad():
        wrapped.set_adapter(["default", "two"])
        y = base(x)
        expected = base.base_layer(x) + x @ (base.delta_weight("default") + base.delta_weight("two")).t()
        assert_close("both", y, expected, MERGED_EQUALS_UNMERGED)
    both = logits(wrapped)
    wrapped.merge_adapter()
    assert_close("merged", logits(wrapped), both, MERGED_EQUALS_UNMERGED)
    assert wrapped.active_adapters == ["default", "two"]
    assert wrapped.active_adapter == "default"


# -- passing through ----------------------------------------------------------------------------------------------------


def test_generate_is_peft_s(tmp_path):
    """With the cache, greedy and sampled: the same tokens."""
    base = tiny_models.llama().eval()
    wrapped = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).eval()
    wrapped.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
        tokens = []
        for model in (wrapped, theirs):
            torch.manual_seed(1)
            tokens.append(model.generate(input_ids=token_ids(2, 5), max_new_tokens=12, pad_token_id=0, **options))
        assert torch.equal(*tokens), options
    plain = wrapped.unload()
    assert not torch.equal(plain.generate(input_ids=token_ids(2, 5), max_new_tokens=12, pad_token_id=0), tokens[0])


def test_what_it_does_not_define_is_the_base_model_s():
    model = tiny_models.llama(dtype=torch.bfloat16)
    wrapped = get_peft_model(model, LoraConfig())
    assert wrapped.config is model.config
    assert wrapped.device == model.device
    assert wrapped.dtype == model.dtype
    assert wrapped.get_input_embeddings() is model.model.embed_tokens
    assert wrapped.get_base_model() is wrapped.base_model.model is model
    assert wrapped.generation_config is model.generation_config
    with pytest.raises(AttributeError, match="no_such_thing"):
        wrapped.no_such_thing  # noqa: B018
    assert not hasattr(wrapped, "no_such_thing")


def test_train_and_eval_reach_every_module():
    wrapped = make_peft(lora_dropout=0.1)
    assert not any(module.training for module in wrapped.modules())
    wrapped.train()
    assert all(module.training for module in wrapped.modules())


def test_dropout_acts_in_training_only_and_follows_the_seed():
    wrapped = make_peft(lora_dropout=0.5)
    assert_bits_equal("eval", logits(wrapped), logits(wrapped))
    wrapped.train()
    torch.manual_seed(3)
    y = logits(wrapped)
    assert not torch.equal(logits(wrapped), y)
    torch.manual_seed(3)
    assert_bits_equal("same seed", logits(wrapped), y)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_copies_stand_alone(duplicate, merged):
    wrapped = make_peft(tiny_models.gpt2, bias="all", modules_to_save=["ln_f"])
    if merged:
        wrapped.merge_adapter()
    y = logits(wrapped)
    twin = duplicate(wrapped)
    assert isinstance(twin, PeftModel)
    assert flags(twin) == flags(wrapped)
    assert_bits_equal("twin", logits(twin), y)
    twin.unmerge_adapter()
    fill(twin, seed=9)
    assert_bits_equal("the first", logits(wrapped), y)
    with twin.disable_adapter(), wrapped.disable_adapter():
        assert_bits_equal("base", logits(twin), logits(wrapped))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_has_float32_adapters(dtype):
    wrapped = get_peft_model(tiny_models.llama().to(dtype), LoraConfig())
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in wrapped.parameters() if not p.requires_grad} == {dtype}
    assert logits(wrapped).dtype == dtype
    same = get_peft_model(tiny_models.llama().to(dtype), LoraConfig(), autocast_adapter_dtype=False)
    assert {p.dtype for p in same.parameters()} == {dtype}


def test_state_dict_has_peft_s_names():
    options = {"r": 2, "target_modules": ["query", "word_embeddings"], "task_type": "SEQ_CLS"}
    ours = get_peft_model(tiny_models.bert(), LoraConfig(**options)).state_dict()
    theirs = peft.get_peft_model(tiny_models.bert(), peft.LoraConfig(**options)).state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_misuse_is_named():
    wrapped = make_peft()
    with pytest.raises(ValueError, match="got a PeftModel"):
        get_peft_model(wrapped, LoraConfig())
    with pytest.raises(TypeError, match="expected a fastpeft config such as LoraConfig, got dict"):
        get_peft_model(tiny_models.llama(), {"r": 8})
    with pytest.raises(ValueError, match="got 'default', which exists"):
        wrapped.add_adapter("default", LoraConfig())
    for call in (wrapped.set_adapter, wrapped.delete_adapter, lambda name: wrapped.merge_adapter([name])):
        with pytest.raises(ValueError, match=r"expected one of \['default'\], got \['absent'\]"):
            call("absent")


# -- training -----------------------------------------------------------------------------------------------------------


@every_model
def test_a_few_steps_lower_the_loss_and_change_the_adapter_only(make):
    wrapped = make_peft(make, filled=False, lora_dropout=0.05).train()
    before = {name: tensor for name, tensor in bits(wrapped).items() if not flags(wrapped).get(name, False)}
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    first = loss(wrapped.eval()).item()  # without dropout, whose noise is larger than what six steps gain
    wrapped.train()
    for _ in range(6):
        optimiser.zero_grad()
        loss(wrapped).backward()
        optimiser.step()
    assert loss(wrapped.eval()).item() < first
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    after = bits(wrapped)
    for name, tensor in before.items():
        assert_bits_equal(name, after[name], tensor)
    assert all(p.grad is None for p in wrapped.parameters() if not p.requires_grad)


@every_model
def test_gradients_are_peft_s(make, tmp_path):
    base = make().eval()
    ours = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear")).eval()
    fill(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    got, expected = gradients(ours), gradients(theirs)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        assert_close(name, got[name], gradient, OTHER_ORDER_OF_SUMS)


CHECKPOINTED = [tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.t5]


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("when", ["before", "after", "prepare"])
@pytest.mark.parametrize("make", CHECKPOINTED, ids=lambda make: make.__name__)
def test_gradient_checkpointing_changes_no_gradient(make, when, use_reentrant):
    """Reentrant checkpointing of a frozen embedding's output trains nothing, without a word, unless it requires a gradient.

    Called before get_peft_model, after it, or by prepare_for_training; the dropout masks of the second forward pass are
    those of the first.
    """
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3)
    model = make().double() if make is tiny_models.t5 else make()
    model.config.use_cache = False
    wrapped = get_peft_model(copy.deepcopy(model), config).train()
    fill(wrapped)
    torch.manual_seed(8)
    expected = gradients(wrapped)
    if when == "before":
        model.gradient_checkpointing_enable(**options)
    if when == "prepare":
        assert prepare_for_training(model, use_gradient_checkpointing=True, **options) is model
    wrapped = get_peft_model(model, config).train()
    if when == "after":
        wrapped.gradient_checkpointing_enable(**options)
    fill(wrapped)
    assert model.is_gradient_checkpointing
    torch.manual_seed(8)
    got = gradients(wrapped)
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        if (
            make is tiny_models.t5
        ):  # gradients of the encoder's output are added in another order: float64 shows it is that
            assert_close(name, got[name], gradient, OTHER_ORDER_OF_SUMS)
        else:
            assert_bits_equal(name, got[name], gradient)
        assert bool(gradient.any()), name


class _Embedded(nn.Module):
    """A model with an input embedding that is not from transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny_models.VOCABULARY, 8)

    def get_input_embeddings(self):
        return self.embed


@pytest.mark.parametrize("make", [tiny_models.llama, _Embedded], ids=["transformers", "other"])
def test_inputs_get_a_gradient(make):
    """Not every release of transformers does this by itself when checkpointing is switched on."""
    model = make().requires_grad_(False)
    require_input_gradients(model)
    assert model.get_input_embeddings()(token_ids()).requires_grad


def test_gradient_checkpointing_with_an_adapted_embedding():
    wrapped = make_peft(target_modules=["embed_tokens", "q_proj"]).train()
    expected = gradients(wrapped)
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for name, gradient in gradients(wrapped).items():
        assert_bits_equal(name, gradient, expected[name])


def test_prepare_for_training_freezes_and_changes_no_dtype():
    """PEFT's prepare_model_for_kbit_training copies norms, embeddings and the head to float32: gigabytes of a large model."""
    model = tiny_models.llama().to(torch.bfloat16)
    before = bits(model)
    assert prepare_for_training(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.is_gradient_checkpointing
    for name, tensor in bits(model).items():
        assert_bits_equal(name, tensor, before[name])
    prepare_for_training(model, use_gradient_checkpointing=True)
    assert model.config.use_cache is False


def test_models_that_are_not_from_transformers():
    """No config, no get_input_embeddings, no generate: only nn.Module is needed."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    expected = model(x)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert_bits_equal("y", wrapped(x), expected)
    wrapped(x).sum().backward()
    assert wrapped.get_nb_trainable_parameters()[0] == 8 * (8 + 8) + 8 * (8 + 2)
    assert wrapped.peft_config["default"].base_model_name_or_path is None


def test_public_names():
    assert set(fastpeft.__all__) >= {"LoraConfig", "LoRALinear", "NoTargetError", "PeftModel", "get_peft_model"}
    assert all(hasattr(fastpeft, name) for name in fastpeft.__all__)
