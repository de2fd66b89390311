"""What the server counts, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server. A label's values are paths and adapters that exist, so that no client can make more."""

    def __init__(self, depth: Callable[[], int]):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("fastpeft_requests", "Answered requests", ("path", "code"), **own)
        self.errors = Counter("fastpeft_errors", "Answers with a code of 400 or more", ("path", "code"), **own)
        self.seconds = Histogram(
            "fastpeft_request_seconds", "Time to the answer", ("path",), buckets=SECONDS, unit="seconds", **own
        )
        self.rows = Counter("fastpeft_rows", "Rows that the model computed", ("adapter",), **own)
        self.tokens = Counter("fastpeft_tokens", "Tokens, of prompts and generated", ("kind",), **own)
        self.batch_size = Histogram("fastpeft_batch_size", "Rows of a batch", buckets=ROWS, **own)
        self.abandoned = Counter("fastpeft_abandoned", "Requests whose client hung up before the answer", **own)
        Gauge("fastpeft_queue_depth", "Requests that wait for a batch", **own).set_function(depth)

    def answered(self, path: str, code: int, seconds: float) -> None:
        self.requests.labels(path, str(code)).inc()
        if code >= 400:
            self.errors.labels(path, str(code)).inc()
        self.seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
