"""FSDP2 of a model with an adapter: every process holds a part of the base's weights, and gathers a layer when it computes.

A weight in 4 or 8 bits is sharded as its bytes and gathered as such; its scales stay in every process. Inside a layer's
forward and backward its modules hold whole, plain tensors, so layers, ops and accelerate's parts know nothing of shards.
Trained parameters are whole in every process (their gradients are averaged), or sharded as the base is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.base_weight import BaseParameters, is_linear_8bit
from fastpeft.model import PeftModel


def check_shardable(model: PeftModel, *, adapters: bool) -> None:
    """Raises:  NotImplementedError for several adapters of which some start from changed base weights, and for AdaLoRA with
    `adapters` sharded
    """
    if adapters and model.active_peft_config.peft_type == "ADALORA":
        raise NotImplementedError("shard_adapters: ADALORA ranks whole tensors; leave them whole")
    if len(model.peft_config) == 1:
        return
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer) and module.started_from:
            raise NotImplementedError(
                f"fsdp: {name} has an adapter that starts from changed base weights (PiSSA, OLoRA, LoftQ) beside others, and a "
                "sharded base cannot hold both weights; train it alone, or use --distributed ddp"
            )


def shard_base(model: PeftModel, device: torch.device, *, adapters: bool = False) -> None:
    """fully_shard every layer of the base, then the rest, over all processes; `adapters`: trained parameters too.

    The model may still be on the CPU: what is sharded goes to `device` layer by layer. Trained parameters become rank 0's.
    Changed base weights that an adapter starts from become the base's: the adapter cannot be switched off any more.
    """
    base = model.get_base_model()
    scales = {}  # of int8 weights: bitsandbytes has them on the parameter, which sharding makes anew
    for module in base.modules():
        if isinstance(module, AdapterLayer):
            module.give_up_own_parameters()
        elif is_linear_8bit(module):
            scales[module] = module.state.SCB = BaseParameters.of(module).state.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(device)
        dist.broadcast(parameter.data, src=0)
    whole = set() if adapters else set(trained)
    prompt = model.base_model.active_prompt()
    if prompt is not None and prompt.lengthens_input:  # it reads the input's embeddings before the base's forward
        for parameter in base.get_input_embeddings().parameters():
            parameter.data = parameter.data.to(device)
            whole.add(parameter)
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "ignored_params": whole or None}
    for group in (*layers_of(base), base):
        fully_shard(group, **options)
        _hand_over(group, scales)


def _hand_over(group: nn.Module, scales: dict[nn.Module, torch.Tensor]) -> None:
    """Before the group's forward, give its int8 weights their scales: bitsandbytes' own forward looks for them there.

    A hook on the linear itself would keep an adapter from computing in one with it.
    """
    own = [(module, scales.pop(module)) for module in group.modules() if module in scales]

    def give(*_: Any) -> None:
        for module, values in own:
            module.weight.CB, module.weight.SCB = module.weight.data, values

    if own:
        group.register_forward_pre_hook(give)


def layers_of(base: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time: a model's repeated blocks, by the names that transformers keeps whole."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    repeated = [child for module in base.modules() if isinstance(module, nn.ModuleList) for child in module]
    return [block for block in repeated if type(block).__name__ in names]


def is_sharded(model: nn.Module) -> bool:
    """True after shard_base."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def bytes_elsewhere(model: nn.Module) -> int:
    """How much of the base this process does not hold, in bytes."""
    shards = [p for p in model.parameters() if isinstance(p, DTensor) and not p.requires_grad]
    return sum((p.numel() - p.to_local().numel()) * p.element_size() for p in shards)


def reshard(model: nn.Module) -> None:
    """Let go of what a forward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def whole_adapters(model: nn.Module, *, change: bool = False) -> Iterator[None]:
    """Inside, trained parameters that are sharded are whole; with `change` what becomes of them is kept. For all processes."""
    reshard(model)
    held: list[tuple[nn.Module, str, DTensor, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor) and parameter.requires_grad:
                whole = nn.Parameter(parameter.detach().full_tensor())
                held.append((module, name, parameter, whole))
    for module, name, _, whole in held:
        module._parameters[name] = whole
    try:
        yield
    finally:
        for module, name, parameter, whole in held:
            if change:
                with torch.no_grad():
                    parameter.to_local().copy_(_shard_like(parameter, whole.detach()).to_local())
            module._parameters[name] = parameter


def average_gradients(model: nn.Module) -> None:
    """Mean over the processes of every gradient that is whole, in one message per dtype."""
    gradients: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for parts in gradients.values():
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for part, mean in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(mean.view_as(part))


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """An optimizer's state as one process has it: what belongs to a sharded parameter is sharded as it is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        number: {
            name: _shard_like(parameters[number], value)
            if isinstance(parameters[number], DTensor) and value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": sharded})


def _shard_like(parameter: DTensor, whole: torch.Tensor) -> DTensor:
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
