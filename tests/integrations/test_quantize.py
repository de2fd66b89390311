"""fastpeft.quantize: transformers' and bitsandbytes' own result from less memory, and what it refuses."""

import copy
import gc
import itertools
import json

import bitsandbytes
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastpeft
from fastpeft.integrations import quantized_model
from fastpeft.integrations.quantize import quantize
from fastpeft.integrations.quantized_model import load_quantized
from fastpeft.layers.base_weight import frozen_weight, is_quantized, keep_model_unpacked
from tests import tiny_models
from tests.tiny_models import logits
from tests.tolerance import assert_bits_equal

KINDS = ["nf4", "fp4", "int8"]
MODELS = {
    "llama": tiny_models.llama,
    "tied_llama": tiny_models.tied_llama,
    "gpt2": tiny_models.gpt2,
    "bert": tiny_models.bert,
    "t5": tiny_models.t5,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models in several shards, by name."""
    saved = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        saved[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(saved[name], max_shard_size="50KB")
        assert len(list(saved[name].glob("*.safetensors"))) > 3
    return saved


def settings(kind: str, double_quant: bool = False) -> BitsAndBytesConfig:
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def assert_same_bytes(got: nn.Module, expected: nn.Module) -> None:
    one, two = got.state_dict(), expected.state_dict()
    assert list(one) == list(two)
    for name, tensor in two.items():
        assert_bits_equal(name, one[name], tensor)


# -- the same as transformers and bitsandbytes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in KINDS), ("tied_llama", "nf4"), ("gpt2", "fp4"), ("gpt2", "int8"), ("t5", "nf4")],
)
def test_a_folder_becomes_what_transformers_makes_of_it(name, kind, folders):
    ours = quantize(folders[name], kind, double_quant=False)
    theirs = type(ours).from_pretrained(folders[name], quantization_config=settings(kind), device_map="cpu")
    assert_same_bytes(ours, theirs)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    marks = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "training")
    assert [getattr(ours, mark, None) for mark in marks] == [getattr(theirs, mark, None) for mark in marks]
    assert not any(parameter.requires_grad for m in ours.modules() if is_quantized(m) for parameter in m.parameters())
    linear = next(m for m in ours.modules() if is_quantized(m))
    assert kind == "int8" or linear.compute_dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_double_quantisation(dtype, folders):
    """Codes and the scales of scales are equal bytes; of the 8-bit scales a few are bitsandbytes' second nearest."""
    ours = quantize(folders["llama"], "nf4", dtype=dtype).state_dict()
    options = {"quantization_config": settings("nf4", double_quant=True), "device_map": "cpu", "dtype": dtype}
    theirs = AutoModelForCausalLM.from_pretrained(folders["llama"], **options).state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if name.endswith("weight.absmax"):
            apart = ours[name].int() - tensor.int()
            assert apart.abs().max() <= 1
            assert (apart != 0).float().mean() < 0.02
        else:
            assert_bits_equal(name, ours[name], tensor)


@pytest.mark.parametrize(("name", "kind"), [(name, "nf4") for name in MODELS] + [("gpt2", "int8")])
def test_a_model_in_memory_becomes_the_same_in_place(name, kind, folders):
    expected = quantize(folders[name], kind)
    model = type(expected).from_pretrained(folders[name])
    assert quantize(model, kind) is model
    assert_same_bytes(model, expected)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "nf4"), ("llama", "int8"), ("tied_llama", "fp4"), ("bert", "nf4")]
)
def test_saved_and_loaded_by_transformers(name, kind, folders, tmp_path):
    ours = quantize(folders[name], kind)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert_same_bytes(again, ours)
    assert [type(m) for m in again.modules()] == [type(m) for m in ours.modules()]
    assert_same_bytes(quantize(tmp_path, kind), ours)  # as it is
    assert_same_bytes(quantize(again, kind), ours)
    keep_model_unpacked(again)
    assert_bits_equal("logits", logits(again), logits(ours))  # last: a forward casts a bias to the compute dtype


