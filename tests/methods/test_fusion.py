"""Adapter fusion in models: it learns which adapter is right, trains nothing else, and needs its adapters."""

import json
from typing import ClassVar

import peft
import pytest
import torch
import torch.nn.functional as F

import fastpeft
from fastpeft import BottleneckConfig, FusionConfig, LoraConfig, NoTargetError, PeftModel, get_peft_model
from fastpeft.layers.bottleneck import BottleneckAdapter, BottleneckSettings
from tests import tiny_models
from tests.tiny_models import bits, fill, logits, token_ids
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, LOGITS_EQUAL_TO_PEFT, assert_bits_equal, assert_close

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
MODELS = {"llama": tiny_models.llama, "gpt2": tiny_models.gpt2, "bert": tiny_models.bert, "t5": tiny_models.t5}


def two_adapters(make=tiny_models.llama, model=None, **options) -> PeftModel:
    """A model with adapters a and b that do something."""
    torch.manual_seed(0)
    wrapped = get_peft_model(make() if model is None else model, BottleneckConfig(bottleneck_size=4, **options), "a")
    wrapped.add_adapter("b", BottleneckConfig(bottleneck_size=6, **options))
    for name in "ab":
        wrapped.set_adapter(name)
        fill(wrapped, seed=ord(name), std=0.2)
    return wrapped.eval()


def fused(*args, **options) -> PeftModel:
    wrapped = two_adapters(*args, **options)
    wrapped.add_adapter("mix", FusionConfig(adapters=["a", "b"]))
    wrapped.set_adapter("mix")
    return wrapped


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_only_the_fusion_moves_and_it_comes_back(make, placement, tmp_path):
    wrapped = fused(make, placement=placement)
    trained = {key for key, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all(".fusion_" in key and ".mix." in key for key in trained)
    before = bits(wrapped)
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        tiny_models.loss(wrapped).backward()
        optimizer.step()
    for key, tensor in bits(wrapped.eval()).items():
        if key in trained:
            assert not torch.equal(tensor, before[key]), key
        else:
            assert_bits_equal(key, tensor, before[key])

    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wrapped.unload(), tmp_path / "a", "a")
    loaded.load_adapter(tmp_path / "b", "b")
    loaded.load_adapter(tmp_path / "mix", "mix")
    loaded.set_adapter("mix")
    assert_bits_equal("loaded", logits(loaded), expected)


class Speakers:
    """A model whose adapter a says one token, whatever it reads, and whose adapter b says another; and a fusion of them."""

    ids = token_ids(8)
    answers: ClassVar = {"a": torch.full_like(ids, 3), "b": torch.full_like(ids, 5)}

    def __init__(self):
        torch.manual_seed(0)
        config = BottleneckConfig(placement="houlsby", bottleneck_size=8)
        self.model = get_peft_model(tiny_models.llama(initializer_range=0.2), config, "a")
        self.model.add_adapter("b", config)
        for name, answer in self.answers.items():
            self.model.set_adapter(name)
            assert self.learn(answer, 40) < 0.1
        self.model.add_adapter("mix", FusionConfig(adapters=["a", "b"]))
        self.model.set_adapter("mix")

    def learn(self, target, steps: int, leave: str = "nothing") -> float:
        """The last loss. leave: parameters that stay as they are, by a part of their names."""
        trained = [p for key, p in self.model.named_parameters() if p.requires_grad and leave not in key]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(input_ids=self.ids).logits.flatten(0, 1), target.flatten())
            loss.backward()
            optimizer.step()
        return loss.item()

    def accuracy(self, target, name: str) -> float:
        self.model.set_adapter(name)
        with torch.no_grad():
            return (self.model(input_ids=self.ids).logits.argmax(-1) == target).float().mean().item()


def test_it_finds_the_adapter_that_is_right():
    """By its attention alone: V stays the identity."""
    for right, wrong in ("ab", "ba"):
        both = Speakers()
        both.learn(both.answers[right], 40, leave="fusion_value")
        assert both.accuracy(both.answers[right], "mix") > 0.95
        assert both.accuracy(both.answers[right], wrong) < 0.05


def test_it_learns_which_adapter_is_right_where():
    """a adds a constant and b takes it away; a is right where the base gives a positive first number, b elsewhere."""
    torch.manual_seed(0)
    layer = BottleneckAdapter(torch.nn.Linear(16, 16).requires_grad_(False))
    for name in "ab":
        layer.add_bottleneck(name, (16, 2, 16), BottleneckSettings())
    constant = torch.randn(16)
    layer.adapter_up["a"].bias.data.copy_(constant)
    layer.adapter_up["b"].bias.data.copy_(-constant)
    layer.add_fusion("mix", ["a", "b"], 16)
    layer.set_adapter("mix")
    x, unseen = torch.randn(256, 16), torch.randn(256, 16)

    def loss(x):
        sign = torch.where(layer.base_layer(x)[:, :1] > 0, 1.0, -1.0)
        return (layer(x) - layer.base_layer(x) - sign * constant).square().mean()

    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    start = loss(unseen).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    assert loss(unseen).item() < start / 4


