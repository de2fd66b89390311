"""Models, tokenizers and data small enough to train in a test: made on the spot, from a seed."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GOOD = ("lovely", "warm", "bright", "funny")
BAD = ("dull", "cold", "grim", "flat")
PLAIN = tuple(f"w{index}" for index in range(20))
WORDS = (*GOOD, *BAD, *PLAIN, "user:", "assistant:", "say", "is")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "<end>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}assistant: "
    "{% generation %}{{ message['content'] + ' <end>' }}{% endgeneration %}{{ ' ' }}"
    "{% else %}{{ message['role'] + ': ' + message['content'] + ' <end> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tokenizer(*, encoder: bool = False, chat_template: str | None = None, pad_is_end: bool = False) -> Any:
    """One token a word. encoder adds [CLS] and [SEP]; pad_is_end makes the pad token the end-of-text token."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    words.decoder = decoders.Fuse()
    if encoder:
        words.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
        )
    special = {"unk_token": "[UNK]", "pad_token": "<end>" if pad_is_end else "[PAD]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if encoder else {"eos_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    fast.model_input_names = ["input_ids", *(["token_type_ids"] if encoder else []), "attention_mask"]
    fast.chat_template = chat_template
    return fast


def bert(folder: Path, layers: int = 2) -> Path:
    """A random BERT encoder without a head, and its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        initializer_range=0.2,  # at 0.02 attention is uniform and nothing is learned in a test's few steps
    )
    BertModel(config).save_pretrained(folder)
    tokenizer(encoder=True).save_pretrained(folder)
    return folder


def llama(folder: Path, *, chat_template: str | None = None, pad_is_end: bool = False) -> Path:
    """A random Llama, and its tokenizer."""
    torch.manual_seed(0)
    words = tokenizer(chat_template=chat_template, pad_is_end=pad_is_end)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,  # at 0.02 attention is uniform and nothing is learned in a test's few steps
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def reviews(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{"text", "label"}: the label is whether the two telling words of a text are good or bad."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = draw.choices(PLAIN, k=draw.randint(0, 5)) + draw.choices(GOOD if index % 2 else BAD, k=2)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": ("negative", "positive")[index % 2]})
    return rows


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """{"prompt", "response"}: the response repeats the prompt's last word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(PLAIN, k=draw.randint(1, 5))
        rows.append({"prompt": " ".join(["say", *words]), "response": words[-1]})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path
