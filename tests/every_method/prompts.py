"""Methods that put trained vectors before the input, or before the keys and values of attention."""

from tests.every_method.method_case import MethodCase

# A prompt changes the function, has no merged form, and its names are PEFT's but for what stands before them.
_PROMPT = {"identity": False, "mergeable": False, "same_names": False, "learning_rate": 3e-2}
_TOKENS = {"num_virtual_tokens": 4}
_ENCODER = _TOKENS | {"encoder_hidden_size": 24}

CASES = {
    "prompt_tuning": MethodCase("PromptTuningConfig", _TOKENS, **_PROMPT),
    "prompt_from_words": MethodCase(
        "PromptTuningConfig", _TOKENS | {"prompt_tuning_init": "SAMPLE_VOCAB"}, models=("llama", "t5"), **_PROMPT
    ),
    "p_tuning": MethodCase("PromptEncoderConfig", _ENCODER, **_PROMPT),
    "p_tuning_lstm": MethodCase(
        "PromptEncoderConfig", _ENCODER | {"encoder_reparameterization_type": "LSTM"}, models=("llama", "t5"), **_PROMPT
    ),
    "prefix_tuning": MethodCase(
        "PrefixTuningConfig", _TOKENS, models=("llama", "gpt2", "t5"), checkpointing=False, **_PROMPT
    ),
    "projected_prefix": MethodCase(
        "PrefixTuningConfig",
        _ENCODER | {"prefix_projection": True},
        models=("llama", "gpt2", "t5"),
        checkpointing=False,
        **_PROMPT,
    ),
    "multitask_prompt": MethodCase(
        "MultitaskPromptTuningConfig", _TOKENS | {"num_ranks": 2}, models=("llama", "gpt2", "bert"), **_PROMPT
    ),
}
