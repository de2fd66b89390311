"""The part "loss": a causal language model trains without its logits.

In training, with gradients and labels, the ...ForCausalLM runs its decoder and takes the loss by `linear_cross_entropy`, as
transformers' ForCausalLMLoss defines it: labels shifted, or `shift_labels` as given, mean over the labels that count, or their
sum over `num_items_in_batch`. The output's logits are computed if somebody asks: see deferred_logits.py. Evaluation, generation
and calls without labels run the model's own forward.
"""

import dataclasses
import functools
import inspect
import sys
import typing

import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.integrations.acceleration.deferred_logits import DeferredLogits, deferred
from fastpeft.integrations.acceleration.ledger import Accelerated, own_class
from fastpeft.layers.adapter import ModulesToSaveWrapper
from fastpeft.ops.cross_entropy import linear_cross_entropy

if typing.TYPE_CHECKING:
    from fastpeft.integrations.acceleration.apply import Walk

PART = "loss"
IGNORED = -100
_NOT_FOR_THE_DECODER = ("labels", "logits_to_keep", "return_dict")


def replace_loss(walk: "Walk") -> None:
    """Let the model in `walk` compute its training loss without logits, if it is a causal language model of a known family."""
    core = walk.core
    own = own_class(core)
    path = next(name for name, module in walk.model.named_modules() if module is core)
    why = _why_never(own, core.config, walk.family.decoder)
    if why:
        walk.ledger.keep(path, core, PART, why)
        return
    walk.ledger.swap(path, core, _replacement(own, walk.family.decoder, walk.family.softcap, walk.impl), PART)


def _why_never(own: type, config, decoder: str | None) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = next(
        (base for base in own.__mro__ if base.__module__.startswith("transformers.")), own
    )  # below FSDP2's own
    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type) != named.__name__:
        return "its loss is not a causal language model's"
    if decoder is None:
        return f"no row for {config.model_type}'s loss"
    if not own.forward.__module__.startswith("transformers.models."):
        return "its forward is not transformers' own"
    if _output_class(own) is None:
        return "its output is not a class with loss and logits"
    return None


def _output_class(own: type) -> type | None:
    """The dataclass that `own.forward` says it returns."""
    annotation = inspect.signature(own.forward).return_annotation
    for choice in typing.get_args(annotation) or (annotation,):
        if dataclasses.is_dataclass(choice) and {"loss", "logits"} <= {f.name for f in dataclasses.fields(choice)}:
            return choice
    return None


@functools.cache
def _replacement(own: type, decoder: str, softcap_name: str | None, impl: str) -> type[Accelerated]:
    """The mixin of one model class: its forward has the signature of the class's own, which Trainer and generate read."""
    names = [name for name in inspect.signature(own.forward).parameters if name != "self"]
    output_class = _output_class(own)
    others = [field.name for field in dataclasses.fields(output_class) if field.name not in ("loss", "logits")]
    output_class = deferred(output_class)

    @functools.wraps(own.forward)
    def forward(self, *args, **kwargs):
        asked = dict(zip(names, args)) | kwargs
        trains = asked.get("labels") is not None and self.training and torch.is_grad_enabled()
        if not trains or not isinstance(self, Accelerated):  # restored, and called by who had taken the method before
            return own.forward(self, *args, **kwargs)
        head = _active(self.get_output_embeddings())
        why = _why_not_now(self, head, asked)
        if why:
            return self.fall_back(why, *args, **kwargs)
        given = {name: value for name, value in asked.items() if name not in _NOT_FOR_THE_DECODER}
        outputs = getattr(self, decoder)(**given)
        hidden = outputs.last_hidden_state
        softcap = None if softcap_name is None else getattr(self.config, softcap_name)
        loss = _loss(hidden, head, softcap, asked, impl)
        return _output(output_class, others, loss, hidden, head, softcap, outputs)

    return type("FastCausalLM", (Accelerated,), {"forward": forward, "__module__": __name__})


def _output(output_class, others, loss, hidden, head, softcap, outputs):
    """The model's output; a compiled step gives back what the logits would be computed of."""
    rest = {name: getattr(outputs, name, None) for name in others}
    return output_class(loss=loss, logits=DeferredLogits(hidden, head, softcap), **rest)


def _loss(hidden: torch.Tensor, head: nn.Linear, softcap: float | None, asked: dict, impl: str) -> torch.Tensor:
    """What ForCausalLMLoss computes of the logits of `hidden` [B, S, K], in float32 as there."""
    ignore_index = asked.get("ignore_index", IGNORED)
    labels = asked.get("shift_labels")
    if labels is None:
        labels = F.pad(asked["labels"], (0, 1), value=ignore_index)[..., 1:]
    loss = linear_cross_entropy(
        hidden,
        head.weight,
        labels.to(hidden.device).reshape(hidden.shape[:-1]),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        num_items=asked.get("num_items_in_batch"),
        impl=impl,
    )
    return loss.float()


def _active(head: nn.Module | None) -> nn.Module | None:
    """The module that computes the logits: the active copy of a ModulesToSaveWrapper, PEFT's or ours, else the head itself."""
    if head is None or _hook_on(head):
        return head
    if isinstance(head, ModulesToSaveWrapper):
        return head if head.row_adapters is not None else head.chosen()
    peft = sys.modules.get("peft.utils.other")
    if peft is None or not isinstance(head, peft.ModulesToSaveWrapper):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or active[0] not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[active[0]]


def _hook_on(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in module.__dict__


def _why_not_now(model, head: nn.Module | None, asked: dict) -> str | None:
    """Why this call needs the model's own forward."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return_dict = asked.get("return_dict")
    if return_dict is False or (return_dict is None and not model.config.return_dict):
        return "a tuple is asked for (return_dict=False)"
    keep = asked.get("logits_to_keep", 0)
    if isinstance(keep, torch.Tensor) or keep != 0:
        return "some logits are asked for (logits_to_keep)"
    if model.loss_function is not ForCausalLMLoss:
        return "its loss function is not ForCausalLMLoss"
    if head is None or own_class(head) is not nn.Linear:
        return f"its head is a {'None' if head is None else own_class(head).__name__}, not a plain Linear"
    if _hook_on(head):
        return "its head has hooks"
    if head.out_features != model.config.vocab_size or head.weight.shape[0] != head.out_features:
        return "its head's weight has not a row for each of config.vocab_size tokens"
    if hasattr(head.weight, "device_mesh"):
        return "its head's weight is distributed"
    return None
