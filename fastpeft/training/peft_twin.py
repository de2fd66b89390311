"""The same adapter by Hugging Face PEFT, for a plan to be compared with. Needs peft."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_dora",
    "use_rslora",
    "lora_bias",
)


def wrap_with_peft(base: nn.Module, options: Any) -> nn.Module:
    """PEFT's get_peft_model with the fields that both LoraConfigs have."""
    import peft

    if options.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    ours = options.peft_config()
    config = peft.LoraConfig(task_type=ours.task_type, **{name: getattr(ours, name) for name in _FIELDS})
    with _moving_fakes():
        return peft.get_peft_model(base, config, autocast_adapter_dtype=options.autocast_adapter_dtype)


@contextlib.contextmanager
def _moving_fakes() -> Iterator[None]:
    """Inside, nn.Module.to makes new parameters in the dtype: it cannot exchange the contents of fake ones."""
    before = nn.Module.to

    def to(module: nn.Module, *args, **kwargs) -> nn.Module:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        for part in module.modules() if dtype is not None else ():
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        return module

    nn.Module.to = to
    try:
        yield
    finally:
        nn.Module.to = before
