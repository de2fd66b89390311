"""What every method's configuration shares: PEFT's field names, checks, and the way to and from adapter_config.json."""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.checkpoint import CONFIG_NAME, adapter_folder, read_config, replace_files
from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.prompt import PromptLayer

TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION")
# New heads, trained in full beside the adapter. PEFT finds DistilBERT's pre_classifier by a bare endswith("classifier").
HEAD_NAMES = {
    "SEQ_CLS": ("classifier", "score", "pre_classifier"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


@dataclass
class PeftConfig:
    """Options common to all methods. A method's config adds its own fields and says which modules it wraps, and how."""

    peft_type: ClassVar[str] = ""
    may_share_parameters: ClassVar[bool] = False
    """Adapters of this method may train the same parameters of the base, one adapter at a time."""
    key_prefix: ClassVar[str] = "base_model.model."
    """What stands before a module's path in the name of a tensor on disk."""
    known_to_peft: ClassVar[bool] = True
    """False for a method that PEFT lacks, whose adapters it cannot load."""
    works_with_checkpointing: ClassVar[bool] = True
    """False for a method that cannot be trained with gradient checkpointing."""
    # Fields that PEFT writes and this method does not have, with the values that mean "not used".
    unsupported: ClassVar[dict[str, tuple]] = {}
    # Fields in which two configs of the same tensors may differ: origin, training, and ways to name the same modules.
    shown_elsewhere: ClassVar[frozenset[str]] = frozenset(
        {"base_model_name_or_path", "revision", "inference_mode", "task_type"}
    )

    task_type: str | None = None
    """What the model is tuned for: SEQ_CLS, TOKEN_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, QUESTION_ANS, FEATURE_EXTRACTION."""
    base_model_name_or_path: str | None = None
    """Where the base model came from; written into the adapter."""
    revision: str | None = None
    """The base model's revision."""
    inference_mode: bool = False
    """True in a saved adapter: load it frozen."""

    def __post_init__(self):
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ValueError(f"{type(self).__name__}: expected task_type one of {TASK_TYPES}, got {self.task_type!r}")
        self.task_type = getattr(self.task_type, "value", self.task_type)  # of TaskType, or PEFT's

    def heads_to_save(self) -> list[str]:
        """Names of the heads that are trained in full for this task type, where the model has them."""
        return list(HEAD_NAMES.get(self.task_type, ()))

    def needed_adapters(self) -> list[str]:
        """Names of other adapters that this one acts through; they have to be in the model first."""
        return []

    # -- training -------------------------------------------------------------------------------------------------------

    def for_run(self, steps: int) -> "PeftConfig":
        """The config with what the length of a training decides filled in; steps: optimizer steps."""
        return self

    def penalty(self, name: str, layers: Mapping[str, AdapterLayer]) -> torch.Tensor | None:
        """What the method adds to the loss of a training of adapter `name`; layers: all wrappers of the model, by path."""
        return None

    def after_step(self, name: str, layers: Mapping[str, AdapterLayer], step: int) -> None:
        """What the method does after an optimizer step, while its gradients are there."""

    # -- what a method does ---------------------------------------------------------------------------------------------

    def for_model(self, model: nn.Module) -> "PeftConfig":
        """The config with what the model's architecture decides filled in; asked before anything is built."""
        return self

    def target_paths(self, model: nn.Module) -> list[str]:
        """Dotted names of the modules that this method wraps, in the model's order. Raises NoTargetError when none match."""
        raise NotImplementedError

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        """A new wrapper of `module` with one adapter; the model that holds the module is not changed."""
        raise NotImplementedError

    def make_prompt(self, model: nn.Module, autocast_adapter_dtype: bool, fresh: bool) -> PromptLayer | None:
        """What a prompt method puts before the model's input or keys; None for a method that wraps modules.

        fresh: draw initial values as the config says; else a saved prompt is about to be loaded
        """
        return None

    def trained_parameters(
        self, modules: dict[str, nn.Module], wrapped: list[str], copied: list[str]
    ) -> dict[str, nn.Parameter]:
        """Parameters of the base model that are trained in place, by their path once the adapter is installed.

        modules: the base model's, by path; wrapped: paths that get a wrapper; copied: paths whose module is copied in full
        """
        return {}

    def showing(self, tensors: dict[str, torch.Tensor]) -> "PeftConfig":
        """The config to save beside these tensors of its adapter."""
        return self

    def to_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The adapter's tensors as they are saved."""
        return tensors

    def from_disk(self, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Saved tensors in the shapes of a fresh adapter, `expected`; what does not fit stays as it is."""
        return found

    def after_loading(self, saved: "PeftConfig") -> "PeftConfig":
        """The config of an adapter into which the tensors of an adapter with the config `saved` have been loaded."""
        return self

    def resolved(self, model: nn.Module, paths: list[str]) -> "PeftConfig":
        """A copy with what was left to defaults spelled out, so that the saved adapter loads without them."""
        name = getattr(getattr(model, "config", None), "_name_or_path", None)
        return dataclasses.replace(self, base_model_name_or_path=self.base_model_name_or_path or name or None)

    def differences(self, other: "PeftConfig") -> list[str]:
        """Fields in which the two differ and that say what an adapter computes from its tensors.

        Where it came from does not, nor what the names and shapes of its tensors show, such as the modules it is on.
        """
        if type(self) is not type(other):
            return ["peft_type"]
        names = [field.name for field in dataclasses.fields(self) if field.name not in self.shown_elsewhere]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    # -- on disk --------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them to adapter_config.json."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
        return {"peft_type": self.peft_type, **plain}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PeftConfig":
        """A config from the fields of an adapter_config.json, written here or by PEFT.

        Raises:  NotImplementedError if the adapter uses an option that this method does not have here
        """
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        for key, unused in cls.unsupported.items():
            if key in values and values[key] not in unused:
                raise NotImplementedError(
                    f"{cls.__name__}: the adapter uses {key}={values[key]!r}, which fastpeft does not have; load it with peft"
                )
        return cls(**known)

    def save_pretrained(self, save_directory: str | os.PathLike, **_: Any) -> None:
        """Write adapter_config.json into a folder, which is made; other arguments of PEFT's are accepted and unused."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        replace_files({folder / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8")})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike) -> "PeftConfig":
        """The config of an adapter's folder, or of an adapter on the hub, in the class of its method.

        Raises:  FileNotFoundError, ValueError for a damaged file, NotImplementedError for a method that is not here;
                 TypeError where a method's own class is asked and the file has another method
        """
        from fastpeft.methods import config_from_dict

        config = config_from_dict(read_config(adapter_folder(pretrained_model_name_or_path)))
        if not isinstance(config, cls):
            raise TypeError(
                f"{cls.__name__}.from_pretrained: expected peft_type {cls.peft_type}, got {config.peft_type} in "
                f"{pretrained_model_name_or_path}; use PeftConfig.from_pretrained"
            )
        return config
