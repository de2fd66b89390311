"""What a method does in training beside its layers' forward: a penalty on the loss, and a turn after every optimizer step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from fastpeft.tuner.adapters import Adapters


class ScheduledAdapters(Adapters):
    """Adapters whose methods may take part in the training: PeftConfig.penalty and PeftConfig.after_step."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._penalty_is_apart = False

    def forward(self, *args, **kwargs):
        """The model's forward; in training the methods' penalty is added to the loss, where the output has one."""
        outputs = super().forward(*args, **kwargs)
        if self.training and not self._penalty_is_apart:
            loss = getattr(outputs, "loss", None)
            penalty = self.penalty() if isinstance(loss, torch.Tensor) else None
            if penalty is not None:
                outputs.loss = loss + penalty.to(loss.device)
        return outputs

    def penalty(self) -> torch.Tensor | None:
        """What the active adapters' methods add to the loss of a training, or None."""
        if self.disabled:
            return None
        layers = dict(self.layers()) if self.active_adapters else {}
        penalties = [self.peft_config[name].penalty(name, layers) for name in self.active_adapters]
        penalties = [penalty for penalty in penalties if penalty is not None]
        return sum(penalties[1:], penalties[0]) if penalties else None

    @contextlib.contextmanager
    def penalty_apart(self) -> Iterator[None]:
        """Inside, forward leaves the loss alone: who computes it adds `penalty` too."""
        before, self._penalty_is_apart = self._penalty_is_apart, True
        try:
            yield
        finally:
            self._penalty_is_apart = before

    def update_and_allocate(self, global_step: int) -> None:
        """Let the active adapters' methods act on a step: call it after optimizer.step() and before zero_grad(). PEFT's name.

        global_step: the number of this step. Counted from 1, the last allocation of AdaLoRA falls on total_step - tfinal steps
        taken; counted from 0 with tfinal=0, it is never reached. Methods without a schedule do nothing.
        """
        layers = dict(self.layers())
        for name in self.active_adapters:
            self.peft_config[name].after_step(name, layers, global_step)
