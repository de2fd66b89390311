"""A training run accelerates its model while it trains, says so, and gives it back as it was."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fastpeft
from fastpeft import LoraConfig, get_peft_model
from fastpeft.cli import main
from fastpeft.integrations.acceleration import apply
from fastpeft.integrations.acceleration.ledger import Accelerated
from fastpeft.ops.fast_matmul import float32_path
from fastpeft.training import RunRecord, Trainer
from fastpeft.training.data import Columns
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import Collator, tokenise_causal_lm
from tests.tolerance import assert_no_worse
from tests.training import tiny
from tests.training.commands import fails, result, train_command

TENSORS = "adapter_model.safetensors"
CALLS = []


class _SameNorm(Accelerated):
    """Computes what the module computes, and says in which mode, at which precision setting and whether layers are recomputed."""

    def forward(self, x):
        CALLS.append((self.training, torch.get_float32_matmul_precision()))
        return self.fall_back("it is a part of a test", x)


def _same_norms(walk):
    for path, module in walk.core.named_modules():
        if isinstance(module, LlamaRMSNorm):
            walk.ledger.swap(path, module, _SameNorm, "norm")


@pytest.fixture
def same_norms(monkeypatch):
    """accelerate's only part is one that changes no bit."""
    monkeypatch.setattr(apply, "PARTS", {"norm": _same_norms})
    CALLS.clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acceleration")
    tiny.llama(folder / "llama")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.questions(40))
    return folder


def _command(files, output, *more):
    options = ("--max-steps", 3, "--learning-rate", 0.01, "--examples", 1, "--max-new-tokens", 2, "--lora-dropout", 0.2)
    return train_command(files, "llama", "rows.jsonl", output, *options, *more)


def _record(output):
    return RunRecord.load(output / "run.json")


def test_a_run_is_accelerated_says_so_and_changes_nothing(files, tmp_path, capsys, same_norms):
    assert main(_command(files, tmp_path / "plain", "--no-accelerate")) == 0
    assert not CALLS
    said = _record(tmp_path / "plain").acceleration["float32_products"]
    assert f"float32 products: {said}" in capsys.readouterr().err
    assert "summary" not in _record(tmp_path / "plain").acceleration
    assert main(_command(files, tmp_path / "fast")) == 0
    assert "norm       LlamaRMSNorm                 5 of 5 replaced" in capsys.readouterr().err
    record = _record(tmp_path / "fast")
    assert (record.acceleration["memory"], record.acceleration["offload"]) == ("balanced", False)
    summary = "\n".join(record.acceleration["summary"])
    assert "LlamaRMSNorm                 5 of 5 replaced" in summary
    assert f"{len(CALLS)} calls ran the model's own code: it is a part of a test" in summary
    assert "5 of 5 replaced" in (tmp_path / "fast" / "report.html").read_text()
    assert {training for training, _ in CALLS} == {True, False}  # validation inside the training, too
    assert (tmp_path / "plain" / TENSORS).read_bytes() == (tmp_path / "fast" / TENSORS).read_bytes()
    assert _record(tmp_path / "plain").metrics == record.metrics


