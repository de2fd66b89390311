"""Two processes (gloo) train what one does: losses, adapters and checkpoints, with DDP and FSDP2, of LoRA and QLoRA."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel as HuggingFacePeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpeft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from fastpeft.cli import launch, main, process
from fastpeft.training import TrainConfig, engine, resuming
from fastpeft.training.across_processes import STATE_FOLDER
from fastpeft.training.processes import Processes
from fastpeft.training.sharded_state import load_state
from fastpeft.training.sharding import check_shardable
from tests.tiny_models import small_llama
from tests.tolerance import (
    ADAM_ON_ROUNDED_GRADIENTS,
    LOGITS_EQUAL_TO_PEFT,
    METRICS_REPEATED,
    OTHER_ORDER_OF_SUMS,
    PLANNED,
    assert_bits_equal,
    assert_close,
)
from tests.training import many_runs, tiny

ROOT = Path(__file__).parents[2]
TENSORS = "adapter_model.safetensors"
STEP = 8
"""Rows of an optimizer step, of all processes together."""

FSDP = {"distributed": "fsdp"}
NF4 = {"quantization": "nf4"}
CLASSES = {"model": "bert", "data": "reviews.jsonl", "peft": {"target_modules": ["query", "value"]}}
INT8 = {"quantization": "int8"}
PROMPT = {"peft": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 16}}
OLORA = NF4 | {"peft": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora", "r": 4}}
PISSA = {"peft": {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa", "r": 3}}
BUFFERS = 2048
"""Bytes of a tiny model's buffers (frequencies, positions) at most: they are whole in each process."""
RUNS = {
    "ddp": ("lora", {}),
    "ddp-nf4": ("nf4", NF4),
    "fsdp": ("lora", FSDP),
    "fsdp-nf4": ("nf4", FSDP | NF4),
    "fsdp-sharded": ("lora", FSDP | {"shard_adapters": True, "gradient_accumulation_steps": 2}),
    "fsdp-nf4-sharded": ("nf4", FSDP | NF4 | {"shard_adapters": True, "gradient_checkpointing": True}),
    "fsdp-int8": ("int8", FSDP | INT8),
    "fsdp-prompt": ("prompt", FSDP | PROMPT),
    "fsdp-olora": ("olora", FSDP | OLORA),
    "fsdp-pissa": ("pissa", FSDP | PISSA | {"shard_adapters": True}),
    "ddp-accumulated": ("lora", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    "fsdp-classes": ("classes", FSDP | CLASSES),
    "ddp-resumed": ("lora", {"resume": True}),
    "fsdp-resumed": ("nf4", FSDP | NF4 | {"shard_adapters": True, "resume": True}),
}
"""Name of a run in two processes -> what one process must find too, and the options."""
DROPOUT = {"peft": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}}
REFERENCES = {
    "lora": {}, "nf4": NF4, "classes": CLASSES, "int8": INT8, "prompt": PROMPT, "olora": OLORA, "pissa": PISSA,
}  # fmt: skip
RESUMED_AT = 4


def _fields(folder, name, processes, **options):
    """41 training rows: an epoch of five steps of eight rows and one of a single row, which one of two processes lacks."""
    model, data = options.pop("model", "model"), options.pop("data", "rows.jsonl")
    rows = STEP // processes // options.get("gradient_accumulation_steps", 1)
    defaults = {
        "peft": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        "learning_rate": 0.01,
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": RESUMED_AT,
        "save_total_limit": 9,
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "group_by_length": model != "bert",
        "examples": 2,
        "max_new_tokens": 3,
        "report": False,
        "use_cpu": True,
    }
    paths = {"model": str(folder / model), "data": str(folder / data), "output_dir": str(folder / name)}
    return defaults | {"per_device_train_batch_size": rows} | options | paths


