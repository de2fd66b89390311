"""A base model, the adapters on it, and the batcher in front of them: text in, text or classes out. No web in here."""

import contextlib
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpeft.integrations.transformers import align_padding, load_config, load_tokenizer, longest_input, model_source
from fastpeft.layers.row_adapters import BASE
from fastpeft.model import PeftModel
from fastpeft.ops.fast_matmul import fast_float32_matmul
from fastpeft.serving.batcher import Batcher, Job
from fastpeft.serving.metrics import Metrics
from fastpeft.serving.writing import RowEnds, RowSampler, Sampling
from fastpeft.training.base_model import load_base
from fastpeft.training.config import BaseOptions
from fastpeft.training.metrics import class_probabilities
from fastpeft.training.predict import adapter_info
from fastpeft.training.record import CAUSAL_LM, CLASSIFICATION
from fastpeft.training.text_format import TextFormat
from fastpeft.training.tokenise import Collator, check_messages, encode_prompts, encode_texts


class UnknownAdapter(ValueError):
    """No adapter of that name is served."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server takes. max_length: tokens of a prompt or text; None: what the model has positions for."""

    max_batch: int = 16
    max_wait_ms: float = 5.0
    max_length: int | None = None
    max_new_tokens: int = 256
    max_queue: int = 256

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "max_new_tokens", "max_queue"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0 <= self.max_wait_ms <= 10_000:
            raise ValueError(f"max_wait_ms: expected 0 to 10000, got {self.max_wait_ms}")


@dataclass(kw_only=True)
class Served:
    """One adapter, or the base model. alone: why its rows cannot share a batch with others', or None."""

    name: str
    folder: str | None
    method: str | None
    labels: list[str]
    text_format: TextFormat
    virtual_tokens: int = 0
    alone: str | None = None

    def describe(self) -> dict[str, Any]:
        shown = {"name": self.name, "folder": self.folder, "method": self.method, "mixed": self.alone is None}
        shown |= {"why_not_mixed": self.alone} if self.alone else {}
        return shown | ({"labels": self.labels} if self.labels else {})


@dataclass(eq=False, kw_only=True)
class Request(Job):
    """A job with its tokens: features for a class, or ids and how to go on from them. return_tokens: answer with ids too."""

    features: dict[str, list[int]]
    sampling: Sampling | None = None
    return_tokens: bool = False

    @property
    def length(self) -> int:
        return len(self.features["input_ids"])


