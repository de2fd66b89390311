"""EVA: A begins as the directions in which a module's inputs vary most, and modules with more variance get more of the rank.

    A = the leading r_i right singular vectors of the module's inputs;  r_i <= rho r, the sum of all r_i as without EVA

Source:  Paischer et al. 2024, arXiv:2410.07170
"""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fastpeft.layers.lora import LoRALinear
from fastpeft.layers.lora_settings import LoRALayer
from fastpeft.methods.lora import EvaConfig, LoraConfig
from fastpeft.model.peft_model import PeftModel
from fastpeft.ops.incremental_svd import IncrementalSVD

WHERE = "initialize_lora_eva_weights"
Rows = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int = 1000,
) -> None:
    """Start an adapter with init_lora_weights="eva" from the model's inputs; before training, as its tensors are made anew.

    dataloader      batches (dictionaries of the model's arguments), gone through again and again until every module's
                    components stay (cosine similarity tau). Padding and, with labels, tokens without one are left out
    eva_state_dict  what get_eva_state_dict gave earlier, in place of a dataloader
    forward_fn      calls the model with a batch; default: model(**batch)
    A module whose rank is 0 loses its wrapper; the others' ranks and scales are in rank_pattern and alpha_pattern.
    Raises:  ValueError for an adapter with another start, or beside others that are active, and as get_eva_state_dict
    """
    config = _config(model, adapter_name)
    if len(model.active_adapters) > 1:
        raise ValueError(f"{WHERE}: expected one active adapter, got {model.active_adapters}")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError(f"{WHERE}: expected a dataloader or an eva_state_dict, got neither")
        eva_state_dict = get_eva_state_dict(model, dataloader, adapter_name, forward_fn, max_batches)
    tuner = model.base_model
    wrapped = {
        path: layer for path, layer in tuner.layers() if isinstance(layer, LoRALayer) and adapter_name in layer.r
    }
    new = _redistributed(config, wrapped, adapter_name, eva_state_dict)
    active, requires_grad = model.active_adapters, any(
        parameter.requires_grad for layer in wrapped.values() for parameter in layer.adapter_tensors(adapter_name).values()
    )  # fmt: skip
    model.delete_adapter(adapter_name)
    model.add_adapter(adapter_name, new)
    for path, layer in tuner.layers():
        if path in eva_state_dict and adapter_name in layer.adapter_names:
            a, _ = layer.lora_pair(adapter_name)
            a.copy_(eva_state_dict[path])
    model.set_adapter(active, inference_mode=not requires_grad)


def _config(model: PeftModel, adapter_name: str) -> LoraConfig:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise ValueError(
            f"{WHERE}: expected an adapter with init_lora_weights='eva', got {adapter_name!r} with "
            f"{getattr(config, 'init_lora_weights', None)!r}"
        )
    return config


