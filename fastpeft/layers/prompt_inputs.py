"""A prompt before the input's embeddings: what is added to which argument, by task type, as in PEFT.

    inputs_embeds = [prompt; embed(input_ids)]          [B, T + S, H], for encoder-decoder models the encoder's
    attention_mask = [1 ... 1, attention_mask]          where there is one
    labels = [-100 ... -100, labels]                    of every token: CAUSAL_LM, TOKEN_CLS
    start_positions, end_positions + T                  QUESTION_ANS
    token_type_ids = [0 ... 0, token_type_ids]          SEQ_CLS, TOKEN_CLS; dropped otherwise
    position_ids                                        dropped: tokens are counted from the prompt's first

Logits of every token are T longer than the input: the first T are the prompt's. PEFT leaves the labels of token classification
(and then fails) and the positions of question answering as they are; its logits are the same. A decoder with a classification
head reads the last token of a row that attention_mask shows; transformers, and PEFT, read the padding after it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

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

IGNORED_LABEL = -100


class InputPrompt(PromptLayer):
    """Vectors [P, H] before the embeddings of the input. P = T, or 2 T for the two halves of an encoder-decoder model, of
    which the encoder reads the first; the decoder reads the second where `prompts_decoder` says so.
    """

    lengthens_input = True
    prompts_decoder = False

    def vectors(self, rows: int, task_ids: torch.Tensor | None) -> torch.Tensor:
        """The prompt of every row, [B, P, H]."""
        return self.prompt_embeddings().expand(rows, -1, -1)

    def call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        inputs = named_arguments(model, args, kwargs)
        cache = inputs.get("cache")
        if cache is not None and cache.get_seq_length():
            raise NotImplementedError(
                f"forward: expected no filled cache, got one of {cache.get_seq_length()} tokens; the prompt goes before the "
                "first token: call generate"
            )
        drop(inputs, "position_ids")
        if self.task_type not in KEEPS_TOKEN_TYPES:
            drop(inputs, "token_type_ids")
        tokens = self.num_virtual_tokens
        prompts = self.vectors(batch_rows(inputs), inputs.pop("task_ids", None))
        self._prepend(model, inputs, prompts[:, :tokens])
        if "token_type_ids" in inputs:
            types = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([types.new_zeros(len(types), tokens), types], dim=1)
        for name in ("start_positions", "end_positions"):
            if name in inputs:
                inputs[name] = inputs[name] + tokens
        if self.prompts_decoder:
            self._prepend_to_decoder(model, inputs, prompts[:, tokens:])
        if "labels" in inputs and (self.task_type in ("CAUSAL_LM", "TOKEN_CLS") or self.prompts_decoder):
            labels = inputs["labels"]
            ignored = labels.new_full((len(labels), tokens), IGNORED_LABEL)
            inputs["labels"] = torch.cat([ignored, labels], dim=1)
        with _reading_the_last_token(model, inputs.get("attention_mask") if self.task_type == "SEQ_CLS" else None):
            return model(**inputs)

    def _prepend(self, model: nn.Module, inputs: dict[str, Any], prompts: torch.Tensor) -> None:
        embedded = inputs.get("inputs_embeds")
        ids = inputs.pop("input_ids", None)
        if embedded is None:
            if ids is None:
                raise ValueError(f"prompt: expected input_ids or inputs_embeds, got {sorted(inputs)}")
            embedded = model.get_input_embeddings()(ids)
        inputs["inputs_embeds"] = torch.cat([prompts.to(embedded), embedded], dim=1)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = longer_mask(inputs["attention_mask"], self.num_virtual_tokens)

    def _prepend_to_decoder(self, model: nn.Module, inputs: dict[str, Any], prompts: torch.Tensor) -> None:
        embedded, ids = inputs.get("decoder_inputs_embeds"), inputs.pop("decoder_input_ids", None)
        if embedded is None and ids is None:
            if "labels" not in inputs:
                raise ValueError(
                    "prompt: expected labels, decoder_input_ids or decoder_inputs_embeds, got none of them"
                )
            ids = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
        embedded = model.get_input_embeddings()(ids) if embedded is None else embedded
        inputs["decoder_inputs_embeds"] = torch.cat([prompts.to(embedded), embedded], dim=1)
        if inputs.get("decoder_attention_mask") is not None:
            inputs["decoder_attention_mask"] = longer_mask(inputs["decoder_attention_mask"], self.num_virtual_tokens)

    # -- generation -----------------------------------------------------------------------------------------------------

    def generate(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not model.config.is_encoder_decoder:
            with preparing_inputs(model, lambda inputs, use_cache, ids: self._step(model, inputs, use_cache, ids)):
                return model.generate(*args, **kwargs)
        inputs = {name: value for name, value in kwargs.items() if value is not None}
        drop(inputs, "encoder_outputs")
        drop(inputs, "position_ids")
        drop(inputs, "token_type_ids")
        if "inputs" in inputs or args:
            inputs["input_ids"] = inputs.pop("inputs", None) if not args else args[0]
        task_ids = inputs.pop("task_ids", None)
        prompts = self.vectors(batch_rows(inputs), task_ids)
        self._prepend(model, inputs, prompts[:, : self.num_virtual_tokens])
        if not self.prompts_decoder:
            return model.generate(*args[1:], **inputs)
        if task_ids is not None:
            inputs["task_ids"] = torch.as_tensor(task_ids)  # so that it grows with beams
        with preparing_inputs(model, lambda step, use_cache, ids: self._decoder_step(model, step, use_cache, ids)):
            return model.generate(*args[1:], **inputs)

    def _decoder_step(self, model: nn.Module, inputs: dict[str, Any], use_cache: bool, task_ids: Any) -> dict[str, Any]:
        """As _step, for the decoder of an encoder-decoder model."""
        cache = inputs.get("cache")
        refuse_fixed_cache(cache)
        if use_cache and cache is not None and cache.get_seq_length():
            if inputs.get("decoder_attention_mask") is not None:
                inputs["decoder_attention_mask"] = longer_mask(
                    inputs["decoder_attention_mask"], self.num_virtual_tokens
                )
            return inputs
        prompts = self.vectors(len(inputs["decoder_input_ids"]), task_ids)
        self._prepend_to_decoder(model, inputs, prompts[:, self.num_virtual_tokens :])
        return inputs

    def _step(self, model: nn.Module, inputs: dict[str, Any], use_cache: bool, task_ids: Any) -> dict[str, Any]:
        """The arguments of one forward of generate: the prompt goes before the first token, or before all without a cache."""
        cache = inputs.get("cache")
        refuse_fixed_cache(cache)
        for name in ("position_ids", "token_type_ids"):
            inputs.pop(name, None)
        if use_cache and cache is not None and cache.get_seq_length():
            if inputs.get("attention_mask") is not None:
                inputs["attention_mask"] = longer_mask(inputs["attention_mask"], self.num_virtual_tokens)
            return inputs
        self._prepend(model, inputs, self.vectors(batch_rows(inputs), task_ids))
        return inputs


@contextlib.contextmanager
def _reading_the_last_token(model: nn.Module, mask: torch.Tensor | None) -> Iterator[None]:
    """Inside, a decoder's classification head finds the last token of every row at the end of it.

    The models look for padding in input_ids, and given embeddings they take the last position, whatever is there.
    """
    head = getattr(model, "score", None)
    if mask is None or not isinstance(head, nn.Module):
        yield
        return
    last = (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)

    def move(_, args):
        hidden, rest = args[0], args[1:]
        rows = torch.arange(len(hidden), device=hidden.device)
        return torch.cat([hidden[:, :-1], hidden[rows, last.to(hidden.device)][:, None]], dim=1), *rest

    handle = head.register_forward_pre_hook(move)
    try:
        yield
    finally:
        handle.remove()
