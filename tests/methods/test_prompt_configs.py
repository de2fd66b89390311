"""Options of the prompt methods: what is refused, before a model changes; what is filled in; where a prompt starts."""

import pytest
import torch
import transformers
from safetensors.torch import save_file

import fastpeft
from fastpeft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from tests import tiny_models
from tests.tolerance import OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close
from tests.training import tiny

EVERY = (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig, MultitaskPromptTuningConfig)


def refused(model, config, error, match):
    """`config` is refused and the model is as it was."""
    before, flags = tiny_models.bits(model), tiny_models.flags(model)
    with pytest.raises(error, match=match):
        get_peft_model(model, config)
    assert tiny_models.flags(model) == flags
    for name, tensor in tiny_models.bits(model).items():
        assert_bits_equal(name, tensor, before[name])


@pytest.mark.parametrize("kind", EVERY)
def test_a_prompt_has_a_length(kind):
    for length in (None, 0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_virtual_tokens"):
            kind(num_virtual_tokens=length)


BAD = [
    (PromptTuningConfig, {"prompt_tuning_init": "WORDS"}, "expected prompt_tuning_init one of"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"}, "tokenizer_name_or_path"),
    (PromptTuningConfig, {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "a"}, "prompt_tuning_init_text"),
    (PromptTuningConfig, {"tokenizer_kwargs": {"use_fast": True}}, "tokenizer_kwargs is for"),
    (PromptTuningConfig, {"num_transformer_submodules": 3}, "1 or 2"),
    (PromptTuningConfig, {"modules_to_save": "score"}, "a list of names"),
    (PromptTuningConfig, {"task_type": "SPEECH"}, "expected task_type one of"),
    (PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type"),
    (PromptEncoderConfig, {"encoder_hidden_size": 0}, "encoder_hidden_size"),
    (PromptEncoderConfig, {"encoder_dropout": 1.0}, "encoder_dropout"),
    (PrefixTuningConfig, {"init_weights": "ones"}, "init_weights"),
    (PrefixTuningConfig, {"token_dim": 10, "num_attention_heads": 4}, "a multiple of"),
    (MultitaskPromptTuningConfig, {"num_tasks": 0}, "num_tasks"),
    (MultitaskPromptTuningConfig, {"num_ranks": None}, "num_ranks"),
    (MultitaskPromptTuningConfig, {"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "state_dict_path"),
]


@pytest.mark.parametrize(("kind", "options", "match"), BAD, ids=[next(iter(options)) for _, options, _ in BAD])
def test_values_out_of_range(kind, options, match):
    with pytest.raises(ValueError, match=match):
        kind(num_virtual_tokens=2, **options)


def test_what_does_not_fit_the_model():
    llama = tiny_models.small_llama()
    refused(llama, PromptTuningConfig(num_virtual_tokens=2, token_dim=7), ValueError, "expected token_dim 32")
    refused(llama, PrefixTuningConfig(num_virtual_tokens=2, num_layers=3), ValueError, "expected num_layers 1")
    refused(
        llama,
        PrefixTuningConfig(num_virtual_tokens=2, num_attention_heads=4),
        ValueError,
        "expected num_attention_heads 2",
    )
    distilbert = tiny_models.distilbert()
    refused(distilbert, PrefixTuningConfig(num_virtual_tokens=2), ValueError, "takes a cache, got DistilBert")
    refused(torch.nn.Linear(2, 2), PromptTuningConfig(num_virtual_tokens=2), ValueError, "transformers model")
    mixed = tiny_models.small_llama()
    mixed.config.layer_types = ["linear_attention"]
    refused(mixed, PrefixTuningConfig(num_virtual_tokens=2), NotImplementedError, "linear_attention")


def test_checkpointing_and_a_prefix_exclude_each_other():
    model = tiny_models.small_llama()
    model.gradient_checkpointing_enable()
    refused(model, PrefixTuningConfig(num_virtual_tokens=2), ValueError, "gradient checkpointing")
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2))


TASKS = [
    (tiny_models.small_llama, "CAUSAL_LM", 1),
    (tiny_models.gpt2, "CAUSAL_LM", 1),
    (tiny_models.bert, "SEQ_CLS", 1),
    (tiny_models.t5, "SEQ_2_SEQ_LM", 2),
]


@pytest.mark.parametrize(("model", "task_type", "submodules"), TASKS, ids=["llama", "gpt2", "bert", "t5"])
def test_the_task_type_is_the_models(model, task_type, submodules):
    wrapped = get_peft_model(model(), PromptTuningConfig(num_virtual_tokens=2))
    config = wrapped.active_peft_config
    assert (config.task_type, config.num_transformer_submodules) == (task_type, submodules)
    assert config.token_dim == wrapped.get_input_embeddings().weight.shape[1]
    assert ("classifier" in (config.modules_to_save or ())) == (task_type == "SEQ_CLS")
    heads = [name for name, p in wrapped.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert bool(heads) == (task_type == "SEQ_CLS")


def test_a_model_that_does_not_say_its_task():
    refused(tiny_models.bert_mlm(), PromptTuningConfig(num_virtual_tokens=2), ValueError, "expected task_type one of")


def test_a_prompt_from_text(tmp_path):
    """Its words' embeddings, repeated to the prompt's length or cut to it."""
    folder = tiny.llama(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    ids = tiny.tokenizer()("w1 w2 w3")["input_ids"]
    words = model.get_input_embeddings().weight
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "w1 w2 w3",
        "tokenizer_name_or_path": str(folder),
    }
    wrapped = get_peft_model(model, PromptTuningConfig(num_virtual_tokens=7, **options))
    prompt = wrapped.base_model.prompts["default"].embedding.weight
    assert_bits_equal("long", prompt, words[(ids * 3)[:7]])
    wrapped.add_adapter("short", PromptTuningConfig(num_virtual_tokens=2, **options))
    assert_bits_equal("short", wrapped.base_model.prompts["short"].embedding.weight, words[ids[:2]])
    wrapped.save_pretrained(tmp_path / "adapter")
    (folder / "tokenizer.json").unlink()  # a saved prompt needs its words no more
    again = transformers.LlamaForCausalLM.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter", is_trainable=True)
    assert_bits_equal("loaded", loaded.base_model.prompts["default"].embedding.weight, prompt)
    missing = PromptTuningConfig(num_virtual_tokens=2, **options | {"tokenizer_name_or_path": str(tmp_path)})
    refused(tiny_models.small_llama(), missing, ValueError, "tokenizer_name_or_path: cannot load")


def test_a_prompt_from_random_words():
    wrapped = get_peft_model(
        tiny_models.small_llama(), PromptTuningConfig(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB")
    )
    words = wrapped.get_input_embeddings().weight
    for vector in wrapped.base_model.prompts["default"].embedding.weight:
        assert (words == vector).all(dim=1).any()


def test_a_prefix_of_zeros():
    for options in ({}, {"prefix_projection": True}):
        config = PrefixTuningConfig(num_virtual_tokens=3, init_weights="zero", **options)
        wrapped = get_peft_model(tiny_models.small_llama(), config)
        assert not wrapped.base_model.prompts["default"].prompt_embeddings().any()


def test_a_multitask_prompt_from_source_tasks(tmp_path):
    source = get_peft_model(
        tiny_models.small_llama(), MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=4, num_ranks=2)
    )
    tiny_models.fill(source)
    source.save_pretrained(tmp_path)
    trained = source.base_model.prompts["default"]
    options = {
        "num_virtual_tokens": 3,
        "num_ranks": 2,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        "prompt_tuning_init_task": 2,
    }
    for start in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"):
        config = MultitaskPromptTuningConfig(prompt_tuning_init=start, **options)
        prompt = get_peft_model(tiny_models.small_llama(), config).base_model.prompts["default"]
        assert_bits_equal("shared", prompt.embedding.weight, trained.embedding.weight)
        for name, tensor in prompt.other_tensors().items():
            tasks = trained.other_tensors()[name]
            if start == "AVERAGE_SOURCE_TASKS":
                assert_close(name, tensor, tasks.mean(0, keepdim=True), OTHER_ORDER_OF_SUMS)
            elif start == "EXACT_SOURCE_TASK":
                assert_bits_equal(name, tensor, tasks[2:3])
            else:
                assert not torch.equal(tensor, tasks[:1])
    bad = [
        ({"prompt_tuning_init_task": 4}, ValueError, "prompt_tuning_init_task: expected one of"),
        ({"num_ranks": 3}, ValueError, "expected prefix_task_cols"),
        ({"num_virtual_tokens": 4}, ValueError, "expected prompt_embeddings"),
        ({"prompt_tuning_init_state_dict_path": "a.bin"}, ValueError, "unpickling"),
        ({"prompt_tuning_init_state_dict_path": "a.safetensors"}, FileNotFoundError, "no such file"),
    ]
    for changes, error, match in bad:
        config = MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK", **options | changes)
        refused(tiny_models.small_llama(), config, error, match)
    save_file({"other": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    refused(
        tiny_models.small_llama(),
        MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK", **options),
        ValueError,
        "is it",
    )


def test_pefts_own_names_for_choices():
    import peft

    config = PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB)
    assert config.prompt_tuning_init == "SAMPLE_VOCAB"
    kind = peft.PromptEncoderReparameterizationType.LSTM
    assert (
        PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type=kind).to_dict()[
            "encoder_reparameterization_type"
        ]
        == "LSTM"
    )


def test_switching_between_prompts_and_a_lora():
    model = tiny_models.small_llama()
    plain = tiny_models.logits(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    lora = tiny_models.logits(wrapped)
    wrapped.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    wrapped.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=4))
    assert_bits_equal("added", tiny_models.logits(wrapped), lora)
    wrapped.set_adapter("prompt")
    assert [name for name, p in wrapped.named_parameters() if p.requires_grad] == [
        "base_model.prompts.prompt.embedding.weight"
    ]
    assert tiny_models.logits(wrapped).shape == (2, 14, 97)
    wrapped.set_adapter("prefix")
    assert tiny_models.logits(wrapped).shape == plain.shape
    with pytest.raises(ValueError, match="to be active alone"):
        wrapped.set_adapter(["default", "prompt"])
    wrapped.delete_adapter("prefix")
    wrapped.set_adapter("default")
    assert_bits_equal("lora again", tiny_models.logits(wrapped), lora)
    wrapped.set_adapter("prompt")
    with pytest.raises(NotImplementedError, match="merge: "):
        wrapped.merge_adapter()
    wrapped.delete_adapter("prompt")
    assert_bits_equal("unloaded", tiny_models.logits(wrapped.unload()), plain)


def test_int8_base():
    quantized = fastpeft.quantize(tiny_models.llama().eval(), "int8")
    wrapped = get_peft_model(quantized, PrefixTuningConfig(num_virtual_tokens=3))
    tiny_models.loss(wrapped).backward()
    assert wrapped.base_model.prompts["default"].embedding.weight.grad.abs().sum() > 0
