"""An adapter together with its base model, from the adapter's folder alone: PEFT's AutoPeftModel classes."""

import os
from pathlib import Path
from typing import Any, ClassVar

from fastpeft.checkpoint import adapter_folder, read_config
from fastpeft.methods import config_from_dict
from fastpeft.model import DEFAULT_ADAPTER, PeftModel


class AutoPeftModel:
    """from_pretrained reads the adapter's config, loads the base model that it names with a class of transformers, and puts the
    adapter on it."""

    task_type: ClassVar[str | None] = None
    """The task of the adapters; None takes any, by the adapter's own task_type."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError(f"{type(self).__name__}: expected from_pretrained(folder), got a call; it makes a PeftModel")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = DEFAULT_ADAPTER,
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """The base model with the adapter of a folder or hub id. kwargs go to the base model's from_pretrained (dtype, ...).

        Raises:  as PeftModel.from_pretrained; ValueError where the adapter names no base model, or has another task
        """
        source = pretrained_model_name_or_path
        folder = adapter_folder(source)
        config = config_from_dict(read_config(folder))
        if cls.task_type and config.task_type not in (None, cls.task_type):
            raise ValueError(
                f"{cls.__name__}: expected an adapter with task_type {cls.task_type}, got {config.task_type} in {source}"
            )
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{cls.__name__}: {source} does not name its base model; load that and use PeftModel.from_pretrained"
            )
        revision = {"revision": config.revision} if config.revision else {}
        auto_class = transformers_class(cls.task_type or config.task_type)
        base = auto_class.from_pretrained(config.base_model_name_or_path, **revision | kwargs)
        _fit_vocabulary(base, folder)
        return PeftModel.from_pretrained(base, folder, adapter_name=adapter_name, is_trainable=is_trainable)


def transformers_class(task_type: str | None) -> Any:
    """The class of transformers that loads base models for a task; AutoModel for None."""
    import transformers

    names = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }
    return getattr(transformers, names.get(task_type, "AutoModel"))


def _fit_vocabulary(base: Any, folder: Path) -> None:
    """As many embedding rows as the tokenizer beside the adapter has tokens, where there is one that has more."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(folder))
    if tokens > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """AutoPeftModel of a causal language model."""

    task_type = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """AutoPeftModel of a sequence-to-sequence language model."""

    task_type = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """AutoPeftModel of a classifier of texts."""

    task_type = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """AutoPeftModel of a classifier of tokens."""

    task_type = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """AutoPeftModel of an extractor of answers."""

    task_type = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """AutoPeftModel of a model without a head."""

    task_type = "FEATURE_EXTRACTION"
