"""Models with an adapter of any method, and a task that they can learn."""

import copy
import functools

import torch
import torch.nn.functional as F

import fastpeft
from tests.every_method.cases import CASES
from tests.every_method.method_case import MODELS
from tests.tiny_models import inputs

PAIRS = [(name, model) for name, case in CASES.items() for model in case.models]
SHARPNESS = 8.0  # random models have flat logits: a loss on them would hardly fall, whatever is learned


def ids(pairs) -> list[str]:
    return ["-".join(pair) for pair in pairs]


@functools.cache
def _made(model: str):
    torch.manual_seed(0)
    made = MODELS[model]().eval()
    for module in made.modules():  # two libraries, or two runs, must see the same function
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return made


def base(model: str):
    """A fresh copy of the random model, in eval mode."""
    return copy.deepcopy(_made(model))


def adapted(name: str, model: str, library=fastpeft, over=None):
    """A model with a fresh adapter of the case, in eval mode; the same seed gives the same adapter."""
    torch.manual_seed(1)
    return library.get_peft_model(base(model) if over is None else over, CASES[name].config(library, model)).eval()


def moved(wrapped, name: str, seed: int = 1):
    """The same model, with every trained value moved away from its start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            step = torch.randn(parameter.shape, generator=generator) * CASES[name].fill_std
            parameter.data.add_(step.to(parameter))
    return wrapped


def task_loss(wrapped) -> torch.Tensor:
    """Cross-entropy of one answer for every row and every token: the whole model must learn to say it."""
    logits = wrapped(**inputs(wrapped)).logits.float() * SHARPNESS
    logits = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(logits, torch.full((len(logits),), 2))


class Training:
    """A plain loop: AdamW on what is trainable, and the method's schedule where it has one."""

    def __init__(self, wrapped, name: str):
        self.wrapped, self.case, self.step = wrapped, CASES[name], 0
        trainable = [p for p in wrapped.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=self.case.learning_rate, weight_decay=0.0)

    def run(self, steps: int) -> list[float]:
        losses = []
        self.wrapped.train()
        for _ in range(steps):
            loss = task_loss(self.wrapped)
            loss.backward()
            self.optimizer.step()
            if hasattr(self.wrapped.base_model, "update_and_allocate"):
                self.wrapped.base_model.update_and_allocate(self.step)
            self.optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item())
        self.wrapped.eval()
        return losses