@pytest.mark.parametrize("blocksize", [32, 256])
def test_other_block_sizes(blocksize, folders, tmp_path):
    ours = quantize(folders["llama"], "nf4", blocksize=blocksize, double_quant=False)
    linear = ours.model.layers[0].mlp.up_proj
    dense = AutoModelForCausalLM.from_pretrained(folders["llama"]).model.layers[0].mlp.up_proj.weight
    data, state = bitsandbytes.functional.quantize_4bit(dense.detach(), blocksize=blocksize, quant_type="nf4")
    assert_bits_equal("bytes", linear.weight.data, data)
    assert_bits_equal("scales", linear.weight.quant_state.absmax, state.absmax)
    ours.save_pretrained(tmp_path)
    assert_same_bytes(AutoModelForCausalLM.from_pretrained(tmp_path), ours)


def test_a_plain_model_of_any_kind():
    """No transformers: every linear, a shared one once, a Conv1D transposed, an attention module's own left alone."""
    torch.manual_seed(0)
    shared = nn.Linear(64, 64)
    model = nn.Sequential(
        shared, nn.ReLU(), shared, transformers.pytorch_utils.Conv1D(32, 64), nn.MultiheadAttention(32, 2)
    )
    expected = shared.weight.detach().clone()
    quantize(model, "fp4", compute_dtype=torch.float32, double_quant=False)
    assert model[0] is model[2]
    assert [type(m) for m in (model[0], model[3])] == [Linear4bit, Linear4bit]
    assert type(model[4].out_proj) is not Linear4bit
    data, _ = bitsandbytes.functional.quantize_4bit(expected, quant_type="fp4")
    assert_bits_equal("bytes", model[0].weight.data, data)
    assert frozen_weight(model[3]).shape == (32, 64)
    assert model[:4](torch.randn(4, 64)).shape == (4, 32)
    assert model.is_loaded_in_4bit


# -- memory -----------------------------------------------------------------------------------------------------------


def full_bytes() -> int:
    """Bytes of the floating-point matrices that were made since gc.freeze()."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    matrices = [t for t in found if t.is_floating_point() and not t.is_meta and t.dim() == 2]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in matrices}.values())


@pytest.fixture
def only_new_objects():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("source", ["folder", "memory"])
def test_at_most_one_full_weight_is_there_at_a_time(source, folders, monkeypatch):
    """Counted at every weight: tensors of a linear's size in floating point that are alive."""
    quantised, most = [], []
    original = quantized_model._quantized

    def counted(weight, *rest):
        most.append(full_bytes())
        quantised.append(weight.numel() * weight.element_size())
        return original(weight, *rest)

    monkeypatch.setattr(quantized_model, "_quantized", counted)
    if source == "folder":
        model = quantize(folders["llama"], "nf4")
        resident = 4 * (model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel())
        assert len(quantised) == 21
        assert max(most) <= resident + 2 * max(quantised), "more than a weight and its transfer"
        return
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    quantize(model, "nf4")
    steps = [before - after for before, after in itertools.pairwise(most)]
    assert all(step >= 256 * 256 * 4 for step in steps), "a weight stays after it was quantised"


def test_the_model_takes_an_eighth(folders):
    dense = AutoModelForCausalLM.from_pretrained(folders["llama"])
    ours = quantize(copy.deepcopy(dense), "nf4")
    weights = sum(m.weight.nbytes for m in dense.modules() if type(m) is nn.Linear and m is not dense.lm_head)
    packed = sum(frozen_weight(m).packed.nbytes for m in ours.modules() if is_quantized(m))
    assert packed * 8 == weights


# -- heads, skipped and shared weights --------------------------------------------------------------------------------


