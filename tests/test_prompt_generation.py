"""generate with a prompt writes what a loop over PEFT's forward writes, with a cache and without, padded, with beams.

The loop is the oracle, not PEFT's generate: under transformers 5.23 PEFT 0.21.2 asks the model's inputs for past_key_values,
which are called cache by now; with use_cache=True it therefore puts the prompt before every new token again.
"""

import copy

import peft
import pytest
import torch

import fastpeft
from tests import tiny_models
from tests.tolerance import assert_bits_equal

NEW = 6
KINDS = {
    "prompt": ("PromptTuningConfig", {}),
    "encoder": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "prefix": ("PrefixTuningConfig", {}),
}
MODELS = {
    "llama": (tiny_models.llama, "CAUSAL_LM"),
    "gpt2": (tiny_models.gpt2, "CAUSAL_LM"),
    "gemma3": (tiny_models.gemma3, "CAUSAL_LM"),
    "t5": (tiny_models.t5, "SEQ_2_SEQ_LM"),
}


def base(model):
    torch.manual_seed(0)
    made = MODELS[model][0]().eval()
    for parameter in made.parameters():
        parameter.data.mul_(3)  # so that the largest logit changes from token to token
    return made


def left_padded():
    ids = tiny_models.token_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def greedy(wrapped, kind, given):
    """NEW tokens by the wrapped model's forward alone, everything computed again for each."""
    if wrapped.config.is_encoder_decoder:
        written = torch.zeros(len(given["input_ids"]), 1, dtype=torch.long)
        for _ in range(NEW):
            logits = wrapped(**given, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], 1)
        return written[:, 1:]
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(NEW):
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if kind == "prefix" else {}
        logits = wrapped(input_ids=ids, attention_mask=mask, **positions).logits
        ids, mask = torch.cat([ids, logits[:, -1:].argmax(-1)], 1), torch.cat([mask, mask[:, :1] * 0 + 1], 1)
    return ids[:, -NEW:]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_pefts(kind, model, tmp_path):
    name, options = KINDS[kind]
    plain = base(model)
    config = getattr(peft, name)(task_type=MODELS[model][1], num_virtual_tokens=4, **options)
    theirs = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = fastpeft.PeftModel.from_pretrained(plain, tmp_path)
    expected = greedy(theirs, kind, left_padded())
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    prepare = plain.prepare_inputs_for_generation
    for use_cache in (True, False):
        got = ours.generate(**left_padded(), **settings, use_cache=use_cache)[:, -NEW:]
        assert_bits_equal(f"use_cache={use_cache}", got, expected)
    beams = [ours.generate(**left_padded(), **settings, num_beams=3, use_cache=flag) for flag in (True, False)]
    assert_bits_equal("beams", *beams)
    alone = ours.generate(left_padded()["input_ids"][1:], **settings)[:, -NEW:]
    assert_bits_equal("ids by place, no mask", alone, expected[1:])
    assert plain.prepare_inputs_for_generation == prepare
    with ours.disable_adapter():
        off = ours.generate(**left_padded(), **settings)
    assert_bits_equal("disabled", off, base(model).generate(**left_padded(), **settings))


@pytest.mark.parametrize("model", MODELS)
def test_a_multitask_prompt(model):
    """Against a loop over our own forward: PEFT's generate leaves the decoder's prompt out, which its forward has."""
    ours = fastpeft.get_peft_model(
        base(model), fastpeft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=2)
    ).eval()
    tiny_models.fill(ours, std=1.0)
    given = left_padded() | {"task_ids": torch.tensor([1, 0])}
    if model == "t5":
        expected = greedy(ours, "prompt", given)
    else:

        def forward(**inputs):
            return ours(**inputs, task_ids=given["task_ids"])

        forward.config = ours.config
        expected = greedy(forward, "prompt", given)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    for use_cache in (True, False):
        got = ours.generate(**given, **settings, use_cache=use_cache)[:, -NEW:]
        assert_bits_equal(f"use_cache={use_cache}", got, expected)
    beams = [ours.generate(**given, **settings, num_beams=3, use_cache=flag) for flag in (True, False)]
    assert_bits_equal("beams", *beams)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_fixed_length_has_no_room(kind):
    name, options = KINDS[kind]
    ours = fastpeft.get_peft_model(base("llama"), getattr(fastpeft, name)(num_virtual_tokens=4, **options))
    with pytest.raises(NotImplementedError, match="a cache that grows"):
        ours.generate(**left_padded(), max_new_tokens=2, cache_implementation="static")
    assert "prepare_inputs_for_generation" not in vars(ours.get_base_model())