def _environment():
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return free | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with all runs: the references in this process, the others in two."""
    folder = tmp_path_factory.mktemp("distributed")
    tiny.llama(folder / "model")
    config = tiny.bert(folder / "bert") / "config.json"
    without_dropout = json.loads(config.read_text(encoding="utf-8")) | {"attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(without_dropout), encoding="utf-8")  # each process draws masks of its own
    tiny.write_jsonl(folder / "rows.jsonl", tiny.questions(46))
    tiny.write_jsonl(folder / "reviews.jsonl", tiny.reviews(46))
    for name, options in REFERENCES.items():
        engine.train(many_runs.config(_fields(folder, name, 1, **options)))
    for name, (reference, options) in RUNS.items():
        if "resume" in options:
            checkpoint = f"checkpoints/checkpoint-{RESUMED_AT}"
            shutil.copytree(folder / reference / checkpoint, folder / name / checkpoint)
    listed = [_fields(folder, name, 2, **options) for name, (_, options) in RUNS.items()]
    listed.append(_fields(folder, "dropout", 2, **DROPOUT))
    half = {"resume": True, "goes_on_from": str(folder / "dropout/checkpoints/checkpoint-4")}
    listed.append(_fields(folder, "dropout-resumed", 2, **DROPOUT, **half))
    listed += [{"own_loop": str(folder / f"loop-{number}"), "shard_adapters": bool(number)} for number in (0, 1)]
    many_runs.own_loop(folder / "loop-of-one")
    step = {"method": "lora", "options": {"r": 8, "batch_size": 2, "seq_len": 64, "gradient_checkpointing": True}}
    listed.append(step | {"peak": str(folder / "peak.json")})
    (folder / "runs.json").write_text(json.dumps(listed), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "tests/training/many_runs.py"), str(folder / "runs.json")]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _record(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def _assert_same_run(got, expected, first_step=0):
    """Every logged number, the final metrics, and the adapter."""
    records = _record(got), _record(expected)
    histories = [[entry for entry in record["history"] if entry["step"] > first_step] for record in records]
    assert len(histories[0]) == len(histories[1]) > 8
    for entry, other in zip(*histories, strict=True):
        assert entry["step"] == other["step"]
        for name in {"loss", "eval_loss", "learning_rate"} & set(other):
            pair = torch.tensor([entry[name], other[name]], dtype=torch.float64)
            assert_close(f"step {other['step']} {name}", pair[0], pair[1], OTHER_ORDER_OF_SUMS)
        if "grad_norm" in other:
            assert entry["grad_norm"] == pytest.approx(other["grad_norm"], rel=METRICS_REPEATED)
    assert records[0]["metrics"] == pytest.approx(records[1]["metrics"], rel=METRICS_REPEATED)
    answers = [[(row.get("before"), row["after"]) for row in record["examples"]] for record in records]
    assert answers[0] == answers[1]
    tensors, others = load_file(got / TENSORS), load_file(expected / TENSORS)
    assert set(tensors) == set(others)
    for name, tensor in others.items():
        assert_close(name, tensors[name], tensor, ADAM_ON_ROUNDED_GRADIENTS)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(runs, name):
    reference, options = RUNS[name]
    _assert_same_run(runs / name, runs / reference, RESUMED_AT if "resume" in options else 0)
    record = _record(runs / name)
    assert record["training"]["processes"] == 2
    base = record["base"]
    held = base.pop("process_bytes", base["bytes"])
    assert base == _record(runs / reference)["base"]
    if "distributed" in options:
        whole = (
            base["bytes"] // 8 if "quantization" in options or reference == "prompt" else 0
        )  # scales, or the embeddings
        assert base["bytes"] / 2 <= held <= base["bytes"] / 2 + whole + BUFFERS
    else:
        assert held == base["bytes"]


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_of_two_processes_is_that_of_one(runs, name):
    """The same files; a checkpoint has each process's random state beside them, and of a sharded base its state in parts."""
    parts = {".metadata", "__0_0.distcp", "__1_0.distcp"}

    def files(folder):
        found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        in_parts = {path.parent for path in found if path.parent.name == STATE_FOLDER}
        assert all({path.name for path in found if path.parent == state} <= parts for state in in_parts)
        optimizers = {str(state.parent / "optimizer.pt") for state in in_parts}
        assert not optimizers & {str(path) for path in found}
        assert (not in_parts) == (folder.name == RUNS[name][0] or "distributed" not in RUNS[name][1])
        return {str(path) for path in found if path.parent not in in_parts} | optimizers

    own = {file for file in files(runs / name) if "rng_state_" not in file}
    expected = files(runs / RUNS[name][0])
    if "resume" in RUNS[name][1]:
        assert own == {file for file in expected if not file.startswith("checkpoints/checkpoint-12/")} | own
    else:
        assert own == expected
        states = {path.name for path in (runs / name / "checkpoints/checkpoint-4").glob("rng_state_*")}
        assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_every_part_of_accelerate_acts_under_both(runs):
    expected = _record(runs / "lora")["acceleration"]["summary"]
    for name in ("ddp", "fsdp", "fsdp-sharded"):
        found = _record(runs / name)["acceleration"]["summary"]
        assert [line.replace("FSDPLlama", "Llama").split() for line in found] == [line.split() for line in expected]
        assert "1 of 1 replaced" in next(line for line in found if line.startswith("loss"))