@dataclass
class Engine:
    """What is served. Make it with `load`; `close` ends its threads after what waits is done."""

    model: PeftModel
    tokenizer: Any
    source: str
    task: str
    served: dict[str, Served]
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.collate = Collator(self.tokenizer)
        self.longest = longest_input(self.model.config)
        ends = self.model.generation_config.eos_token_id if self.task == CAUSAL_LM else []
        self.end_ids = set(ends if isinstance(ends, list) else [ends]) - {None}
        self._tokenizing = threading.Lock()  # a fast tokenizer's settings are one for all threads
        self.model.eval()
        for served in self.served.values():
            served.alone = self._why_alone(served.name)
        limits = self.limits
        self.batcher = Batcher(
            self.run,
            self.group_of,
            max_batch=limits.max_batch,
            max_wait=limits.max_wait_ms / 1000,
            max_queue=limits.max_queue,
        )
        self.metrics = Metrics(lambda: self.batcher.depth)

    @classmethod
    def load(
        cls,
        model: str,
        adapters: dict[str, str | Path],
        limits: Limits | None = None,
        *,
        quantization: str | None = None,
        dtype: str = "auto",
        use_cpu: bool = False,
    ) -> "Engine":
        """The base model with all adapters, by the names that requests use.

        quantization: of the base; None: as the adapters were trained
        Raises:  FileNotFoundError, ValueError, NotImplementedError with a one-line reason
        """
        wrong = [name for name in adapters if name == BASE or not name or "." in name]
        if wrong:
            raise ValueError(f"serve: expected adapter names without dots that are not {BASE!r}, got {wrong}")
        source = model_source(model)
        infos = {name: adapter_info(folder, source) for name, folder in adapters.items()}
        has_head = any("SequenceClassification" in name for name in load_config(source).architectures or ())
        task = _only("task", {n: info.task for n, info in infos.items()}) or (CLASSIFICATION if has_head else CAUSAL_LM)
        classes = _only("number of classes", {name: len(info.labels) for name, info in infos.items()})
        options = _options(infos, quantization, dtype)
        tokenizer = load_tokenizer(source)
        device = "cpu" if use_cpu or not torch.cuda.is_available() else "cuda"
        own = list((load_config(source).id2label or {}).values()) if task == CLASSIFICATION else []
        labels = (
            own if has_head and classes in (None, len(own)) else next(iter(infos.values())).labels if infos else own
        )
        base = load_base(source, options, labels=labels if task == CLASSIFICATION else (), device=device)
        align_padding(base, tokenizer)
        peft = PeftModel(base)
        for name, folder in adapters.items():
            peft.load_adapter(folder, name)
        peft.to(device)
        served = {
            name: Served(
                name=name,
                folder=str(adapters[name]),
                method=peft.peft_config[name].peft_type,
                labels=info.labels,
                text_format=info.text_format,
                virtual_tokens=getattr(peft.peft_config[name], "num_virtual_tokens", 0) or 0,
            )
            for name, info in infos.items()
        }
        if task == CAUSAL_LM or (has_head and classes in (None, len(own))):  # a head made anew answers nothing
            served[BASE] = Served(name=BASE, folder=None, method=None, labels=own, text_format=TextFormat())
        return cls(peft, tokenizer, source, task, served, limits or Limits())

    # -- requests -------------------------------------------------------------------------------------------------------

    def generation(
        self, adapter: str, prompt: str | Sequence[dict[str, str]], sampling: Sampling, *, return_tokens: bool = False
    ) -> Request:
        """A request for text after a prompt, or after chat messages.

        Raises:  UnknownAdapter; ValueError for a prompt without tokens or too long, and a length over the limit
        """
        served = self._served(adapter)
        if sampling.max_new_tokens > self.limits.max_new_tokens:
            raise ValueError(
                f"max_new_tokens: expected at most {self.limits.max_new_tokens}, got {sampling.max_new_tokens}"
            )
        if not isinstance(prompt, str):
            prompt = check_messages(prompt, "messages")
            if not self.tokenizer.chat_template:
                raise ValueError("messages: the model's tokenizer has no chat template; give a prompt instead")
        with self._tokenizing:
            ids = encode_prompts([prompt], self.tokenizer, served.text_format)[0]
        self._check_length("prompt", len(ids), served, sampling.max_new_tokens)
        return Request(adapter=adapter, features={"input_ids": ids}, sampling=sampling, return_tokens=return_tokens)

    def classification(self, adapter: str, text: str, pair: str | None = None) -> Request:
        """A request for the class of a text or pair. Raises as `generation` does."""
        served = self._served(adapter)
        with self._tokenizing:
            features, _ = encode_texts([text], None if pair is None else [pair], self.tokenizer, 2**62)
        self._check_length("text", len(features["input_ids"][0]), served, 0)
        return Request(adapter=adapter, features={name: rows[0] for name, rows in features.items() if name != "length"})

    def submit(self, request: Request) -> None:
        """Let it wait for its batch. Raises QueueFull or Closed."""
        self.batcher.submit(request)

    def close(self) -> None:
        self.batcher.close()

    def _served(self, adapter: str) -> Served:
        if adapter not in self.served:
            raise UnknownAdapter(f"adapter: expected one of {sorted(self.served)}, got {adapter[:100]!r}")
        return self.served[adapter]

    def _check_length(self, what: str, tokens: int, served: Served, more: int) -> None:
        room = None if self.longest is None else self.longest - more - served.virtual_tokens
        most = min((most for most in (room, self.limits.max_length) if most is not None), default=None)
        if most is not None and tokens > most:
            less = f" (the model's {self.longest} less max_new_tokens={more})" if most == room and more else ""
            raise ValueError(f"{what}: expected at most {most} tokens{less}, got {tokens}")
        if not tokens:
            raise ValueError(f"{what}: expected at least one token, got none")

    # -- batches --------------------------------------------------------------------------------------------------------

    def group_of(self, request: Request) -> Hashable:
        """Requests of one group can share a batch: None for all that mix. Between a prompt's vectors and a text that is padded
        on its left there would be a gap, which positions see: only texts of one length go together."""
        served = self.served[request.adapter]
        if served.alone is None:
            return None
        padded = self.task == CAUSAL_LM and served.virtual_tokens
        return request.adapter, request.length if padded else None

    def run(self, requests: list[Request]) -> None:
        """Compute a batch and answer every request; called by the batcher's thread."""
        self.metrics.batch_size.observe(len(requests))
        self.metrics.tokens.labels("prompt").inc(sum(request.length for request in requests))
        for request in requests:
            self.metrics.rows.labels(request.adapter).inc()
        with torch.no_grad(), fast_float32_matmul(self.device), self._acting(requests) as names:
            (self._classify if self.task == CLASSIFICATION else self._write)(requests, names)

    @contextlib.contextmanager
    def _acting(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
        """Inside, the model takes this batch with the arguments that are yielded."""
        first = requests[0].adapter
        mixing = [name for name, served in self.served.items() if name != BASE and not served.alone]
        if self.served[first].alone:
            self._activate(first)
            yield {}
        elif mixing:  # one of these is active: it leaves the base as it is, and each row names its own
            self._activate(mixing[0])
            yield {"adapter_names": [request.adapter for request in requests]}
        elif self.model.peft_config:
            with self.model.disable_adapter():
                yield {}
        else:
            yield {}

    def _activate(self, name: str) -> None:
        if self.model.active_adapters != [name]:
            self.model.set_adapter(name, inference_mode=True)

    def _classify(self, requests: list[Request], names: dict[str, Any]) -> None:
        batch = self.collate([request.features for request in requests])
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        logits = self.model(**inputs, **names).logits.float().cpu().numpy()
        for request, row in zip(requests, class_probabilities(logits), strict=True):
            labels = self.served[request.adapter].labels
            probabilities = dict(zip(labels, row.tolist(), strict=True))
            label = labels[int(row.argmax())]
            request.answer({"label": label, "probability": float(row.max()), "probabilities": probabilities})

    def _write(self, requests: list[Request], names: dict[str, Any]) -> None:
        rows = [request.sampling for request in requests]
        batch = self.collate.left_padded([request.features["input_ids"] for request in requests])

        def finished(row: int, tokens: list[int], reason: str) -> None:
            self.metrics.tokens.labels("generated").inc(len(tokens))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            counts = {"prompt_tokens": requests[row].length, "generated_tokens": len(tokens)}
            drawn = {"seed": rows[row].seed} if rows[row].temperature else {}
            ids = {"tokens": tokens} if requests[row].return_tokens else {}
            requests[row].answer({"text": text, "finish_reason": reason, **counts, **drawn, **ids})

        lengths = [row.max_new_tokens for row in rows]
        ends = RowEnds(lengths, self.end_ids, lambda row: requests[row].abandoned, finished)
        self.model.generate(
            **{name: tensor.to(self.device) for name, tensor in batch.items()},
            **names,
            max_new_tokens=max(lengths),
            do_sample=False,
            pad_token_id=self.collate.fill["input_ids"],
            logits_processor=[RowSampler(rows)],
            stopping_criteria=[ends],
        )

    def _why_alone(self, name: str) -> str | None:
        """Why rows of this adapter cannot be mixed with others: what the model says to one token with its name."""
        if name == BASE:
            return None
        self._activate(name)
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        try:
            with torch.no_grad():
                self.model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[name])
        except NotImplementedError as error:
            return str(error)
        return None


def _only(what: str, values: dict[str, Any]) -> Any:
    """The one value that all adapters have, or None if there are no adapters."""
    if len(set(values.values())) > 1:
        raise ValueError(f"serve: expected adapters of one {what}, got {values}; serve them by one server each")
    return next(iter(values.values()), None)


def _options(infos: dict[str, Any], quantization: str | None, dtype: str) -> BaseOptions:
    """How the base is held: as is asked for, else as the adapters were trained."""
    if quantization is not None:
        return BaseOptions(quantization=quantization, dtype=dtype)
    trained = {name: BaseOptions.as_trained(info.config, dtype) for name, info in infos.items()}
    if len(set(trained.values())) > 1:
        kinds = {name: options.quantization for name, options in trained.items()}
        raise ValueError(f"serve: expected adapters of one kind of base, got {kinds}; choose one with --quantization")
    return next(iter(trained.values()), BaseOptions(dtype=dtype))
