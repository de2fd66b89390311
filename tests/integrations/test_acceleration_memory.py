"""accelerate's memory options: what they keep, that they change no bit, and that restore takes them back."""

import functools

import peft
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft.integrations.acceleration.ledger import Acceleration
from fastpeft.integrations.acceleration.offload import Offload, watch_forward
from fastpeft.layers.base_weight import frozen_weight
from tests import tiny_models
from tests.saved_bytes import SavedBytes
from tests.tolerance import GRADIENTS_THROUGH_A_MODEL, assert_bits_equal, assert_close


def _model(**options):
    torch.manual_seed(0)
    wrapped = fastpeft.get_peft_model(
        tiny_models.llama(), fastpeft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **options)
    )
    return wrapped.train()


def _step(model, retain=False):
    """Loss and gradients by name of one step; with `retain`, of the second of two backward passes."""
    torch.manual_seed(1)
    ids = tiny_models.token_ids().to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids).loss
    if retain:
        loss.backward(retain_graph=True)
        model.zero_grad()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def _assert_same_bits(got, expected):
    assert set(got) == set(expected)
    assert len(expected) > 10
    for name, tensor in expected.items():
        assert_bits_equal(name, got[name], tensor)


def _offloaded(model):
    """An Offload at work on a model, and the ledger that takes it off.

    A CPU plays the GPU: what is moved is copied, and the original dies if nothing else holds it.
    """
    kind = next(model.parameters()).device.type
    ledger, offload = Acceleration(model), Offload(model, devices=(kind,), least_bytes=512)
    watch_forward(ledger, model.get_base_model(), offload)
    return ledger, offload


class _Storages(TorchDispatchMode):
    """Every storage that an op makes while this is entered, parameters left out: how many bytes of them are alive."""

    def __init__(self, model):
        super().__init__()
        self.made = {}
        self.parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self):
        return sum(
            size
            for address, (reference, size) in self.made.items()
            if address not in self.parameters and not reference.expired()
        )