def test_it_needs_its_adapters(tmp_path):
    wrapped = fused()
    wrapped.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mix" / "adapter_config.json").read_text())["adapters"] == ["a", "b"]
    model = tiny_models.llama()
    before = bits(model)
    with pytest.raises(
        ValueError, match=r"'mix' acts through the adapters \['a', 'b'\], of which \['a', 'b'\] are not"
    ):
        PeftModel.from_pretrained(model, tmp_path / "mix", "mix")
    assert set(bits(model)) == set(before)
    loaded = PeftModel.from_pretrained(model, tmp_path / "a", "a")
    with pytest.raises(ValueError, match=r"of which \['b'\] are not loaded; load them first"):
        loaded.load_adapter(tmp_path / "mix", "mix")
    with pytest.raises(KeyError):
        peft.PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "mix")

    expected = logits(wrapped)
    with pytest.raises(ValueError, match=r"\['mix'\] act through 'a'; delete them first"):
        wrapped.delete_adapter("a")
    assert_bits_equal("unchanged", logits(wrapped), expected)
    wrapped.delete_adapter("mix")
    wrapped.delete_adapter("a")
    assert list(wrapped.peft_config) == ["b"]


def test_what_cannot_be_fused_is_refused():
    for bad in ([], ["a"], ["a", "a"], "ab", None):
        with pytest.raises(ValueError, match="FusionConfig: expected adapters"):
            FusionConfig(adapters=bad)
    wrapped = two_adapters()
    wrapped.add_adapter("lora", LoraConfig())
    wrapped.add_adapter("parallel", BottleneckConfig(placement="parallel", target_modules=["down_proj"]))
    wrapped.add_adapter("alone", BottleneckConfig(residual=False))
    before = set(bits(wrapped))
    with pytest.raises(NoTargetError, match=r"names of bottleneck adapters, got \['lora'\]"):
        wrapped.add_adapter("mix", FusionConfig(adapters=["a", "lora"]))
    with pytest.raises(ValueError, match=r"one placement, got \{'a': 'after', 'parallel': 'beside'\}"):
        wrapped.add_adapter("mix", FusionConfig(adapters=["a", "parallel"]))
    with pytest.raises(ValueError, match=r"residual=True, got \['a', 'alone'\]"):
        wrapped.add_adapter("mix", FusionConfig(adapters=["a", "alone"]))
    with pytest.raises(ValueError, match=r"\['nobody'\] are not loaded"):
        wrapped.add_adapter("mix", FusionConfig(adapters=["a", "nobody"]))
    assert set(bits(wrapped)) == before
    wrapped.add_adapter("mix", FusionConfig(adapters=["a", "b"]))
    with pytest.raises(ValueError, match="without another bottleneck"):
        wrapped.set_adapter(["mix", "a"])
    for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(NotImplementedError, match="merge"):
            merge(adapter_names=["mix"])


def test_a_head_is_trained_with_it(tmp_path):
    wrapped = two_adapters(tiny_models.bert, task_type="SEQ_CLS")
    wrapped.add_adapter("mix", FusionConfig(adapters=["a", "b"], task_type="SEQ_CLS"))
    wrapped.set_adapter("mix")
    fill(wrapped)
    assert any("classifier" in key for key, p in wrapped.named_parameters() if p.requires_grad)
    expected = logits(wrapped)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(wrapped.unload(), tmp_path / "a", "a")
    for name in ("b", "mix"):
        loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter("mix")
    assert_bits_equal("loaded", logits(loaded), expected)


def test_adapters_on_other_modules_than_each_other():
    """Where a module has one of the two only, that one acts."""
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny_models.llama(), BottleneckConfig(placement="houlsby"), "a").eval()
    wrapped.add_adapter("b", BottleneckConfig(layers_to_transform=0))
    for name in "ab":
        wrapped.set_adapter(name)
        fill(wrapped, seed=ord(name))
    wrapped.add_adapter("mix", FusionConfig(adapters=["a", "b"]))
    wrapped.set_adapter("mix")
    assert len(list(wrapped.base_model.layers())) == 6
    tiny_models.loss(wrapped).backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_over_nf4(reentrant):
    wrapped = fused(model=fastpeft.quantize(tiny_models.llama(), "nf4"), placement="houlsby").train()

    def gradients():
        wrapped.zero_grad()
        tiny_models.loss(wrapped).backward()
        return {key: p.grad.clone() for key, p in wrapped.named_parameters() if p.requires_grad}

    expected = gradients()
    wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for key, gradient in gradients().items():
        assert_close(key, gradient, expected[key], GRADIENTS_THROUGH_A_MODEL)


def test_every_row_its_adapter():
    wrapped = fused()
    ids, names = token_ids(4), ["mix", "a", "__base__", "b"]
    rows = []
    with torch.no_grad():
        for row, name in zip(ids, names, strict=True):
            if name == "__base__":
                with wrapped.disable_adapter():
                    rows.append(wrapped(input_ids=row[None]).logits)
            else:
                wrapped.set_adapter(name)
                rows.append(wrapped(input_ids=row[None]).logits)
        got = wrapped(input_ids=ids, adapter_names=names).logits
    assert_close("logits", got, torch.cat(rows), LOGITS_EQUAL_TO_PEFT)


def test_compiled_in_one_graph():
    wrapped = fused(tiny_models.bert, placement="parallel")
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=True)
    for name in ("a", "mix"):
        wrapped.set_adapter(name)
        assert_close(name, compiled(**tiny_models.inputs(wrapped)).logits, logits(wrapped), LOGITS_EQUAL_TO_PEFT)
