"""Tokens to train on: the demo's reviews where they are there, else a Markov chain."""

import json
from typing import Any

import torch

from fastpeft.demo.assets import SMOLLM, VADER, default_cache_dir, obtain
from fastpeft.demo.movies import write_splits
from fastpeft.demo.smollm import model_folder

BRANCHES = 8
VOCABULARY = 1000


def demo_model() -> str:
    """Folder of the demo's SmolLM2-135M, fetched unless it is there.

    Raises:  ConnectionError where it cannot be fetched
    """
    cache = default_cache_dir()
    return str(model_folder(obtain(SMOLLM, cache), cache / "SmolLM2-135M-Instruct"))


def reviews() -> list[dict[str, Any]]:
    """{"text", "label"} of the demo's training reviews."""
    cache = default_cache_dir()
    path = write_splits(obtain(VADER, cache), cache / "movie-snippets")["train"]
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def tokens_of(folder: str | None, count: int) -> tuple[torch.Tensor, str]:
    """(ids [count], what they are); read by the tokenizer of `folder`, or by that of the demo's SmolLM2."""
    import transformers

    try:
        words = transformers.AutoTokenizer.from_pretrained(folder or demo_model())
        texts = [row["text"] for row in reviews()]
    except (OSError, ImportError) as error:
        reason = str(error).splitlines()[0][:100]
        return markov(count), f"a Markov chain of {VOCABULARY} tokens ({reason})"
    ids = torch.tensor(words("\n".join(texts))["input_ids"])
    return ids.repeat(-(-count // len(ids)))[:count], "the demo's movie reviews"


def markov(count: int) -> torch.Tensor:
    """ids [count], each drawn from its predecessor's eight successors: its entropy is log 8 = 2.08 nats a token."""
    draw = torch.Generator().manual_seed(0)
    successors = torch.randint(VOCABULARY, (VOCABULARY, BRANCHES), generator=draw).tolist()
    now, ids = 0, []
    for choice in torch.randint(BRANCHES, (count,), generator=draw).tolist():
        now = successors[now][choice]
        ids.append(now)
    return torch.tensor(ids)
