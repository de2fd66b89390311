"""fastpeft study."""

from dataclasses import dataclass
from typing import Annotated, TextIO

import tyro


@dataclass(kw_only=True)
class StudyConfig:
    """Compare methods, options and seeds on one data set, with statistics. Started again, it goes on where it was stopped."""

    study: Annotated[str, tyro.conf.Positional]
    """The study: a .yaml or .json file with model, data, methods, grid."""
    output_dir: str | None = None
    """Folder for runs/, results.csv, summary.json, report.html and best/; default: the file's, else study-out."""
    jobs: int = 1
    """Runs that are trained at once, each in a process of its own."""
    check: bool = False
    """Check everything and list the variants, and train nothing."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"study: expected jobs of at least 1, got {self.jobs}")


CONFIG = StudyConfig


def run(config: StudyConfig, results: TextIO) -> dict:
    """Conduct the study, and return how many runs there were and which is best."""
    from fastpeft.training.studies.conduct import study

    done = study(config.study, config.output_dir, jobs=config.jobs, check_only=config.check)
    return {"checked": config.study} if done is None else done.to_dict()
