"""A training step of a model without weights: built, run on fake tensors, and logged byte by byte."""

import contextlib
import copy
import functools
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, masking_utils
from transformers.initialization import no_init_weights

from fastpeft import backend
from fastpeft.integrations.acceleration import accelerate
from fastpeft.layers.base_weight import frozen_weight, is_quantized
from fastpeft.model import get_peft_model, prepare_for_training
from fastpeft.ops.rehearsal import rehearsal
from fastpeft.ops.weights import own_scratch
from fastpeft.training.base_model import quantize_in_place
from fastpeft.training.config import BaseOptions
from fastpeft.training.live_memory import (
    ADAPTERS,
    BASE,
    BATCH,
    GRADIENTS,
    LOGITS,
    OPTIMIZER,
    SAVED,
    STATISTICS,
    WORKSPACE,
    LiveMemory,
    Peak,
)
from fastpeft.training.plan_config import PlanConfig
from fastpeft.training.precision import autocast

H100 = backend.GpuFacts("NVIDIA H100", "sm_90", 132, 1.98e9, 3.35e12, 50 * 2.0**20)
"""The GPU that algorithms and tiles are chosen for: what they need besides a step's tensors differs little between GPUs."""

ANY_STEPS = 10**9
_FIRST_LAYER = re.compile(r"\.0\.")


PARTS = ("forward", "backward", "end of backward", "optimizer")


@dataclass(frozen=True)
class StepPeaks:
    """parts: the peak in each of PARTS of the second step; trainable, total: numbers of parameters; accelerated: what accelerate
    says it replaced"""

    parts: tuple[Peak, ...]
    trainable: int
    total: int
    accelerated: str

    @property
    def peak(self) -> Peak:
        return max(self.parts, key=lambda peak: peak.nbytes)


class FakeModel:
    """A model of a config without weights, with its adapter in it. layers: how many of the model's, None for all."""

    def __init__(self, options: PlanConfig, config: PreTrainedConfig, layers: int | None = None):
        self.options, self._mode = options, FakeTensorMode()
        config = copy.deepcopy(config)
        if layers is not None:
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
        with _rehearsal(options.device, self._mode):
            self.model = build(options, config)

    def step(self, batch_size: int, seq_len: int) -> StepPeaks:
        """Two training steps."""
        with _rehearsal(self.options.device, self._mode):
            return run_steps(self.model, self.options, batch_size=batch_size, seq_len=seq_len)


