"""accelerate, parts "attention" and "rope": the untouched model's logits and gradients, and nothing left after restore."""

import copy
import pickle
import sys

import pytest
import torch
import transformers

import fastpeft
from fastpeft.integrations.acceleration import rope as part
from fastpeft.integrations.attention import NAME
from tests.integrations.test_attention import DECODER, MODELS, NO_DROPOUT, TOKENS, VOCABULARY
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_bits_equal, assert_close, assert_no_worse

FAMILIES = {name: MODELS[name] for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "bert", "t5")} | {
    "phi": (transformers.PhiForCausalLM, transformers.PhiConfig, DECODER),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, DECODER | {"pad_token_id": 0, "sliding_window": 5}),
    "roberta": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig,
        {key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
    ),
    "distilbert": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig,
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
}  # fmt: skip
WITHOUT_DROPOUT = NO_DROPOUT | {"roberta": NO_DROPOUT["bert"], "distilbert": {"dropout": 0.0, "attention_dropout": 0.0}}
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3")
PARTS = ("attention", "rope")


@pytest.fixture(autouse=True)
def _small_calls_are_rotated_by_us(monkeypatch):
    monkeypatch.setattr(part, "_WORTH", 0)


def build(name, attn="eager"):
    model_class, config_class, options = FAMILIES[name]
    torch.manual_seed(0)
    config = config_class(**options, **WITHOUT_DROPOUT.get(name, {}), attn_implementation=attn)
    return model_class(config).train()


def batch(model, padding):
    ids = torch.arange(3 * TOKENS).reshape(3, TOKENS) * 7 % (VOCABULARY - 1) + 1
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :4] = 0
    if padding == "right":
        mask[1, -3:] = 0
    given = {"input_ids": ids}
    if padding is not None:
        given["attention_mask"] = mask
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"], mask = ids[:, :7], mask[:, :7] * 0 + 1
    return given, mask.bool()


def step(model, padding):
    """Logits where they are read, and the gradient of every parameter."""
    given, mask = batch(model, padding)
    logits = model(**given).logits
    read = logits[mask]
    model.zero_grad()
    read.float().square().mean().backward()
    grads = {path: parameter.grad.clone() for path, parameter in model.named_parameters() if parameter.grad is not None}
    return read.detach(), grads


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_accelerated_model_is_the_untouched_one(name, padding):
    model = build(name)
    eager, eager_grads = step(model, padding)
    before, config = classes(model), copy.deepcopy(model.config.to_dict())
    implementations = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    ledger = fastpeft.accelerate(model, parts=PARTS)
    assert {slot.part for slot in ledger.slots} == ({"rope"} if name in ROTATED else set())
    assert not ledger.kept
    assert model.config._attn_implementation == NAME
    got, grads = step(model, padding)
    if padding == "left":  # transformers' eager code in float64 gives NaN for it
        assert_close("logits", got, eager, GRADIENTS_THROUGH_A_MODEL)
    else:
        assert_no_worse("logits", got, step(build(name).double(), padding)[0], eager)
    assert grads.keys() == eager_grads.keys()
    for path, grad in grads.items():
        if eager_grads[path].abs().max() > 1e-9:  # a bias of keys has none but rounding
            assert_close(path, grad, eager_grads[path], GRADIENTS_THROUGH_A_MODEL)
    assert not ledger.fallbacks
    fastpeft.restore(model)
    assert classes(model) == before
    assert model.config.to_dict() == config
    after = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    assert after == implementations
    again, again_grads = step(model, padding)
    assert_bits_equal("restored logits", again, eager)
    for path, grad in again_grads.items():
        assert_bits_equal(path, grad, eager_grads[path])


@pytest.mark.parametrize("name", ROTATED)
def test_half_precision_is_no_worse(name):
    model = build(name)
    exact, _ = step(copy.deepcopy(model).double(), None)
    model.bfloat16()
    eager, _ = step(model, None)
    fastpeft.accelerate(model, parts=PARTS)
    got, _ = step(model, None)
    assert_no_worse("logits", got, exact, eager)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
def test_the_rotation_of_this_model_only_is_ours(name, monkeypatch):
    """The module's function stays, another model of the same classes runs it, and ours is called twice a step of two layers."""
    calls = []

    def counted(*args, own=part.apply_rope, **options):
        calls.append(args[0].shape)
        return own(*args, **options)

    monkeypatch.setattr(part, "apply_rope", counted)
    model, other = build(name), build(name)
    module = sys.modules[type(model).__module__]
    function = module.apply_rotary_pos_emb
    fastpeft.accelerate(model, parts=["rope"])
    assert module.apply_rotary_pos_emb is function
    expected, _ = step(other, None)
    assert not calls
    assert_close("logits", step(model, None)[0], expected, GRADIENTS_THROUGH_A_MODEL)
    assert len(calls) == 2
    fastpeft.restore(model)
    step(model, None)
    assert len(calls) == 2


