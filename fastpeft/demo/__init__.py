"""Two real fine-tuning runs that need no account, no GPU and no data of one's own: `fastpeft demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fastpeft.training.record import RunRecord

TASKS = ("classify", "generate")


@dataclass(kw_only=True)
class DemoConfig:
    """Fine-tune a small pretrained model with LoRA on real data, and show what it learned."""

    task: Literal["classify", "generate"] = "classify"
    """classify: MiniLM (22.7 M) learns the sentiment of movie reviews; generate: SmolLM2-135M learns to write docstrings
    from the Python packages installed here."""
    output_dir: str | None = None
    """Folder for the adapter, run.json and report.html; default: fastpeft-demo-classify or fastpeft-demo-generate."""
    overwrite: bool = False
    """Replace an earlier run in output_dir."""
    epochs: float | None = None
    """Passes over the training rows; default: what the demo needs."""
    max_steps: int | None = None
    """Optimizer steps, instead of epochs."""
    seed: int = 0
    """Seed of the adapter's initial values, the order of rows and dropout."""
    cache_dir: str | None = None
    """Folder for the downloaded weights and texts; default: the user's cache folder."""
    report: bool = True
    """Write report.html."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"demo: expected task in {TASKS}, got {self.task!r}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"demo: expected epochs > 0, got {self.epochs}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"demo: expected max_steps of at least 1, got {self.max_steps}")
        if self.seed < 0:
            raise ValueError(f"demo: expected seed of at least 0, got {self.seed}")

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return Path(self.output_dir or f"fastpeft-demo-{self.task}")

    @property
    def cache(self) -> Path:
        """Where downloads are kept."""
        from fastpeft.demo.assets import default_cache_dir

        return Path(self.cache_dir).expanduser() if self.cache_dir else default_cache_dir()


def run_demo(config: DemoConfig) -> "RunRecord":
    """Run the demo `config.task` and return its record; tables and progress are printed on the way.

    Raises:  ConnectionError if the assets cannot be fetched, OSError or ValueError with a one-line reason for bad input
    """
    if config.task == "classify":
        from fastpeft.demo.sentiment import classify_demo

        return classify_demo(config)
    from fastpeft.demo.generate import generate_demo

    return generate_demo(config)


__all__ = ["TASKS", "DemoConfig", "run_demo"]
