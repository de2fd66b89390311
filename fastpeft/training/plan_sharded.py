"""What one of N processes holds, from what a single one holds: FSDP2 of sharding.py, or DDP.

    fsdp:  base weights = the layers' / N + the rest's / N + buffers;  quantisation statistics whole
           gathered     = the rest (embeddings, head, final norm) + 3 layers, while a step goes forward and backward: one that
                          computes, the next in the buffer that its message fills, and a buffer that is being unpacked
           adapter weights, gradients, optimizer state: whole, or / N where adapters are sharded; then a layer's gathered too
           messages     = a layer's gradients twice where they are sharded, else all gradients once, to be averaged after backward
    ddp:   messages     = all gradients once, in buckets, from the backward pass on

Activations, logits and workspace are those of a process's own rows. Parts are exact fractions until `whole`, so that bytes that
lie on a line over the number of layers stay on one.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import nn

from fastpeft.training.live_memory import ADAPTERS, BASE, GRADIENTS, KINDS, OPTIMIZER, Peak
from fastpeft.training.plan_config import PlanConfig
from fastpeft.training.sharding import layers_of

if TYPE_CHECKING:
    from fastpeft.training.planned_step import StepPeaks

GATHERED, MESSAGES = "gathered weights", "messages"
ALL_KINDS = (KINDS[0], GATHERED, *KINDS[1:], MESSAGES)
"""What a storage of a process is for, in the order of a table."""
AT_ONCE = 3
"""Layers whose weights a process holds at one time, in place or in a message's buffer; with gloo this many, or one less."""


@dataclass(frozen=True)
class Groups:
    """Bytes of a model's parameters by what FSDP2 gathers at once.

    base_layer: frozen ones of the largest layer; base_layers: of all layers; base_rest: of what is in none; trained_layer: the
    adapter's in the largest layer
    """

    base_layer: int
    base_layers: int
    base_rest: int
    trained_layer: int

    @classmethod
    def of(cls, model: nn.Module) -> "Groups":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layers = layers_of(base)
        frozen = [_nbytes(layer, trained=False) for layer in layers]
        trained = [_nbytes(layer, trained=True) for layer in layers]
        everything = _nbytes(base, trained=False)
        return cls(max(frozen, default=0), sum(frozen), everything - sum(frozen), max(trained, default=0))


def _nbytes(module: nn.Module, *, trained: bool) -> int:
    parameters = (parameter for parameter in module.parameters() if parameter.requires_grad == trained)
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def shared_out(step: "StepPeaks", model: nn.Module, options: PlanConfig) -> "StepPeaks":
    """The step of one of options.processes processes; `model` is what the step was of."""
    if options.processes == 1:
        return step
    groups = Groups.of(model)
    share = _sharded if options.distributed == "fsdp" else _replicated
    names = ("forward", "backward", "end of backward", "optimizer")
    parts = tuple(share(peak, name, groups, options) for name, peak in zip(names, step.parts, strict=True))
    return replace(step, parts=parts)


def _sharded(peak: Peak, phase: str, groups: Groups, options: PlanConfig) -> Peak:
    parts, count = dict(peak.parts), options.processes
    sharded = groups.base_layers + groups.base_rest
    parts[BASE] = parts.get(BASE, 0) - sharded + Fraction(sharded, count)
    if options.shard_adapters:
        for kind in (ADAPTERS, GRADIENTS, OPTIMIZER):
            parts[kind] = Fraction(parts.get(kind, 0), count)
    computes = phase != "optimizer"
    if computes:
        layer = groups.base_layer + groups.trained_layer * options.shard_adapters
        parts[GATHERED] = groups.base_rest + AT_ONCE * layer
    if options.shard_adapters:
        parts[MESSAGES] = 2 * groups.trained_layer * (phase in ("backward", "end of backward"))
    elif not computes:
        parts[MESSAGES] = parts.get(GRADIENTS, 0)
    return _peak(parts, peak)


def _replicated(peak: Peak, phase: str, groups: Groups, options: PlanConfig) -> Peak:
    parts = dict(peak.parts)
    parts[MESSAGES] = parts.get(ADAPTERS, 0)
    return _peak(parts, peak)


def _peak(parts: dict, before: Peak) -> Peak:
    return Peak(sum(parts.values()), parts, before.where)


def whole(peak: Peak) -> Peak:
    """The peak in whole bytes that still add up."""
    parts = {kind: round(nbytes) for kind, nbytes in peak.parts.items()}
    return Peak(sum(parts.values()), parts, peak.where)