def test_a_small_call_on_a_cpu_goes_to_the_models_own_function(monkeypatch):
    monkeypatch.undo()
    model = build("llama")
    expected, _ = step(model, None)
    fastpeft.accelerate(model, parts=["rope"])
    assert_bits_equal("logits", step(model, None)[0], expected)


def test_a_patched_module_is_seen_later(monkeypatch):
    """The exchanged forward shares its module's globals: a copy of them would go on with what was there before."""
    model = build("llama")
    fastpeft.accelerate(model, parts=["rope"])
    seen = []

    def patched(*args, own=transformers.models.llama.modeling_llama.eager_attention_forward, **options):
        seen.append(True)
        return own(*args, **options)

    monkeypatch.setattr(transformers.models.llama.modeling_llama, "eager_attention_forward", patched)
    step(model, None)
    assert len(seen) == 2


def test_what_is_kept_says_why():
    model = build("llama")
    model.config.output_attentions = True
    kept = fastpeft.accelerate(model, parts=PARTS).kept
    assert [(item.part, item.kind) for item in kept] == [("attention", "LlamaForCausalLM")]
    assert "config.output_attentions is on" in kept[0].why
    assert model.config._attn_implementation == "eager"
    transformers.AttentionInterface.register("of_somebody_else", lambda *args, **kwargs: None)
    other = build("bert", attn="of_somebody_else")
    assert "of_somebody_else" in fastpeft.accelerate(other, parts=PARTS).kept[0].why
    assert other.config._attn_implementation == "of_somebody_else"
    assert "rope" in part.__name__
    closed = build("llama")
    attention = closed.model.layers[0].self_attn
    own = type(attention)

    def enclosed():
        apply_rotary_pos_emb = transformers.models.llama.modeling_llama.apply_rotary_pos_emb

        class Attention(own):
            def forward(self, *args, **kwargs):
                apply_rotary_pos_emb.__name__  # noqa: B018 - its name is a variable of the function around
                return super().forward(*args, **kwargs)

        return Attention

    attention.__class__ = enclosed()
    kept = fastpeft.accelerate(closed, parts=["rope"]).kept
    assert [item.path for item in kept] == ["model.layers.0.self_attn"]
    assert "not a global" in kept[0].why


def test_a_wrapper_that_hides_what_it_wraps_is_kept():
    model = build("llama")
    attention = model.model.layers[1].self_attn
    own = type(attention)
    held = {"forward": own.forward}

    def forward(self, *args, **kwargs):
        return held["forward"](self, *args, **kwargs)

    forward.__wrapped__ = own.forward
    attention.__class__ = type("Wrapped", (own,), {"forward": forward})
    ledger = fastpeft.accelerate(model, parts=["rope"])
    assert [(item.path, item.kind) for item in ledger.kept] == [("model.layers.1.self_attn", "Wrapped")]
    assert "wrapped in a way" in ledger.kept[0].why
    assert [slot.path for slot in ledger.slots] == ["model.layers.0.self_attn"]


def test_weights_are_given_where_a_call_asks_for_them():
    model = build("llama").eval()
    given, _ = batch(model, "left")
    expected = model(**given, output_attentions=True).attentions
    fastpeft.accelerate(model, parts=PARTS)
    for layer, (got, want) in enumerate(zip(model(**given, output_attentions=True).attentions, expected, strict=True)):
        read = given["attention_mask"].bool()[:, None, :, None].expand_as(want)
        assert_close(f"weights of layer {layer}", got[read], want[read], GRADIENTS_THROUGH_A_MODEL)


def test_copies_and_pickles_are_of_the_models_own_classes():
    model = build("llama").eval()
    ids = batch(model, None)[0]["input_ids"]
    expected = model(ids).logits
    fastpeft.accelerate(model, parts=["rope"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.model.layers[0].self_attn) is transformers.models.llama.modeling_llama.LlamaAttention
        assert_bits_equal("logits", other(ids).logits, expected)


def test_an_accelerated_model_compiles_and_decodes():
    torch.compiler.reset()
    model = build("llama").eval()
    fastpeft.accelerate(model, parts=PARTS)
    ids = batch(model, None)[0]["input_ids"]
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    assert_close("compiled", compiled(ids, use_cache=False).logits, expected, GRADIENTS_THROUGH_A_MODEL)
    first = model(ids[:, :-1], use_cache=True)
    second = model(ids[:, -1:], past_key_values=first.past_key_values)
    assert_close("decoded", second.logits[:, 0], expected[:, -1], GRADIENTS_THROUGH_A_MODEL)
