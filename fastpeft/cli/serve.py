"""fastpeft serve."""

import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TextIO

SHUTDOWN_SECONDS = 30
"""How long requests that are being answered hold up the end of the server."""


@dataclass(kw_only=True)
class ServeConfig:
    """Serve many adapters on one base model over HTTP: POST /generate or /classify, GET /adapters, /health and /metrics.

    Requests for different adapters are computed in one batch. There is no authentication: it listens on this machine alone
    unless --host says otherwise."""

    model: str
    """The base model: a folder, or a name on the Hugging Face hub."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER of every adapter; a request names its adapter, or __base__ for none."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_batch: int = 16
    """Most requests of a batch."""
    max_wait_ms: float = 5.0
    """How long a batch waits for more requests."""
    max_length: int | None = None
    """Most tokens of a prompt or text; default: what the model has positions for."""
    max_new_tokens: int = 256
    """Most tokens a request may ask for."""
    max_queue: int = 256
    """Most requests that wait; more are answered with 429."""
    max_body_kb: int = 1024
    """Largest body of a request, in units of 1024 bytes."""
    quantization: Literal["none", "nf4", "fp4", "int8"] | None = None
    """How the base's weights are held; default: as the adapters were trained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base model's weights; auto: as saved."""
    use_cpu: bool = False
    """Stay on the CPU even if there is a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536 or self.max_body_kb < 1:
            raise ValueError(
                f"serve: expected a port of 0 to 65535 and max_body_kb of at least 1, got {self.port}, {self.max_body_kb}"
            )
        named = [text.partition("=") for text in self.adapter]
        wrong = [text for text, (name, _, folder) in zip(self.adapter, named, strict=True) if not (name and folder)]
        names = [name for name, _, _ in named]
        if wrong or len(set(names)) < len(names):
            raise ValueError(f"--adapter: expected NAME=FOLDER with different names, got {list(self.adapter)}")

    def folders(self) -> dict[str, str]:
        return {name: folder for name, _, folder in (text.partition("=") for text in self.adapter)}


CONFIG = ServeConfig


def run(config: ServeConfig, results: TextIO) -> dict:
    """Serve until the process is told to end (SIGINT, SIGTERM), and return what was answered."""
    import uvicorn

    from fastpeft.serving.app import make_app
    from fastpeft.serving.engine import Engine, Limits
    from fastpeft.training.measure import Stopwatch

    names = ("max_batch", "max_wait_ms", "max_length", "max_new_tokens", "max_queue")
    limits = Limits(**{name: getattr(config, name) for name in names})
    options = {name: getattr(config, name) for name in ("quantization", "dtype", "use_cpu")}
    with _listener(config.host, config.port) as listener:
        engine = Engine.load(config.model, config.folders(), limits, **options)
        address, port = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            print(f"warning: {address} is not this machine alone, and there is no authentication", file=sys.stderr)
        app = make_app(engine, max_body=config.max_body_kb * 1024)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
        )
        shown = f"[{address}]" if ":" in address else address
        print(f"serving {sorted(engine.served)} on http://{shown}:{port}; Ctrl+C ends it", file=sys.stderr, flush=True)
        clock = Stopwatch()
        with _signals_end_quietly():
            server.run(sockets=[listener])
    counted = engine.metrics.requests.collect()[0].samples
    codes: dict[str, int] = {}
    for sample in counted:
        if sample.name.endswith("_total"):
            codes[sample.labels["code"]] = codes.get(sample.labels["code"], 0) + int(sample.value)
    return {
        "model": config.model,
        "served": sorted(engine.served),
        "address": f"{address}:{port}",
        "answers": codes,
        "seconds": round(clock.seconds(), 3),
    }


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket; before the model is read, so that a port in use is found at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise OSError(
            f"serve: cannot listen on {host}:{port}: {error.strerror or error}; choose --host, --port"
        ) from error
    return listener


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn ends gracefully at SIGINT and SIGTERM and then raises them again for whoever handled them before: nobody here."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
