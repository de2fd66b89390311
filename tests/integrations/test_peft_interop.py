"""Adapters go to Hugging Face PEFT and come from it: same logits, same numbers of parameters, same names."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastpeft
from fastpeft.checkpoint import CONFIG_NAME, TENSORS_NAME
from tests import tiny_models
from tests.tiny_models import fill, flags, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

LLAMA, GPT2, BERT, T5 = tiny_models.llama, tiny_models.gpt2, tiny_models.bert, tiny_models.t5
CASES = {
    "llama": (LLAMA, {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 16}),
    "llama_default": (LLAMA, {}),
    "llama_patterns": (
        LLAMA,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
            "alpha_pattern": {"k_proj": 4, r"layers\.[02]\..*v_proj": 3},
            "use_rslora": True,
        },
    ),
    "llama_embedding": (LLAMA, {"target_modules": ["embed_tokens", "q_proj"], "task_type": "CAUSAL_LM"}),
    "llama_saved_modules": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "lora_bias": True}),
    "llama_saved_by_suffix": (LLAMA, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "llama_one_layer": (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "llama_one_layer_no_pattern": (LLAMA, {"target_modules": ["q_proj"], "layers_to_transform": 2}),
    "llama_regex": (LLAMA, {"target_modules": r".*\.layers\.[02]\..*_proj", "exclude_modules": ["down_proj"]}),
    "llama_rank_1": (LLAMA, {"r": 1, "target_modules": ["o_proj"], "lora_alpha": 0.5}),
    "llama_rank_over_width": (LLAMA, {"r": 80, "target_modules": ["k_proj"]}),
    "llama_dropout": (LLAMA, {"target_modules": ["q_proj"], "lora_dropout": 0.4}),
    "tied_llama_both_embeddings": (tiny_models.tied_llama, {"target_modules": ["embed_tokens", "lm_head"]}),
    "gemma3_scaled_embedding": (tiny_models.gemma3, {"target_modules": ["embed_tokens", "q_proj"]}),
    "gpt2": (GPT2, {}),
    "gpt2_all": (GPT2, {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True}),
    "gpt2_bias": (GPT2, {"bias": "lora_only", "lora_bias": True}),
    "bert": (BERT, {"task_type": "SEQ_CLS"}),
    "bert_bias_all": (BERT, {"task_type": "SEQ_CLS", "bias": "all"}),
    "bert_bias_lora_only": (BERT, {"task_type": "SEQ_CLS", "bias": "lora_only"}),
    "bert_all_linear": (BERT, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "bert_embeddings": (BERT, {"target_modules": ["word_embeddings", "position_embeddings"], "task_type": "SEQ_CLS"}),
    "bert_mlm_shared_bias": (tiny_models.bert_mlm, {"bias": "all", "target_modules": ["query"]}),
    "distilbert": (tiny_models.distilbert, {"task_type": "SEQ_CLS", "target_modules": ["q_lin", "v_lin"]}),
    "t5": (T5, {}),
    "t5_shared_embedding": (T5, {"target_modules": ["q", "v", "wo", "shared"]}),
}
SAME_NAMES = [name for name in CASES if name != "llama_saved_by_suffix"]


def make(library, name: str, base):
    options = {"r": 4} | CASES[name][1]
    return library.get_peft_model(base, library.LoraConfig(**options)).eval()


@pytest.fixture(scope="module")
def bases():
    """One base model per maker, copied by each test."""
    made = {}

    def base(name):
        maker = CASES[name][0]
        if maker not in made:
            torch.manual_seed(0)
            made[maker] = maker().eval()
        return copy.deepcopy(made[maker])

    return base


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_the_same_logits(name, direction, bases, tmp_path):
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    wrapped = make(writer, name, bases(name))
    fill(wrapped)
    y = logits(wrapped)
    assert not torch.equal(y, logits(bases(name))), "the adapter does nothing"
    wrapped.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = reader.PeftModel.from_pretrained(bases(name), tmp_path).eval()
    complaints = [str(w.message) for w in caught if "adapter keys" in str(w.message) or "keyword arg" in str(w.message)]
    assert complaints == []
    assert_close("logits", logits(loaded), y, LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_the_same_parameters(name, bases):
    ours, theirs = make(fastpeft, name, bases(name)), make(peft, name, bases(name))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert flags(ours) == flags(theirs)


@pytest.mark.parametrize("name", SAME_NAMES)
def test_the_same_tensors_on_disk(name, bases, tmp_path):
    """But for what PEFT writes beside the adapter: the base's embedding, and a copied module's biases under other names."""
    files = []
    for library in (fastpeft, peft):
        make(library, name, bases(name)).save_pretrained(tmp_path / library.__name__)
        files.append(load_file(tmp_path / library.__name__ / TENSORS_NAME))
    ours, theirs = ({key: tensor.shape for key, tensor in file.items()} for file in files)
    extra = set(theirs) - set(ours)
    beside = ("base_layer.weight", "modules_to_save.bias", "original_module.bias", "lm_head.weight", "shared.weight")
    assert set(ours) <= set(theirs)
    assert all(key.endswith(beside) for key in extra), extra
    assert all(theirs[key] == shape for key, shape in ours.items())


@pytest.mark.parametrize("name", SAME_NAMES)
def test_every_field_of_the_config_means_the_same(name, bases, tmp_path):
    """What peft reads back from our file is what it would have written itself, as far as it changes the function."""
    for library in (fastpeft, peft):
        make(library, name, bases(name)).save_pretrained(tmp_path / library.__name__)
    ours, theirs = (json.loads((tmp_path / n / CONFIG_NAME).read_text()) for n in ("fastpeft", "peft"))
    assert set(ours) <= set(theirs), "peft warns about a key that it does not know"
    elsewhere = {
        "modules_to_save",
        "base_model_name_or_path",
        "layers_pattern",
    }  # below; of no effect; a name or a list of it
    if CASES[name][1].get("target_modules") == "all-linear":
        elsewhere.add("target_modules")  # every path here, the shortest names that do in PEFT: see the logits
    for key in set(ours) - elsewhere:
        one, two = ours[key], theirs[key]
        if isinstance(one, list) and isinstance(two, list):
            one, two = set(one), set(two)
        assert one == two or (not one and not two), key
    assert set(theirs["modules_to_save"] or []) <= set(ours["modules_to_save"] or [])


@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_saved_modules_by_suffix(direction, bases, tmp_path):
    """ "norm" is also the end of input_layernorm: PEFT copies and trains that too, here it means the module "norm"."""
    name = "llama_saved_by_suffix"
    writer = peft if direction == "from_peft" else fastpeft
    wrapped = make(writer, name, bases(name))
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    copies = [key for key in load_file(tmp_path / TENSORS_NAME) if "norm" in key]
    assert len(copies) == (7 if direction == "from_peft" else 1)
    for reader in (peft, fastpeft):
        loaded = reader.PeftModel.from_pretrained(bases(name), tmp_path).eval()
        assert_close(reader.__name__, logits(loaded), logits(wrapped), LOGITS_EQUAL_TO_PEFT)
        again = tmp_path / reader.__name__
        loaded.save_pretrained(again)
        assert set(copies) <= set(load_file(again / TENSORS_NAME))


@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_named_adapters(direction, bases, tmp_path):
    """Two adapters, in the folder itself and in a subfolder; one alone, both active, each loaded under another name."""
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    wrapped = make(writer, "llama", bases("llama"))
    wrapped.add_adapter("second", writer.LoraConfig(r=2, target_modules=["q_proj", "gate_proj"]))
    expected = {}
    for seed, adapter in enumerate(("default", "second")):
        wrapped.set_adapter(adapter)
        fill(wrapped, seed=seed)
        expected[adapter] = logits(wrapped)
    wrapped.base_model.set_adapter(["default", "second"])
    expected["both"] = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "second" / TENSORS_NAME).is_file()

    loaded = reader.PeftModel.from_pretrained(bases("llama"), tmp_path / "second", adapter_name="b").eval()
    loaded.load_adapter(tmp_path, "a")
    assert_close("second", logits(loaded), expected["second"], LOGITS_EQUAL_TO_PEFT)
    loaded.set_adapter("a")
    assert_close("default", logits(loaded), expected["default"], LOGITS_EQUAL_TO_PEFT)
    loaded.base_model.set_adapter(["a", "b"])
    assert_close("both", logits(loaded), expected["both"], LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("direction", ["from_peft", "to_peft"])
def test_bfloat16_base_with_float32_adapters(direction, tmp_path):
    """Rounding differs from PEFT's, which computes the low-rank path in float32; the adapters' bits do not."""
    writer, reader = (peft, fastpeft) if direction == "from_peft" else (fastpeft, peft)
    torch.manual_seed(0)
    base = tiny_models.llama().to(torch.bfloat16).eval()
    wrapped = make(writer, "llama", copy.deepcopy(base))
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS_NAME).values()} == {torch.float32}
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    theirs = dict(wrapped.named_parameters())
    for key, parameter in loaded.named_parameters():
        assert_bits_equal(key, parameter.detach(), theirs[key].detach())
    wide = [copy.deepcopy(model).float() for model in (wrapped, loaded)]
    assert_close("logits in float32", *map(logits, wide), LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("name", ["bert", "bert_bias_all", "llama_patterns", "llama_regex", "t5", "distilbert"])
def test_an_adapter_of_peft_s_is_loaded_over_one_of_ours(name, bases, tmp_path):
    """The same options, spelled differently in the two files: "all-linear" or paths, heads named or implied."""
    wrapped = make(peft, name, bases(name))
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    ours = make(fastpeft, name, bases(name))
    ours.load_adapter(tmp_path, "default", is_trainable=True)
    assert_close("logits", logits(ours), logits(wrapped), LOGITS_EQUAL_TO_PEFT)


def test_training_goes_on_after_the_way_through_peft(bases, tmp_path):
    wrapped = make(peft, "bert", bases("bert"))
    wrapped.save_pretrained(tmp_path)
    loaded = fastpeft.PeftModel.from_pretrained(bases("bert"), tmp_path, is_trainable=True)
    assert flags(loaded) == flags(peft.PeftModel.from_pretrained(bases("bert"), tmp_path, is_trainable=True))


def test_a_changed_vocabulary_is_refused_with_what_to_do(bases, tmp_path):
    """PEFT saves a resized embedding with the adapter; loaded over the old one, its new rows would be missing."""
    base = bases("llama")
    base.resize_token_embeddings(101)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(NotImplementedError, match=r"embed_tokens.weight \(101, 64\) .* changed vocabulary"):
        fastpeft.PeftModel.from_pretrained(bases("llama"), tmp_path)


@pytest.mark.parametrize("kind", ["VeraConfig", "LoHaConfig"])
def test_another_method_of_peft_s_is_refused_by_name(kind, bases, tmp_path):
    wrapped = peft.get_peft_model(bases("llama"), getattr(peft, kind)(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=r"peft_type '(VERA|LOHA)'"):
        fastpeft.PeftModel.from_pretrained(bases("llama"), tmp_path)
