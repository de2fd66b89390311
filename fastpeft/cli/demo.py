"""fastpeft demo."""

from typing import TextIO

from fastpeft.demo import DemoConfig, run_demo

CONFIG = DemoConfig


def run(config: DemoConfig, results: TextIO) -> dict:
    """Run the demo, and return the metrics and costs."""
    return run_demo(config).summary()
