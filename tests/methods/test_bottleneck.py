"""Where bottleneck adapters stand: every placement against the papers' equations in models, and every architecture's modules."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers

import fastpeft
from fastpeft import BottleneckConfig, LoraConfig, NoTargetError, PeftModel, get_peft_model
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.methods.bottleneck import PLACEMENT_TARGETS
from tests import tiny_models
from tests.tiny_models import VOCABULARY, bits, fill, logits
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 2, "num_heads": 2}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}
GPT_NEO = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}

# model_type: its options, and the numbers of modules that houlsby, pfeiffer and parallel wrap in two layers (of each half)
ARCHITECTURES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2"), (SIZES, 4, 2, 2)),
    "deberta": (SIZES, 4, 2, 2),
    "distilbert": (DISTILBERT, 4, 2, 2),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (GPT, 4, 2, 2)),
    "gpt_neo": (GPT_NEO | {"attention_types": [[["global", "local"], 1]]}, 4, 2, 2),
    **dict.fromkeys(("gptj", "codegen"), (GPT | {"rotary_dim": 8, "n_head": 4}, 4, 2, 2)),
    "gpt_neox": (SIZES, 4, 2, 2),
    **dict.fromkeys(("t5", "mt5"), (T5, 10, 4, 4)),
    **dict.fromkeys(("bart", "mbart"), (BART, 10, 4, 0)),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm"), (GROUPED, 4, 2, 2)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (GROUPED, 4, 2, 2)),
    "phi": (SIZES, 4, 2, 2),
    "phi3": (SIZES | {"pad_token_id": 0}, 4, 2, 2),
    "falcon": ({key: SIZES[key] for key in SIZES if key != "intermediate_size"}, 4, 2, 2),
    "opt": (OPT, 4, 2, 0),
    "bloom": ({"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 2}, 4, 2, 2),
    "mpt": ({"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2}, 4, 2, 2),
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def architecture(kind: str):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **ARCHITECTURES[kind][0])
    return transformers.AutoModel.from_config(config).eval()


def hidden(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.inputs(model)).last_hidden_state


def test_every_architecture_with_a_default_is_tried():
    for targets in PLACEMENT_TARGETS.values():
        assert set(targets) == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_default_targets(kind, tmp_path):
    """Nothing changes at the start, every adapter acts, and the saved adapter loads without the defaults."""
    model = architecture(kind)
    before = hidden(model)
    for placement, count in zip(PLACEMENTS, ARCHITECTURES[kind][1:], strict=True):
        config = BottleneckConfig(placement=placement, bottleneck_size=3)
        if not count:
            with pytest.raises(NotImplementedError, match=rf"parallel.*{kind!r}.*use placement='pfeiffer'"):
                get_peft_model(model, config)
            assert not any(isinstance(module, AdapterLayer) for module in model.modules())
            continue
        wrapped = get_peft_model(model, config)
        paths = [path for path, _ in wrapped.base_model.layers()]
        assert len(paths) == count, paths
        assert_bits_equal(placement, hidden(wrapped), before)
        fill(wrapped)
        after = hidden(wrapped)
        hidden_with_gradient = wrapped(**tiny_models.inputs(wrapped)).last_hidden_state
        hidden_with_gradient.square().sum().backward()
        idle = [key for key, p in wrapped.named_parameters() if p.requires_grad and not p.grad.any()]
        assert idle == []
        wrapped.save_pretrained(tmp_path / placement)
        model = wrapped.unload()
        assert_bits_equal("unloaded", hidden(model), before)
        loaded = PeftModel.from_pretrained(model, tmp_path / placement)
        assert_bits_equal("loaded", hidden(loaded), after)
        model = loaded.unload()


def adapted(model, **options):
    torch.manual_seed(1)
    wrapped = get_peft_model(model, BottleneckConfig(bottleneck_size=5, **options)).eval()
    fill(wrapped, std=0.3)
    return wrapped


def change(wrapped, path: str, v: torch.Tensor) -> torch.Tensor:
    """f(v) of the adapter at a path, in plain code."""
    t = {
        key.removeprefix(f"base_model.model.{path}."): tensor
        for key, tensor in wrapped.base_model.adapter_tensors("default").items()
        if key.startswith(f"base_model.model.{path}.adapter_")
    }
    z = F.linear(v, t["adapter_down.weight"], t["adapter_down.bias"])
    return F.linear(z.relu(), t["adapter_up.weight"], t["adapter_up.bias"])


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_a_layer_of_bert_is_the_papers(placement):
    """norm(x + sublayer(x)), with the adapter before the sum and the norm."""
    plain = tiny_models.bert().eval()
    wrapped = adapted(copy.deepcopy(plain), placement=placement)
    layer, path = plain.bert.encoder.layer[0], "bert.encoder.layer.0"
    x = torch.randn(2, 5, 64)
    attention = layer.attention.output.dense(layer.attention.self(x)[0])
    if placement == "houlsby":
        attention = attention + change(wrapped, f"{path}.attention.output.dense", attention)
    middle = layer.attention.output.LayerNorm(x + attention)
    mlp = layer.output.dense(layer.intermediate(middle))
    if placement == "parallel":
        mlp = mlp + change(wrapped, f"{path}.output", middle)
    else:
        mlp = mlp + change(wrapped, f"{path}.output.dense", mlp)
    expected = layer.output.LayerNorm(middle + mlp)
    got = wrapped.base_model.model.bert.encoder.layer[0](x)
    assert_close("layer", got[0] if isinstance(got, tuple) else got, expected, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_the_mlp_of_llama_is_the_papers(placement):
    plain = tiny_models.llama().eval()
    wrapped = adapted(copy.deepcopy(plain), placement=placement, scaling=2.0)
    x, path = torch.randn(2, 5, 64), "model.layers.0.mlp"
    y = plain.model.layers[0].mlp(x)
    added = change(wrapped, path, x) if placement == "parallel" else change(wrapped, f"{path}.down_proj", y)
    got = wrapped.base_model.model.model.layers[0].mlp(x)
    assert_close("mlp", got, y + 2 * added, OTHER_ORDER_OF_SUMS)


def test_sizes_and_layers():
    model = get_peft_model(
        tiny_models.llama(), BottleneckConfig(placement="parallel", reduction_factor=24, layers_to_transform=[0, 2])
    )
    layers = dict(model.base_model.layers())
    assert list(layers) == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert layers["model.layers.0.mlp"].adapter_down["default"].weight.shape == (2, 64)
    beside = get_peft_model(
        tiny_models.llama(), BottleneckConfig(placement="parallel", target_modules=r".*\.0\.mlp\.up_proj")
    )
    (layer,) = dict(beside.base_model.layers()).values()
    assert layer.adapter_down["default"].weight.shape == (4, 64)
    assert layer.adapter_up["default"].weight.shape == (96, 4)


@pytest.mark.parametrize(
    "name", ["self_attn", "embed_tokens", "input_layernorm", "mlp", "all-linear", r".*\.1\.self_attn\.k_proj"]
)
@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_any_module_may_be_named(name, placement, tmp_path):
    """Attention gives a tuple and is called by keywords; an embedding reads token numbers, which no adapter can."""
    model = tiny_models.llama().eval()
    before = logits(model)
    targets = name if name == "all-linear" or "*" in name else [name]
    config = BottleneckConfig(target_modules=targets, placement=placement)
    if name == "embed_tokens" and placement == "parallel":
        with pytest.raises(ValueError, match=r"got the embedding model\.embed_tokens; use 'pfeiffer'"):
            get_peft_model(model, config)
        return
    wrapped = get_peft_model(model, config)
    assert_close("start", logits(wrapped), before, LOGITS_EQUAL_TO_PEFT)
    fill(wrapped)
    after = logits(wrapped)
    assert not torch.equal(after, before)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wrapped.unload(), tmp_path)
    assert_bits_equal("loaded", logits(loaded), after)


BAD = {
    "placement": ({"placement": "before"}, r"placement one of .*'before'"),
    "reduction_factor": ({"reduction_factor": 0}, "reduction_factor > 0, got 0"),
    "bottleneck_size": ({"bottleneck_size": 0}, "bottleneck_size a number >= 1 or None, got 0"),
    "non_linearity": ({"non_linearity": "gulu"}, r"non_linearity one of .*'gulu'"),
    "dropout": ({"dropout": 1.0}, "0 <= dropout < 1, got 1.0"),
    "init_weights": ({"init_weights": "gaussian"}, "init_weights True, False or 'houlsby', got 'gaussian'"),
    "residual": ({"residual": False, "placement": "parallel"}, "residual=False replaces"),
    "bias": ({"bias": "lora_only"}, r"bias one of .*'bottleneck_only'.*'lora_only'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**options)


def test_bad_targets_are_refused_before_the_model_changes():
    model = tiny_models.llama()
    before = bits(model)
    with pytest.raises(ValueError, match=r"a norm or a module that holds linears, got SiLU\w* at .*act_fn"):
        get_peft_model(model, BottleneckConfig(target_modules=["act_fn"]))
    with pytest.raises(NoTargetError, match="down_prj"):
        get_peft_model(model, BottleneckConfig(target_modules=["down_prj"]))
    model.config.model_type = "new"
    with pytest.raises(NoTargetError, match="no default for model_type 'new'"):
        get_peft_model(model, BottleneckConfig(placement="parallel"))
    assert set(bits(model)) == set(before)


def test_adapters_inside_a_wrapped_module():
    """A wrapper inside a wrapped module was not found, and got another path on disk than alone."""
    model = tiny_models.llama().eval()
    before = logits(model)
    wrapped = get_peft_model(model, BottleneckConfig(placement="parallel"), "outer")
    wrapped.add_adapter("inner", BottleneckConfig())
    wrapped.add_adapter("lora", LoraConfig(target_modules=["up_proj"]))
    alone = get_peft_model(tiny_models.llama(), BottleneckConfig(), "inner")
    assert set(wrapped.base_model.adapter_tensors("inner")) == set(alone.base_model.adapter_tensors("inner"))
    alone.add_adapter("outer", BottleneckConfig(placement="parallel"))
    outer = wrapped.base_model.adapter_tensors("outer")
    assert set(alone.base_model.adapter_tensors("outer")) == set(outer)
    assert "base_model.model.model.layers.0.mlp.adapter_down.weight" in outer

    seen = []
    for names in (["outer"], ["inner"], ["lora"], ["outer", "inner", "lora"]):
        wrapped.set_adapter(names)
        fill(wrapped)
        seen.append(logits(wrapped))
    assert len({tuple(one.flatten().tolist()) for one in seen}) == len(seen)
    wrapped.set_adapter("lora")
    expected = logits(wrapped)
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    wrapped.delete_adapter("outer")
    assert_bits_equal("lora alone", logits(wrapped), expected)
    wrapped.delete_adapter("lora")
    wrapped.delete_adapter("inner")
    assert_bits_equal("none", logits(wrapped), before)
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.bert], ids=["llama", "bert"])
def test_every_row_its_adapter(make):
    torch.manual_seed(0)
    model = get_peft_model(make().eval(), BottleneckConfig(placement="parallel"), "a")
    model.add_adapter("b", BottleneckConfig(placement="houlsby"))
    for name in "ab":
        model.set_adapter(name)
        fill(model, seed=ord(name))
    ids, names = tiny_models.token_ids(4), ["a", "__base__", "b", "a"]
    rows = []
    with torch.no_grad():
        for row, name in zip(ids, names, strict=True):
            model.set_adapter("a" if name == "__base__" else name)
            one = {"input_ids": row[None]}
            rows.append(model(**one, adapter_names=["__base__"]) if name == "__base__" else model(**one))
        got = model(input_ids=ids, adapter_names=names).logits
    assert_close("logits", got, torch.cat([row.logits for row in rows]), LOGITS_EQUAL_TO_PEFT)


def test_the_folder_says_what_it_is(tmp_path):
    """What peft answers is in tests/every_method/test_peft.py: KeyError."""
    model = get_peft_model(tiny_models.bert(), BottleneckConfig(placement="parallel", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK"
    assert config["target_modules"] == ["bert.encoder.layer.0.output", "bert.encoder.layer.1.output"]


def test_biases_are_trained_on_request(tmp_path):
    model = tiny_models.gpt2().eval()
    wrapped = get_peft_model(model, BottleneckConfig(bias="bottleneck_only"))
    trained = {key for key, p in wrapped.named_parameters() if p.requires_grad and "adapter_" not in key}
    assert trained == {f"base_model.model.transformer.h.{i}.mlp.c_proj.base_layer.bias" for i in (0, 1)}
    fill(wrapped)
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped)
    assert_bits_equal("loaded", logits(PeftModel.from_pretrained(wrapped.unload(), tmp_path)), expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_over_a_quantised_base(kind):
    """A quantised linear that is wrapped goes through fastpeft's product, as LoRA's does."""
    quantized = fastpeft.quantize(tiny_models.llama(), kind).eval()
    wrapped = get_peft_model(quantized, BottleneckConfig(placement="houlsby"))
    lora = get_peft_model(copy.deepcopy(wrapped).unload(), LoraConfig(target_modules=["o_proj", "down_proj"]))
    assert_bits_equal("logits", logits(wrapped), logits(lora))
