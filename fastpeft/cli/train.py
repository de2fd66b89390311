"""fastpeft train."""

from typing import TextIO

from fastpeft.training.config import TrainConfig

CONFIG = TrainConfig


def run(config: TrainConfig, results: TextIO) -> dict:
    """Train, and return the metrics and costs."""
    from fastpeft.training.engine import train  # transformers and datasets take seconds to import; --help needs neither
    from fastpeft.training.processes import Processes

    summary = train(config).summary()
    Processes.of_environment().leave()
    return summary
