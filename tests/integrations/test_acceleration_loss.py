"""The part "loss": a causal language model's loss and gradients are the untouched model's, however it is wrapped and called."""

import inspect

import peft
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft.integrations.acceleration import restore
from fastpeft.integrations.acceleration.deferred_logits import DeferredLogits
from tests import tiny_models
from tests.integrations.causal_models import FAMILIES, batch, only_loss
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close


def step(model, **inputs):
    """loss, and every gradient by name."""
    model.train().zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(got, expected):
    assert_close("loss", got[0], expected[0], OTHER_ORDER_OF_SUMS)
    assert got[0].dtype == expected[0].dtype
    assert got[1].keys() == expected[1].keys()
    for name, grad in got[1].items():
        assert_close(name, grad, expected[1][name], GRADIENTS_THROUGH_A_MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_untouched_models(family):
    model = FAMILIES[family]()
    inputs = {
        "half": batch(),
        "by_count": batch() | {"num_items_in_batch": torch.tensor(17)},
        "nothing": batch("all") | {"num_items_in_batch": 5},
        "shifted": batch() | {"shift_labels": tiny_models.token_ids().roll(3, 1)},
    }
    expected = {name: step(model, **given) for name, given in inputs.items()}
    own, logits = type(model), tiny_models.logits(model.eval())
    ledger = only_loss(model)
    for name, given in inputs.items():
        assert_equal_steps(step(model, **given), expected[name])
    assert not ledger.fallbacks
    assert_bits_equal("logits in evaluation", tiny_models.logits(model.eval()), logits)
    restore(model)
    assert type(model) is own
    assert_bits_equal("loss", step(model, **batch())[0], expected["half"][0])


def test_all_labels_ignored_without_a_count_is_zero():
    """The untouched model's loss is NaN then."""
    model = tiny_models.llama()
    only_loss(model)
    loss, grads = step(model, **batch("all"))
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_bfloat16_and_autocast():
    for model, dtype in ((tiny_models.llama().bfloat16(), None), (tiny_models.llama(), torch.bfloat16)):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            expected = model.train()(**batch())
            only_loss(model)
            got = model(**batch())
        assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
        assert_bits_equal("logits", got.logits, expected.logits)
        assert_close("loss", got.loss, expected.loss, OTHER_ORDER_OF_SUMS)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any call returned, views left out."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, t.numel())
        return out


def test_a_step_never_holds_the_logits(monkeypatch):
    from fastpeft.ops import cross_entropy_torch

    monkeypatch.setattr(cross_entropy_torch, "ROWS", 16)
    ids = tiny_models.token_ids(4, 32)
    model = peft.get_peft_model(
        tiny_models.llama(vocab_size=997), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).train()
    counts, kept = {}, {}
    for name in ("untouched", "accelerated"):
        with Largest() as largest, SavedBytes(model) as saved:
            output = model(input_ids=ids, labels=ids)
            kept[name] = saved.total()
            output.loss.backward()
        counts[name] = largest.elements
        only_loss(model)
    assert counts["untouched"] >= ids.numel() * 997
    assert counts["accelerated"] < ids.numel() * 997 / 4
    dx = ids.numel() * 64
    assert kept["accelerated"] <= kept["untouched"] - (ids.numel() * 997 - dx) * 4


def _wraps(kind):
    """(model, is its loss without logits?)"""
    linears = ["q_proj", "v_proj"]
    if kind == "peft-lora":
        return peft.get_peft_model(
            tiny_models.llama(), peft.LoraConfig(target_modules=linears, task_type="CAUSAL_LM")
        ), True
    if kind == "peft-modules-to-save":
        config = peft.LoraConfig(target_modules=linears, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_models.llama(), config), True
    if kind == "peft-lora-on-the-head":
        config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_models.llama(), config), False
    if kind == "peft-prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_models.llama(), config), True
    if kind == "peft-prefix":
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        return peft.get_peft_model(tiny_models.llama(), config), True
    if kind == "injected":
        return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=linears), tiny_models.llama()), True
    options = {"modules_to_save": ["lm_head"]} if kind == "fastpeft-modules-to-save" else {}
    targets = ["lm_head"] if kind == "fastpeft-lora-on-the-head" else linears
    if kind == "fastpeft-prompt":
        return fastpeft.get_peft_model(tiny_models.llama(), fastpeft.PromptTuningConfig(num_virtual_tokens=3)), True
    config = fastpeft.LoraConfig(target_modules=targets, **options)
    return fastpeft.get_peft_model(tiny_models.llama(), config), targets == linears


@pytest.mark.parametrize(
    "kind",
    [
        "peft-lora",
        "peft-modules-to-save",
        "peft-lora-on-the-head",
        "peft-prompt",
        "peft-prefix",
        "injected",
        "fastpeft-lora",
        "fastpeft-modules-to-save",
        "fastpeft-lora-on-the-head",
        "fastpeft-prompt",
    ],
)
def test_wrapped_models(kind):
    model, without_logits = _wraps(kind)
    tiny_models.fill(model)
    expected = step(model, **batch())
    ledger = only_loss(model)
    assert_equal_steps(step(model, **batch()), expected)
    assert isinstance(dict.get(model(**batch()), "logits"), DeferredLogits) == without_logits
    assert bool(ledger.fallbacks) != without_logits
    if not without_logits:
        assert any("not a plain Linear" in why for _, why in ledger.fallbacks)


def test_an_adapter_that_is_off_uses_the_original_head():
    model, _ = _wraps("peft-modules-to-save")
    tiny_models.fill(model)
    model.train()
    with model.disable_adapter():
        expected = model(**batch()).loss
        only_loss(model)
        got = model(**batch())
    assert isinstance(dict.get(got, "logits"), DeferredLogits)
    assert_close("loss", got.loss, expected, OTHER_ORDER_OF_SUMS)


