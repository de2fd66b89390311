"""PeftModel: a model with adapters, by PEFT's names."""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastpeft.checkpoint import KEY_PREFIX, compare, read_adapter, write_adapter
from fastpeft.layers.adapter import recomputes_layers
from fastpeft.layers.base_weight import is_linear_4bit, keep_model_unpacked, weight_shape
from fastpeft.methods import config_from_dict
from fastpeft.methods.config import PeftConfig
from fastpeft.methods.targets import base_modules
from fastpeft.tuner import Injection, Tuner

DEFAULT_ADAPTER = "default"


class PeftModel(nn.Module):
    """A model whose base is frozen and whose adapters are trained. What it does not define passes through to the base model.

    base_model: the Tuner, which holds the user's model as `base_model.model`, so parameter names equal PEFT's
    peft_config: config of every adapter by name
    """

    def __init__(
        self,
        model: nn.Module,
        config: PeftConfig | None = None,
        adapter_name: str = DEFAULT_ADAPTER,
        autocast_adapter_dtype: bool = True,
    ):
        super().__init__()
        if isinstance(model, PeftModel):
            raise ValueError("PeftModel: expected a plain model, got a PeftModel; use its add_adapter or load_adapter")
        self.base_model = Tuner(model)
        if config is not None:
            self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
            self.set_adapter(adapter_name)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args, adapter_names: Iterable[str] | None = None, **kwargs):
        """The base model's forward. adapter_names: one adapter per item of the batch, "__base__" for none."""
        with self.base_model.adapters_per_item(adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args, adapter_names: Iterable[str] | None = None, **kwargs):
        """The base model's generate; adapter_names as in forward."""
        with self.base_model.adapters_per_item(adapter_names):
            return self.get_base_model().generate(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The user's model, with the adapters in it."""
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """What transformers' Trainer asks of a quantised model: whether it has adapters, and so something to train."""
        return bool(self.peft_config)

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        return list(self.base_model.active_adapters)

    @property
    def active_adapter(self) -> str:
        """The first active adapter's name."""
        return self.base_model.active_adapters[0]

    # -- adapters -------------------------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True) -> None:
        """Add a new adapter; the active ones stay active. Fails before the model changes.

        autocast_adapter_dtype: keep the adapter's tensors in float32 over a float16 or bfloat16 base
        Raises:  ValueError for a name that exists or an option out of range, NoTargetError where nothing matches
        """
        injection = self.base_model.prepare(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        self._install(injection)

    def _install(self, injection: Injection) -> None:
        if not self.peft_config and recomputes_layers(self.get_base_model()):
            require_input_gradients(self.get_base_model())
        self.base_model.install(injection)

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several whose updates add up; the others are frozen and do not act."""
        self.base_model.set_adapter(adapter_name, trainable=not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active."""
        self.base_model.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self):
        """Inside, the model computes exactly what the base model did; contexts may be nested."""
        was_disabled = self.base_model.disabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not was_disabled:
                self.base_model.enable_adapter_layers()

    def merge_adapter(self, adapter_names: Iterable[str] | None = None, safe_merge: bool = False) -> None:
        self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Iterable[str] | None = None
    ) -> nn.Module:
        """The plain model with the adapters in its weights. progressbar is accepted for PEFT's sake; merging takes seconds."""
        return self.base_model.merge_and_unload(safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        return self.base_model.unload()

    # -- counts ---------------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters; a tied parameter counts once, a quantised one as it was before."""
        packed = {
            id(module.weight): math.prod(weight_shape(module)) for module in self.modules() if is_linear_4bit(module)
        }
        sizes = [(packed.get(id(p), p.numel()), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def trainable_parameter_table(self) -> list[dict[str, Any]]:
        """One row per trainable parameter: name, shape, dtype, numel."""
        return [
            {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype)[6:], "numel": tensor.numel()}
            for name, tensor in self.named_parameters()
            if tensor.requires_grad
        ]

    # -- training -------------------------------------------------------------------------------------------------------

    def gradient_checkpointing_enable(self, *args, **kwargs) -> None:
        """The base model's gradient checkpointing, of either kind; its inputs get a gradient, which the reentrant kind needs."""
        self.get_base_model().gradient_checkpointing_enable(*args, **kwargs)
        require_input_gradients(self.get_base_model())

    # -- files ----------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike, selected_adapters: Iterable[str] | None = None, **_: Any
    ) -> None:
        """Write the adapters in PEFT's format: "default" into the folder itself, any other into a subfolder of its name.

        The adapter's tensors only; other keyword arguments of transformers' save_pretrained are accepted and unused.
        Raises:  OSError if the folder cannot be written; what was there before is then untouched
        """
        names = list(self.peft_config if selected_adapters is None else selected_adapters)
        self.base_model._known(names)
        root = Path(save_directory)
        if root.is_file():
            raise NotADirectoryError(f"save_pretrained: expected a folder, got the file {root}")
        for name in names:
            folder = root if name == DEFAULT_ADAPTER else root / name
            config = dataclasses.replace(self.peft_config[name], inference_mode=True)
            write_adapter(folder, config.to_dict(), self.base_model.adapter_tensors(name))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> "PeftModel":
        """A model with the adapter of folder `model_id`, frozen and in eval mode unless is_trainable.

        Raises:  as load_adapter; `model` is then unchanged
        """
        peft_model = cls(model)
        peft_model.load_adapter(model_id, adapter_name, is_trainable, autocast_adapter_dtype)
        return peft_model

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Load the adapter of a folder under a new name, or its values into an adapter of that name that exists.

        A first adapter becomes active. Everything is checked before the model changes.
        Raises:  FileNotFoundError, or ValueError for a damaged file, a pickle, or tensors that do not fit, listed by name
        """
        values, found = read_adapter(model_id)
        config = config_from_dict(values)
        config.inference_mode = not is_trainable
        exists = adapter_name in self.peft_config
        if exists:
            different = config.differences(self.peft_config[adapter_name])
            if different:
                raise ValueError(f"load_adapter: {model_id} differs from the loaded {adapter_name!r} in {different}")
            expected, injection = self.base_model.adapter_tensors(adapter_name), None
        else:
            injection = self.base_model.prepare(
                adapter_name,
                config,
                autocast_adapter_dtype=autocast_adapter_dtype,
                strict=False,
                saved_paths=self._paths_peft_saved(config, found),
            )
            expected = injection.tensors()
        found = self._without_extras(found, expected)
        compare(expected, found)
        if injection is not None:
            self._install(injection)
            if not self.active_adapters:
                self.base_model.set_adapter(adapter_name, trainable=is_trainable)
        with torch.no_grad():
            for name, tensor in self.base_model.adapter_tensors(adapter_name).items():
                tensor.copy_(found[name])
        if not is_trainable:
            self.eval()

    def _paths_peft_saved(self, config: PeftConfig, found: dict[str, torch.Tensor]) -> list[str]:
        """Modules that PEFT saved by its bare endswith rule, such as input_layernorm for modules_to_save=["norm"]."""
        names = tuple(getattr(config, "modules_to_save", None) or ())
        owners = {key.removeprefix(KEY_PREFIX).rpartition(".")[0] for key in found}
        return [
            path for path, _ in base_modules(self.get_base_model()) if names and path.endswith(names) and path in owners
        ]

    def _without_extras(
        self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Drop what PEFT writes beside the adapter: biases of wrappers, and embeddings that equal the base model's.

        Raises:  NotImplementedError if the file holds an embedding that differs from the base model's
        """
        modules = dict(base_modules(self.get_base_model()))
        kept = {}
        for key, tensor in found.items():
            path = key.removeprefix(KEY_PREFIX)
            if key not in expected and re.search(r"\.(modules_to_save|original_module)\.([\w.]+\.)?bias$", path):
                continue
            owner = modules.get(path.removesuffix(".weight").removesuffix(".base_layer"))
            if key not in expected and isinstance(owner, nn.Embedding | nn.Linear) and path.endswith(".weight"):
                same = owner.weight.shape == tensor.shape and torch.equal(
                    owner.weight.cpu(), tensor.to(owner.weight.dtype)
                )
                if same:
                    continue
                if isinstance(owner, nn.Embedding):
                    raise NotImplementedError(
                        f"load_adapter: {key} {tuple(tensor.shape)} is not the base model's {tuple(owner.weight.shape)}; "
                        "the adapter was saved with a changed vocabulary: give the base model's embedding these weights first"
                    )
            kept[key] = tensor
        return kept


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = DEFAULT_ADAPTER,
    autocast_adapter_dtype: bool = True,
) -> PeftModel:
    """A PeftModel over `model`: its parameters frozen, the adapter's trainable and active.

    The modules of `model` itself are wrapped. Raises NoTargetError, naming what exists, if nothing matches.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"get_peft_model: expected a fastpeft config such as LoraConfig, got {type(peft_config).__name__}"
        )
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


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
