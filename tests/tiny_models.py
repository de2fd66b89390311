"""Transformers models of a few thousand parameters with random weights, made on the spot, and what to feed them."""

import torch
import transformers
from safetensors.torch import load_file, save_file

from fastpeft import LoraConfig, PeftModel, get_peft_model
from fastpeft.checkpoint import TENSORS_NAME

VOCABULARY = 97
LENGTH = 12


def llama(**options):
    defaults = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "tie_word_embeddings": False} | defaults | options
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def small_llama(**options):
    """One layer, in eval mode."""
    return llama(hidden_size=32, intermediate_size=32, num_hidden_layers=1, **options).eval()


def tied_llama(**options):
    """Its output embedding is its input embedding."""
    return llama(tie_word_embeddings=True, **options)


def gpt2(**options):
    """Its linear layers are Conv1D, and its embeddings are tied."""
    config = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64} | options
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, bos_token_id=0, eos_token_id=0))


def gemma3():
    """Its input embedding multiplies by sqrt(hidden size), and it is tied."""
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    return transformers.Gemma3ForCausalLM(config)


def _bert_config(**options):
    return transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
        **options,
    )


def bert(**options):
    return transformers.BertForSequenceClassification(_bert_config(**options))


def bert_mlm():
    """One bias is registered under two names: cls.predictions.bias and cls.predictions.decoder.bias."""
    return transformers.BertForMaskedLM(_bert_config())


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, hidden_dim=96, n_layers=2, n_heads=4, num_labels=3
    )
    return transformers.DistilBertForSequenceClassification(config)


def t5():
    """Encoder and decoder, with one embedding for both."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


_EXPERTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def mixtral():
    """Its experts' weights are [E, N, K] in one parameter, and its router's weight is a bare [E, K]."""
    config = transformers.MixtralConfig(**_EXPERTS, intermediate_size=24, num_local_experts=3)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **_EXPERTS, intermediate_size=24, moe_intermediate_size=20, num_experts=4, head_dim=16, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    """Its experts' weights are stored [E, K, N], and have biases."""
    config = transformers.GptOssConfig(**_EXPERTS, intermediate_size=24, num_local_experts=3, head_dim=16)
    return transformers.GptOssForCausalLM(config)


def token_ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) * 7 % VOCABULARY


def inputs(model) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass of any model here, or of a PeftModel over one."""
    ids = token_ids()
    given = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :5]
    if any(hasattr(config, "num_tasks") for config in _peft_configs(model)):
        given["task_ids"] = torch.zeros(len(ids), dtype=torch.long)
    return given


def _peft_configs(model) -> list:
    """The adapters' configs of a model under Hugging Face peft, which never leaves task_ids to a default."""
    return list(model.peft_config.values()) if type(model).__module__.startswith("peft.") else []


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs(model)).logits


def loss(model) -> torch.Tensor:
    """A scalar that depends on every logit, for gradients; the logits of random models are small, so they are scaled up."""
    return model(**inputs(model)).logits.float().mul(8).square().mean()


def fill(model, *, seed: int = 1, std: float = 0.1) -> None:
    """Draw all trainable parameters anew, in order, so that an adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(values)


def trained(model=None, **options) -> PeftModel:
    """small_llama, or `model`, with an adapter that does something, in eval mode."""
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | options))
    wrapped = get_peft_model(small_llama() if model is None else model, config).eval()
    fill(wrapped)
    return wrapped


def edit(folder, change) -> None:
    """Change the tensors of an adapter's folder: `change` gets them as a dict by name."""
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)


def bits(model) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer, by every name that it has."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def flags(model) -> dict[str, bool]:
    """requires_grad of every parameter by name."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