@contextlib.contextmanager
def _rehearsal(device: str, mode: FakeTensorMode) -> Iterator[None]:
    """Inside, tensors have sizes alone, and ops do what they would do on `device` but for the launches."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(mode)
        stack.enter_context(FakeCopyMode(mode))  # a deep copy of a parameter stays of this mode
        stack.enter_context(no_init_weights())
        stack.enter_context(_rows_unpacked())
        stack.enter_context(rehearsal(device, H100 if device == "cuda" else None))
        yield


@contextlib.contextmanager
def _rows_unpacked() -> Iterator[None]:
    """Inside, transformers takes every row for one sequence. It would read the positions to see, and where it cannot, make a
    mask of all pairs of tokens."""
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


# -- the model --------------------------------------------------------------------------------------------------------


def build(options: PlanConfig, config: PreTrainedConfig) -> nn.Module:
    """The base model of a config with its adapter in it, as a training run has it; with weights outside a rehearsal."""
    base = _base(options, config)
    if options.peft_library:
        from fastpeft.training.peft_twin import wrap_with_peft

        return wrap_with_peft(base, options)
    prepare_for_training(base, options.gradient_checkpointing, {"use_reentrant": False})
    peft = options.peft_config().for_run(ANY_STEPS)
    return get_peft_model(base, peft, autocast_adapter_dtype=options.autocast_adapter_dtype)


def _base(options: PlanConfig, config: PreTrainedConfig) -> nn.Module:
    held = BaseOptions(
        quantization=options.quantization, double_quant=options.double_quant, dtype=options.dtype, bf16=options.bf16
    )
    config.use_cache = False
    auto = AutoModelForCausalLM
    if options.task == "classification":
        auto, config.num_labels = AutoModelForSequenceClassification, options.num_labels
        config.problem_type = "single_label_classification"
        config.pad_token_id = config.pad_token_id or 0
    dtype = getattr(config, "dtype", None) if options.dtype == "auto" else getattr(torch, options.dtype)
    model = auto.from_config(config, dtype=dtype or torch.float32)
    return quantize_in_place(model, held)


# -- the step ---------------------------------------------------------------------------------------------------------


def run_steps(
    model: nn.Module, options: PlanConfig, *, batch_size: int, seq_len: int, memory: LiveMemory | None = None
) -> StepPeaks:
    """Two training steps as the Trainer takes them, with every storage logged; on fake tensors or real ones."""
    device = torch.device("cpu")
    acceleration = accelerate(model, memory=options.memory) if options.accelerate and not options.peft_library else None
    model.train()
    memory = LiveMemory() if memory is None else memory
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _mark_model(memory, model)
    inputs = _batch(model, options, batch_size, seq_len)
    memory.mark(inputs.values(), BATCH)
    optimizer = _optimizer(options)(trained, lr=1e-4)
    with memory, own_scratch() as scratch, _arrivals(memory, trained) as arrived:
        for _ in range(2):
            arrived.clear()
            marks = [memory.now]
            memory.phase = "forward"
            with autocast(device, options.bf16):
                loss = model(**inputs)["loss"]
            memory.mark([scratch.buffer], WORKSPACE)
            memory.keep_for_backward()
            marks.append(memory.now)
            memory.phase = "backward"
            loss.backward()
            del loss
            memory.mark([parameter.grad for parameter in trained], GRADIENTS)
            marks.append(memory.now)
            memory.phase = "optimizer"
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            memory.mark(_state_of(optimizer), OPTIMIZER)
            marks.append(memory.now)
            optimizer.zero_grad(set_to_none=True)
    columns = getattr(_core(model).config.get_text_config(), "vocab_size", None)
    if columns:
        memory.mark_where(LOGITS, lambda life: _is_logits(life, columns))
    forward, backward, step = itertools.pairwise(marks)
    ending = (_last_layer(model, arrived, backward[1]), backward[1])
    parts = tuple(memory.peak(*span) for span in (forward, backward, ending, step))
    numbers = [parameter.numel() for parameter in trained]
    return StepPeaks(parts, sum(numbers), _numel(model), "" if acceleration is None else acceleration.summary())


@contextlib.contextmanager
def _arrivals(memory: LiveMemory, trained: list[nn.Parameter]) -> Iterator[list[int]]:
    """The numbers of the events at which gradients are complete."""
    arrived: list[int] = []
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _: arrived.append(memory.now)) for parameter in trained
    ]
    try:
        yield arrived
    finally:
        for hook in hooks:
            hook.remove()


def _last_layer(model: nn.Module, arrived: list[int], end: int) -> int:
    """The event at which the backward pass comes to layer 0: the others' gradients are there. `end` where none says."""
    own = sum(
        parameter.requires_grad and _FIRST_LAYER.search(name) is not None
        for name, parameter in model.named_parameters()
    )
    return arrived[-own - 1] if 0 < own < len(arrived) else end


def _is_logits(life, columns: int) -> bool:
    """A row of as many numbers as there are words, or of a few more, for the alignment of the next."""
    movable = life.kind in (None, SAVED) and life.phase != "before"
    return movable and len(life.shape) > 1 and columns <= life.shape[-1] < columns + 128


def _core(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _mark_model(memory: LiveMemory, model: nn.Module) -> None:
    memory.mark(model.buffers(), BASE)
    for parameter in model.parameters():
        memory.mark([parameter], ADAPTERS if parameter.requires_grad else BASE)
    for module in model.modules():
        if is_quantized(module):
            _, *statistics = frozen_weight(module).tensors().values()
            state = getattr(module, "quant_state", None)
            memory.mark([*statistics, getattr(state, "code", None)], STATISTICS)


def _numel(model: nn.Module) -> int:
    """Numbers of all parameters, a quantised weight's as many as it stands for."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if is_quantized(module):
            total += module.in_features * module.out_features - module.weight.numel()
    return total


def _batch(model: nn.Module, options: PlanConfig, batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Rows of full length: a padded batch takes no more."""
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    if options.task == "classification":
        return {"input_ids": ids, "labels": torch.zeros(batch_size, dtype=torch.long)}
    return {"input_ids": ids, "labels": ids.clone()}


def _optimizer(options: PlanConfig) -> Any:
    on_gpu = options.device == "cuda"
    kinds = {
        "adamw_torch": functools.partial(torch.optim.AdamW, foreach=on_gpu),
        "adamw_torch_fused": functools.partial(torch.optim.AdamW, fused=True),
        "sgd": functools.partial(torch.optim.SGD, foreach=on_gpu),
        "rmsprop": functools.partial(torch.optim.RMSprop, foreach=on_gpu),
        "adagrad": functools.partial(torch.optim.Adagrad, foreach=on_gpu),
    }
    return kinds[options.optim]


def _state_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
