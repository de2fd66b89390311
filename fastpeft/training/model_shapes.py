"""Public models by name, as shapes: what `fastpeft plan` needs of them where no config.json is at hand."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fastpeft.integrations.transformers import load_config, one_line
from fastpeft.methods.by_name import near_matches

_LLAMA_3 = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3 | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-3-70b": _LLAMA_3 | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "llama-3.2-1b": _LLAMA_3 | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "mistral-7b": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    },
    "minilm": {
        "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 12, "max_position_embeddings": 512, "dtype": "float32",
    },
}  # fmt: skip
"""Fields of a config.json, by a name in small letters."""


def config_of(model: str | os.PathLike | PreTrainedConfig) -> PreTrainedConfig:
    """The config of a folder with config.json, of such a file, of a name in SHAPES, or of a hub name owner/model.

    Raises:  ValueError or OSError with a one-line reason; for a name that is none of these, with the names that there are
    """
    if isinstance(model, PreTrainedConfig):
        return model
    name = os.fspath(model)
    if name.lower() in SHAPES:
        return AutoConfig.for_model(**SHAPES[name.lower()])
    path = Path(name).expanduser()
    if path.is_file():
        try:
            return AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise one_line(f"model {name}", error) from error
    if path.is_dir() or (name.count("/") == 1 and not name.startswith((".", "~", "/"))):
        return load_config(name)
    near = near_matches([name.lower()], SHAPES)
    raise ValueError(
        f"model: expected a folder with config.json, a config file, a hub name owner/model, or one of {list(SHAPES)}, "
        f"got {name!r}{near}"
    )