@pytest.mark.parametrize("retain", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_offload_changes_no_bit(checkpointing, retain, device):
    """On a GPU through pinned memory and the stream of copies, on a CPU by plain copies."""
    model = _model(lora_dropout=0.3).to(device)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    expected = _step(model, retain)
    ledger, offload = _offloaded(model)
    _assert_same_bits(_step(model, retain), expected)
    assert offload.moved_bytes > 0
    moved = offload.moved_bytes
    ledger.restore()
    _assert_same_bits(_step(model, retain), expected)
    assert offload.moved_bytes == moved


def test_offloaded_bytes_leave_the_device_and_are_counted():
    """What stays alive after a forward is what stayed before, less what was moved, plus its copies, each storage once."""
    model = _model()

    def alive_after_forward():
        with _Storages(model) as storages:
            loss = model(input_ids=tiny_models.token_ids(), labels=tiny_models.token_ids()).loss
        return storages.alive(), loss

    before, loss = alive_after_forward()
    del loss
    ledger, offload = _offloaded(model)
    after, loss = alive_after_forward()
    assert offload.moved_bytes > 0.9 * before
    on_device = after - offload.moved_bytes  # the copies are CPU tensors, too
    assert on_device == before - offload.moved_bytes < 0.1 * before
    del loss
    ledger.restore()


def stays(offload, tensor):
    """Whether what is kept is the tensor's own memory, without its graph."""
    packed = offload._pack(tensor)
    return isinstance(packed, torch.Tensor) and packed.data_ptr() == tensor.data_ptr() and packed.grad_fn is None


def test_parameters_small_tensors_and_quantised_weights_stay():
    torch.manual_seed(0)
    model = fastpeft.quantize(tiny_models.llama(), "nf4")
    model = fastpeft.get_peft_model(model, fastpeft.LoraConfig(r=4, target_modules="all-linear")).train()
    base = model.get_base_model()
    quantised = frozen_weight(base.model.layers[0].mlp.up_proj.base_layer)
    x = torch.randn(64, 64)
    offload = Offload(model, devices=("cpu",), least_bytes=0)
    with offload.saving():
        for tensor in (base.lm_head.weight, quantised.absmax, next(model.buffers())):
            assert stays(offload, tensor)
            view = tensor.detach()[1:]
            assert stays(offload, view)
        assert offload.moved_bytes == 0
        assert not stays(offload, x)
    assert offload.moved_bytes == x.nbytes
    assert stays(Offload(model, devices=("cpu",), least_bytes=x.nbytes + 1), x)
    assert stays(Offload(model, devices=("cuda",), least_bytes=0), x)


def test_views_of_one_storage_are_moved_once_and_a_changed_one_again():
    offload = Offload(torch.nn.Linear(2, 2), devices=("cpu",), least_bytes=0)
    x = torch.arange(24.0).view(4, 6)
    views = [x, x.t(), x[1:, ::2], x.view(torch.int32)]
    expected = [view.clone() for view in views]
    with offload.saving():
        packed = [offload._pack(view) for view in views]
        assert offload.moved_bytes == x.nbytes
        x.add_(1)
        again = offload._pack(x)
        assert offload.moved_bytes == 2 * x.nbytes
    for saved, value, view in zip(packed, expected, views, strict=True):
        restored = offload._unpack(saved)
        assert_bits_equal("view", restored, value)
        assert restored.stride() == view.stride()
    assert_bits_equal("again", offload._unpack(again), x)


def test_offload_runs_under_fake_tensors():
    with FakeTensorMode():
        model = _model()
        ledger, offload = _offloaded(model)
        ids = torch.zeros(2, 12, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
    assert offload.moved_bytes > 0
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    ledger.restore()


def test_offload_acts_in_training_with_gradients_only_and_survives_an_error():
    model = _model()
    ledger, offload = _offloaded(model)
    ids = tiny_models.token_ids()
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    assert offload.moved_bytes == 0
    with pytest.raises((IndexError, RuntimeError)):
        model.train()(input_ids=ids + 10**6)
    x = torch.randn(64, 64, requires_grad=True)
    assert x.square().grad_fn._saved_self is x  # no hook is left on the stack
    ledger.restore()


def test_a_model_on_the_cpu_says_that_there_is_nothing_to_offload_to():
    model = _model()
    expected = _step(model)
    ledger = fastpeft.accelerate(model, parts=[], offload=True)
    assert "activation offload: off, the model is on the CPU and there is nothing to offload to" in ledger.summary()
    assert not model.get_base_model()._forward_pre_hooks
    _assert_same_bits(_step(model), expected)


# ---- memory="memory" ------------------------------------------------------------------------------------------------


def _saved(model):
    with SavedBytes(model) as saved:
        loss = model(input_ids=tiny_models.token_ids(), labels=tiny_models.token_ids()).loss
        total = saved.total()
    del loss
    return total


def _with_peft():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_models.llama(), peft.LoraConfig(r=4, target_modules="all-linear")).train()


@pytest.mark.parametrize(
    "build", [_model, _with_peft, tiny_models.llama, tiny_models.bert, tiny_models.t5, tiny_models.gpt2]
)
def test_memory_checkpoints_the_layers_until_restore(build):
    model = build().train()
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    step = functools.partial(_step if build in (_model, _with_peft) else _step_of_bare, model)
    expected = step()
    kept = None if build not in (_model, _with_peft) else _saved(model)
    ledger = fastpeft.accelerate(model, parts=[], memory="memory")
    assert "gradient checkpointing: on for every layer, non-reentrant" in ledger.summary()
    core = model.get_base_model() if kept is not None else model
    assert core.is_gradient_checkpointing
    for (
        name,
        gradient,
    ) in step().items():  # T5's layers are computed again in an order that sums its encoder's otherwise
        assert_close(name, gradient, expected[name], GRADIENTS_THROUGH_A_MODEL)
    if kept is not None:
        assert _saved(model) < 0.4 * kept
    fastpeft.restore(model)
    assert not core.is_gradient_checkpointing
    for module, before in attributes:
        assert set(module.__dict__) == set(before)
    _assert_same_bits(step(), expected)


def _step_of_bare(model):
    torch.manual_seed(1)  # some drop out by themselves
    tiny_models.loss(model).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("memory", ["speed", "balanced"])
def test_other_policies_leave_the_users_setting(memory):
    model = _model()
    fastpeft.accelerate(model, parts=[], memory=memory)
    assert not model.get_base_model().is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ledger = fastpeft.accelerate(model, parts=[], memory="memory")
    assert "on before, left as it was" in ledger.summary()
    fastpeft.restore(model)
    assert model.get_base_model().is_gradient_checkpointing


@pytest.mark.parametrize("library", [fastpeft, peft], ids=["fastpeft", "peft"])
def test_a_prefix_is_not_checkpointed(library):
    """Checkpointing switches the cache off, and the prefix is in the cache."""
    config = library.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = library.get_peft_model(tiny_models.llama(), config)
    ledger = fastpeft.accelerate(model, parts=[], memory="memory")
    assert "gradient checkpointing: off, adapter 'default' keeps its keys in the cache" in ledger.summary()
    assert not model.get_base_model().is_gradient_checkpointing
