"""One training run: data, baseline, training, evaluation, adapter, record, report."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch.utils.data import DataLoader

from fastpeft.checkpoint import TENSORS_NAME
from fastpeft.integrations.acceleration import accelerate, restore
from fastpeft.integrations.transformers import (
    align_padding,
    load_config,
    load_tokenizer,
    longest_input,
    model_source,
)
from fastpeft.model import PeftModel, get_peft_model
from fastpeft.model.eva import initialize_lora_eva_weights
from fastpeft.ops.fast_matmul import fast_float32_matmul, float32_path
from fastpeft.training.base_model import describe_base, load_base, quantize_in_place
from fastpeft.training.config import TrainConfig
from fastpeft.training.evaluate import Evaluator
from fastpeft.training.examples import classification_examples, prompt_text, prompts_and_responses
from fastpeft.training.guidance import suggested_learning_rate
from fastpeft.training.measure import Stopwatch, environment, peak_memory_mb, start_peak_memory
from fastpeft.training.metrics import (
    causal_lm_metrics,
    classification_metrics,
    confusion_matrix,
    roc_curve,
    token_scores,
)
from fastpeft.training.prepare import RawData, held_out_split, read_training_data, sorted_by_length
from fastpeft.training.processes import Processes
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION, RunRecord
from fastpeft.training.report import write_report
from fastpeft.training.resuming import checkpoint_to_resume
from fastpeft.training.run_folder import (
    CHECKPOINTS,
    PREDICTIONS_FILE,
    RECORD_FILE,
    REPORT_FILE,
    TENSORBOARD,
    TrainingInfo,
    check_output_folder,
    save_arrays,
)
from fastpeft.training.sharding import bytes_elsewhere, check_shardable, shard_base, whole_adapters
from fastpeft.training.tokenise import Collator, PreparedSplit, encode_prompts
from fastpeft.training.tracking import own_tracks, trackers
from fastpeft.training.trainer import (
    STATE_FILE,
    Trainer,
    classification_loss,
    total_steps,
    warmup_steps,
)


def train(config: TrainConfig, *, model: Any = None, tokenizer: Any = None) -> RunRecord:
    """run_training's record."""
    return run_training(config, model=model, tokenizer=tokenizer)[0]


