"""Token ids, loss masks, truncation and padding."""

import pytest
from datasets import Dataset

from fastpeft.training.data import Columns
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import (
    IGNORED,
    Collator,
    encode_prompts,
    encode_texts,
    tokenise_causal_lm,
    tokenise_classification,
)
from tests.training import tiny

CONVERSATION = [
    {"role": "user", "content": "w1"},
    {"role": "assistant", "content": "w2"},
    {"role": "user", "content": "w3"},
    {"role": "assistant", "content": "w4 w5"},
]


def _causal(rows, columns, words, **options):
    return tokenise_causal_lm(Dataset.from_list(rows), columns, words, TextFormat(**options), "train")


def _trained_words(split, words, row=0):
    """The tokens of a row that have a loss."""
    return words.convert_ids_to_tokens([label for label in split.features[row]["labels"] if label != IGNORED])


def test_plain_text_has_a_loss_on_every_token_and_its_end():
    split = _causal([{"text": "w1 w2"}], Columns(text="text"), tiny.tokenizer())
    assert _trained_words(split, tiny.tokenizer()) == ["w1", "w2", "<end>"]


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_prompt_and_response_have_a_loss_on_the_response_and_its_end(pad_is_end):
    words = tiny.tokenizer(pad_is_end=pad_is_end)
    columns = Columns(prompt="prompt", response="response")
    split = _causal([{"prompt": "say w1", "response": "w2 w3"}], columns, words)
    assert words.convert_ids_to_tokens(split.features[0]["input_ids"]) == ["say", "w1", "w2", "w3", "<end>"]
    assert _trained_words(split, words) == ["w2", "w3", "<end>"]
    both = _causal([{"prompt": "say w1", "response": "w2 w3"}], columns, words, train_on_prompt=True)
    assert _trained_words(both, words) == ["say", "w1", "w2", "w3", "<end>"]


def test_the_prompt_of_a_prediction_is_the_prompt_of_training():
    columns = Columns(prompt="prompt", response="response")
    for template in (None, tiny.CHAT_TEMPLATE):
        words = tiny.tokenizer(chat_template=template)
        split = _causal([{"prompt": "say w1", "response": "w2 w3"}], columns, words)
        row = split.features[0]
        start = row["labels"].count(IGNORED)
        assert encode_prompts(["say w1"], words, TextFormat()) == [row["input_ids"][:start]]


def test_prompts_go_through_the_chat_template_where_there_is_one():
    words = tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE)
    columns = Columns(prompt="prompt", response="response")
    split = _causal([{"prompt": "say w1", "response": "w2"}], columns, words)
    rendered = ["user:", "say", "w1", "<end>", "assistant:", "w2", "<end>"]
    assert words.convert_ids_to_tokens(split.features[0]["input_ids"]) == rendered
    assert _trained_words(split, words) == ["w2", "<end>"]
    plain = _causal([{"prompt": "say w1", "response": "w2"}], columns, words, prompt_format="plain")
    assert words.convert_ids_to_tokens(plain.features[0]["input_ids"]) == ["say", "w1", "w2", "<end>"]
    with pytest.raises(ValueError, match="no chat template"):
        _causal([{"prompt": "a", "response": "b"}], columns, tiny.tokenizer(), prompt_format="chat")


def test_messages_have_a_loss_on_marked_turns_or_on_the_last():
    rows, columns = [{"messages": CONVERSATION}], Columns(messages="messages")
    marked = tiny.tokenizer(chat_template=tiny.MARKED_TEMPLATE)
    assert _trained_words(_causal(rows, columns, marked), marked) == ["w2", "<end>", "w4", "w5", "<end>"]
    unmarked = tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE)
    split = _causal(rows, columns, unmarked)
    assert _trained_words(split, unmarked) == ["w4", "w5", "<end>"]
    assert encode_prompts([CONVERSATION[:-1]], unmarked, TextFormat())[0] == split.features[0]["input_ids"][:-3]


