"""attn_implementation="fastpeft" in transformers: eager's logits, within float32 rounding, for every kind of batch."""

import copy

import pytest
import torch
import transformers
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from fastpeft.integrations.attention import NAME, attention_mask
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_bits_equal, assert_close, assert_no_worse

VOCABULARY, ROWS, TOKENS, DECODED = 97, 3, 12, 7
WINDOW = 5
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HYBRID = {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, DECODER),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, DECODER | {"sliding_window": WINDOW}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, DECODER),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, DECODER | {"head_dim": 8}),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        DECODER | HYBRID | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, DECODER | HYBRID),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        DECODER | HYBRID | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "bert": (
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        {key: value for key, value in DECODER.items() if key != "num_key_value_heads"},
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "dropout_rate": 0.0,
        },
    ),
    "bart": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
}  # fmt: skip
ENCODER_DECODERS = ("t5", "bart")
DECODERS = [name for name in MODELS if name not in (*ENCODER_DECODERS, "bert")]
NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def make(name):
    """The model in eager attention, with weights large enough for attention to matter."""
    kind, config, options = MODELS[name]
    model = kind(config(**options, **NO_DROPOUT.get(name, {}))).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    model.set_attn_implementation("eager")
    return model


def with_ours(model):
    ours = copy.deepcopy(model)
    ours.set_attn_implementation(NAME)
    return ours


def token_ids():
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS))


def batch(name, kind):
    """(arguments, where the logits are read) of a batch, padded on the left or right or not."""
    arguments, mask = {"input_ids": token_ids()}, torch.ones(ROWS, TOKENS, dtype=torch.long)
    if kind == "left":
        mask[1, :5] = 0
    if kind == "right":
        mask[1, -4:] = 0
    if kind != "plain":
        arguments["attention_mask"] = mask
    if name in ENCODER_DECODERS:
        arguments["decoder_input_ids"] = token_ids()[:, :DECODED]
        return arguments, torch.ones(ROWS, DECODED, dtype=torch.bool)
    return arguments, mask.bool()


