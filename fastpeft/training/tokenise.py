"""Rows -> token ids, labels and what was cut: classification and causal LM, and the collator that pads them.

Padding is never recognised by its id: labels of padded positions are -100 and the attention mask is 0 because the position
was added by the collator, so a tokenizer whose pad token is its end-of-text token trains like any other.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from datasets import Dataset

from fastpeft.training.data import Columns
from fastpeft.training.labels import is_missing, label_index
from fastpeft.training.text_format import TextFormat

IGNORED = -100
"""Label of a token without a loss (PyTorch's ignore_index)."""


@dataclass
class SplitReport:
    """What became of the rows of one split; truncated_tokens is the number of tokens that were cut off."""

    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    empty_rows: int = 0
    cut_response_rows: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass
class PreparedSplit:
    """Tokenised rows (`features`), the source rows they came from in the same order (`rows`), and the report."""

    features: Dataset
    rows: Dataset
    report: SplitReport = field(default_factory=SplitReport)


def tokenise_classification(
    dataset: Dataset, columns: Columns, labels: Sequence[str], tokenizer: Any, text_format: TextFormat, split: str
) -> PreparedSplit:
    """Features input_ids, attention_mask, (token_type_ids,) labels, length. Rows without text or label are dropped.

    Raises:  ValueError for a label that is not among `labels`, naming the row
    """
    texts = [_text(value) for value in dataset[columns.text]]
    values = dataset[columns.label]
    kept = [row for row, text in enumerate(texts) if text.strip() and not is_missing(values[row])]
    _require_rows(split, kept, len(texts))
    rows = dataset.select(kept, keep_in_memory=True)
    pairs = [_text(value) for value in rows[columns.text_pair]] if columns.text_pair else None
    features, report = encode_texts([texts[row] for row in kept], pairs, tokenizer, text_format.max_length)
    features["labels"] = [label_index(values[row], labels, f"{split} data, row {row}") for row in kept]
    report.empty_rows = len(texts) - len(kept)
    return PreparedSplit(Dataset.from_dict(features), rows, report)


def encode_texts(
    texts: list[str], pairs: list[str] | None, tokenizer: Any, max_length: int
) -> tuple[dict[str, list], SplitReport]:
    """Token ids of whole texts (or pairs) with the tokenizer's special tokens, cut to max_length, and what was cut."""
    options = {"add_special_tokens": True, "return_length": False, "verbose": False}
    whole = tokenizer(texts, pairs, **options)
    lengths = [len(ids) for ids in whole["input_ids"]]
    over = [row for row, length in enumerate(lengths) if length > max_length]
    features = {name: list(whole[name]) for name in whole}
    if over:
        some_pairs = [pairs[row] for row in over] if pairs else None
        cut = tokenizer([texts[row] for row in over], some_pairs, truncation=True, max_length=max_length, **options)
        for name in features:
            for index, row in enumerate(over):
                features[name][row] = cut[name][index]
    features["length"] = [len(ids) for ids in features["input_ids"]]
    removed = sum(lengths) - sum(features["length"])
    return features, SplitReport(rows=len(texts), truncated_rows=len(over), truncated_tokens=removed)


def tokenise_causal_lm(
    dataset: Dataset, columns: Columns, tokenizer: Any, text_format: TextFormat, split: str
) -> PreparedSplit:
    """Features input_ids, attention_mask, labels, length; labels are -100 where a token has no loss.

    text: loss on every token. prompt + response: on the response and its end. messages: on the assistant turns where
    the chat template marks them ({% generation %}), else on the last assistant turn. train_on_prompt: on every token.
    Rows that are empty, or whose response is cut off as a whole, are dropped and counted.
    """
    if columns.messages:
        kept, encoded = _encode_messages(dataset[columns.messages], tokenizer, split)
    elif columns.response:
        kept, encoded = _encode_pairs(dataset[columns.prompt], dataset[columns.response], tokenizer, text_format)
    else:
        kept, encoded = _encode_plain(dataset[columns.text], tokenizer)
    report = SplitReport(empty_rows=len(dataset) - len(kept))
    features: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": [], "length": []}
    used = []
    for row, (ids, has_loss) in zip(kept, encoded, strict=True):
        removed = max(0, len(ids) - text_format.max_length)
        report.truncated_rows += removed > 0
        report.truncated_tokens += removed
        ids, has_loss = ids[: text_format.max_length], has_loss[: text_format.max_length]
        if text_format.train_on_prompt:
            has_loss = [True] * len(ids)
        if not any(has_loss[1:]):
            report.cut_response_rows += 1
            continue
        used.append(row)
        features["input_ids"].append(ids)
        features["attention_mask"].append([1] * len(ids))
        features["labels"].append([token if wanted else IGNORED for token, wanted in zip(ids, has_loss, strict=True)])
        features["length"].append(len(ids))
    _require_rows(split, used, len(dataset))
    report.rows = len(used)
    return PreparedSplit(Dataset.from_dict(features), dataset.select(used, keep_in_memory=True), report)


def render_prompt(prompt: Any, tokenizer: Any, text_format: TextFormat) -> str:
    """The text a response follows: of a prompt, or of chat messages that end before the assistant's turn."""
    if not isinstance(prompt, str):
        return _render(tokenizer, list(prompt), add_generation_prompt=True)
    if text_format.is_chat(tokenizer):
        return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    return prompt + text_format.separator


def encode_prompts(prompts: Sequence[Any], tokenizer: Any, text_format: TextFormat) -> list[list[int]]:
    """Token ids of rendered prompts: exactly the ids a response followed in training."""
    texts = [render_prompt(prompt, tokenizer, text_format) for prompt in prompts]
    special = [isinstance(prompt, str) and not text_format.is_chat(tokenizer) for prompt in prompts]
    return [_prompt_ids(tokenizer, text, add) for text, add in zip(texts, special, strict=True)]


class Collator:
    """Pads features to the longest row of a batch, on the tokenizer's padding side, and makes tensors.

    input_ids are padded with the pad token's id (any id serves where there is none: it is masked), attention_mask with 0,
    labels of tokens with -100. Columns a model does not know (length) are left out.
    """

    def __init__(self, tokenizer: Any):
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.left = tokenizer.padding_side == "left"
        self.fill = {
            "input_ids": pad_id if pad_id is not None else 0,
            "attention_mask": 0,
            "token_type_ids": 0,
            "labels": IGNORED,
        }

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in features)
        batch = {}
        for name in self.fill:
            if name not in features[0]:
                continue
            values = [row[name] for row in features]
            if not isinstance(values[0], int):
                values = [self._padded(list(value), longest, self.fill[name]) for value in values]
            batch[name] = torch.tensor(values, dtype=torch.long)
        return batch

    def left_padded(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask of prompts that are to be continued."""
        longest = max(map(len, prompts))
        fill = self.fill["input_ids"]
        return {
            "input_ids": torch.tensor([[fill] * (longest - len(row)) + row for row in prompts]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts]),
        }

    def _padded(self, values: list[int], length: int, fill: int) -> list[int]:
        padding = [fill] * (length - len(values))
        return padding + values if self.left else values + padding


def _encode_plain(texts: Sequence[Any], tokenizer: Any):
    texts = [_text(value) for value in texts]
    kept = [row for row, text in enumerate(texts) if text.strip()]
    whole = tokenizer([texts[row] for row in kept], verbose=False)["input_ids"] if kept else []
    ended = [_with_end(ids, tokenizer) for ids in whole]
    return kept, [(ids, [True] * len(ids)) for ids in ended]


def _encode_pairs(prompts: Sequence[Any], responses: Sequence[Any], tokenizer: Any, text_format: TextFormat):
    prompts, responses = [_text(value) for value in prompts], [_text(value) for value in responses]
    kept = [row for row, response in enumerate(responses) if response.strip()]
    if text_format.is_chat(tokenizer):
        turns = [_turns(prompts[row], responses[row]) for row in kept]
        return kept, [_last_turn(messages, tokenizer) for messages in turns]
    encoded = []
    for row in kept:
        prompt = _prompt_ids(tokenizer, prompts[row] + text_format.separator, add_special_tokens=True)
        response = _with_end(tokenizer(responses[row], add_special_tokens=False, verbose=False)["input_ids"], tokenizer)
        encoded.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return kept, encoded


def _encode_messages(conversations: Sequence[Any], tokenizer: Any, split: str):
    if not tokenizer.chat_template:
        raise ValueError("chat messages: the tokenizer has no chat template; give prompt and response columns instead")
    kept, encoded = [], []
    marks_turns = "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template
    for row, messages in enumerate(conversations):
        messages = check_messages(messages, f"{split} data, row {row}")
        if any(message["role"] == "assistant" for message in messages):
            kept.append(row)
            encoded.append(_marked_turns(messages, tokenizer) if marks_turns else _last_turn(messages, tokenizer))
    return kept, encoded


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """The messages as [{"role", "content"}, ...]. Raises ValueError if they are anything else."""
    messages = list(messages) if isinstance(messages, (list, tuple)) else []
    for message in messages or [None]:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'{where}: expected messages as [{{"role": ..., "content": ...}}, ...], got {message!r}')
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _marked_turns(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, with a loss on what the template marks as generated by the assistant."""
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]


def _last_turn(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids of a conversation up to its last assistant turn, with a loss on what that turn adds to the prompt."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    prompt = _render(tokenizer, messages[:last], add_generation_prompt=True)
    whole = _render(tokenizer, messages[: last + 1])
    shared = next((at for at, (left, right) in enumerate(zip(prompt, whole)) if left != right), len(prompt))
    prompt = whole[:shared]
    before = _prompt_ids(tokenizer, prompt, add_special_tokens=False)
    turn = tokenizer(whole[len(prompt) :], add_special_tokens=False, verbose=False)["input_ids"]
    return before + turn, [False] * len(before) + [True] * len(turn)


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _prompt_ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of a text that something follows: without the end-of-text token some tokenizers append."""
    ids = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    ends = add_special_tokens and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if ends else ids


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _require_rows(split: str, kept: Sequence[int], total: int) -> None:
    if not kept:
        raise ValueError(f"{split} data: none of its {total} rows can be used; they are empty or cut off by max_length")
