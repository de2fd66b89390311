"""A tiny base model with adapters on disk, an engine over them, and clients."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastpeft import LoraConfig, get_peft_model
from fastpeft.methods.config import PeftConfig
from fastpeft.training.config import DEFAULT_MAX_LENGTH, TASK_TYPES
from fastpeft.training.record import CLASSIFICATION
from fastpeft.training.run_folder import TrainingInfo
from fastpeft.training.text_format import TextFormat
from tests import tiny_models
from tests.training import tiny

LABELS = ["negative", "positive"]


def lora(seed: int, **options) -> LoraConfig:
    return LoraConfig(**{"r": 2 + seed, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]} | options)


def llama_in_whole_blocks(folder: Path) -> Path:
    """tiny.llama with widths that are multiples of 64: bitsandbytes' CPU code misreads 4-bit rows that end inside a block."""
    words = tiny.tokenizer()
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    sizes = {"vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
    tiny_models.llama(**sizes, initializer_range=0.2, num_hidden_layers=2, **ids).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Path, config: PeftConfig, seed: int, labels: list[str] | None = None) -> Path:
    """An adapter with random values that change what the model says, as `fastpeft train` leaves it."""
    torch.manual_seed(seed)
    task = CLASSIFICATION if labels else "causal_lm"
    config.task_type = TASK_TYPES[task]
    auto = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    options = {"num_labels": len(labels)} if labels else {}
    adapted = get_peft_model(auto.from_pretrained(model, **options), config)
    tiny_models.fill(adapted, seed=seed, std=0.3)
    adapted.save_pretrained(folder)
    TrainingInfo(task, str(model), labels or [], text_format=TextFormat(max_length=DEFAULT_MAX_LENGTH)).save(folder)
    return folder


@contextlib.contextmanager
def listening(app) -> Iterator[str]:
    """The address of a real server over loopback, in a thread; it is shut down gracefully at the end."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not shut down"