def _redistributed(
    config: LoraConfig, wrapped: dict[str, LoRALayer], name: str, found: dict[str, torch.Tensor]
) -> LoraConfig:
    """The config with the ranks of `found`."""
    ranks, alphas, paths = {}, {}, []
    for path, layer in wrapped.items():
        before, alpha = layer.r[name], layer.lora_alpha[name]
        rank = found[path].shape[0] if path in found else before
        if rank == 0:
            continue
        paths.append(path)
        if rank != before and config.eva_config.adjust_scaling_factors:
            alpha *= rank / before
        if rank != config.r:
            ranks[path] = rank
        if alpha != config.lora_alpha:
            alphas[path] = alpha
    if not paths:
        raise ValueError(f"{WHERE}: expected components for some module, got none")
    return dataclasses.replace(
        config,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=paths,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


@torch.no_grad()
def get_eva_state_dict(
    model: PeftModel,
    dataloader: Iterable,
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    max_batches: int = 1000,
) -> dict[str, torch.Tensor]:
    """A [rank, K] by module path, with the adapter off; the arguments are initialize_lora_eva_weights'.

    Raises:  ValueError for an empty dataloader, batches with fewer tokens than components, a module narrower than rho r, and
             components that still turn after max_batches
    """
    config = _config(model, adapter_name)
    options = config.eva_config or EvaConfig()
    layers = {
        path: layer
        for path, layer in model.base_model.layers()
        if isinstance(layer, LoRALinear) and adapter_name in layer.adapter_names
    }
    ranks = {path: layer.r[adapter_name] for path, layer in layers.items()}
    wanted = {path: round(rank * options.rho) for path, rank in ranks.items()}
    narrow = [path for path, layer in layers.items() if wanted[path] > layer.in_features]
    if narrow:
        raise ValueError(
            f"{WHERE}: expected rho r of at most the module's inputs, got {wanted[narrow[0]]} components of "
            f"{layers[narrow[0]].in_features} inputs at {narrow[0]}; lower r or rho"
        )
    batches = _again_and_again(dataloader, max_batches)
    run = _Run(model, layers, options, forward_fn or (lambda model, batch: model(**batch)))
    first = next(batches)
    leaders = run.equal_inputs(first)
    for path, leader in leaders.items():  # one decomposition for modules with one input, for the largest need
        wanted[leader] = max(wanted[leader], wanted[path])
    estimates = {path: _Estimate(wanted[path], options.tau) for path in leaders if leaders[path] == path}
    wanted = {path: wanted[leaders[path]] for path in layers}
    distribution = dict(wanted)
    for batch in _with_first(first, batches):
        open_ones = {path: one for path, one in estimates.items() if not one.settled(distribution[path])}
        if not open_ones:
            break
        run.observe(batch, open_ones)
        if all(one.svd.components is not None for one in estimates.values()):
            distribution = _ranks(estimates, leaders, sum(ranks.values()), wanted)
    unsettled = [path for path, leader in leaders.items() if not estimates[leader].settled(distribution[path])]
    if unsettled:
        raise ValueError(
            f"{WHERE}: {len(unsettled)} of {len(layers)} modules have no settled components after {max_batches} batches, e.g. "
            f"{unsettled[0]}; give larger batches (at least {max(wanted.values())} tokens) or lower tau"
        )
    result = {}
    for path, rank in distribution.items():
        svd = estimates[leaders[path]].svd
        components = svd.components[:rank]
        if options.whiten:
            components = components / svd.singular_values[:rank].sqrt()[:, None]
        result[path] = components
    return result


class _Estimate:
    """The components of one input, and which of them stayed with the last batch."""

    def __init__(self, count: int, tau: float):
        self.svd, self.tau = IncrementalSVD(count), tau
        self.stayed = torch.zeros(count, dtype=torch.bool)

    def add(self, rows: torch.Tensor) -> None:
        if rows.shape[0] < self.svd.n_components:
            return
        before = self.svd.components
        self.svd.add(rows)
        if before is not None:
            self.stayed = torch.cosine_similarity(self.svd.components, before) >= self.tau

    def settled(self, rank: int) -> bool:
        return self.svd.components is not None and bool(self.stayed[:rank].all())


def _ranks(
    estimates: dict[str, _Estimate], leaders: dict[str, str], budget: int, wanted: dict[str, int]
) -> dict[str, int]:
    """The `budget` components that explain most, counted by module; a leader has the largest rank of those it leads."""
    order = [*estimates, *(path for path in leaders if path not in estimates)]
    shares = [(path, share) for path in order for share in estimates[leaders[path]].svd.explained[: wanted[path]]]
    largest = torch.stack([share for _, share in shares]).argsort(descending=True)[:budget]
    counts = Counter(shares[i][0] for i in largest.tolist())
    ranks = {path: counts[path] for path in order}
    for path, leader in leaders.items():
        if ranks[path] > ranks[leader]:
            ranks[path], ranks[leader] = ranks[leader], ranks[path]
    return ranks


class _Run:
    """Forward passes with the adapter off, and what the modules were given in them."""

    def __init__(self, model: PeftModel, layers: dict[str, LoRALinear], options: EvaConfig, forward: Callable):
        self.model, self.layers, self.options, self.forward = model, layers, options, forward

    def equal_inputs(self, batch: Any) -> dict[str, str]:
        """For each module the first one that is given the same numbers, often itself."""
        prints: dict[str, str] = {}
        first: dict[str, str] = {}

        def look(path: str, rows: torch.Tensor) -> None:
            data = rows.contiguous().view(torch.uint8).cpu().numpy().tobytes()
            prints[path] = hashlib.sha256(data).hexdigest()

        self._pass(batch, dict.fromkeys(self.layers, look))
        unused = [path for path in self.layers if path not in prints]
        if unused:
            raise ValueError(f"{WHERE}: expected a batch that runs every module, got one that does not run {unused[0]}")
        for path in self.layers:
            first.setdefault(prints[path], path)
        return {path: first[prints[path]] for path in self.layers}

    def observe(self, batch: Any, estimates: dict[str, _Estimate]) -> None:
        self._pass(batch, {path: (lambda path, rows: estimates[path].add(rows)) for path in estimates})

    def _pass(self, batch: Any, see: dict[str, Callable[[str, torch.Tensor], None]]) -> None:
        device = next(self.model.parameters()).device
        if hasattr(batch, "items"):
            batch = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
            }
        mask, training = _token_mask(batch, self.options), self.model.training
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.model.disable_adapter())
            stack.callback(self.model.train, training)
            self.model.eval()
            for path, function in see.items():
                hook = self.layers[path].register_forward_pre_hook(
                    lambda module, given, path=path, function=function: function(path, _rows(given[0], mask))
                )
                stack.callback(hook.remove)
            self.forward(self.model, batch)


def _token_mask(batch: Any, options: EvaConfig) -> torch.Tensor | None:
    """True for tokens that count, [B, S]; None where the batch does not say."""
    if not hasattr(batch, "items") or batch.get("input_ids") is None:
        return None
    given = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"], dtype=torch.bool) if given is None else given.bool()
    labels = batch.get("labels")
    if options.use_label_mask and labels is not None and labels.shape == mask.shape:
        mask = mask & (labels != options.label_mask_value)
    return mask


def _rows(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, S, K] as rows [n, K]: those of the mask where it fits, else all."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])


def _again_and_again(dataloader: Iterable, most: int) -> Iterator[Any]:
    count = 0
    while count < most:
        before = count
        for batch in dataloader:
            count += 1
            yield batch
            if count >= most:
                return
        if count == before:
            raise ValueError(f"{WHERE}: expected a dataloader with batches, got an empty one")


def _with_first(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
