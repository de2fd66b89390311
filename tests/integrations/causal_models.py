"""Tiny causal language models of every family that the part "loss" knows, and a batch for them."""

import transformers

from fastpeft.integrations.acceleration import accelerate
from tests import tiny_models
from tests.tiny_models import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def _of(name, **options):
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == f"{name}ForCausalLM"
    return model


FAMILIES = {
    "llama": tiny_models.llama,
    "tied-llama": tiny_models.tied_llama,
    "mistral": lambda: _of("Mistral", num_key_value_heads=1),
    "qwen2": lambda: _of("Qwen2", num_key_value_heads=1),
    "qwen3": lambda: _of("Qwen3", num_key_value_heads=1, head_dim=16),
    "gemma2": lambda: _of("Gemma2", num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0),
    "gemma3": tiny_models.gemma3,
    "phi": lambda: _of("Phi"),
    "phi3": lambda: _of("Phi3"),
    "gpt2": lambda: tiny_models.gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
}


def batch(ignored: str = "half"):
    ids = tiny_models.token_ids()
    labels = ids.clone()
    labels[:, {"half": slice(0, None, 2), "all": slice(None), "none": slice(0)}[ignored]] = -100
    return {"input_ids": ids, "labels": labels}


def only_loss(model):
    return accelerate(model, parts=["loss"])
