"""A pretrained model and its tokenizer from a folder or a name, with one-line errors."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def model_source(name_or_path: str | os.PathLike) -> str:
    """The absolute path of a local model folder, or a name for the Hugging Face hub as it is.

    Raises:  FileNotFoundError for a path that is not there, or a folder without config.json
    """
    text = os.fspath(name_or_path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            names = sorted(path.name for path in folder.iterdir())[:12]
            raise FileNotFoundError(
                f"model {text}: expected a folder with config.json, got {names or 'an empty folder'}"
            )
        return str(folder.resolve())
    looks_local = folder.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or folder.exists()
    if looks_local:
        raise FileNotFoundError(f"model {text}: expected a folder of a transformers model, got no such folder")
    return text


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises OSError or ValueError with a one-line reason."""
    source = model_source(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise one_line(f"tokenizer of {source}", error) from error


def load_config(name_or_path: str | os.PathLike) -> PreTrainedConfig:
    """The model's config alone. Raises OSError or ValueError with a one-line reason."""
    source = model_source(name_or_path)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise one_line(f"model {source}", error) from error


def load_model(
    name_or_path: str | os.PathLike, *, labels: Sequence[str] = (), dtype: str = "auto", on_meta: bool = False
) -> PreTrainedModel:
    """The pretrained model: with a classification head over `labels` if there are any, else a causal LM.

    dtype is "auto" (as saved), "float32", "bfloat16" or "float16". on_meta makes the modules without data, for counting.
    Raises:  OSError or ValueError with a one-line reason
    """
    source = model_source(name_or_path)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {list(DTYPES)}, got {dtype!r}")
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    names = dict(enumerate(labels))
    options: dict[str, Any] = {}
    if labels:
        options = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if on_meta:
            with torch.device("meta"):
                return auto.from_config(config)
        if labels:
            config.problem_type = "single_label_classification"
        return auto.from_pretrained(source, config=config, dtype=DTYPES[dtype], ignore_mismatched_sizes=bool(labels))
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise one_line(f"model {source}", error) from error


def align_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model one pad token: the tokenizer's, else its end-of-text token.

    Decoder classifiers find the last token of a row by it. Training and metrics never do: they mask by position.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def longest_input(config: PreTrainedConfig) -> int | None:
    """Positions a model of this config has, in tokens, or None if it sets no bound."""
    config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        positions = getattr(config, name, None)
        if positions:
            offset = (
                2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
            )  # rows 0..pad are not used
            return positions - offset
    return None


def one_line(what: str, error: Exception) -> Exception:
    """The same kind of error (ValueError for kinds of their own) with its first sentence, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = next((kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind)), ValueError)
    return kind(f"{what}: cannot be loaded: {text[:300]}")