@pytest.mark.parametrize("name", ["ddp", "fsdp-sharded", "fsdp-nf4-sharded"])
def test_the_adapter_loads_in_peft_with_equal_outputs(runs, name):
    base = AutoModelForCausalLM.from_pretrained(runs / "model").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        got = PeftModel.from_pretrained(base, runs / name)(input_ids=ids).logits
        other = AutoModelForCausalLM.from_pretrained(runs / "model")
        theirs = HuggingFacePeftModel.from_pretrained(other, runs / name).eval()(input_ids=ids).logits
    assert_close("logits", got, theirs, LOGITS_EQUAL_TO_PEFT)
    assert not torch.equal(got, plain)


@pytest.mark.parametrize("name", ["ddp-nf4", "fsdp-nf4-sharded"])
def test_a_checkpoint_of_two_processes_resumes_in_one(runs, tmp_path, name, recwarn):
    checkpoint = f"checkpoints/checkpoint-{RESUMED_AT}"
    shutil.copytree(runs / name / checkpoint, tmp_path / "resumed" / checkpoint)
    fields = _fields(runs, "resumed", 1, **NF4) | {"output_dir": str(tmp_path / "resumed"), "resume": True}
    fields["gradient_checkpointing"] = name != "ddp-nf4"
    engine.train(many_runs.config(fields))
    assert not [warning for warning in recwarn if "options differ" in str(warning.message)]
    _assert_same_run(tmp_path / "resumed", runs / "nf4", RESUMED_AT)