def run_training(
    config: TrainConfig, *, model: Any = None, tokenizer: Any = None, rows: dict[str, Any] | None = None
) -> tuple[RunRecord, PeftModel, Any]:
    """Fine-tune `config.model` on `config.data` and write the adapter, run.json and report.html into `config.output_dir`.

    A base model and tokenizer that are already loaded may be passed, and rows by split; config.model and config.data are then
    only their names. Returns (record, the model with its adapter, tokenizer).
    All options, rows and names are checked before anything is written. An adapter that stands in output_dir is replaced
    only by a finished run that may overwrite it.
    Raises:  ValueError, OSError, NotImplementedError with a one-line reason for what is wrong with the input
    """
    clock = Stopwatch()
    processes = Processes.of_environment()
    if config.nproc not in (1, processes.count):
        raise ValueError(
            f"nproc: expected 1 in a process that is running already, got {config.nproc}; start fastpeft train --nproc "
            f"{config.nproc}, or your script by torchrun --nproc-per-node {config.nproc}"
        )
    folder = check_output_folder(config.output_dir, overwrite=config.overwrite, resume=config.resume)
    checkpoint = checkpoint_to_resume(config, folder, processes) if config.resume else None
    trackers(config.report_to)
    raw = read_training_data(config, task=config.task, labels=config.labels, seed=config.seed, splits=rows)
    source = model_source(config.model) if model is None else config.model
    tokenizer = load_tokenizer(source) if tokenizer is None else tokenizer
    base_config = load_config(source) if model is None else model.config
    text_format = config.text_format(longest_input(base_config))
    if raw.task == CAUSAL_LM and raw.columns.text:
        text_format = dataclasses.replace(
            text_format, prompt_format="plain", separator=""
        )  # a prompt is a text's beginning
    splits = raw.tokenise(tokenizer, text_format)

    transformers.set_seed(config.seed)
    device = processes.device(config.use_cpu)
    processes.join(device)  # from here on one may write what the others checked
    options = config.base_options()
    if model is None:
        base = load_base(source, options, labels=raw.labels, device=device)
    else:
        base = quantize_in_place(model, options)
    align_padding(base, tokenizer)
    described = describe_base(base)
    step_rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes.count
    steps = total_steps(len(splits["train"].features), step_rows, config.num_train_epochs, config.max_steps)
    sharded = config.distributed == "fsdp" and processes.count > 1
    wrapped = get_peft_model(base, config.peft_config(raw.task).for_run(steps))
    if sharded:
        check_shardable(wrapped, adapters=config.shard_adapters)
    else:  # a model that is sharded goes to the device layer by layer
        wrapped.to(device)
    if getattr(config.peft, "init_lora_weights", None) == "eva":
        rows = DataLoader(
            splits["train"].features, config.per_device_train_batch_size, collate_fn=Collator(tokenizer)
        )  # in their own order: a resumed run finds the same ranks
        initialize_lora_eva_weights(wrapped, rows)
    if config.learning_rate is None:
        rate = suggested_learning_rate(config.peft.peft_type, wrapped.get_nb_trainable_parameters()[1])
        config = dataclasses.replace(config, learning_rate=rate)
    options = config.to_dict() | {"processes": processes.count}
    info = TrainingInfo(raw.task, str(source), raw.labels, raw.columns, text_format, options)
    if sharded:
        shard_base(wrapped, device, adapters=config.shard_adapters)
        described["process_bytes"] = described["bytes"] - bytes_elsewhere(wrapped)
    run = _Run(config, raw, splits, wrapped, tokenizer, info, folder, described, processes)
    with fast_float32_matmul(run.device) if config.cpu_fast_matmul else contextlib.nullcontext():
        return run.execute(checkpoint, clock), wrapped, tokenizer


@dataclass
class _Scores:
    """What one evaluation of the held-out rows found."""

    metrics: dict[str, float]
    rows: dict[str, np.ndarray]
    logits: np.ndarray | None = None
    responses: list[str] | None = None


