"""What every prompt method shares: vectors that are trained and stand before the model's input, or before its keys.

A prompt wraps no module. It runs the model with something added to the arguments; what is saved is `prompt_embeddings`.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

PROMPT_KEY = "prompt_embeddings"
KEEPS_TOKEN_TYPES = ("SEQ_CLS", "TOKEN_CLS")
"""Task types for which token_type_ids count; for the others PEFT drops them, and so do we."""


class PromptLayer(nn.Module):
    """The trained vectors of one adapter, and how a model runs with them. A subclass defines

    prompt_embeddings()           what PEFT saves under that name, [P, ...], with gradients
    load_prompt(values)           take over a saved prompt; an encoder that made the earlier one is given up
    call(model, args, kwargs)     the model's forward with the prompt
    generate(model, args, kwargs) the model's generate with the prompt
    other_tensors()               what is trained and saved beside the prompt itself, by its name on disk
    encoder_tensors()             the parameters that make the prompt, where it is not a parameter itself: not on disk
    """

    lengthens_input = False
    """True if the model reads T tokens more, so that a causal LM predicts the first token of the text as well."""
    encoder_names: tuple[str, ...] = ()
    """Attributes of the modules that make the prompt from `embedding`; empty once they are given up."""

    def __init__(self, task_type: str, num_virtual_tokens: int):
        super().__init__()
        self.task_type, self.num_virtual_tokens = task_type, num_virtual_tokens

    def prompt_embeddings(self) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__}: expected prompt_embeddings to be defined")

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected call to be defined")

    def generate(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected generate to be defined")

    def other_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    # -- an encoder makes the prompt, or the prompt is the embedding itself -----------------------------------------------

    def has_encoder(self) -> bool:
        return any(hasattr(self, name) for name in self.encoder_names)

    def encoder_tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters()) if self.has_encoder() else {}

    @torch.no_grad()
    def load_prompt(self, values: torch.Tensor) -> None:
        if self.has_encoder():
            old = self.embedding.weight
            for name in self.encoder_names:
                if hasattr(self, name):
                    delattr(self, name)
            self.embedding = nn.Embedding(*values.shape, device=old.device, dtype=old.dtype)
            self.embedding.requires_grad_(old.requires_grad)
        self.embedding.weight.copy_(values)

    # -- on disk --------------------------------------------------------------------------------------------------------

    def disk_tensors(self) -> dict[str, torch.Tensor]:
        """What is saved, by name: the prompt as it acts, without dropout, and what is trained beside it."""
        training = self.training
        self.eval()
        try:
            return {PROMPT_KEY: self.prompt_embeddings()} | self.other_tensors()
        finally:
            self.train(training)

    def training_tensors(self) -> dict[str, torch.Tensor]:
        """What a resumed training needs beside what is on disk: the encoder's parameters, where there is one."""
        return {f"prompt_encoder.{name}": tensor for name, tensor in self.encoder_tensors().items()}

    def resumable(self) -> bool:
        """True if the saved prompt itself is what is trained, so that training goes on from it alone."""
        return not self.has_encoder()

    @torch.no_grad()
    def load(self, found: dict[str, torch.Tensor], training: dict[str, torch.Tensor]) -> None:
        """Take over what is on disk. training: the encoder's parameters, which then make the prompt; none without one."""
        own = self.training_tensors()
        if training and own:
            for name, tensor in own.items():
                tensor.copy_(training[name])
        else:
            self.load_prompt(found[PROMPT_KEY])
        for name, tensor in self.other_tensors().items():
            tensor.copy_(found[name])


def named_arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of model.forward by name; those that are None are left out."""
    names = list(inspect.signature(model.forward).parameters) if args else []
    named = dict(zip(names, args, strict=False)) | kwargs
    if "past_key_values" in named:
        named["cache"] = named.pop("past_key_values")
    return {name: value for name, value in named.items() if value is not None}


def batch_rows(inputs: dict[str, Any]) -> int:
    """Rows of a batch. Raises ValueError without input_ids and inputs_embeds."""
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name].shape[0]
    raise ValueError(f"prompt: expected input_ids or inputs_embeds, got {sorted(inputs)}")


def longer_mask(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """A mask [B, S] with `tokens` ones before every row. Raises NotImplementedError for another shape."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(
            f"attention_mask: expected [B, S] with a prompt, got {got}; give the mask of the tokens"
        )
    return torch.cat([mask.new_ones(mask.shape[0], tokens), mask], dim=1)


def drop(inputs: dict[str, Any], name: str) -> None:
    """Leave out an argument that means nothing with a prompt, and say so."""
    if inputs.pop(name, None) is not None:
        warnings.warn(f"{name} has no meaning with a prompt before the input and is not used", stacklevel=4)


def refuse_fixed_cache(cache: Any) -> None:
    """Raises NotImplementedError for a cache whose length was reckoned without the prompt."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise NotImplementedError(
            f"generate: expected a cache that grows, got {type(cache).__name__}, which has no room for the prompt; "
            "leave cache_implementation out"
        )


@contextlib.contextmanager
def preparing_inputs(model: nn.Module, adjust: Callable[[dict[str, Any], bool, Any], dict[str, Any]]) -> Iterator[None]:
    """Inside, every step of model.generate passes its arguments through adjust(arguments, use_cache, task_ids).

    The model's own prepare_inputs_for_generation runs before, and stands in the model again afterwards.
    """
    name = "prepare_inputs_for_generation"
    before = vars(model).get(name)
    original = getattr(model, name)

    def prepare(*args, task_ids=None, **kwargs):
        return adjust(original(*args, **kwargs), kwargs.get("use_cache") is not False, task_ids)

    # generate validates its arguments against this signature
    signature = inspect.signature(original)
    task_ids = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "task_ids"]
    rest = [parameter for parameter in own if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    own = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    prepare.__signature__ = signature.replace(parameters=[*own, task_ids, *rest])
    setattr(model, name, prepare)
    try:
        yield
    finally:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
