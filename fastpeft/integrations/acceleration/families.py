"""What the walk must be told of a model family, by config.model_type. Everything else is found by structure.

A family that has no row is walked too: its norms, linears and gated MLPs are recognised by what they hold. Its rotary embedding
and its loss stay its own.
"""

from typing import NamedTuple


class Family(NamedTuple):
    """One model family.

    rotary: name of the function in its modelling module that turns q and k, or None where it has no such function
    decoder: attribute of the ...ForCausalLM model that gives the last hidden states, None where the loss stays its own
    softcap: name of the config value that caps its logits, None without
    """

    rotary: str | None = "apply_rotary_pos_emb"
    decoder: str | None = "model"
    softcap: str | None = None


_ENCODER = Family(rotary=None, decoder=None)

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma": Family(),
    "gemma2": Family(softcap="final_logit_softcapping"),
    "gemma3_text": Family(softcap="final_logit_softcapping"),
    "phi": Family(),
    "phi3": Family(),
    "gpt2": Family(rotary=None, decoder="transformer"),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": _ENCODER,
    "t5": _ENCODER,
}
