"""A run that is killed and resumed ends with the same bits as one that is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from fastpeft import LoraConfig
from fastpeft.cli import main
from fastpeft.training import TrainConfig, Trainer, engine
from tests.tolerance import assert_bits_equal
from tests.training import tiny

ROOT = Path(__file__).parents[1]
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny Llama and 120 prompts with responses."""
    folder = tmp_path_factory.mktemp("resume")
    tiny.llama(folder / "model")
    tiny.write_jsonl(folder / "rows.jsonl", tiny.questions(120))
    return folder


def _options(files, output, *more):
    """lora_dropout and an epoch's order draw random numbers; checkpoints fall inside epochs and inside accumulation."""
    options = {
        "model": files / "model",
        "data": files / "rows.jsonl",
        "output-dir": output,
        "lora-dropout": 0.2,
        "learning-rate": 0.01,
        "per-device-train-batch-size": 4,
        "gradient-accumulation-steps": 2,
        "num-train-epochs": 8,
        "eval-strategy": "steps",
        "eval-steps": 5,
        "examples": 0,
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["train", *flags, "--target-modules", "q_proj", "v_proj", "--no-baseline", "--no-report", "--use-cpu", *more]


def _same_adapters(folder, other):
    tensors, others = load_file(folder / TENSORS), load_file(other / TENSORS)
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert_bits_equal(name, others[name], tensor)


def test_a_killed_process_resumes_to_the_same_bits(files, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(_options(files, whole)) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastpeft", *_options(files, killed)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    written = killed / "checkpoints/checkpoint-10/trainer_state.json"
    deadline = time.monotonic() + 120
    while not written.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert not (killed / TENSORS).exists()

    assert main(_options(files, killed)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(_options(files, killed, "--resume")) == 0
    _same_adapters(whole, killed)


class _Stop(TrainerCallback):
    """Interrupts the process, as Ctrl-C does, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("eval_strategy", ["steps", "epoch"])
@pytest.mark.parametrize("group_by_length", [True, False], ids=["grouped", "shuffled"])
def test_an_interrupted_run_resumes_to_the_same_bits(files, tmp_path, monkeypatch, group_by_length, eval_strategy):
    """Stopped at step 19 of 28: with epochs of 14 steps, the checkpoint is at step 16 in an epoch, or at 14 between two."""

    def config(output, **more):
        return TrainConfig(
            model=str(files / "model"),
            data=str(files / "rows.jsonl"),
            output_dir=str(tmp_path / output),
            peft=LoraConfig(lora_dropout=0.2, target_modules=["q_proj"]),
            learning_rate=0.01,
            per_device_train_batch_size=8,
            num_train_epochs=2,
            group_by_length=group_by_length,
            eval_strategy=eval_strategy,
            eval_steps=8,
            load_best_model_at_end=False,
            examples=0,
            baseline=False,
            report=False,
            use_cpu=True,
            **more,
        )

    engine.train(config("whole"))

    class Stopping(Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, callbacks=[_Stop(19)], **options)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "Trainer", Stopping)
        with pytest.raises(KeyboardInterrupt):
            engine.train(config("stopped"))
    record = engine.train(config("stopped", resume=True))
    _same_adapters(tmp_path / "whole", tmp_path / "stopped")
    assert max(entry["step"] for entry in record.history) == 28


def test_resume_says_what_is_missing_or_changed(files, tmp_path, capsys):
    assert main(_options(files, tmp_path / "new", "--resume")) == 2
    assert "no complete checkpoint in" in capsys.readouterr().err
    short = ("--max-steps", "5")
    assert main(_options(files, tmp_path / "run", *short)) == 0
    capsys.readouterr()
    assert main(_options(files, tmp_path / "run", "--max-steps", "6", "--resume")) == 0
    assert "warning: resume: options differ" in capsys.readouterr().err
    before = (tmp_path / "run" / TENSORS).read_bytes()
    assert main(_options(files, tmp_path / "run", "--max-steps", "8", "--r", "4", "--resume")) == 2
    assert "differs from the loaded 'default'" in capsys.readouterr().err
    assert (tmp_path / "run" / TENSORS).read_bytes() == before
