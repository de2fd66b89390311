"""One batch, several adapters: what the wrappers compute while every item of a batch names its own adapter.

A wrapper's `row_adapters` holds one name per item, BASE for none. Names are PEFT's `adapter_names`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from fastpeft.layers.adapter import AdapterLayer, recomputes_layers
from fastpeft.layers.base_weight import compute_dtype, frozen_weight
from fastpeft.ops.lora_rows import BASE as NO_ADAPTER
from fastpeft.ops.lora_rows import RowAdapter, lora_linear_rows

BASE = "__base__"
"""The name of an item that goes through the base model alone."""


def names_per_item(layer: AdapterLayer, x: torch.Tensor) -> list[str]:
    """One name for each item of x; a batch that generation made n times longer (beams) repeats every name n times.

    Raises:  ValueError where the batch is no multiple of the names, or an adapter is merged
    """
    names = list(layer.row_adapters)
    if layer.merged:
        raise ValueError(
            f"adapter_names: expected no merged adapter, got {layer.merged_adapters}; call unmerge_adapter first"
        )
    if not names or x.shape[0] % len(names):
        raise ValueError(f"adapter_names: expected one name for each of {x.shape[0]} items, got {len(names)}: {names}")
    repeats = x.shape[0] // len(names)
    return [name for name in names for _ in range(repeats)]


def lora_linear_layer(layer: AdapterLayer, x: torch.Tensor) -> torch.Tensor:
    """y of a LoRALinear, in one grouped pass over x.

    Raises:  NotImplementedError for DoRA and for dropout in training: their masks and gains are one adapter's
    """
    names = names_per_item(layer, x)
    present = [name for name in dict.fromkeys(names) if name in layer.adapter_names]
    for name in present:
        if name in layer.lora_magnitude_vector:
            raise NotImplementedError(f"adapter_names: expected adapters without DoRA, got {name!r}; run it by itself")
        if layer._dropout_p(name):
            raise NotImplementedError(
                f"adapter_names: expected no dropout, got lora_dropout={layer._dropout_p(name)} of {name!r} in training; "
                "call model.eval(), or set its dropout to 0"
            )
    wanted = compute_dtype(layer.base_layer, x.dtype)
    w, bias, own = frozen_weight(layer.base_layer), layer.base_layer.bias, x.to(wanted)
    rows = [present.index(name) if name in present else NO_ADAPTER for name in names]
    if not present:
        from fastpeft.ops.frozen_linear import frozen_linear

        return frozen_linear(own, w, bias, impl=layer.impl).to(x.dtype)
    adapters = [RowAdapter(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in present]
    y = lora_linear_rows(own, w, adapters, rows, bias, impl=layer.impl)
    for number, name in enumerate(present):
        added = layer._scaled_bias(name)
        if added is not None:
            mine = torch.tensor([row == number for row in rows], device=x.device)
            y = y + mine.view(-1, *[1] * (x.dim() - 1)) * added.to(y.dtype)
    return y.to(x.dtype)


def by_name(layer: AdapterLayer, x: torch.Tensor, run: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """run(name, the items that name it) for each name, put together in the batch's order."""
    names = names_per_item(layer, x)
    result = None
    for name in dict.fromkeys(names):
        items = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
        part = run(name, x[items])
        if result is None:
            result = part.new_zeros(x.shape[0], *part.shape[1:])
        result = result.index_copy(0, items, part)
    return result


@contextlib.contextmanager
def named_items(
    model: nn.Module, layers: Sequence[AdapterLayer], names: list[str], known: Iterable[str], biased: Sequence[str]
) -> Iterator[None]:
    """Inside, item i of a batch goes through the adapter names[i] in all `layers` of `model`.

    known: the adapters there are; biased: those that trained biases of the base, or have a prompt
    Raises:  ValueError for an unknown name; NotImplementedError for an adapter with trained biases or a prompt, which the
             whole batch would share, and with gradient checkpointing, which computes layers again after this has ended
    """
    unknown = sorted(set(names) - {BASE} - set(known))
    if unknown:
        raise ValueError(f"adapter_names: expected {sorted(known)} or {BASE!r}, got {unknown}")
    if set(names) & set(biased):
        raise NotImplementedError(
            f"adapter_names: expected adapters that leave the base as it is, got {sorted(set(names) & set(biased))}, which "
            "trained biases, have a prompt, or changed base weights; run each by itself"
        )
    if torch.is_grad_enabled() and model.training and recomputes_layers(model):
        raise NotImplementedError(
            "adapter_names: expected no gradient checkpointing, which runs the layers again in backward, after the names "
            "are gone; call model.gradient_checkpointing_disable()"
        )
    before = [layer.row_adapters for layer in layers]
    for layer in layers:
        layer.row_adapters = names
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.row_adapters = earlier
