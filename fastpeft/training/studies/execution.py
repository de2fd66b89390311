"""The runs of a study: one folder each, named by a digest of what decides the result; done once, resumed, or failed."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from fastpeft.integrations.transformers import load_model, load_tokenizer, model_source
from fastpeft.methods.config import PeftConfig
from fastpeft.model import get_peft_model
from fastpeft.training.base_model import load_base
from fastpeft.training.config import METRICS, TrainConfig
from fastpeft.training.engine import run_training
from fastpeft.training.finetune import train_config
from fastpeft.training.measure import environment
from fastpeft.training.prepare import RawData, held_out_split, read_training_data
from fastpeft.training.record import plain_json
from fastpeft.training.run_folder import CHECKPOINTS, PREDICTIONS_FILE, RECORD_FILE
from fastpeft.training.studies.search import Variant
from fastpeft.training.studies.spec import StudySpec
from fastpeft.training.tracking import trackers
from fastpeft.training.trainer import last_checkpoint

RUNS = "runs"
PLAN_FILE, ERROR_FILE, LOG_FILE = "plan.json", "error.json", "log.txt"
RUN_ERRORS = (
    ValueError, TypeError, OSError, RuntimeError, ArithmeticError, LookupError, AttributeError, ImportError, MemoryError,
    AssertionError,
)  # fmt: skip
"""What ends one run of a study and not the study. RuntimeError is also a device that is out of memory."""
_NO_DIFFERENCE = (
    "output_dir", "overwrite", "resume", "report", "report_to", "title", "model", "data", "save_predictions", "examples",
    "max_new_tokens",
)  # fmt: skip
_DECIDING = ("fastpeft", "torch", "transformers", "accelerate")
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")


@dataclass(frozen=True)
class PlannedRun:
    """One run: a variant with a seed, its options, and where it is kept."""

    variant: Variant
    seed: int
    config: TrainConfig
    digest: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.variant.label}, seed {self.seed}"

    def finished(self) -> bool:
        """True where the run is there whole: run.json is its last file."""
        return (self.folder / RECORD_FILE).is_file() and (self.folder / PREDICTIONS_FILE).is_file()

    def error(self) -> str | None:
        """Why the run failed, or None where it did not."""
        path = self.folder / ERROR_FILE
        return None if self.finished() or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))["error"]


class Plan:
    """A study whose rows are read and whose names are checked."""

    def __init__(self, spec: StudySpec):
        self.spec = spec
        self.source = model_source(spec.model)
        self.folder = Path(spec.output_dir)
        rows = spec.data if isinstance(spec.data, dict) else None
        shared = self._config(Variant("", spec.methods[0].method, _shared(spec, spec.methods[0].fixed)), 0, "", None)
        shared = dataclasses.replace(shared, max_train_rows=None, max_eval_rows=None)
        self.raw = read_training_data(shared, task=spec.task, labels=spec.labels, seed=0, splits=rows)
        self.held_out = held_out_split(self.raw.splits)
        if self.held_out is None:
            raise ValueError(
                f"study: expected held-out rows in {spec.data_name()}: a test or validation split, or a fraction"
            )
        known = METRICS[self.raw.task]
        self.metric = spec.metric or known[0]
        if self.metric not in known:
            raise ValueError(f"metric: expected one of {known} for {self.raw.task}, got {self.metric!r}")
        self.data_hash = self.raw.digest()
        self.model_hash = model_digest(self.source)
        trackers(shared.report_to)

    def _config(self, variant: Variant, seed: int, folder: str | os.PathLike, raw: RawData | None) -> TrainConfig:
        options = {"baseline": False} | variant.options | {"seed": seed, "save_predictions": True}
        options["title"] = f"{variant.label}, seed {seed}"
        if raw is not None:  # its rows are read already
            options |= {"task": raw.task, "labels": tuple(raw.labels), "validation_data": None, "test_data": None}
            if self.spec.metric and not options.get("metric_for_best_model"):
                options["metric_for_best_model"] = self.spec.metric
        return train_config(self.source, self.spec.data_name(), variant.method, folder, options)[0]

    def runs(self, variant: Variant) -> list[PlannedRun]:
        """The runs of a variant, one a seed. Raises ValueError or TypeError that names the variant for wrong options."""
        return [self._run(variant, seed) for seed in self.spec.seeds]

    def _run(self, variant: Variant, seed: int) -> PlannedRun:
        try:
            config = self._config(variant, seed, "", self.raw)
        except (ValueError, TypeError) as error:
            raise type(error)(f"study, {variant.label}: {error}") from error
        digest = self.digest(config)
        return PlannedRun(
            variant, seed, dataclasses.replace(config, output_dir=str(self.folder / RUNS / digest)), digest
        )

    def digest(self, config: TrainConfig) -> str:
        """16 hex digits of all that decides a run's result: options, rows, base model, versions, kind of device."""
        options = plain_json(config.to_dict())
        device = torch.device("cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda")
        versions = environment(device)["versions"]
        wanted = (*_DECIDING, *(["bitsandbytes"] if config.quantization != "none" else []))
        content = {
            "options": {name: value for name, value in options.items() if name not in _NO_DIFFERENCE},
            "data": self.data_hash,
            "model": self.model_hash,
            "versions": {name: versions.get(name) for name in wanted},
            "device": device.type,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def check(self, variants: Iterable[Variant]) -> None:
        """Every variant's options, and that its targets are in the model, without the model's weights."""
        for variant in variants:
            config = self.runs(variant)[0].config
            peft = config.peft_config(self.raw.task)
            if _starts_from_weights(peft):
                continue
            empty = load_model(self.source, labels=self.raw.labels, on_meta=True)
            try:
                get_peft_model(empty, peft.for_run(1_000_000))
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(f"study, {variant.label}: {error}") from error


def _shared(spec: StudySpec, fixed: dict[str, Any]) -> dict[str, Any]:
    """The options of the data alone, which are one for all runs."""
    names = {item.name for item in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in fixed.items() if name in names and name in spec.base}


def _starts_from_weights(peft: PeftConfig) -> bool:
    """True for an adapter whose start is computed from the base's weights or the data (PiSSA, OLoRA, LoftQ, EVA)."""
    return getattr(peft, "init_lora_weights", True) not in (True, False, "gaussian", "orthogonal")


def model_digest(source: str) -> str:
    """SHA-256 of a model folder's files; a name on the hub stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        found.update(path.name.encode())
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                found.update(block)
    return found.hexdigest()


class Runner:
    """Executes runs, in this process or in `jobs` of its own, and says one line for each."""

    def __init__(self, plan: Plan, jobs: int = 1):
        self.plan, self.jobs = plan, jobs
        self.trained = self.reused = self.failed = 0
        self.done: dict[str, PlannedRun] = {}

    def execute(self, runs: list[PlannedRun]) -> None:
        """Every run that is not finished yet. A failed one is recorded in its folder; it is tried again by the next study."""
        new = {run.digest: run for run in runs if run.digest not in self.done}
        self.done |= new
        for run in new.values():
            if run.finished():
                self.reused += 1
                print(f"  {run.digest}  {run.name}: finished before")
        waiting = [run for run in new.values() if not run.finished()]
        rows, labels = self.plan.raw.splits, self.plan.raw.labels
        if self.jobs == 1 or len(waiting) < 2:
            for run in waiting:
                self._say(run, execute_run(run, rows, labels))
            return
        threads = max(1, torch.get_num_threads() // self.jobs)
        pool = ProcessPoolExecutor(self.jobs, get_context("spawn"), _begin_worker, (rows, labels, threads))
        try:
            futures = {pool.submit(_execute_in_worker, run): run for run in waiting}
            for future in as_completed(futures):
                error = future.exception()  # of the pool itself: a process that was killed
                self._say(futures[future], _failure(futures[future], error) if error else future.result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _say(self, run: PlannedRun, error: str | None) -> None:
        if error is None:
            self.trained += 1
            metrics = json.loads((run.folder / RECORD_FILE).read_text(encoding="utf-8"))
            score, seconds = metrics["metrics"].get(self.plan.metric), metrics["seconds"]
            print(f"  {run.digest}  {run.name}: {self.plan.metric} {score:.4f}, {seconds:.1f} s", flush=True)
        else:
            self.failed += 1
            print(f"  {run.digest}  {run.name}: failed: {error}", file=sys.stderr, flush=True)


def execute_run(run: PlannedRun, rows: dict[str, Dataset], labels: list[str]) -> str | None:
    """Train one run, from its last checkpoint if it has one. Returns None, or the error that ended it.

    What the run prints is in log.txt of its folder. Checkpoints go when it is finished.
    """
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"label": run.variant.label, "method": run.variant.method, "options": run.variant.options, "seed": run.seed}
    (folder / PLAN_FILE).write_text(json.dumps(plain_json(plan), indent=2) + "\n", encoding="utf-8")
    resume = last_checkpoint(folder / CHECKPOINTS) is not None
    config = dataclasses.replace(run.config, resume=resume, overwrite=not resume)
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8", buffering=1) as log, _printing_to(log):
            _train(config, rows, labels)
    except RUN_ERRORS as error:
        _BASES.clear()
        return _failure(run, error)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    return None


def _failure(run: PlannedRun, error: BaseException) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    values = {"error": text, "traceback": traceback.format_exception(error)}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / ERROR_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return text


@contextlib.contextmanager
def _printing_to(log: Any) -> Iterator[None]:
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


# The base model that this process holds, by what it depends on. One at a time: a new head is drawn by the seed, so that
# a run's result does not depend on the runs before it.
_BASES: dict[tuple, tuple[Any, Any]] = {}


def _train(config: TrainConfig, rows: dict[str, Dataset], labels: list[str]) -> None:
    """run_training on the base model that is in memory, which then gets its adapter taken out again."""
    if config.quantization != "none":  # quantised while it is read
        run_training(config, rows=rows)
        return
    key = (config.model, config.dtype, tuple(labels), config.seed if labels else None)
    if key not in _BASES:
        _BASES.clear()
        torch.manual_seed(config.seed)
        _BASES[key] = load_base(config.model, config.base_options(), labels=labels), load_tokenizer(config.model)
    base, tokenizer = _BASES[key]
    _, model, _ = run_training(config, model=base, tokenizer=tokenizer, rows=rows)
    plain = model.unload()
    if config.gradient_checkpointing:
        plain.gradient_checkpointing_disable()


_WORKER: dict[str, Any] = {}


def _begin_worker(rows: dict[str, Dataset], labels: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    _WORKER.update(rows=rows, labels=labels)


def _execute_in_worker(run: PlannedRun) -> str | None:
    return execute_run(run, _WORKER["rows"], _WORKER["labels"])