class _Run:
    """A run whose input is checked: the model with its adapter, and the tokenised splits."""

    def __init__(
        self, config: TrainConfig, raw: RawData, splits: dict[str, PreparedSplit], model: PeftModel, tokenizer: Any,
        info: TrainingInfo, folder: Path, base: dict[str, Any], processes: Processes,
    ):  # fmt: skip
        self.processes = processes
        self.config, self.raw, self.splits, self.tokenizer, self.info = config, raw, splits, tokenizer, info
        self.folder, self.model, self.base = folder, model, base
        self.device = next(model.parameters()).device
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.held_out = held_out_split(splits)
        self.prompts: list[tuple[Any, str]] = []
        if self.held_out and raw.task != CLASSIFICATION:
            self.prompts = prompts_and_responses(splits[self.held_out].rows, raw.columns, config.examples)
        self.arguments = self._arguments()
        self.acceleration: dict[str, Any] = {}
        if self.device.type == "cpu":
            path = float32_path(self.device)
            how = f"oneDNN, {path.why}" if path.allowed else f"PyTorch's own, {path.why}"
            self.acceleration["float32_products"] = how if config.cpu_fast_matmul else "PyTorch's own, as asked for"

    def execute(self, checkpoint: Path | None, clock: Stopwatch) -> RunRecord:
        start_peak_memory(self.device)
        before = self._score("baseline") if self.config.baseline else None
        trainer = self._trainer()
        self.processes.own_random_numbers(self.config.seed)
        began = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")) if checkpoint else {}
        training = Stopwatch()
        with self._accelerated(), own_tracks(self.arguments.report_to):
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = training.seconds()
        after = self._score("evaluate")
        with whole_adapters(self.model), self.processes.first() as writes:
            if writes:
                self.model.save_pretrained(self.folder)
                self.info.save(self.folder)
                if self.config.save_predictions and after is not None:
                    save_arrays(self.folder / PREDICTIONS_FILE, after.rows)
        record = self._record(before, after, trainer.state.log_history, clock)
        self._add_throughput(record, trainer.state, began, seconds)
        if after is None:
            record.metrics = {"train_loss": outcome.training_loss}
        with self.processes.first() as writes:
            if writes:
                record.save(self.folder / RECORD_FILE)
                if self.config.report:
                    write_report(record, self.folder / REPORT_FILE)
        return record

    @contextlib.contextmanager
    def _accelerated(self) -> Iterator[None]:
        """The model is accelerated while it trains, and what it was before and after: all scores are of the model itself."""
        config = self.config
        if not config.accelerate or not isinstance(self.model.get_base_model(), transformers.PreTrainedModel):
            if self.acceleration and self.processes.is_main:
                print(f"float32 products: {self.acceleration['float32_products']}")
            yield
            return
        acceleration = accelerate(self.model, memory=config.memory, offload=config.offload)
        try:
            with acceleration.fast_matmul() if config.cpu_fast_matmul else contextlib.nullcontext():
                if self.processes.is_main:
                    acceleration.report()
                yield
            summary = acceleration.summary().splitlines()  # again: it counts the calls that fell back
            self.acceleration |= {"memory": config.memory, "offload": config.offload, "summary": summary}
        finally:
            restore(self.model)

    def _score(self, description: str) -> _Scores | None:
        """Metrics of the held-out rows and answers to the example prompts, or None without held-out rows."""
        if self.held_out is None:
            return None
        features = self.splits[self.held_out].features
        size = self.config.per_device_eval_batch_size
        processes, bf16 = self.processes, self.config.bf16
        evaluator = Evaluator(self.model, self.tokenizer, batch_size=size, bf16=bf16, progress=processes.is_main)
        if self.raw.task == CLASSIFICATION:
            logits = processes.over_rows(lambda rows: evaluator.class_logits(rows, description), features)
            targets = np.asarray(features["labels"])
            return _Scores(classification_metrics(logits, targets), {"logits": logits, "labels": targets}, logits)
        scores = processes.over_rows(lambda rows: evaluator.token_scores(rows, description), features)
        prompts = encode_prompts([prompt for prompt, _ in self.prompts], self.tokenizer, self.info.text_format)
        return _Scores(
            causal_lm_metrics(scores),
            {"scores": scores},
            responses=evaluator.responses(prompts, self.config.max_new_tokens),
        )

    def _trainer(self) -> Trainer:
        with self.processes.first() as writes:
            if writes and self.config.overwrite and (self.folder / CHECKPOINTS).exists():
                shutil.rmtree(self.folder / CHECKPOINTS)
        classify = self.raw.task == CLASSIFICATION
        validation = self.splits.get("validation")
        trainer = Trainer(
            self.model,
            self.arguments,
            info=self.info,
            loraplus=self.config.loraplus(),
            data_collator=Collator(self.tokenizer),
            train_dataset=self.splits["train"].features,
            eval_dataset=None if validation is None else sorted_by_length(validation.features),
            compute_loss_func=classification_loss if classify else None,
            compute_metrics=_classification_eval if classify else _causal_lm_eval,
            preprocess_logits_for_metrics=None if classify else token_scores,
        )
        for callback in trainer.callback_handler.callbacks:
            if getattr(callback, "logging_dir", "") is None:  # TensorBoard's; its own choice lies among the checkpoints
                callback.logging_dir = str(self.folder / TENSORBOARD)
        return trainer

    def _arguments(self) -> transformers.TrainingArguments:
        config, accumulation = self.config, self.config.gradient_accumulation_steps
        rows = len(self.splits["train"].features)
        step_rows = config.per_device_train_batch_size * accumulation * self.processes.count
        evaluates = "validation" in self.splits and config.eval_strategy != "no"
        metric = config.best_metric(self.raw.task)
        return transformers.TrainingArguments(
            output_dir=str(self.folder / CHECKPOINTS),
            num_train_epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=warmup_steps(config.warmup_ratio, rows, step_rows, config.num_train_epochs, config.max_steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim=config.optim,
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_eval_batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="group_by_length" if config.group_by_length else "random",
            bf16=config.bf16,
            use_cpu=self.device.type == "cpu",
            eval_strategy=config.eval_strategy if evaluates else "no",
            eval_steps=config.eval_steps,
            save_strategy="epoch" if config.eval_strategy == "no" else config.eval_strategy,
            save_steps=config.eval_steps,
            save_total_limit=config.save_total_limit,
            load_best_model_at_end=config.load_best_model_at_end and evaluates,
            metric_for_best_model=metric if evaluates else None,
            greater_is_better=metric not in ("loss", "perplexity"),
            logging_steps=config.logging_steps,
            logging_first_step=True,
            seed=config.seed,
            report_to=trackers(config.report_to),
            run_name=config.title or self.folder.name,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            dataloader_pin_memory=self.device.type != "cpu",
        )

    def _record(
        self,
        before: _Scores | None,
        after: _Scores | None,
        history: list[dict[str, Any]],
        clock: Stopwatch,
    ) -> RunRecord:
        trainable, total = self.model.get_nb_trainable_parameters()
        record = RunRecord(
            title=self.config.title
            or f"{Path(self.info.model).name}: {self.config.peft.peft_type} for {self.raw.task}",
            task=self.raw.task,
            model=self.info.model,
            data={name: split.report.to_dict() for name, split in self.splits.items()},
            data_hash=self.raw.digest(),
            peft_config=self.model.peft_config[self.model.active_adapters[0]].to_dict(),
            training=self.config.to_dict()
            | {
                "processes": self.processes.count,
                "held_out": self.held_out,
                "max_length": self.info.text_format.max_length,
            },
            trainable_parameters=trainable,
            total_parameters=total,
            base=self.base,
            acceleration=self.acceleration,
            adapter=str(self.folder),
            adapter_bytes=(self.folder / TENSORS_NAME).stat().st_size,
            history=history,
            labels=self.raw.labels,
            environment=environment(self.device),
        )
        if after is not None:
            self._add_scores(record, before, after)
        record.peak_memory_mb = peak_memory_mb(self.device)
        record.seconds, record.cpu_seconds = clock.seconds(), clock.cpu_seconds()
        return record

    def _add_throughput(self, record: RunRecord, state: Any, began: dict[str, Any], seconds: float) -> None:
        """Tokens trained on since `began`, the checkpoint's state; a part of an epoch counts by the mean length of a row."""
        first = began.get("global_step", 0)
        evaluations = [e["eval_runtime"] for e in state.log_history if "eval_runtime" in e and e["step"] > first]
        epochs = (state.epoch or 0.0) - (began.get("epoch") or 0.0)
        record.train_tokens = round(epochs * sum(self.splits["train"].features["length"]))
        record.train_seconds = max(seconds - sum(evaluations), 0.0)
        if record.train_seconds:
            record.tokens_per_second = record.train_tokens / record.train_seconds

    def _add_scores(self, record: RunRecord, before: _Scores | None, after: _Scores) -> None:
        record.metrics, record.baseline = after.metrics, before.metrics if before else {}
        split = self.splits[self.held_out]
        if self.raw.task == CLASSIFICATION:
            targets = np.asarray(split.features["labels"])
            record.confusion = confusion_matrix(after.logits, targets)
            record.roc = roc_curve(after.logits, targets)
            record.baseline_roc = roc_curve(before.logits, targets) if before else None
            record.examples = classification_examples(
                split.rows, self.raw.columns, self.raw.labels, targets.tolist(),
                before.logits if before else None, after.logits, self.config.examples,
            )  # fmt: skip
            return
        for index, (prompt, response) in enumerate(self.prompts):
            answers = {"before": before.responses[index]} if before else {}
            answers["after"] = after.responses[index]
            record.examples.append({"prompt": prompt_text(prompt), "response": response, **answers})


def _classification_eval(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return classification_metrics(prediction.predictions, prediction.label_ids)


def _causal_lm_eval(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return causal_lm_metrics(prediction.predictions)
