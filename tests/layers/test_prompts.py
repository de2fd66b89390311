"""What a prompt does to a model's arguments, by task type: logits, losses and gradients are PEFT's, or plain code's."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

import fastpeft
from tests import tiny_models
from tests.tolerance import (
    GRADIENTS_THROUGH_A_MODEL,
    LOGITS_EQUAL_TO_PEFT,
    OTHER_ORDER_OF_SUMS,
    assert_bits_equal,
    assert_close,
)

T = 3
KINDS = {
    "prompt": ("PromptTuningConfig", {}),
    "encoder": ("PromptEncoderConfig", {"encoder_hidden_size": 12}),
    "lstm": (
        "PromptEncoderConfig",
        {"encoder_hidden_size": 5, "encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1},
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 7}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
}


def config(library, kind, task_type, **options):
    name, more = KINDS[kind]
    return getattr(library, name)(task_type=task_type, num_virtual_tokens=T, **more | options)


def bert(head="SequenceClassification"):
    settings = tiny_models._bert_config()
    settings.num_labels = 2 if head == "QuestionAnswering" else 3
    return getattr(transformers, f"BertFor{head}")(settings)


MODELS = {
    "CAUSAL_LM": tiny_models.llama,
    "SEQ_CLS": bert,
    "TOKEN_CLS": lambda: bert("TokenClassification"),
    "QUESTION_ANS": lambda: bert("QuestionAnswering"),
    "FEATURE_EXTRACTION": lambda: transformers.BertModel(tiny_models._bert_config()),
    "SEQ_2_SEQ_LM": tiny_models.t5,
}


def base(task_type):
    torch.manual_seed(0)
    return MODELS[task_type]().eval()


def padded():
    """Token ids [2, 12] and a mask with padding on the right of the first row."""
    ids = tiny_models.token_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair(kind, task_type, model=None):
    """The same adapter under PEFT and here: PEFT's values, copied by name."""
    model = base(task_type) if model is None else model
    theirs = peft.get_peft_model(copy.deepcopy(model), config(peft, kind, task_type)).eval()
    ours = fastpeft.get_peft_model(model, config(fastpeft, kind, task_type)).eval()
    values = {name_here(name): parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    trained = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert set(values) == set(trained)
    for name, parameter in trained.items():
        parameter.data.copy_(values[name])
    return theirs, ours, values, trained


def name_here(name):
    """PEFT's parameter name -> ours: PEFT's prompt models hold the base without a tuner between."""
    name = name.replace("prompt_encoder.", "base_model.prompts.", 1)
    return name if ".prompts." in name else name.replace("base_model.", "base_model.model.", 1)


def outputs_of(result):
    return [value for value in result.to_tuple() if isinstance(value, torch.Tensor) and value.dim() > 0]


EQUAL_TO_PEFT = [
    (kind, task_type)
    for kind in KINDS
    for task_type in MODELS
    if not (
        kind in ("prefix", "projected") and task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
    )  # peft 0.21.2 fails there
    and not (kind == "multitask" and task_type in ("QUESTION_ANS", "FEATURE_EXTRACTION"))  # it passes no task_ids on
]


@pytest.mark.parametrize(("kind", "task_type"), EQUAL_TO_PEFT)
def test_logits_and_gradients_of_every_task_type_are_pefts(kind, task_type):
    theirs, ours, values, trained = pair(kind, task_type)
    given = padded()
    if task_type == "SEQ_2_SEQ_LM":
        given["labels"] = given["input_ids"][:, :5].contiguous()
    if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        given["token_type_ids"] = (given["input_ids"] > 40).long()
    if kind == "multitask":
        given["task_ids"] = torch.tensor([2, 0])
    results = [wrapped(**given) for wrapped in (ours, theirs)]
    for index, (got, expected) in enumerate(zip(*map(outputs_of, results), strict=True)):
        assert_close(f"output {index}", got, expected, LOGITS_EQUAL_TO_PEFT)
        assert got.numel()
    for result in results:
        sum(output.float().square().mean() for output in outputs_of(result)[:2]).mul(64).backward()
    for name, parameter in trained.items():
        if values[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert_close(name, parameter.grad, values[name].grad, GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_losses_are_pefts(kind, task_type):
    if kind in ("prefix", "projected") and task_type == "SEQ_CLS":
        pytest.skip("peft 0.21.2 has no prefix for BERT with transformers 5.23")
    theirs, ours, *_ = pair(kind, task_type)
    given = padded()
    given["labels"] = torch.tensor([1, 2]) if task_type == "SEQ_CLS" else given["input_ids"].clone()
    if kind == "multitask":
        given["task_ids"] = torch.tensor([1, 1])
    assert_close("loss", ours(**given).loss, theirs(**given).loss, LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize("kind", ["prompt", "encoder"])
def test_labels_of_token_classification_are_those_of_the_tokens(kind):
    """PEFT leaves the labels S long beside logits T + S long, and fails."""
    _, ours, *_ = pair(kind, "TOKEN_CLS")
    given = padded()
    labels = given["input_ids"] % 3
    result = ours(**given, labels=labels)
    expected = F.cross_entropy(result.logits[:, T:].reshape(-1, 3), labels.reshape(-1))
    assert_close("loss", result.loss, expected, OTHER_ORDER_OF_SUMS)


def test_positions_of_question_answering_are_those_of_the_tokens():
    _, ours, *_ = pair("prompt", "QUESTION_ANS")
    given, start, end = padded(), torch.tensor([2, 5]), torch.tensor([4, 5])
    result = ours(**given, start_positions=start, end_positions=end)
    expected = (F.cross_entropy(result.start_logits, start + T) + F.cross_entropy(result.end_logits, end + T)) / 2
    assert_close("loss", result.loss, expected, OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("kind", ["prefix", "projected"])
@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_before_an_encoders_keys(kind, task_type, attention):
    """Against plain attention with the prefix's keys and values, layer by layer; a padded row is the row without padding."""
    model = base(task_type)
    model.set_attn_implementation(attention)
    ours = fastpeft.get_peft_model(model, config(fastpeft, kind, task_type)).eval()
    tiny_models.fill(ours, std=1.0)
    plain = ours.get_base_model()
    given = padded()
    prefix = ours.base_model.prompts["default"].prompt_embeddings().view(T, 2 * 2, 4, 16).permute(1, 2, 0, 3)
    for row, length in ((0, 9), (1, 12)):
        x = plain.bert.embeddings(
            given["input_ids"][row : row + 1, :length], position_ids=torch.arange(T, T + length)[None]
        )
        for index, layer in enumerate(plain.bert.encoder.layer):
            own = layer.attention.self
            q, k, v = (f(x).view(length, 4, 16).transpose(0, 1) for f in (own.query, own.key, own.value))
            keys, values = torch.cat([prefix[2 * index], k], 1), torch.cat([prefix[2 * index + 1], v], 1)
            mixed = torch.softmax(q @ keys.transpose(1, 2) / 4, -1) @ values
            attended = layer.attention.output(mixed.transpose(0, 1).reshape(1, length, 64), x)
            x = layer.output(layer.intermediate(attended), attended)
        expected = plain.classifier(plain.bert.pooler(x) if task_type == "SEQ_CLS" else x)
        got = ours(**given).logits[row : row + 1]
        assert_close(
            f"row {row}", got if task_type == "SEQ_CLS" else got[:, :length], expected, OTHER_ORDER_OF_SUMS * 4
        )
    full = ours(input_ids=given["input_ids"]).logits[1]
    assert_close("no mask", full, ours(**given).logits[1], OTHER_ORDER_OF_SUMS)


@pytest.mark.parametrize("heads", [4, 2, 1], ids=["as_queries", "grouped", "one"])
def test_a_prefix_has_the_sizes_of_the_keys(heads):
    model = tiny_models.llama(num_key_value_heads=heads, head_dim=24)
    ours = fastpeft.get_peft_model(model, config(fastpeft, "prefix", "CAUSAL_LM"))
    theirs = peft.get_peft_model(
        tiny_models.llama(num_key_value_heads=heads, head_dim=24), config(peft, "prefix", "CAUSAL_LM")
    )
    for field in (
        "token_dim",
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "encoder_hidden_size",
    ):
        assert getattr(ours.active_peft_config, field) == getattr(theirs.active_peft_config, field), field
    assert ours.active_peft_config.token_dim == heads * 24


def mistral(window):
    settings = transformers.MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    return transformers.MistralForCausalLM(settings).eval()


@pytest.mark.parametrize(
    "model", [lambda: mistral(5), lambda: mistral(2), tiny_models.gemma3], ids=["w5", "w2", "gemma3"]
)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_sliding_windows(model, kind):
    """Windows shorter than the input, than the prefix, and Gemma 3's embeddings, which are scaled: as PEFT."""
    torch.manual_seed(0)
    theirs, ours, *_ = pair(kind, "CAUSAL_LM", model().eval())
    given = padded()
    assert_close("logits", ours(**given).logits, theirs(**given).logits, LOGITS_EQUAL_TO_PEFT)


CLASSIFIERS = {
    "llama": lambda: transformers.LlamaForSequenceClassification(tiny_models.llama(pad_token_id=0).config),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(tiny_models.gpt2(pad_token_id=0).config),
}


@pytest.mark.parametrize("make", CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_decoder_classifies_by_the_last_token(make, kind):
    """A row with padding after it has the logits of the row alone; PEFT, given embeddings, reads the padding."""
    torch.manual_seed(0)
    model = make().eval()
    model.config.pad_token_id = 0
    ids = tiny_models.token_ids() + 1
    if kind == "prompt":
        theirs, ours, *_ = pair(kind, "SEQ_CLS", model)
        assert_close("logits", ours(ids).logits, theirs(ids).logits, LOGITS_EQUAL_TO_PEFT)
        left = torch.ones_like(ids)
        left[0, :4] = 0
        expected = theirs(input_ids=ids, attention_mask=left).logits
        assert_close("padded before", ours(input_ids=ids, attention_mask=left).logits, expected, LOGITS_EQUAL_TO_PEFT)
    else:
        ours = fastpeft.get_peft_model(model, config(fastpeft, kind, "SEQ_CLS")).eval()
    alone = ours(ids[:1, :7]).logits
    padded_ids, mask = ids.clone(), torch.ones_like(ids)
    padded_ids[0, 7:], mask[0, 7:] = 0, 0
    got = ours(input_ids=padded_ids, attention_mask=mask).logits
    assert_close("padded after", got[:1], alone, OTHER_ORDER_OF_SUMS)
    assert_close("not padded", got[1:], ours(ids[1:]).logits, OTHER_ORDER_OF_SUMS)
    assert not ours.get_base_model().score._forward_pre_hooks


def test_position_ids_go_on_after_a_prefix_and_mean_nothing_after_a_prompt():
    given = padded()
    positions = torch.arange(12)[None].expand(2, -1)
    for kind in ("prefix", "prompt"):
        _, ours, *_ = pair(kind, "CAUSAL_LM")
        expected = ours(**given).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = ours(**given, position_ids=positions).logits
        assert_bits_equal(kind, got, expected)
        said = [str(w.message) for w in caught if "position_ids" in str(w.message)]
        assert bool(said) == (kind == "prompt")


def test_arguments_by_place_and_embeddings_instead_of_tokens():
    given = padded()
    for kind in ("prompt", "prefix"):
        _, ours, *_ = pair(kind, "CAUSAL_LM")
        expected = ours(**given).logits
        assert_bits_equal("by place", ours(given["input_ids"], given["attention_mask"]).logits, expected)
        embedded = ours.get_base_model().get_input_embeddings()(given["input_ids"])
        got = ours(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits
        assert_bits_equal("embedded", got, expected)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_half_precision_base_keeps_the_prompt_in_float32(kind):
    model = base("CAUSAL_LM").to(torch.bfloat16)
    ours = fastpeft.get_peft_model(model, config(fastpeft, kind, "CAUSAL_LM"))
    result = ours(**padded())
    assert result.logits.dtype == torch.bfloat16
    result.logits.float().square().mean().backward()
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert [p.dtype for p in trained] == [torch.float32]
    assert trained[0].grad.isfinite().all()
    assert trained[0].grad.abs().sum() > 0


def test_what_a_prompt_does_not_take():
    _, ours, *_ = pair("prompt", "CAUSAL_LM")
    ids = tiny_models.token_ids()
    with pytest.raises(ValueError, match="expected input_ids or inputs_embeds"):
        ours(attention_mask=torch.ones(2, 12))
    with pytest.raises(NotImplementedError, match=r"attention_mask: expected \[B, S\]"):
        ours(input_ids=ids, attention_mask=torch.ones(2, 1, 12, 12))
    cache = ours.get_base_model()(ids).cache
    with pytest.raises(NotImplementedError, match="expected no filled cache"):
        ours(input_ids=ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="have a prompt"):
        ours(input_ids=ids, adapter_names=["default", "__base__"])


def test_every_row_of_a_multitask_prompt_names_its_task():
    _, ours, *_ = pair("multitask", "CAUSAL_LM")
    ids = tiny_models.token_ids()
    for task_ids in (None, torch.tensor([0]), torch.tensor([0, 3]), torch.tensor([-1, 0])):
        with pytest.raises(ValueError, match="task_ids: expected"):
            ours(input_ids=ids, task_ids=task_ids)
    first, second = (ours(input_ids=ids, task_ids=torch.tensor(order)).logits for order in ([0, 1], [1, 0]))
    assert not torch.equal(first, second)
    prompt = ours.base_model.prompts["default"]
    expected = prompt.embedding.weight.double() * (
        prompt.prefix_task_cols[2].double() @ prompt.prefix_task_rows[2].double()
    )
    assert_close("prompt of task 2", prompt.vectors(1, torch.tensor([2]))[0], expected.float(), OTHER_ORDER_OF_SUMS)
    with ours.disable_adapter():
        plain = ours(input_ids=ids, task_ids=torch.tensor([0, 1])).logits
    assert_bits_equal("disabled", plain, base("CAUSAL_LM")(ids).logits)
