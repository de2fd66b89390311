"""Prefix tuning: trained keys and values before those of every attention layer (Li and Liang 2021, arXiv:2101.00190).

P-tuning v2 (Liu et al. 2022, arXiv:2110.07602) is the same without the projection. The prefix stands in the model's cache, so
the model believes that it has read T tokens: positions go on after them, and logits are as long as the input.
"""

from typing import Any

import torch
from torch import nn

from fastpeft.layers.adapter import recomputes_layers
from fastpeft.layers.prompt import (
    KEEPS_TOKEN_TYPES,
    PromptLayer,
    batch_rows,
    drop,
    longer_mask,
    named_arguments,
    preparing_inputs,
    refuse_fixed_cache,
)


class PrefixEncoder(PromptLayer):
    """softmax(q [k_prefix; k]^T) [v_prefix; v] in every layer, with the prefix of layer l at 2 l and 2 l + 1 of

    prefix = e [T, 2 L heads D], or with a projection prefix = W_2 tanh(W_1 e + b_1) + b_2, e [T, heads D]

    Shapes:  T virtual tokens, L layers, heads those of the keys and values, D their width
    Dtypes:  float32, cast to the model's
    Grads:   e and the projection. Only the prefix is saved for inference: load_prompt gives the projection up
    Raises:  ValueError in training with gradient checkpointing, which switches the cache off
    Source:  Li and Liang 2021, arXiv:2101.00190; Liu et al. 2022, arXiv:2110.07602
    """

    encoder_names = ("transform",)

    def __init__(
        self, task_type: str, num_virtual_tokens: int, submodules: int, layers: int, heads: int, head_dim: int,
        projected_from: int | None = None, bidirectional: bool = False,
    ):  # fmt: skip
        """projected_from: the hidden width of a projection, or None without one; bidirectional: for an encoder such as BERT."""
        super().__init__(task_type, num_virtual_tokens)
        self.bidirectional = bidirectional
        self.submodules, self.layers, self.heads, self.head_dim = submodules, layers, heads, head_dim
        token_dim = heads * head_dim
        prefix_dim = 2 * layers * token_dim
        self.embedding = nn.Embedding(num_virtual_tokens, prefix_dim if projected_from is None else token_dim)
        if projected_from is not None:
            self.transform = nn.Sequential(
                nn.Linear(token_dim, projected_from), nn.Tanh(), nn.Linear(projected_from, prefix_dim)
            )

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Keys and values of zero."""
        if self.has_encoder():
            self.transform[-1].weight.zero_()
            self.transform[-1].bias.zero_()
        else:
            self.embedding.weight.zero_()

    def prompt_embeddings(self) -> torch.Tensor:
        return self.transform(self.embedding.weight) if self.has_encoder() else self.embedding.weight

    def key_values(self, model: nn.Module, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) [B, heads, T, D] of every layer whose attention has the prefix.

        An encoder-decoder model has it in the decoder's own attention, and there layer l reads the pair 2 l mod L: PEFT lays
        two copies of the prefix end to end and gives each layer four in a row, of which the last two (the attention to the
        encoder) are not used.
        """
        pairs = self.prompt_embeddings().to(model.dtype).view(self.num_virtual_tokens, self.layers, 2, self.heads, -1)
        pairs = pairs.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, rows, -1, -1, -1)
        order = [layer * self.submodules % self.layers for layer in range(self.layers)]
        return [(pairs[layer, 0], pairs[layer, 1]) for layer in order]

    def fill(self, cache: Any, model: nn.Module, rows: int) -> Any:
        """The cache, which was empty, with the prefix in it."""
        own = getattr(cache, "self_attention_cache", cache)
        for layer, (keys, values) in enumerate(self.key_values(model, rows)):
            own.update(keys, values, layer)
        return cache

    def new_cache(self, model: nn.Module, rows: int) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        if self.bidirectional:  # its layers know no windows
            return self.fill(DynamicCache(), model, rows)
        cache = DynamicCache(config=model.config)
        if model.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        return self.fill(cache, model, rows)

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if model.training and recomputes_layers(model):
            raise ValueError(
                "forward: expected no gradient checkpointing with prefix tuning, whose keys stand in the cache that it "
                "switches off; call gradient_checkpointing_disable(), or use prompt tuning or P-tuning"
            )
        inputs = named_arguments(model, args, kwargs)
        inputs.pop("task_ids", None)
        if self.task_type not in KEEPS_TOKEN_TYPES:
            drop(inputs, "token_type_ids")
        rows, tokens = batch_rows(inputs), self.num_virtual_tokens
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + tokens
        mask_name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
        if mask_name in inputs:
            inputs[mask_name] = longer_mask(inputs[mask_name], tokens)
            if self.bidirectional:
                inputs[mask_name] = _bidirectional_mask(model, inputs[mask_name], tokens)
        inputs["cache"] = self.new_cache(model, rows)
        return model(**inputs)

    def generate(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        with preparing_inputs(model, lambda inputs, use_cache, _: self._step(model, inputs, use_cache)):
            return model.generate(*args, **kwargs)

    def _step(self, model: nn.Module, inputs: dict[str, Any], use_cache: bool) -> dict[str, Any]:
        """The arguments of one forward of generate: the prefix goes into an empty cache, or into a new one each time."""
        cache, tokens = inputs.get("cache"), self.num_virtual_tokens
        refuse_fixed_cache(cache)
        prefix = "decoder_" if model.config.is_encoder_decoder else ""
        rows = inputs[f"{prefix}input_ids"] if inputs.get(f"{prefix}input_ids") is not None else inputs["inputs_embeds"]
        if inputs.get(f"{prefix}position_ids") is not None:
            inputs[f"{prefix}position_ids"] = inputs[f"{prefix}position_ids"] + tokens
        if inputs.get(f"{prefix}attention_mask") is not None:
            inputs[f"{prefix}attention_mask"] = longer_mask(inputs[f"{prefix}attention_mask"], tokens)
        if not use_cache or cache is None:
            inputs["cache"] = self.new_cache(model, len(rows))
        elif not cache.get_seq_length():
            self.fill(cache, model, len(rows))
        return inputs


def is_bidirectional(model: nn.Module) -> bool:
    """True for an encoder such as BERT: none of its attention modules is causal."""
    return not any(getattr(module, "is_causal", False) for module in model.modules()) and not (
        model.config.is_encoder_decoder
    )


def _bidirectional_mask(model: nn.Module, mask: torch.Tensor, tokens: int) -> torch.Tensor | None:
    """The mask [B, T + S] of keys as an encoder's attention reads it. Encoders make their own mask for as many keys as queries;
    one that is made already passes through. Only the shapes and the dtype of the empty tensors count.
    """
    from transformers.masking_utils import create_bidirectional_mask

    rows, keys = mask.shape
    like = torch.empty(0, dtype=model.dtype, device=mask.device)
    return create_bidirectional_mask(
        config=model.config,
        inputs_embeds=like.new_empty(rows, keys - tokens, 0),
        attention_mask=mask,
        encoder_hidden_states=like.new_empty(rows, keys, 0),
    )
