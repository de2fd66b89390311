"""Prefix tuning and P-tuning v2: trained keys and values in every attention layer (arXiv:2101.00190, arXiv:2110.07602)."""

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from fastpeft.layers.adapter import recomputes_layers
from fastpeft.layers.prefix_tuning import PrefixEncoder, is_bidirectional
from fastpeft.layers.prompt import PromptLayer
from fastpeft.methods.prompt_learning import PromptLearningConfig

CACHED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """Options of prefix tuning, by PEFT's names. P-tuning v2 is prefix_projection=False, the default.

    token_dim is heads * D of the keys, num_attention_heads those of the keys and values: fewer than the queries' in a model
    with grouped queries.
    Raises:  ValueError for a value outside its range, for a model whose attention takes no cache, and with gradient
             checkpointing; NotImplementedError for a model whose layers' keys differ in shape, or are no keys of attention
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    works_with_checkpointing: ClassVar[bool] = False
    shown_elsewhere: ClassVar[frozenset[str]] = PromptLearningConfig.shown_elsewhere | {
        "init_weights",
        "encoder_hidden_size",
        "prefix_projection",
    }

    init_weights: Literal["zero"] | None = None
    """Start with keys and values of zero, or from random ones."""
    encoder_hidden_size: int | None = None
    """Hidden width of the projection; token_dim by default."""
    prefix_projection: bool = False
    """Make the prefix with a network of two layers, which is given up after training."""

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        self._check_count("encoder_hidden_size")
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"{where}: expected init_weights 'zero' or none, got {self.init_weights!r}")
        if self.token_dim and self.num_attention_heads and self.token_dim % self.num_attention_heads:
            raise ValueError(
                f"{where}: expected token_dim a multiple of num_attention_heads, got "
                f"{self.token_dim} and {self.num_attention_heads}"
            )

    def _sizes(self, model: nn.Module) -> dict[str, Any]:
        config = model.config.get_text_config()
        _check_layers(model, config)
        queries = config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // queries
        wanted = {"token_dim": heads * width, "num_attention_heads": heads, "num_layers": config.num_hidden_layers}
        for name, value in wanted.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"PrefixTuningConfig: expected {name} {value}, as the model's keys have it, got {getattr(self, name)}"
                )
        sizes = self._counts(config) | wanted
        return sizes | {"encoder_hidden_size": self.encoder_hidden_size or sizes["token_dim"]}

    def make_prompt(self, model: nn.Module, autocast_adapter_dtype: bool, fresh: bool) -> PromptLayer:
        if recomputes_layers(model) and not self.inference_mode:
            raise ValueError(
                "PrefixTuningConfig: expected no gradient checkpointing, which switches off the cache that the prefix stands in; "
                "call gradient_checkpointing_disable(), or use prompt tuning or P-tuning"
            )
        projected = self.prefix_projection and not self.inference_mode
        prompt = PrefixEncoder(
            self.task_type,
            self.num_virtual_tokens,
            self.num_transformer_submodules,
            self.num_layers,
            self.num_attention_heads,
            self.token_dim // self.num_attention_heads,
            projected_from=self.encoder_hidden_size if projected else None,
            bidirectional=is_bidirectional(model),
        )
        if self.init_weights == "zero":
            prompt.start_at_zero()
        return self._placed(prompt, model, autocast_adapter_dtype)


def _check_layers(model: nn.Module, config: Any) -> None:
    """Refuse a model whose layers do not all take keys and values of one shape through a cache."""
    name = type(model).__name__
    backbone = model if model.config.is_encoder_decoder else getattr(model, "base_model", model)
    if "cache" not in inspect.signature(backbone.forward).parameters:
        raise ValueError(
            f"PrefixTuningConfig: expected a model whose forward takes a cache, got {name}; use prompt tuning or P-tuning"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - set(CACHED_LAYERS)
    decoder_layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    if model.config.is_encoder_decoder and decoder_layers not in (None, config.num_hidden_layers):
        kinds.add(f"{decoder_layers} decoder layers beside {config.num_hidden_layers} of the encoder")
    for field in ("is_heterogeneous", "global_head_dim", "num_kv_shared_layers", "kv_lora_rank"):
        if getattr(config, field, None):
            kinds.add(f"{field}={getattr(config, field)!r}"[:80])
    if kinds:
        raise NotImplementedError(
            f"PrefixTuningConfig: expected layers whose keys have one shape, got {name} with {sorted(kinds)}; "
            "use prompt tuning or P-tuning"
        )
