"""Getting a base model ready to be trained with adapters."""

from typing import Any

from torch import nn

from fastpeft.layers.base_weight import keep_model_unpacked


def prepare_for_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freeze a model and, if asked, recompute activations in backward instead of keeping them.

    No dtype changes: unlike PEFT's prepare_model_for_kbit_training, norms, embeddings and the head are not copied to float32.
    Raises:  ValueError for a 4-bit model that bitsandbytes has repacked
    """
    keep_model_unpacked(model)
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        require_input_gradients(model)
        if hasattr(model, "config"):
            model.config.use_cache = False
    return model


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """prepare_for_training by PEFT's name, with its default: checkpointing on. For models of any kind, quantised or not.

    PEFT's own also copies every other half-precision weight to float32: norms, embeddings, the head. That makes the whole
    residual stream float32 and costs 2 bytes a number (1 GB for a vocabulary of 128K by 4096) without more accurate sums:
    norms sum in float32 in any case, and the adapter's tensors are float32. Here nothing is copied.
    """
    return prepare_for_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)


def require_input_gradients(model: nn.Module) -> None:
    """Let the input embedding's output require a gradient: reentrant checkpointing trains nothing otherwise."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
