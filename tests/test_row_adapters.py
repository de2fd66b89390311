"""adapter_names: a batch whose items go through different adapters, against one call per adapter; as PEFT's mixed batches."""

import pytest
import torch

from fastpeft import LoraConfig, get_peft_model
from tests import tiny_models
from tests.tolerance import LOGITS_EQUAL_TO_PEFT, OTHER_ORDER_OF_SUMS, assert_bits_equal, assert_close

IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [7, 8, 9, 7, 8], [2, 2, 2, 2, 2]])
NAMES = ["a", "__base__", "b", "a"]
TARGETS = ["q_proj", "v_proj", "up_proj", "embed_tokens"]


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def two_adapters(**options):
    torch.manual_seed(0)  # every call gives the same model
    model = get_peft_model(tiny_models.llama(), LoraConfig(r=4, target_modules=TARGETS), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=7, lora_alpha=3, **{"target_modules": ["q_proj", "gate_proj"], **options}))
    randomise(model)
    return model.eval()


def one_by_one(model, ids=IDS, names=NAMES):
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(input_ids=row[None]).logits)
        else:
            model.set_adapter(name)
            rows.append(model(input_ids=row[None]).logits)
    return torch.cat(rows)


def test_every_item_goes_through_its_adapter():
    model = two_adapters()
    expected = one_by_one(model)
    got = model(input_ids=IDS, adapter_names=NAMES).logits
    assert_close("logits", got, expected, LOGITS_EQUAL_TO_PEFT)
    model.set_adapter("a")
    before = model(input_ids=IDS).logits
    model(input_ids=IDS, adapter_names=NAMES)
    assert_bits_equal("afterwards", model(input_ids=IDS).logits, before)


def test_peft_computes_the_same(tmp_path):
    import peft

    model = two_adapters()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    theirs.eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS, adapter_names=NAMES).logits
        got = model(input_ids=IDS, adapter_names=NAMES).logits
    assert_close("logits", got, expected, LOGITS_EQUAL_TO_PEFT)


def test_gradients_are_those_of_the_items_of_an_adapter():
    model = two_adapters(target_modules=TARGETS)
    model.set_adapter(["a", "b"])
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(input_ids=IDS, labels=IDS, adapter_names=NAMES).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    for row, name in zip(IDS, NAMES, strict=True):
        if name != "__base__":
            model.set_adapter(name)  # the others are frozen meanwhile and keep what they have
            model(input_ids=row[None]).logits.square().sum().backward()
    assert set(got) == {name for name, p in trained.items() if p.grad is not None}
    for name, gradient in got.items():
        assert_close(name, gradient, trained[name].grad, OTHER_ORDER_OF_SUMS)


def test_generation_names_adapters_too():
    model = two_adapters()
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=IDS, adapter_names=NAMES, **settings)
    for row, name, answer in zip(IDS, NAMES, together, strict=True):
        alone = model.generate(input_ids=row[None], adapter_names=[name], **settings)
        assert torch.equal(alone[0], answer)
    beams = model.generate(input_ids=IDS[:2], adapter_names=["a", "b"], num_beams=2, **settings)
    assert beams.shape[0] == 2


def test_copies_of_modules_follow_the_names():
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_models.bert(), LoraConfig(r=2, **config), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=3, **config))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.b" in name:
                parameter.add_(1.0)
    model.eval()
    got = model(input_ids=IDS, adapter_names=NAMES).logits
    assert_close("logits", got, one_by_one(model), LOGITS_EQUAL_TO_PEFT)


def test_a_quantised_base():
    import fastpeft

    model = fastpeft.quantize(tiny_models.llama(), "nf4", compute_dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    randomise(model)
    model.eval()
    assert_close("logits", model(input_ids=IDS, adapter_names=NAMES).logits, one_by_one(model), LOGITS_EQUAL_TO_PEFT)


@pytest.mark.parametrize(
    ("names", "said"), [(["a", "c", "a", "a"], "got ['c']"), (["a", "b", "a"], "each of 4 items, got 3")]
)
def test_bad_names_are_named(names, said):
    model = two_adapters()
    with pytest.raises(ValueError) as caught:
        model(input_ids=IDS, adapter_names=names)
    assert said in str(caught.value)
    model(input_ids=IDS)  # nothing stuck


def test_what_cannot_be_mixed_is_refused():
    model = two_adapters()
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="gradient checkpointing"):
        model(input_ids=IDS, adapter_names=NAMES)
    dropping = two_adapters(lora_dropout=0.5).train()
    with pytest.raises(NotImplementedError, match=r"lora_dropout=0.5 of 'b'"):
        dropping(input_ids=IDS, adapter_names=NAMES)
    dora = two_adapters(use_dora=True)
    with pytest.raises(NotImplementedError, match="DoRA"):
        dora(input_ids=IDS, adapter_names=NAMES)
    biased = two_adapters(bias="all", target_modules=["q_proj"])
    if any("bias" in name for name, _ in biased.named_parameters()):
        with pytest.raises(NotImplementedError, match="trained biases"):
            biased(input_ids=IDS, adapter_names=NAMES)
