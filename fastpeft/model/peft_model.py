"""PeftModel: a model with adapters, by PEFT's names."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft.checkpoint import adapter_folder, read_config, write_adapter
from fastpeft.layers.base_weight import is_linear_4bit, weight_shape
from fastpeft.methods.config import PeftConfig
from fastpeft.model.loading import install, load_into
from fastpeft.model.plain_lora import as_plain_lora
from fastpeft.model.preparation import require_input_gradients
from fastpeft.ops.mixing import MajoritySign
from fastpeft.tuner import Tuner
from fastpeft.tuner.mixing import Mixture, prepare_mixture

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
            return self.base_model.generate(*args, **kwargs)

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
        install(self.base_model, injection)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
    ) -> None:
        """Add a LoRA adapter that is a mixture of others; the active ones stay active.

        combination_type  "cat" and "svd" give sum of w_i s_i B_i A_i (svd: at its best rank svd_rank; cat: at the sum of the
                          ranks), "linear" sums A and B one by one. "ties", "dare_linear", "dare_ties" and "magnitude_prune"
                          keep a share `density` of the values, as ops/mixing.py says; each has a form with "_svd", which
                          works on the products B A
        Raises:  ValueError for an unknown name or value, and adapters that are more than s B A (DoRA, lora_bias, trained
                 biases, changed base weights); NotImplementedError for other methods. The model is then unchanged
        """
        mixture = Mixture(
            list(adapters),
            list(weights),
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
        )
        install(self.base_model, prepare_mixture(self.base_model, mixture, adapter_name))

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

    def parameter_counts(self) -> dict[str, Any]:
        """{"trainable", "total", "percent", "by_module"}: by_module has the trainable numbers by path in the base model.

        Units: numbers of parameters; percent of the total, not rounded
        """
        trainable, total = self.get_nb_trainable_parameters()
        groups = [(path, layer.parameters()) for path, layer in self.base_model.layers()]
        groups += [(f"prompts.{name}", prompt.parameters()) for name, prompt in self.base_model.prompts.items()]
        groups += [(path, module.parameters(recurse=False)) for path, module in self.get_base_model().named_modules()]
        rows: dict[str, int] = {}
        counted: set[int] = set()
        for path, parameters in groups:
            new = {id(p): p.numel() for p in parameters if p.requires_grad and id(p) not in counted}
            counted |= set(new)
            if new:
                rows[path] = rows.get(path, 0) + sum(new.values())
        return {"trainable": trainable, "total": total, "percent": 100 * trainable / total, "by_module": rows}

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[Any]:
        """One row per wrapped module: which adapters it has, and which act, are merged, train."""
        from fastpeft.model.status import get_layer_status

        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """The rows of get_layer_status in one."""
        from fastpeft.model.status import get_model_status

        return get_model_status(self)

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
        self,
        save_directory: str | os.PathLike,
        selected_adapters: Iterable[str] | None = None,
        path_initial_model_for_weight_conversion: str | os.PathLike | bool | None = None,
        **_: Any,
    ) -> None:
        """Write the adapters in PEFT's format: "default" into the folder itself, any other into a subfolder of its name.

        The adapter's tensors only; other keyword arguments of transformers' save_pretrained are accepted and unused.
        path_initial_model_for_weight_conversion: write plain LoRA of twice the rank, which needs no change of the base
        weights, in place of PiSSA, OLoRA or LoftQ (plain_lora.py); True, or a folder with the adapter as it was at its start
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
            tensors = self.base_model.adapter_tensors(name)
            config = config.showing(tensors)
            tensors = config.to_disk(tensors)
            if path_initial_model_for_weight_conversion:
                initial = path_initial_model_for_weight_conversion
                config, tensors = as_plain_lora(
                    self.base_model, name, config, tensors, None if initial is True else initial
                )
            write_adapter(folder, config.to_dict(), tensors, self.base_model.training_tensors(name))

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

        On PeftModel itself the class is that of the adapter's task_type, such as PeftModelForCausalLM.
        Raises:  as load_adapter; `model` is then unchanged
        """
        folder = adapter_folder(model_id)
        peft_model = (_class_for(read_config(folder)) if cls is PeftModel else cls)(model)
        peft_model.load_adapter(folder, adapter_name, is_trainable, autocast_adapter_dtype)
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
        load_into(self.base_model, model_id, adapter_name, is_trainable, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()


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
    kind = _class_for({"task_type": peft_config.task_type})
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype)


def _class_for(config: dict[str, Any]) -> type[PeftModel]:
    """The class of PeftModel for a config's task_type."""
    from fastpeft.model.tasks import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.get("task_type"), PeftModel)