@torch.no_grad()
def assert_logits_equal(model, arguments, where=...):
    """fastpeft's logits are as near to those of a float64 model as eager's are.

    Rows of left padding are NaN in eager attention in float64 and spoil the others: there the two are compared.
    """
    eager, got = (one(**copy.deepcopy(arguments)).logits[where] for one in (model, with_ours(model)))
    wide = copy.deepcopy(model).double()
    if hasattr(wide.config, "num_local_experts"):
        wide.set_experts_implementation("eager")  # the fused products have no float64
    exact = wide(**arguments).logits[where]
    if torch.isfinite(exact).all():
        assert_no_worse("logits", got, exact, eager)
    else:
        assert_close("logits", got, eager, GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("kind", ["plain", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_eager_attention(name, kind):
    arguments, where = batch(name, kind)
    assert_logits_equal(make(name), arguments, where)


@pytest.mark.parametrize("name", MODELS)
def test_three_steps_of_training(name):
    eager = make(name).train()
    ours = with_ours(eager)
    arguments, _ = batch(name, "left")
    labels = arguments.get("decoder_input_ids", arguments["input_ids"])
    losses = []
    for model in (eager, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(3):
            logits = model(**arguments).logits.float()
            where = slice(None) if name in ENCODER_DECODERS else arguments["attention_mask"].bool()
            loss = torch.nn.functional.cross_entropy(logits[where].reshape(-1, VOCABULARY), labels[where].reshape(-1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    assert_close("losses", *(torch.stack(part) for part in reversed(losses)), GRADIENTS_THROUGH_A_MODEL)
    assert losses[0][2] != losses[0][0]


def test_t5_trains_its_table():
    model = with_ours(make("t5").train())
    arguments, _ = batch("t5", "plain")
    model(**arguments).logits.square().mean().backward()
    for stack in (model.encoder, model.decoder):
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert table.grad.abs().max() > 0


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_packed_sequences_do_not_see_each_other(name, use_cache):
    """transformers packs by position_ids, but with a cache, its default, lets documents attend to each other."""
    model = with_ours(make(name))
    lengths = [5, 1, 6]
    ids = token_ids()
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    for rows in (1, ROWS):
        with torch.no_grad():
            packed = model(input_ids=ids[:rows], position_ids=positions, use_cache=use_cache).logits
            alone = [model(input_ids=part, use_cache=use_cache).logits for part in ids[:rows].split(lengths, dim=1)]
        assert_close("logits", packed, torch.cat(alone, dim=1), GRADIENTS_THROUGH_A_MODEL)


def test_layers_of_packed_sequences_keep_nothing_of_the_mask(monkeypatch):
    """The mask is made, since other code may look at it, and read as sequences: no layer makes a bias of it."""
    from fastpeft.integrations import attention as integration

    calls = []
    monkeypatch.setattr(integration, "attention", lambda *args, **terms: calls.append(terms) or args[0])
    model = with_ours(make("mistral"))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8]])
    model(input_ids=token_ids(), position_ids=positions, use_cache=False)
    assert len(calls) == 2
    for terms in calls:
        assert terms["bias"] is None
        assert terms["window"] == WINDOW - 1
        assert terms["cu_seqlens_q"].tolist() == [0, 3, 12, 15, 24, 27, 36]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_decoding_with_a_cache(name, padded):
    """The same tokens as eager attention, more of them than the window is wide."""
    model = make(name)
    arguments, _ = batch(name, "left" if padded else "plain")
    arguments.pop("decoder_input_ids", None)
    arguments |= {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "pad_token_id": 1}
    generated = [
        one.generate(**arguments, return_dict_in_generate=True, output_logits=True) for one in (model, with_ours(model))
    ]
    expected, got = (torch.stack(one.logits) for one in generated)
    assert torch.equal(generated[0].sequences, generated[1].sequences)
    assert_close("logits", got, expected, GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_of_fixed_size(name):
    model = make(name)
    arguments = {"input_ids": token_ids(), "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    arguments |= {"pad_token_id": 1, "disable_compile": True}
    assert torch.equal(with_ours(model).generate(**arguments), model.generate(**arguments))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_prefix_tuning_has_more_keys_than_queries(name):
    peft = pytest.importorskip("peft")
    model = make(name)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    arguments, where = batch(name, "left")
    logits = []
    for base in (model, with_ours(model)):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(base, config)
        with torch.no_grad():
            logits.append(wrapped(**arguments).logits[where])
    assert_close("logits", logits[1], logits[0], GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_the_users_own(kind):
    visible = torch.rand(ROWS, 1, TOKENS, TOKENS) > 0.4
    visible |= torch.eye(TOKENS, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    model, arguments = make("llama"), {"input_ids": token_ids()}
    with torch.no_grad():
        expected = model(**arguments, attention_mask=mask).logits
        got = with_ours(model)(**arguments, attention_mask=mask if kind == "float" else visible).logits
    assert_close("logits", got, expected, GRADIENTS_THROUGH_A_MODEL)


def test_checkpointing_repeats_the_bits():
    model = with_ours(make("llama").train())
    arguments, _ = batch("llama", "left")
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**arguments).logits.square().mean().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*grads):
        assert_bits_equal("gradient", one, other)


SIZES = {"batch_size": 2, "q_length": 6, "kv_length": 6, "device": "cpu"}


@pytest.mark.parametrize("function", [causal_mask_function, sliding_window_causal_mask_function(3)])
def test_causal_and_sliding_masks_are_not_made(function):
    padding = torch.ones(2, 6, dtype=torch.bool)
    assert attention_mask(**SIZES, mask_function=function) is None
    assert attention_mask(**SIZES, mask_function=function, attention_mask=padding) is None
    padding[0, 0] = False
    assert torch.equal(attention_mask(**SIZES, mask_function=function, attention_mask=padding), padding)
    both = attention_mask(**SIZES, mask_function=bidirectional_mask_function, attention_mask=padding)
    assert both.shape == (2, 1, 1, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_function": chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)), "local_size": 3},
        {"mask_function": and_masks(causal_mask_function, lambda b, h, q, k: q != k + 1)},
        {"allow_is_causal_skip": False},
        {"kv_length": 9},
    ],
    ids=["chunks", "another function", "not to be left out", "a longer cache"],
)
def test_every_other_mask_is_made_in_full(options):
    mask = attention_mask(**SIZES | options)
    assert mask.shape == (2, 1, 6, options.get("kv_length", 6))


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
def test_a_padded_step_runs_on_fake_tensors(name):
    """No mask or position is read: a planner runs whole models without their values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model_class, config_class, options = MODELS[name]
    with FakeTensorMode():
        model = model_class(config_class(**options, attn_implementation=NAME))
        ids = torch.ones(ROWS, TOKENS, dtype=torch.long)
        positions = torch.ones(ROWS, TOKENS, dtype=torch.long)
        for extra in ({"attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long)}, {"position_ids": positions}):
            logits = model(input_ids=ids, **extra).logits
            logits.sum().backward()
            assert logits.shape == (ROWS, TOKENS, VOCABULARY)