def test_a_new_head_is_made_and_stays_whole(folders):
    names = {0: "no", 1: "yes"}
    config = transformers.AutoConfig.from_pretrained(folders["llama"], id2label=names)
    made = transformers.AutoModelForSequenceClassification
    model = load_quantized(folders["llama"], settings("nf4"), auto_class=made, config=config)
    assert type(model.score) is nn.Linear
    assert torch.isfinite(model.score.weight).all()
    assert model.score.weight.std() > 0
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit)


def test_skip_modules_are_left_alone_and_remembered(folders, tmp_path):
    ours = quantize(folders["llama"], "nf4", skip_modules=["lm_head", "mlp.up_proj"])
    assert type(ours.model.layers[0].mlp.up_proj) is nn.Linear
    assert isinstance(ours.model.layers[0].self_attn.q_proj, Linear4bit)
    ours.save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("source", ["folder", "memory"])
def test_shared_weights_stay_shared(source, folders):
    folder = folders["tied_llama"]
    given = folder if source == "folder" else AutoModelForCausalLM.from_pretrained(folder)
    model = quantize(given, "int8", skip_modules=[])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear8bitLt)


# -- refusals ---------------------------------------------------------------------------------------------------------


def broken(folder, tmp_path, change):
    """A copy of a saved model in one file whose tensors `change` edits."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(UP), f"lacks.*{UP}"),
        (lambda t: t.pop("model.norm.weight"), r"lacks.*model\.norm"),
        (lambda t: t.update(extra=torch.ones(3)), r"too much: \['extra'\]"),
        (lambda t: t.update({UP: torch.ones(3, 4)}), r"\(3, 4\)"),
        (lambda t: t[UP].__setitem__((2, 3), float("inf")), rf"{UP}: .*w\[2, 3\]"),
    ],
    ids=["a linear is missing", "a norm is missing", "one too many", "another shape", "not finite"],
)
def test_weights_that_do_not_fit_are_named(change, reason, folders, tmp_path):
    with pytest.raises(ValueError, match=reason) as refused:
        quantize(broken(folders["llama"], tmp_path, change), "nf4")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quant_type": "int4"}, "one of .*'nf4', 'fp4', 'int8'.*got 'int4'"),
        ({"blocksize": 48}, "power of two from 32 to 4096, got 48"),
        ({"compute_dtype": torch.float64}, "compute_dtype"),
        ({"skip_modules": "lm_head"}, "as a list of names"),
    ],
)
def test_options_out_of_range(options, reason):
    model = tiny_models.small_llama()
    with pytest.raises(ValueError, match=reason):
        quantize(model, **options)
    assert not any(map(is_quantized, model.modules()))


def test_a_quantised_model_is_not_quantised_again_with_other_settings(folders, tmp_path):
    model = quantize(folders["llama"], "nf4")
    for options in ({"quant_type": "fp4"}, {"blocksize": 128}, {"double_quant": False}, {"quant_type": "int8"}):
        with pytest.raises(ValueError, match="load the full weights again"):
            quantize(model, **options)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the full weights again"):
        quantize(tmp_path, "int8")


def test_models_with_nothing_to_quantise(folders):
    with pytest.raises(ValueError, match="expected linear modules, found none in Sequential"):
        quantize(nn.Sequential(nn.LayerNorm(4)), "nf4")
    with pytest.raises(ValueError, match="found none in LlamaForCausalLM outside skip_modules"):
        quantize(folders["llama"], "nf4", skip_modules=["model", "lm_head"])
    with torch.device("meta"), pytest.raises(ValueError, match="with data"):
        quantize(nn.Sequential(nn.Linear(4, 4)), "nf4")
    wrapped = fastpeft.get_peft_model(tiny_models.small_llama(), fastpeft.LoraConfig())
    with pytest.raises(ValueError, match="without adapters"):
        quantize(wrapped, "nf4")


def test_folders_that_are_not_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        quantize(tmp_path / "nothing" / "here", "nf4")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="names no class"):
        quantize(tmp_path, "nf4")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(OSError, match="cannot be loaded"):
        quantize(tmp_path, "nf4")
