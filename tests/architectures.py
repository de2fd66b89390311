"""One random model of a few thousand parameters of every architecture that has default targets and can be made that small."""

from collections.abc import Callable

import torch
import transformers as hf

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHORT = {"max_position_embeddings": 32}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SIZES, **SHORT, **ENDS, "num_key_value_heads": 2}


def decoder(config_class: str, **options) -> Callable:
    return lambda: hf.AutoModelForCausalLM.from_config(getattr(hf, config_class)(**options))


def classifier(config_class: str, **options) -> Callable:
    return lambda: hf.AutoModelForSequenceClassification.from_config(getattr(hf, config_class)(**options, num_labels=3))


def seq2seq(config_class: str, **options) -> Callable:
    return lambda: hf.AutoModelForSeq2SeqLM.from_config(getattr(hf, config_class)(**options, decoder_start_token_id=0))


def encoder(config_class: str, **options) -> Callable:
    return classifier(config_class, **{**SIZES, **SHORT, "type_vocab_size": 1, **options})


def gpt(config_class: str, **options) -> Callable:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return decoder(config_class, **{**sizes, **ENDS, **options})


def bart_like(config_class: str, **options) -> Callable:
    sizes = {
        "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 32,
    }  # fmt: skip
    return seq2seq(config_class, **{**sizes, **ENDS, **options})


def t5_like(config_class: str) -> Callable:
    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}
    return seq2seq(config_class, **sizes)


def gemma3():
    """The multimodal config, with a vision tower whose projections have the text model's names."""
    text = {**GROUPED, "head_dim": 16}
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return hf.Gemma3ForConditionalGeneration(config)


ARCHITECTURES: dict[str, Callable] = {
    "bert": encoder("BertConfig"),
    "roberta": encoder("RobertaConfig", pad_token_id=1),
    "xlm-roberta": encoder("XLMRobertaConfig", pad_token_id=1),
    "camembert": encoder("CamembertConfig", pad_token_id=1),
    "electra": encoder("ElectraConfig", embedding_size=64),
    "albert": encoder("AlbertConfig", embedding_size=64),
    "deberta": encoder("DebertaConfig"),
    "deberta-v2": encoder("DebertaV2Config"),
    "mpnet": encoder("MPNetConfig", pad_token_id=1),
    "modernbert": encoder("ModernBertConfig", global_attn_every_n_layers=2, **ENDS),
    "distilbert": classifier(
        "DistilBertConfig",
        vocab_size=VOCABULARY,
        dim=64,
        hidden_dim=128,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=32,
    ),
    "gpt2": gpt("GPT2Config"),
    "gptj": gpt("GPTJConfig", rotary_dim=8),
    "codegen": gpt("CodeGenConfig", rotary_dim=8, n_ctx=32),
    "gpt_bigcode": gpt("GPTBigCodeConfig"),
    "gpt_neo": decoder(
        "GPTNeoConfig",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        **ENDS,
    ),
    "gpt_neox": decoder("GPTNeoXConfig", **SIZES, **SHORT, **ENDS),
    "bloom": decoder("BloomConfig", vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, **ENDS),
    "falcon": decoder("FalconConfig", **SIZES, **ENDS, alibi=False),
    "mpt": decoder("MptConfig", vocab_size=VOCABULARY, d_model=64, n_heads=4, n_layers=2, max_seq_len=32),
    "opt": decoder(
        "OPTConfig",
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=32,
        **ENDS,
    ),
    "llama": decoder("LlamaConfig", **GROUPED),
    "llama4_text": decoder(
        "Llama4TextConfig", **GROUPED, head_dim=16, intermediate_size_mlp=128, num_local_experts=2, moe_layers=[]
    ),
    "mistral": decoder("MistralConfig", **GROUPED),
    "mixtral": decoder("MixtralConfig", **GROUPED, num_local_experts=2),
    "qwen2": decoder("Qwen2Config", **GROUPED),
    "qwen3": decoder("Qwen3Config", **GROUPED, head_dim=16),
    "qwen3_moe": decoder(
        "Qwen3MoeConfig", **GROUPED, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32
    ),
    "gemma": decoder("GemmaConfig", **GROUPED, head_dim=16),
    "gemma2": decoder("Gemma2Config", **GROUPED, head_dim=16),
    "gemma3_text": decoder("Gemma3TextConfig", **GROUPED, head_dim=16),
    "gemma3": gemma3,
    "phi": decoder("PhiConfig", **SIZES, **SHORT, **ENDS),
    "phi3": decoder("Phi3Config", **GROUPED),
    "stablelm": decoder("StableLmConfig", **GROUPED),
    "starcoder2": decoder("Starcoder2Config", **GROUPED),
    "olmo2": decoder("Olmo2Config", **GROUPED),
    "cohere": decoder("CohereConfig", **GROUPED),
    "granite": decoder("GraniteConfig", **GROUPED),
    "smollm3": decoder("SmolLM3Config", **GROUPED),
    "t5": t5_like("T5Config"),
    "mt5": t5_like("MT5Config"),
    "bart": bart_like("BartConfig"),
    "mbart": bart_like("MBartConfig"),
    "pegasus": bart_like("PegasusConfig"),
    "m2m_100": bart_like("M2M100Config"),
}


def made(kind: str) -> torch.nn.Module:
    """The same random model every time, in evaluation mode: nothing is dropped."""
    torch.manual_seed(0)
    return ARCHITECTURES[kind]().eval()


def task_type(model: torch.nn.Module) -> str:
    if model.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "SEQ_CLS" if "ForSequenceClassification" in type(model).__name__ else "CAUSAL_LM"


def loss(model: torch.nn.Module, task: str) -> torch.Tensor:
    """A training loss on two rows."""
    ids = torch.arange(3, 19).reshape(2, 8)
    labels = torch.tensor([0, 1]) if task == "SEQ_CLS" else ids
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
