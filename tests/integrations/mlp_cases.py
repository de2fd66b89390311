"""Tiny models with gated MLPs, how they are adapted and stepped, for the tests of accelerate's part "mlp"."""

import peft
import torch
import transformers

import fastpeft
from fastpeft import LoraConfig
from fastpeft.integrations.acceleration import mlp as part
from fastpeft.ops import lora_mlp
from tests import tiny_models
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_close

SIZES = {
    "vocab_size": tiny_models.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def causal(name, **options):
    config = getattr(transformers, f"{name}Config")(**SIZES, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _t5(**options):
    config = transformers.T5Config(
        vocab_size=tiny_models.VOCABULARY,
        d_model=32,
        d_ff=48,
        d_kv=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        **options,
    )
    return transformers.T5ForConditionalGeneration(config)


FAMILIES = {
    "llama": lambda: causal("Llama"),
    "llama_biased": lambda: causal("Llama", mlp_bias=True),
    "mistral": lambda: causal("Mistral"),
    "qwen2": lambda: causal("Qwen2"),
    "qwen3": lambda: causal("Qwen3", head_dim=16),
    "gemma2": lambda: causal("Gemma2", head_dim=16),
    "gemma3": tiny_models.gemma3,
    "phi3": lambda: causal("Phi3", pad_token_id=0),
    "t5": _t5,
}
TARGETS = {"phi3": ["gate_up_proj", "down_proj"], "t5": ["wi_0", "wi_1", "wo"]}


def adapted(family, how="fastpeft", **options):
    torch.manual_seed(1)
    model = FAMILIES[family]()
    targets = TARGETS.get(family, ["gate_proj", "up_proj", "down_proj"])
    if how == "fastpeft":
        model = fastpeft.get_peft_model(model, LoraConfig(**({"r": 2, "target_modules": targets} | options)))
    elif how == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(**({"r": 2, "target_modules": targets} | options)))
    tiny_models.fill(model)
    return model.train()


def mlps(model):
    return [module for module in model.modules() if any(layout.of(module) for layout in part.LAYOUTS)]


def step(model):
    """Logits, and every gradient by name."""
    model.zero_grad()
    torch.manual_seed(9)
    out = model(**tiny_models.inputs(model)).logits
    out.float().mul(8).square().mean().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.detach()} | named


def assert_same(got, want, limit=GRADIENTS_THROUGH_A_MODEL):
    assert list(got) == list(want)
    for name, value in want.items():
        scale = max(1.0, value.abs().max().item())
        assert_close(name, got[name] / scale, value / scale, limit)


def one_op_calls(monkeypatch) -> list[dict]:
    """The options of every call of the one op from now on, which runs as one Function here although everything is small."""
    monkeypatch.setattr(lora_mlp, "composed_is_faster", lambda *call: False)
    made = []

    def counted(*args, **options):
        made.append(options)
        return lora_mlp.lora_glu_mlp(*args, **options)

    monkeypatch.setattr(part, "lora_glu_mlp", counted)
    return made
