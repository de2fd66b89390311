"""Putting adapters into a model and taking them out: shared and tied modules, trained biases, nothing half done."""

import copy

import pytest
import torch
from torch import nn

from fastpeft import LoraConfig, get_peft_model
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.lora import LoRAEmbedding, LoRALinear
from tests import tiny_models
from tests.tiny_models import bits, fill, flags, logits
from tests.tolerance import MERGED_EQUALS_UNMERGED, assert_bits_equal, assert_close


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = bits(model)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert_bits_equal(name, after[name], tensor)


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


class Shared(nn.Module):
    """One linear at two places, one of them deeper, between two linears of its own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.out = nn.ModuleDict({"again": self.up})

    def forward(self, x):
        return self.out["again"](self.tower(self.up(x)))


# -- shared and tied ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["up", "again", r"up|out\.again"])
def test_a_shared_module_is_adapted_once_and_at_every_place(target):
    """PEFT wraps only the path that it meets first: the other place goes on without the adapter."""
    model, x = Shared(), torch.randn(4, 8)
    original = model.up
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=target if "|" in target else [target], bias="lora_only")
    )
    assert model.up is model.out["again"]
    assert isinstance(model.up, LoRALinear)
    assert len(list(wrapped.base_model.layers())) == 1
    assert wrapped.get_nb_trainable_parameters() == (2 * 8 + 8 * 2 + 8, 2 * (64 + 8) + 32)
    fill(wrapped)
    with torch.no_grad():
        y = wrapped(x)
        wrapped.merge_adapter()
        assert_close("merged", wrapped(x), y, MERGED_EQUALS_UNMERGED)
        wrapped.unmerge_adapter()
        assert_bits_equal("beside", wrapped(x), y)
    wrapped.delete_adapter("default")
    assert model.up is model.out["again"] is original


@pytest.mark.parametrize("make", [tiny_models.tied_llama, tiny_models.gpt2, tiny_models.gemma3])
@pytest.mark.parametrize("targets", ["input", "output", "both"])
def test_adapters_on_tied_embeddings(make, targets, tmp_path):
    """Merging into one of two tied modules must not change the other; saved and loaded, the model is still the same."""
    model = make().eval()
    named = {id(module): path for path, module in model.named_modules()}
    paths = {"input": named[id(model.get_input_embeddings())], "output": named[id(model.get_output_embeddings())]}
    names = list(paths.values()) if targets == "both" else [paths[targets]]
    base = logits(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=names)).eval()
    kinds = {"input": [LoRAEmbedding], "output": [LoRALinear], "both": [LoRAEmbedding, LoRALinear]}[targets]
    assert sorted(type(layer).__name__ for _, layer in wrapped.base_model.layers()) == sorted(k.__name__ for k in kinds)
    fill(wrapped)
    y = logits(wrapped)
    assert not torch.equal(y, base)
    with wrapped.disable_adapter():
        assert_bits_equal("disabled", logits(wrapped), base)
    wrapped.merge_adapter()
    assert_close("merged", logits(wrapped), y, MERGED_EQUALS_UNMERGED)
    wrapped.unmerge_adapter()
    assert_bits_equal("beside", logits(wrapped), y)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight

    plain = wrapped.merge_and_unload()
    assert_close("merged and unloaded", logits(plain), y, MERGED_EQUALS_UNMERGED)
    assert plain.config.tie_word_embeddings is False
    expected = logits(plain)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert_bits_equal("saved and loaded", logits(loaded), expected)


def test_a_tied_model_stays_tied_where_its_embeddings_are_not_adapted(tmp_path):
    wrapped = get_peft_model(tiny_models.tied_llama().eval(), LoraConfig(target_modules=["q_proj"]))
    fill(wrapped)
    plain = wrapped.merge_and_unload()
    assert plain.config.tie_word_embeddings is True
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    plain.save_pretrained(tmp_path)
    assert_bits_equal("loaded", logits(type(plain).from_pretrained(tmp_path).eval()), logits(plain))


def test_a_tied_module_trained_in_full_is_warned_about_and_tied_copies_stay_tied():
    with pytest.warns(UserWarning, match=r"shares weights with \['model.embed_tokens'\]"):
        get_peft_model(tiny_models.tied_llama(), LoraConfig(modules_to_save=["lm_head"]))
    wrapped = get_peft_model(tiny_models.tied_llama(), LoraConfig(modules_to_save=["lm_head", "embed_tokens"]))
    model = wrapped.get_base_model()
    copies = [module.modules_to_save["default"].weight for module in (model.lm_head, model.model.embed_tokens)]
    assert copies[0] is copies[1]
    assert copies[0].requires_grad
    assert copies[0] is not model.lm_head.original_module.weight


# -- trained biases -----------------------------------------------------------------------------------------------------

BIASED = {
    "bert_all": (tiny_models.bert, "all"),
    "bert_lora_only": (tiny_models.bert, "lora_only"),
    "shared_bias": (tiny_models.bert_mlm, "all"),
    "gpt2": (tiny_models.gpt2, "all"),
}


def _biased(name: str, **options):
    make, bias = BIASED[name]
    model = make().eval()
    before = bits(model)
    base = logits(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, bias=bias, **options)).eval()
    fill(wrapped)
    return wrapped, base, before


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_disabling_brings_back_the_base_s_biases_and_enabling_the_trained_ones(name, merged):
    """PEFT leaves trained biases in; a bias with two names was swapped twice, which lost the trained values for good."""
    wrapped, base, _ = _biased(name, lora_bias=True)
    if merged:
        wrapped.merge_adapter()
    y, trained = logits(wrapped), bits(wrapped)
    for _ in range(2):
        with wrapped.disable_adapter():
            assert_bits_equal("disabled", logits(wrapped), base)
            saved = wrapped.base_model.adapter_tensors("default")
        assert_bits_equal("enabled", logits(wrapped), y)
        assert_same_bits(wrapped, trained)
        for key, tensor in wrapped.base_model.adapter_tensors("default").items():
            assert_bits_equal(f"saved while disabled: {key}", saved[key].detach(), tensor.detach())


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("way_out", ["unload", "delete_adapter", "delete_while_disabled", "delete_while_merged"])
def test_taking_the_adapter_out_restores_every_bit(name, way_out):
    wrapped, base, before = _biased(name, lora_bias=True)
    model = wrapped.get_base_model()
    if way_out == "unload":
        assert wrapped.unload() is model
    elif way_out == "delete_while_disabled":
        with wrapped.disable_adapter():
            wrapped.delete_adapter("default")
    else:
        if way_out == "delete_while_merged":
            wrapped.merge_adapter()
        wrapped.delete_adapter("default")
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert_same_bits(model, before)
    assert_bits_equal("logits", logits(model), base)


def test_biases_belong_to_their_adapter():
    """Switching to an adapter that trains no bias gives what that adapter gives alone; PEFT leaves the biases in."""
    wrapped, _, _ = _biased("bert_all")
    with_bias = logits(wrapped)
    wrapped.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    alone = get_peft_model(tiny_models.bert().eval(), LoraConfig(r=2)).eval()
    with wrapped.disable_adapter():
        alone.get_base_model().load_state_dict(wrapped.get_base_model().state_dict(), strict=False)
    wrapped.set_adapter("other")
    source = {key: t.detach() for key, t in wrapped.base_model.adapter_tensors("other").items()}
    for key, tensor in alone.base_model.adapter_tensors("default").items():
        tensor.data.copy_(source[key])
    for path in ("weight", "bias"):
        getattr(alone.get_base_model().classifier, path).data.copy_(getattr(wrapped.get_base_model().classifier, path))
    assert_bits_equal("other", logits(wrapped), logits(alone))
    wrapped.set_adapter("default")
    assert_bits_equal("default", logits(wrapped), with_bias)


def test_two_adapters_that_train_the_base_s_biases_are_refused():
    wrapped, _, _ = _biased("bert_all")
    with pytest.raises(ValueError, match=r"expected bias='none' beside \['default'\]"):
        wrapped.add_adapter("other", LoraConfig(bias="lora_only"))
    wrapped.delete_adapter("default")
    wrapped.add_adapter("other", LoraConfig(bias="lora_only"))


@pytest.mark.parametrize("name", BIASED)
def test_only_the_named_biases_are_trained(name):
    wrapped, _, _ = _biased(name)
    trained = {n.removeprefix("base_model.model.") for n, on in flags(wrapped).items() if on and n.endswith("bias")}
    adapted = {
        f"{path}.base_layer.bias" for path, layer in wrapped.base_model.layers() if layer.base_layer.bias is not None
    }
    if BIASED[name][1] == "lora_only":
        assert trained == adapted
    else:
        every = {n.removeprefix("base_model.model.") for n in flags(wrapped) if n.endswith(".bias")}
        assert trained == every
        assert adapted < trained


# -- several adapters ---------------------------------------------------------------------------------------------------


def _two(make=tiny_models.llama, **second):
    wrapped = get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "one")
    wrapped.add_adapter("two", LoraConfig(**({"r": 3, "target_modules": ["v_proj", "down_proj"]} | second)))
    return wrapped


def test_a_new_adapter_leaves_the_active_one_as_it_is():
    """What trains goes on training, what is frozen stays frozen, and the new one does not act."""
    wrapped = get_peft_model(tiny_models.llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "one")
    fill(wrapped)
    y = logits(wrapped)
    wrapped.add_adapter("two", LoraConfig(r=3, target_modules=["v_proj", "down_proj"], init_lora_weights=False))
    assert wrapped.active_adapters == ["one"]
    assert_bits_equal("one still", logits(wrapped), y)
    assert all(on is (".one." in name) for name, on in flags(wrapped).items())

    wrapped.set_adapter("one", inference_mode=True)
    wrapped.add_adapter("three", LoraConfig(r=3, target_modules=["q_proj"]))
    assert not any(flags(wrapped).values()), "a frozen adapter became trainable"


def test_adapters_added_to_a_model_in_eval_mode_do_not_drop():
    """The new dropout module was in training mode, so an added adapter dropped inputs although the model was in eval."""
    wrapped = _two().eval()
    wrapped.add_adapter(
        "three", LoraConfig(lora_dropout=0.5, target_modules=["v_proj", "o_proj"], init_lora_weights=False)
    )
    wrapped.set_adapter("three")
    assert not any(module.training for module in wrapped.modules())
    assert_bits_equal("repeated", logits(wrapped), logits(wrapped))


def test_a_refused_selection_changes_nothing():
    """Two full copies cannot both act: that came out after half the layers had been switched."""
    wrapped = get_peft_model(tiny_models.bert().eval(), LoraConfig(task_type="SEQ_CLS"), "one")
    wrapped.add_adapter("two", LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    y, before = logits(wrapped), flags(wrapped)
    for names, said in ((["one", "two"], "full copies"), (["one", "absent"], "absent")):
        with pytest.raises(ValueError, match=said):
            wrapped.set_adapter(names)
        assert wrapped.active_adapters == ["one"]
        assert flags(wrapped) == before
        assert_bits_equal("as before", logits(wrapped), y)


def test_adapters_added_or_selected_while_disabled_act_only_afterwards():
    wrapped = _two()
    with wrapped.disable_adapter():
        base = logits(wrapped)
        wrapped.add_adapter("three", LoraConfig(target_modules=["v_proj", "o_proj"], init_lora_weights=False))
        wrapped.set_adapter("three")
        assert_bits_equal("still disabled", logits(wrapped), base)
    assert not torch.equal(logits(wrapped), base)


@pytest.mark.parametrize("merged", [[], ["one"], ["one", "two"]], ids=["beside", "one_merged", "both_merged"])
def test_deleting_one_of_two(merged):
    wrapped = _two()
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        fill(wrapped)
    two, tensors = logits(wrapped), bits(wrapped.get_base_model())
    wrapped.merge_adapter(merged)
    wrapped.delete_adapter("one")
    wrapped.unmerge_adapter()
    assert wrapped.active_adapters == ["two"]
    assert list(wrapped.peft_config) == ["two"]
    assert_bits_equal("two is left", logits(wrapped), two)
    assert {path.split(".")[-1] for path, _ in wrapped.base_model.layers()} == {"v_proj", "down_proj"}
    assert not any(".one." in name for name in flags(wrapped))
    after = bits(wrapped.get_base_model())
    for name, tensor in after.items():
        wrapped_name = name.replace("weight", "base_layer.weight")
        assert_bits_equal(name, tensor, tensors[name if name in tensors else wrapped_name])
    wrapped.delete_adapter("two")
    assert wrapped.active_adapters == []


# -- refused whole ------------------------------------------------------------------------------------------------------

REFUSED = {
    "no_such_module": ({"target_modules": ["q_proj", "q_porj"]}, "q_porj"),
    "no_wrapper_for_it": ({"target_modules": ["q_proj", "norm"]}, "RMSNorm"),
    "no_such_module_to_save": ({"target_modules": ["q_proj"], "modules_to_save": ["head"]}, "head"),
    "lora_bias_on_an_embedding": ({"target_modules": ["q_proj", "embed_tokens"], "lora_bias": True}, "lora_bias"),
    "name_with_a_dot": ({"target_modules": ["q_proj"], "name": "a.b"}, "without dots"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_a_refused_adapter_leaves_the_model_as_it_was(options, said, first):
    """Not a parameter, not a requires_grad, not a module differs."""
    options = dict(options)
    name = options.pop("name", "new")
    model = tiny_models.llama()
    model.model.norm.requires_grad_(False)
    wrapped = None if first else get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]), "one")
    before, was, stood = bits(model), flags(model), modules(model)
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, LoraConfig(**options), name) if first else wrapped.add_adapter(
            name, LoraConfig(**options)
        )
    assert flags(model) == was
    assert {path: id(module) for path, module in modules(model).items()} == {p: id(m) for p, m in stood.items()}
    assert_same_bits(model, before)
    if not first:
        assert list(wrapped.peft_config) == ["one"]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            {"target_modules": ["lm_head"]},
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "cannot join",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            {"target_modules": ["lm_head"]},
            "cannot join",
        ),
        (
            {"target_modules": ["q_proj"]},
            {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]},
            "delete that",
        ),
    ],
    ids=["copy_of_an_adapted", "adapter_on_a_copied", "copy_around_an_adapted"],
)
def test_adapters_that_cannot_stand_on_one_module(first, second, said):
    wrapped = get_peft_model(tiny_models.llama(), LoraConfig(**first), "one")
    before = bits(wrapped)
    with pytest.raises(ValueError, match=said):
        wrapped.add_adapter("two", LoraConfig(**second))
    assert_same_bits(wrapped, before)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_merges_nothing(call):
    wrapped = _two()
    wrapped.set_adapter(["one", "two"])
    fill(wrapped)
    last = list(wrapped.base_model.layers())[-1][1].lora_B["two"].weight.data
    before, y, was = bits(wrapped), logits(wrapped), last[0, 0].item()
    last[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        getattr(wrapped, call)(safe_merge=True)
    assert not any(layer.merged for _, layer in wrapped.base_model.layers())
    last[0, 0] = was
    assert_same_bits(wrapped, before)
    assert_bits_equal("as before", logits(wrapped), y)


def test_copies_of_a_tuner_share_nothing():
    wrapped, base, _ = _biased("shared_bias")
    y = logits(wrapped)
    twin = copy.deepcopy(wrapped)
    fill(twin, seed=5)
    assert_bits_equal("the first", logits(wrapped), y)
    with twin.disable_adapter():
        assert_bits_equal("the twin's base", logits(twin), base)
    assert not torch.equal(logits(twin), y)