def test_the_float32_products_are_reported_and_can_be_left_alone(files, tmp_path, same_norms):
    path = float32_path(torch.device("cpu"))
    assert main(_command(files, tmp_path / "fast")) == 0
    assert {precision for _, precision in CALLS} == {"medium" if path.allowed else "highest"}
    record = _record(tmp_path / "fast")
    said = f"oneDNN, {path.why}" if path.allowed else f"PyTorch's own, {path.why}"
    assert record.acceleration["float32_products"] == said
    assert any(line.startswith("float32 products: ") and path.why in line for line in record.acceleration["summary"])
    assert "float32 products" in (tmp_path / "fast" / "report.html").read_text()
    CALLS.clear()
    assert main(_command(files, tmp_path / "plain", "--no-cpu-fast-matmul")) == 0
    assert {precision for _, precision in CALLS} == {"highest"}
    record = _record(tmp_path / "plain")
    assert record.acceleration["float32_products"] == "PyTorch's own, as asked for"
    assert "float32 products: PyTorch's own; fast_matmul() was not entered" in record.acceleration["summary"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_memory_and_offload_are_options_and_the_model_comes_back_as_it_was(files, tmp_path, same_norms):
    options = {"use_cpu": True, "report": False, "examples": 0, "max_steps": 1}
    done = fastpeft.finetune(
        files / "llama", tiny.questions(20), "lora", tmp_path, memory="memory", offload=True, **options
    )
    summary = "\n".join(done.record.acceleration["summary"])
    assert "gradient checkpointing: on for every layer" in summary
    assert "activation offload: off, the model is on the CPU" in summary
    assert not any(isinstance(module, Accelerated) for module in done.model.modules())
    assert not done.model.get_base_model().is_gradient_checkpointing
    with pytest.raises(ValueError, match=r"memory: expected one of \('speed', 'balanced', 'memory'\), got 'least'"):
        fastpeft.finetune(files / "llama", tiny.questions(20), "lora", tmp_path / "new", memory="least")


def test_offload_needs_accelerate(files, tmp_path, capsys):
    fails(capsys, _command(files, tmp_path / "out", "--offload", "--no-accelerate"), "offload: expected False without")
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_gives_the_model_back(files, tmp_path, same_norms, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(files / "llama")

    def fail(*args, **kwargs):
        assert any(isinstance(module, Accelerated) for module in model.modules())
        raise OSError("no space left")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(OSError, match="no space left"):
        fastpeft.finetune(model, tiny.questions(20), "lora", tmp_path, use_cpu=True, examples=0, report=False)
    assert not any(isinstance(module, Accelerated) for module in model.modules())
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_last_line_of_the_command_is_still_the_result(files, tmp_path, capsys):
    assert main(_command(files, tmp_path / "out", "--no-report")) == 0
    assert result(capsys)["adapter"] == str(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["training"]
    assert settings["accelerate"] is settings["cpu_fast_matmul"] is True
    assert load_file(tmp_path / "out" / TENSORS)


# ---- accumulation ---------------------------------------------------------------------------------------------------


def _gradients(files, dtype, batch, accumulation, folder, accelerated):
    """Of one optimizer step over rows of unequal lengths, by the Trainer of this package."""
    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(files / "llama")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).to(dtype).train()
    if accelerated:
        fastpeft.accelerate(model)
    arguments = TrainingArguments(
        folder, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=0.0, learning_rate=0.0,
        use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, data_collator=Collator(tiny.tokenizer()))
    rows, columns = Dataset.from_list(tiny.questions(8)), Columns(prompt="prompt", response="response")
    features = tokenise_causal_lm(rows, columns, tiny.tokenizer(), TextFormat(train_on_prompt=True), "train").features
    assert len(set(features["length"])) > 2
    kept = {}

    def keep(*args):
        kept.update({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        return torch.zeros(())

    trainer.accelerator.clip_grad_norm_ = keep
    loaded = [features.select(range(i, i + batch)) for i in range(0, 8, batch)]
    trainer.train_step([trainer.data_collator(list(part)) for part in loaded])
    return kept


def test_accumulated_tokens_weigh_alike_when_accelerated(files, tmp_path):
    """The loss part gets num_items_in_batch: four batches of 2 give one of 8's gradient, to the untouched float32's error."""
    exact = _gradients(files, torch.float64, 8, 1, tmp_path, accelerated=False)
    eager = _gradients(files, torch.float32, 8, 1, tmp_path, accelerated=False)
    one = _gradients(files, torch.float32, 8, 1, tmp_path, accelerated=True)
    four = _gradients(files, torch.float32, 2, 4, tmp_path, accelerated=True)
    for name, gradient in exact.items():
        assert gradient.abs().max() > 0, name
        assert_no_worse(name, one[name], gradient, eager[name], factor=4.0)
        assert_no_worse(name, four[name], gradient, eager[name], factor=4.0)
