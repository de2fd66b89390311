"""IA3: keys, values and feed-forward activations are scaled by learned vectors (Liu et al. 2022, arXiv:2205.05638)."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.layers.adapter import AdapterLayer
from fastpeft.layers.ia3 import IA3Linear
from fastpeft.methods.targeted import TargetedConfig, require_linear

_LLAMA, _LATER = ("k_proj", "v_proj", "down_proj"), ("q_proj", "v_proj", "down_proj")
_BERT, _FUSED = ("key", "value", "output.dense"), ("query_key_value", "dense_4h_to_h")
IA3_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3", "llama4", "llama4_text", "stablelm"), _LATER),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    **dict.fromkeys(("gpt_neox", "falcon", "RefinedWeb", "RefinedWebModel"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "mlp.c_proj")),
    "t5": ("k", "v", "wo"),
    "mt5": ("k", "v", "wi_1"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "gptj": ("q_proj", "v_proj", "fc_out"),
    "gpt_neo": ("q_proj", "v_proj", "c_proj"),
    "bart": ("q_proj", "v_proj", "fc2"),
    "mixtral": ("k_proj", "v_proj", "w2"),
    "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj", "value_proj", "output.dense"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "phi3": ("qkv_proj", "down_proj"),
    "distilbert": ("k_lin", "v_lin", "ffn.lin2"),
}
"""Modules that are usually scaled, by `model.config.model_type`: PEFT's where it has a row."""
FEEDFORWARD: dict[str, tuple[str, ...]] = {
    kind: () if kind == "mt5" else names[-1:] for kind, names in IA3_TARGETS.items()
}
"""Those of them whose input is scaled: the second linear of a feed-forward block, the last of its row."""


@dataclass
class IA3Config(TargetedConfig):
    """Options of IA3, by PEFT's names.

    Raises:  ValueError where feedforward_modules names what target_modules does not, or has no default for the model
    """

    peft_type: ClassVar[str] = "IA3"
    default_targets: ClassVar[dict[str, tuple[str, ...]]] = IA3_TARGETS
    shown_elsewhere: ClassVar[frozenset[str]] = TargetedConfig.shown_elsewhere | {
        "feedforward_modules",
        "init_ia3_weights",
    }

    feedforward_modules: list[str] | str | None = None
    """Those of target_modules whose input is scaled instead of their output: ends of their names, or a regular expression for
    whole paths; None for the architecture's usual ones."""
    fan_in_fan_out: bool = False
    """Some adapted weight is stored [in, out] (GPT-2's Conv1D); found out by itself."""
    init_ia3_weights: bool = True
    """Start with ones; False: random."""

    def __post_init__(self):
        super().__post_init__()
        self.feedforward_modules = self._names("feedforward_modules", may_be_pattern=True)
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            beyond = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if beyond:
                raise ValueError(
                    f"IA3Config: expected feedforward_modules among target_modules {sorted(self.target_modules)}, "
                    f"got {beyond} too"
                )

    def for_model(self, model: nn.Module) -> "IA3Config":
        if self.feedforward_modules is not None:
            return self
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in FEEDFORWARD:
            raise ValueError(
                f"IA3Config: no default feedforward_modules for model_type {kind!r}; name the modules whose input is to be "
                "scaled, or give [] for none"
            )
        config = copy.copy(self)  # unchecked: a row may name what target_modules leaves out
        config.feedforward_modules = list(FEEDFORWARD[kind])
        return config

    def is_feedforward(self, path: str) -> bool:
        """True if the module's input is scaled. Names are compared with the path's end, as PEFT does it."""
        names = self.feedforward_modules
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return path.endswith(tuple(names or ()))

    def resolved(self, model: nn.Module, paths: list[str]) -> "IA3Config":
        names = self.feedforward_modules
        config = super(IA3Config, dataclasses.replace(self, feedforward_modules=None)).resolved(model, paths)
        if isinstance(names, list) and isinstance(config.target_modules, list):
            names = [name for name in names if any(path.endswith(name) for path in paths)]
            if not set(names) <= set(config.target_modules):  # as PEFT wants to read them
                config.target_modules = list(paths)
                names = [path for path in paths if self.is_feedforward(path)]
        return dataclasses.replace(config, feedforward_modules=names)

    def wrap(self, path: str, module: nn.Module, adapter_name: str, autocast_adapter_dtype: bool) -> AdapterLayer:
        return IA3Linear(
            require_linear("IA3Config", path, module),
            adapter_name=adapter_name,
            is_feedforward=self.is_feedforward(path),
            init_ia3_weights=self.init_ia3_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
