"""What every prompt method shares: vectors that are trained and stand before the model's input, or before its keys.

A prompt wraps no module. It runs the model with something added to the arguments; what is saved is `prompt_embeddings`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PROMPT_KEY = "prompt_embeddings"


class PromptLayer(nn.Module):
    """The trained vectors of one adapter, and how a model runs with them. A subclass defines

    prompt_embeddings()      what PEFT saves, [T, ...], with gradients
    load_prompt(values)      take over a saved prompt [T, ...]; an encoder that made it is left as it is
    call(model, args, kwargs) the model's forward with the prompt
    generation(model)        a context in which model.generate uses the prompt
    training_tensors()       what a resumed training needs: the encoder's parameters, where there is one
    """

    def prompt_embeddings(self) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__}: expected prompt_embeddings to be defined")

    def load_prompt(self, values: torch.Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__}: expected load_prompt to be defined")

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: expected call to be defined")

    @contextlib.contextmanager
    def generation(self, model: nn.Module) -> Iterator[None]:
        """Inside, model.generate uses the prompt."""
        raise NotImplementedError(f"{type(self).__name__}: expected generation to be defined")
        yield

    def training_tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def resumable(self) -> bool:
        """True if the saved prompt itself is what is trained, so that training goes on from it alone."""
        return True