def _own_loss(model):
    model.loss_function = lambda logits, labels, **_: logits.sum()


FALLBACKS = {
    "return_dict": (lambda model: None, {"return_dict": False}, "return_dict=False"),
    "logits_to_keep": (lambda model: None, {"logits_to_keep": 12}, "logits_to_keep"),
    "loss_function": (_own_loss, {}, "not ForCausalLMLoss"),
    "hooks": (lambda model: model.lm_head.register_forward_hook(lambda *_: None), {}, "hooks"),
    "forward": (lambda model: setattr(model.lm_head, "forward", model.lm_head.forward), {}, "hooks"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_calls_that_need_the_models_own_forward_say_why(name):
    change, options, why = FALLBACKS[name]
    model = tiny_models.llama().train()
    change(model)
    expected = model(**batch(), **options)
    ledger = only_loss(model)
    got = model(**batch(), **options)
    assert type(got) is type(expected)
    assert_bits_equal("loss", got[0], expected[0])
    ((part, said),) = ledger.fallbacks
    assert part == "loss"
    assert why in said
    assert said in ledger.summary()


def test_evaluation_and_calls_without_labels_are_the_models_own():
    model = tiny_models.llama()
    ledger = only_loss(model)
    labelled, plain = batch(), {"input_ids": batch()["input_ids"]}
    with torch.no_grad():
        outputs = [model.train()(**labelled)]
    outputs += [model(**plain), model.eval()(**labelled)]
    for output in outputs:
        assert isinstance(dict.get(output, "logits"), torch.Tensor)
    assert model.generate(plain["input_ids"], max_new_tokens=2, do_sample=False).shape[1] == tiny_models.LENGTH + 2
    assert not ledger.fallbacks


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (tiny_models.bert, "not a causal language model's"),
        (tiny_models.t5, "not a causal language model's"),
        (tiny_models.mixtral, "no row for mixtral"),
    ],
)
def test_other_models_stay(make, why):
    model = make()
    own = type(model)
    assert why in only_loss(model).summary()
    assert type(model) is own


def test_a_forward_that_was_taken_before_restore_still_runs():
    """TRL keeps the bound method of a model that it patches."""
    model = tiny_models.llama().train()
    only_loss(model)
    taken = model.forward
    restore(model)
    assert_bits_equal("loss", taken(**batch()).loss, model(**batch()).loss)


def test_positional_arguments_and_the_signature():
    model = tiny_models.llama().train()
    signature, expected = inspect.signature(model.forward), model(**batch()).loss
    only_loss(model)
    assert inspect.signature(model.forward) == signature
    assert inspect.signature(type(model).forward).parameters.keys() >= {"labels", "kwargs"}
    given = batch()
    got = model(given["input_ids"], None, None, None, None, given["labels"])
    assert_close("loss", got.loss, expected, OTHER_ORDER_OF_SUMS)
    assert isinstance(dict.get(got, "logits"), DeferredLogits)


def test_compiled_it_gives_the_same():
    torch._dynamo.reset()
    model = tiny_models.small_llama()
    expected = step(model, **batch())
    only_loss(model)
    assert_equal_steps(step(torch.compile(model, backend="aot_eager"), **batch()), _compiled_names(expected))


def _compiled_names(result):
    return result[0], {f"_orig_mod.{name}": grad for name, grad in result[1].items()}


def _train(folder, model, batch_size, accumulation):
    """One update by transformers' Trainer over two texts of unequal lengths."""
    rows = []
    for length in (12, 4):
        ids = tiny_models.token_ids(1, length)[0]
        padded = torch.zeros(12, dtype=torch.long)
        padded[:length] = ids
        labels = torch.where(torch.arange(12) < length, padded, -100)
        rows.append({"input_ids": padded, "attention_mask": (labels != -100).long(), "labels": labels})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.model_accepts_loss_kwargs
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "labels"} <= set(trainer._signature_columns)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = trainer.train().training_loss
    return loss, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_accumulated_gradients_are_normalised_by_tokens(tmp_path):
    """A mean of means would give the short text's tokens three times the weight of the long one's."""
    torch.manual_seed(3)
    start = tiny_models.small_llama().state_dict()
    results = {}
    for accelerated in (False, True):
        for sizes in ((2, 1), (1, 2)):
            model = tiny_models.small_llama()
            model.load_state_dict(start)
            if accelerated:
                ledger = only_loss(model)
            results[accelerated, sizes] = _train(tmp_path, model, *sizes)
    assert not ledger.fallbacks
    loss, updates = results[False, (2, 1)]
    for case, (other_loss, other) in results.items():
        assert_close(f"loss {case}", torch.tensor(other_loss), torch.tensor(loss), OTHER_ORDER_OF_SUMS)
        for name, update in other.items():
            assert_close(f"{name} {case}", update, updates[name], GRADIENTS_THROUGH_A_MODEL)


def test_compiled_with_adapters_it_is_one_graph():
    """Half of the labels are ignored: a compiled loss of Liger's once divided by all of them (Liger-Kernel #1338)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        tiny_models.small_llama(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    untouched = step(model, **batch())
    fastpeft.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal_steps(step(compiled, **batch()), _compiled_names(untouched))
    assert_equal_steps(step(compiled, **batch()), _compiled_names(step(model, **batch())))
    output = compiled(**batch())
    assert isinstance(dict.get(output, "logits"), DeferredLogits)
    assert_close("logits", output.logits, model(**batch()).logits, GRADIENTS_THROUGH_A_MODEL)
    output = compiled(**batch())
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    with pytest.raises(RuntimeError, match="before the head's weight changes"):
        _ = output.logits
