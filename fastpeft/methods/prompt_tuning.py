"""Prompt tuning: vectors before the embeddings of the input are trained (Lester et al. 2021, arXiv:2104.08691)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastpeft.layers.prompt import PromptLayer
from fastpeft.layers.prompt_tuning import PromptEmbedding
from fastpeft.methods.prompt_learning import PromptLearningConfig


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Options of prompt tuning, by PEFT's names.

    Raises:  ValueError for a value outside its range, or a text to start from without its tokenizer
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    starts: ClassVar[tuple[str, ...]] = ("RANDOM", "TEXT", "SAMPLE_VOCAB")
    shown_elsewhere: ClassVar[frozenset[str]] = PromptLearningConfig.shown_elsewhere | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_name_or_path",
        "tokenizer_kwargs",
    }

    prompt_tuning_init: str = "RANDOM"
    """Where the prompt starts: RANDOM (normal), TEXT (embeddings of a text), SAMPLE_VOCAB (of random words)."""
    prompt_tuning_init_text: str | None = None
    """The text to start from, with TEXT; repeated or cut to the prompt's length."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer of that text."""
    tokenizer_kwargs: dict[str, Any] | None = None
    """Options for that tokenizer; trust_remote_code is left out."""

    def __post_init__(self):
        super().__post_init__()
        where = type(self).__name__
        self.prompt_tuning_init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        if self.prompt_tuning_init not in self.starts:
            raise ValueError(
                f"{where}: expected prompt_tuning_init one of {self.starts}, got {self.prompt_tuning_init!r}"
            )
        if self.prompt_tuning_init == "TEXT":
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ValueError(
                        f"{where}: expected {name} with prompt_tuning_init='TEXT', got {getattr(self, name)!r}"
                    )
        elif self.tokenizer_kwargs:
            raise ValueError(f"{where}: tokenizer_kwargs is for prompt_tuning_init='TEXT'; leave it out")

    def make_prompt(self, model: nn.Module, autocast_adapter_dtype: bool, fresh: bool) -> PromptLayer:
        prompt = self._layer()
        if fresh and not self.inference_mode:
            self._start(prompt, model)
        return self._placed(prompt, model, autocast_adapter_dtype)

    def _layer(self) -> PromptEmbedding:
        return PromptEmbedding(self.task_type, self.num_virtual_tokens, self.num_transformer_submodules, self.token_dim)

    @torch.no_grad()
    def _start(self, prompt: PromptEmbedding, model: nn.Module) -> None:
        """Fill in the words' embeddings, where the prompt starts from words."""
        words, count = model.get_input_embeddings(), prompt.embedding.num_embeddings
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, words.weight.shape[0], (count,))
        elif self.prompt_tuning_init == "TEXT":
            ids = torch.tensor(self._text_ids(words.weight.shape[0]))
            ids = ids.repeat(-(-count // len(ids)))[:count]
        else:
            return
        prompt.embedding.weight.copy_(words(ids.to(words.weight.device)).float().to(prompt.embedding.weight.device))

    def _text_ids(self, vocabulary: int) -> list[int]:
        from transformers import AutoTokenizer

        options = {name: value for name, value in (self.tokenizer_kwargs or {}).items() if name != "trust_remote_code"}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"tokenizer_name_or_path: cannot load {self.tokenizer_name_or_path!r}: {reason}"
            ) from error
        ids = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not ids or max(ids) >= vocabulary:
            raise ValueError(
                f"prompt_tuning_init_text: expected tokens of the model's {vocabulary} words, got {ids[:8]} from "
                f"{self.tokenizer_name_or_path!r}; is it the model's tokenizer?"
            )
        return ids
