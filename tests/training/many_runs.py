"""Several training runs one after another in each process that torchrun starts: starting up takes longer than they do.

python -m torch.distributed.run --nproc-per-node 2 many_runs.py RUNS.json, a list of
- TrainConfig's fields, a method's under "peft"; with "goes_on_from" from that checkpoint, of an earlier run in the list
- {"own_loop": FOLDER, "shard_adapters": ...}, a loop over Trainer.train_step
- {"peak": FILE, "method": ..., "options": ...}, a planned step beside a real one
"""

import gc
import itertools
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, TrainingArguments

from fastpeft import LoraConfig, PeftModel, get_peft_config, get_peft_model
from fastpeft.training import TrainConfig, Trainer, train
from fastpeft.training.live_memory import LiveMemory
from fastpeft.training.plan import make_plan, plan_config
from fastpeft.training.plan_sharded import Groups
from fastpeft.training.planned_step import build, run_steps
from fastpeft.training.processes import Processes
from fastpeft.training.sharded_state import save_state
from fastpeft.training.sharding import shard_base
from tests.tiny_models import small_llama

STEPS, ROWS = 3, 8


def config(fields: dict) -> TrainConfig:
    return TrainConfig(**fields | {"peft": get_peft_config({"peft_type": "LORA"} | fields["peft"])})


def loop_of_your_own(folder: Path, shard_adapters: bool = False) -> tuple[PeftModel, Trainer]:
    """A model with adapters of ranks 3 and 1, sharded with its base where there are several processes, and its trainer."""
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=3, rank_pattern={"v_proj": 1}, task_type="CAUSAL_LM")
    model = get_peft_model(small_llama(), lora)
    if Processes.of_environment().count > 1:
        shard_base(model, torch.device("cpu"), adapters=shard_adapters)
    options = {"use_cpu": True, "report_to": "none", "max_grad_norm": 0.1, "gradient_accumulation_steps": 2}
    return model, Trainer(model, TrainingArguments(str(folder), max_steps=STEPS, learning_rate=0.01, **options))


def own_loop(folder: Path, shard_adapters: bool = False) -> None:
    """Steps of ROWS rows, dealt out over the processes; what train_step returns goes into FOLDER.json, the state into FOLDER."""
    processes = Processes.of_environment()
    processes.join(torch.device("cpu"))
    model, trainer = loop_of_your_own(folder, shard_adapters)
    model.train()
    draw = torch.Generator().manual_seed(1)
    numbers = []
    for _ in range(STEPS):
        ids = torch.randint(0, model.config.vocab_size, (ROWS, 9), generator=draw)[processes.rank :: processes.count]
        numbers.append(trainer.train_step({"input_ids": ids, "labels": ids.clone()}))
    save_state(folder, model, trainer.optimizer)
    if processes.is_main:
        folder.with_name(folder.name + ".json").write_text(json.dumps(numbers), encoding="utf-8")


class _Unwatched(LiveMemory):
    """A log that sees nothing, for a step that PyTorch's record of allocations watches."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def peak(file: Path, method: str, options: dict) -> None:
    """The planned peak of a step over a sharded base, and what the allocator saw of it in rank 0."""
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 5, "tie_word_embeddings": False, "dtype": "bfloat16"}
    llama = AutoConfig.for_model("llama", **sizes)
    processes = Processes.of_environment()
    processes.join(torch.device("cpu"))
    sharded = {"device": "cpu", "processes": processes.count, "distributed": "fsdp", "target_modules": "all-linear"}
    config = plan_config(llama, method, sharded | options)
    planned = make_plan(config, llama)
    model = build(config, llama)
    layer = Groups.of(model).base_layer
    shard_base(model, torch.device("cpu"), adapters=config.shard_adapters)
    run_steps(model, config, batch_size=config.batch_size, seq_len=config.seq_len)  # caches are filled
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_steps(model, config, batch_size=config.batch_size, seq_len=config.seq_len, memory=_Unwatched())
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    found = {
        "planned": planned.parts,
        "layer": layer,
        "held": sum(tensor.nbytes for tensor in [*held, *model.buffers()]),
    }
    if processes.is_main:
        file.write_text(json.dumps(found | {"allocated": max(itertools.accumulate(changes))}), encoding="utf-8")


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if "own_loop" in run:
            own_loop(Path(run["own_loop"]), run["shard_adapters"])
            continue
        if "peak" in run:
            peak(Path(run["peak"]), run["method"], run["options"])
            continue
        checkpoint = run.pop("goes_on_from", None)
        if checkpoint:
            if dist.get_rank() == 0:
                shutil.copytree(checkpoint, Path(run["output_dir"]) / "checkpoints" / Path(checkpoint).name)
            dist.barrier()
        train(config(run))
    dist.barrier()
    dist.destroy_process_group()
