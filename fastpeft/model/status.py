"""What adapters a model has and what they are doing, by PEFT's names: one row per wrapped module, and a summary."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fastpeft.layers.adapter import AdapterLayer, ModulesToSaveWrapper
from fastpeft.model.peft_model import PeftModel
from fastpeft.model.plain import tuner_of


@dataclass(frozen=True)
class TunerLayerStatus:
    """One wrapped module. requires_grad: by adapter; "irregular" where its tensors differ."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """All wrapped modules together. "irregular" where they differ; requires_grad, devices: by adapter."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | str
    active_adapters: list[str] | str
    merged_adapters: list[str] | str
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every wrapped module, in the model's order."""
    tuner = tuner_of(model, "get_layer_status")
    prefix = "model." if isinstance(model, PeftModel) else ""
    return [_layer_status(prefix + path, layer) for path, layer in tuner.layers()]


def _layer_status(name: str, layer: AdapterLayer) -> TunerLayerStatus:
    tensors = {adapter: list(layer.adapter_tensors(adapter).values()) for adapter in layer.adapter_names}
    return TunerLayerStatus(
        name=name,
        module_type=type(layer).__name__,
        enabled=not layer.disable_adapters,
        active_adapters=list(layer.active_adapters),
        merged_adapters=list(layer.merged_adapters),
        requires_grad={adapter: _one(t.requires_grad for t in found) for adapter, found in tensors.items()},
        available_adapters=sorted(layer.adapter_names),
        devices={adapter: sorted({t.device.type for t in found}) for adapter, found in tensors.items()},
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model; what the wrapped modules disagree on is "irregular"."""
    tuner, layers = tuner_of(model, "get_model_status"), get_layer_status(model)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trainable, total = sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
    adapters = sorted(tuner.peft_config)
    by_adapter = {name: [layer for layer in layers if name in layer.available_adapters] for name in adapters}
    return TunerModelStatus(
        base_model_type=type(tuner.model).__name__,
        adapter_model_type=type(model).__name__ if isinstance(model, PeftModel) else "None",
        peft_types={name: config.peft_type for name, config in tuner.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers) if layers else not tuner.disabled,
        active_adapters=list(tuner.active_adapters),
        merged_adapters=_merged(layers),
        requires_grad={
            name: _one(row.requires_grad[name] for row in rows) for name, rows in by_adapter.items() if rows
        },
        available_adapters=adapters,
        devices={name: sorted({d for row in rows for d in row.devices[name]}) for name, rows in by_adapter.items()},
    )


def _merged(layers: list[TunerLayerStatus]) -> list[str] | str:
    """Names that are merged in every module that has them and can be: a full copy never is."""
    rows = [layer for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__]
    merged = sorted({name for layer in rows for name in layer.merged_adapters})
    regular = all((name in row.merged_adapters) == (name in row.available_adapters) for row in rows for name in merged)
    return merged if regular else "irregular"


def _one(values: Iterable[bool]) -> bool | str:
    """The value that all have, or "irregular"."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"