def test_resuming_warns_where_a_step_would_have_other_rows(runs):
    """Two processes with four rows each, resumed with one: eight rows are the same run, four are not."""
    for rows, differ in ((STEP, False), (STEP // 2, True)):
        config = many_runs.config(_fields(runs, "ddp", 1) | {"per_device_train_batch_size": rows})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resuming.checkpoint_to_resume(config, runs / "ddp", Processes())
        assert ["processes 2 -> 1" in str(warning.message) for warning in caught] == [True] * differ


def test_two_processes_that_resume_two_with_dropout_end_with_the_same_bits(runs):
    tensors, others = load_file(runs / "dropout" / TENSORS), load_file(runs / "dropout-resumed" / TENSORS)
    for name, tensor in tensors.items():
        assert_bits_equal(name, others[name], tensor)


def test_each_process_draws_its_own_dropout():
    seeds = []
    for rank in range(3):
        torch.manual_seed(5)
        Processes(rank, 3, rank).own_random_numbers(5)
        seeds.append(torch.initial_seed())
    assert seeds == [5, 6, 7]


@pytest.mark.parametrize("name", ["loop-0", "loop-1"], ids=["adapters-whole", "adapters-sharded"])
def test_a_loop_of_your_own_over_a_sharded_base(runs, name):
    """Each process gives its rows to train_step, and all get the numbers of one; the state in parts is that of one, too."""
    expected = json.loads((runs / "loop-of-one.json").read_text(encoding="utf-8"))
    got = json.loads((runs / f"{name}.json").read_text(encoding="utf-8"))
    assert len(got) == len(expected) == 3
    for step, other in zip(got, expected, strict=True):
        assert step == pytest.approx(other, rel=METRICS_REPEATED)
    model, trainer = many_runs.loop_of_your_own(runs / "loop-of-one")
    trainer._begin_own_loop()
    found = []
    for folder in (runs / name, runs / "loop-of-one"):
        load_state(folder, model, trainer.optimizer)
        tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for number, state in trainer.optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.{key}": value.clone() for key, value in state.items()}
        found.append(tensors)
    assert set(found[0]) == set(found[1])
    assert {tuple(tensor.shape) for tensor in found[1].values()} >= {
        (3, 32),
        (1, 32),
    }  # unequal shards, and an empty one
    for name, tensor in found[1].items():
        assert_close(name, found[0][name], tensor, ADAM_ON_ROUNDED_GRADIENTS)


def test_a_plan_of_two_processes_is_what_one_of_them_takes(runs):
    """Its share of the weights exactly; with what a step allocates, up to a layer less: not every run holds three."""
    found = json.loads((runs / "peak.json").read_text(encoding="utf-8"))
    parts, held = found["planned"], found["held"]
    assert parts["base weights"] + parts["adapter weights"] == pytest.approx(held, rel=1e-3)
    planned, taken = sum(parts.values()), held + found["allocated"]
    assert (planned - found["layer"]) * (1 - PLANNED) <= taken <= planned * (1 + PLANNED)


# -- fastpeft train --nproc ---------------------------------------------------------------------------------------------


def _command(folder, output, processes, *more):
    options = {
        "model": folder / "model",
        "data": folder / "rows.jsonl",
        "output-dir": output,
        "learning-rate": 0.001,
        "per-device-train-batch-size": STEP // processes,
        "num-train-epochs": 8,
        "eval-strategy": "steps",
        "eval-steps": 6,
        "save-total-limit": 99,
        "examples": 0,
        "logging-steps": 1,
        "quantization": "nf4",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["train", *flags, "--no-baseline", "--no-report", "--no-load-best-model-at-end", "--use-cpu", *more]


def _started(folder, output, *more):
    """The launcher of two processes, and these, when the first checkpoint is complete."""
    command = [sys.executable, "-m", "fastpeft", *_command(folder, output, 2, "--nproc", "2", *more)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen(command, env=_environment(), text=True, **pipes)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints/checkpoint-6/trainer_state.json").is_file():
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return launcher, psutil.Process(launcher.pid).children()


def test_a_killed_launcher_takes_its_processes_along_and_one_process_resumes(runs, tmp_path):
    launcher, workers = _started(runs, tmp_path / "killed", "--distributed", "fsdp", "--shard-adapters")
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "killed" / TENSORS).exists()

    assert main(_command(runs, tmp_path / "whole", 1)) == 0
    assert main(_command(runs, tmp_path / "killed", 1, "--resume")) == 0
    _assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_lost_process_ends_all_with_one_error_line(runs, tmp_path):
    launcher, workers = _started(runs, tmp_path / "lost")
    workers[1].send_signal(signal.SIGKILL)
    out, err = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: train: process 1 ended with exit code -9"]
    assert "Traceback" not in err
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_errors_of_all_processes_are_one(tmp_path, monkeypatch, capsys):
    """The first that was written counts; who lost its neighbour by it shows no traceback. Exit codes are those of one process."""
    monkeypatch.setattr(process, "_CONNECTION_LOST", 0.0)
    for rank, error in ((1, ValueError("rows: expected\nsome")), (0, RuntimeError("Connection closed by peer"))):
        monkeypatch.setenv("RANK", str(rank))
        with process._Outcome(tmp_path) as outcome:
            raise error
        assert outcome.code == (2 if rank == 1 else 1)
    first = launch._first_error(tmp_path, "train", None)
    assert (str(first), first.code) == ("rows: expected some", 2)
    assert capsys.readouterr().err == ""
    (tmp_path / "error-1.json").unlink()
    lost = launch._first_error(tmp_path, "train", None)
    assert (str(lost), lost.code) == ("train: process 0: Connection closed by peer", 1)


def test_only_rank_0_of_torchruns_processes_prints(runs, capsys, monkeypatch):
    for rank, prints in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["inspect", "--adapter", str(runs / "ddp")]) == 0
        assert bool(capsys.readouterr().out) == prints


def test_what_fsdp_cannot_shard_is_refused():
    adalora = get_peft_model(small_llama(), AdaLoraConfig(total_step=9, target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="shard_adapters: ADALORA"):
        check_shardable(adalora, adapters=True)
    check_shardable(adalora, adapters=False)
    olora = LoraConfig(init_lora_weights="olora", target_modules=["q_proj"])
    model = get_peft_model(small_llama(), olora)
    check_shardable(model, adapters=True)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(NotImplementedError, match="q_proj has an adapter that starts from changed base weights"):
        check_shardable(model, adapters=False)


def test_what_cannot_be_is_refused(runs, tmp_path):
    fields = _fields(runs, "refused", 1) | {"output_dir": str(tmp_path / "refused")}
    with pytest.raises(ValueError, match=r"nproc: expected 1 in a process that is running already, got 2; start"):
        engine.train(many_runs.config(fields | {"nproc": 2}))
    for wrong in ({"distributed": "zero"}, {"shard_adapters": True}, {"nproc": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TrainConfig(model="m", data="d", output_dir="o", **wrong)