def test_messages_that_are_none_are_named():
    words, columns = tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE), Columns(messages="messages")
    with pytest.raises(ValueError, match="train data, row 0: expected messages"):
        _causal([{"messages": [{"from": "user", "value": "a"}]}], columns, words)
    with pytest.raises(ValueError, match="no chat template"):
        _causal([{"messages": CONVERSATION}], columns, tiny.tokenizer())
    split = _causal([{"messages": CONVERSATION}, {"messages": CONVERSATION[:1]}], columns, words)
    assert (split.report.rows, split.report.empty_rows) == (1, 1)


def test_causal_truncation_is_counted_and_a_cut_response_dropped():
    rows = [
        {"prompt": "say w1", "response": "w2 w3 w4"},  # 6 tokens: 2 cut
        {"prompt": "say w1 w2 w3 w4", "response": "w2"},  # 7 tokens: 3 cut, with them the whole response
        {"prompt": "say", "response": "w2"},
        {"prompt": "say", "response": " "},
    ]
    split = _causal(rows, Columns(prompt="prompt", response="response"), tiny.tokenizer(), max_length=4)
    assert vars(split.report) == {
        "rows": 2,
        "truncated_rows": 2,
        "truncated_tokens": 5,
        "empty_rows": 1,
        "cut_response_rows": 1,
    }
    assert [len(ids) for ids in split.features["input_ids"]] == split.features["length"][:] == [4, 3]
    assert split.rows["prompt"][:] == ["say w1", "say"]
    with pytest.raises(ValueError, match="none of its 1 rows can be used"):
        _causal(rows[1:2], Columns(prompt="prompt", response="response"), tiny.tokenizer(), max_length=4)


def test_classification_rows_labels_and_truncation():
    words = tiny.tokenizer(encoder=True)
    rows = [
        {"text": "w1 w2 w3 w4", "label": "yes"},
        {"text": " ", "label": "no"},
        {"text": "w1", "label": None},
        {"text": "w5", "label": "no"},
    ]
    dataset, columns = Dataset.from_list(rows), Columns(text="text", label="label")
    split = tokenise_classification(dataset, columns, ["no", "yes"], words, TextFormat(max_length=5), "train")
    assert words.convert_ids_to_tokens(split.features[0]["input_ids"]) == ["[CLS]", "w1", "w2", "w3", "[SEP]"]
    assert split.features["labels"][:] == [1, 0]
    assert (split.report.rows, split.report.empty_rows) == (2, 2)
    assert (split.report.truncated_rows, split.report.truncated_tokens) == (1, 1)
    with pytest.raises(ValueError, match="train data, row 3: label 'no' is outside the range"):
        tokenise_classification(dataset, columns, ["never", "yes"], words, TextFormat(), "train")


def test_pairs_have_two_segments():
    features, report = encode_texts(["w1 w2"], ["w3"], tiny.tokenizer(encoder=True), 16)
    assert features["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]
    assert (features["length"], report.truncated_rows) == ([6], 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_position_even_if_the_pad_token_ends_texts(side):
    words = tiny.tokenizer(pad_is_end=True)
    words.padding_side = side
    split = _causal([{"text": "w1 w2"}, {"text": "w1"}], Columns(text="text"), words)
    batch = Collator(words)([split.features[0], split.features[1]])
    end, one = words.eos_token_id, words.convert_tokens_to_ids("w1")
    pad = {"ids": [end], "mask": [0], "labels": [IGNORED]}
    short = {"ids": [one, end], "mask": [1, 1], "labels": [one, end]}
    row = {name: pad[name] + short[name] if side == "left" else short[name] + pad[name] for name in pad}
    assert batch["input_ids"][1].tolist() == row["ids"]
    assert batch["attention_mask"][1].tolist() == row["mask"]
    assert batch["labels"][1].tolist() == row["labels"]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
