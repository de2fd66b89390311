"""study.yaml: what is compared, on what. Read and checked whole before anything runs."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.methods.by_name import check_fields, near_matches

SEARCHES = ("grid", "random", "optuna")
FIXED = ("model", "data", "output_dir", "peft", "overwrite", "resume", "save_predictions", "title", "task", "labels")
"""Options of a run that the study sets itself."""
ONE_FOR_ALL = (
    "validation_data", "test_data", "validation_fraction", "max_eval_rows", "text_column", "text_pair_column", "label_column",
    "prompt_column", "response_column", "messages_column",
)  # fmt: skip
"""Options that decide which rows are held out: one value for all runs, in `base`."""


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, for a search that draws; log: evenly in the logarithm."""

    low: float
    high: float
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class MethodSpace:
    """One entry of `methods`: what is fixed, and over what it varies."""

    name: str
    method: str
    fixed: dict[str, Any]
    axes: dict[str, list[Any] | Range]


@dataclass(frozen=True)
class Search:
    """How variants are chosen from the grid: all of it, or `trials` of them by chance or by optuna."""

    kind: str = "grid"
    trials: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SEARCHES:
            raise ValueError(f"search: expected kind, one of {list(SEARCHES)}, got {self.kind!r}")
        if not isinstance(self.trials, int) or self.trials < 1:
            raise ValueError(f"search: expected trials of at least 1, got {self.trials!r}")


@dataclass(frozen=True)
class Sureness:
    """The statistics' options. interval: "bca" or "percentile"."""

    confidence: float = 0.95
    resamples: int = 2000
    interval: str = "bca"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.interval not in ("bca", "percentile") or not 0 < self.confidence < 1 or self.resamples < 100:
            raise ValueError(
                "statistics: expected interval bca or percentile, 0 < confidence < 1 and resamples of at least 100, got "
                f"{self.interval!r}, {self.confidence!r}, {self.resamples!r}"
            )


@dataclass(frozen=True)
class StudySpec:
    """A study as it was written, checked by name and type. data is a path, or rows in memory by split."""

    model: str
    data: Any
    output_dir: str
    methods: list[MethodSpace]
    seeds: list[int]
    task: str | None = None
    labels: tuple[str, ...] = ()
    base: dict[str, Any] = field(default_factory=dict)
    search: Search = field(default_factory=Search)
    statistics: Sureness = field(default_factory=Sureness)
    metric: str | None = None
    title: str | None = None

    def data_name(self) -> str:
        """The data's path, or what there is in memory."""
        if isinstance(self.data, (str, os.PathLike)):
            return os.fspath(self.data)
        return f"{sum(map(len, self.data.values()))} rows in memory"


_SECTIONS = (
    "model", "data", "task", "labels", "output_dir", "title", "metric", "base", "methods", "grid", "search", "statistics",
)  # fmt: skip


def read_study(source: str | os.PathLike | Mapping[str, Any], output_dir: str | os.PathLike | None = None) -> StudySpec:
    """The study in a .yaml or .json file, or in a mapping of the same form.

    Raises:  OSError for a file that is not there; ValueError or TypeError naming the section, what is known there and what came
    """
    values = dict(source) if isinstance(source, Mapping) else _read_file(Path(source))
    check_fields("study", values, _SECTIONS)
    missing = [name for name in ("model", "data") if not values.get(name)]
    if missing:
        raise ValueError(f"study: expected {missing}, got only {sorted(values)}")
    base, grid = _mapping(values, "base"), _mapping(values, "grid")
    methods = _methods(values.get("methods"), grid)
    seeds = _seeds(base, grid)
    data = values["data"]
    if isinstance(data, (str, os.PathLike)):
        data = str(Path(data).expanduser())
    else:
        from fastpeft.training.finetune import as_splits

        data = as_splits(data)
    search = _section(Search, _mapping(values, "search"), "search")
    spaces = [_space(entry, base, grid) for entry in methods]
    _check_shared(base, grid, spaces, methods)
    if search.kind == "grid":
        ranges = sorted({name for space in spaces for name, axis in space.axes.items() if isinstance(axis, Range)})
        if ranges:
            raise ValueError(
                f"grid: expected lists for a grid search, got ranges for {ranges}; search by random or optuna"
            )
    return StudySpec(
        model=os.fspath(values["model"]),
        data=data,
        output_dir=os.fspath(output_dir or values.get("output_dir") or "study-out"),
        methods=spaces,
        seeds=seeds,
        task=values.get("task"),
        labels=tuple(values.get("labels") or ()),
        base=base,
        search=search,
        statistics=_section(Sureness, _mapping(values, "statistics"), "statistics"),
        metric=values.get("metric"),
        title=values.get("title"),
    )


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"study: expected a .yaml or .json file, got {path}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"study {path}: expected JSON, got {error}") from error
    else:
        values = _from_yaml(text, path)
    if not isinstance(values, dict):
        raise ValueError(f"study {path}: expected a mapping with {list(_SECTIONS)}, got {type(values).__name__}")
    return values


def _from_yaml(text: str, path: Path) -> Any:
    import yaml  # comes with transformers

    class Loader(yaml.SafeLoader):
        """YAML 1.1 reads 5e-3 as text; here it is the number that it looks like."""

    Loader.yaml_implicit_resolvers = {key: list(rows) for key, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    number = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"study {path}: expected YAML, got {' '.join(str(error).split())}") from error


def _mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, Mapping):
        raise TypeError(f"{name}: expected a mapping, got {type(found).__name__}")
    return dict(found)


def _section(kind: type, values: dict[str, Any], name: str) -> Any:
    check_fields(name, values, [item.name for item in dataclasses.fields(kind)])
    return kind(**values)


def _methods(methods: Any, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of `methods`, or of grid's `method`."""
    names = grid.pop("method", None)
    if (methods is None) == (names is None):
        both = "both" if names else "neither"
        raise ValueError(f"study: expected the methods either under methods or as method of the grid, got {both}")
    entries = names if methods is None else methods
    if not isinstance(entries, list) or not entries:
        raise TypeError(f"methods: expected a list of names or mappings, got {entries!r}")
    found = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"method": entry}
        if not isinstance(entry, Mapping) or not isinstance(entry.get("method"), str):
            raise TypeError(f"methods: expected a name, or a mapping with method, got {entry!r}")
        found.append(dict(entry))
    return found


def _seeds(base: dict[str, Any], grid: dict[str, Any]) -> list[int]:
    found = grid.pop("seed", None)
    alone = base.pop("seed", None)
    if found is not None and alone is not None:
        raise ValueError("seed: expected it either in base or in the grid, got both")
    seeds = found if found is not None else [0 if alone is None else alone]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seed: expected a list of whole numbers of at least 0, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seed: expected different seeds, got {seeds}")
    return seeds


def _space(entry: dict[str, Any], base: dict[str, Any], grid: dict[str, Any]) -> MethodSpace:
    """What one method is trained with: base, over it the method's presets and the entry, and the grids' options that it has."""
    method = entry.pop("method")
    name = str(entry.pop("name", method))
    own = entry.pop("grid", None) or {}
    if not isinstance(own, Mapping):
        raise TypeError(f"methods, {name}: expected a mapping under grid, got {own!r}")
    known = _options_of(method)
    where = f"methods, {name}"
    check_fields(where, [*entry, *own], known)
    fixed = {key: value for key, value in base.items() if key in known} | entry
    axes = {key: value for key, value in grid.items() if key in known and key not in entry} | dict(own)
    for key in axes:
        fixed.pop(key, None)
    return MethodSpace(name, method, fixed, {key: _axis(key, value) for key, value in axes.items()})


def _options_of(method: str) -> set[str]:
    """The options of a run and of a method, less those that the study sets."""
    from fastpeft.methods.by_name import named_method
    from fastpeft.training.config import TrainConfig

    names = {
        item.name for kind in (TrainConfig, named_method(method).config_class) for item in dataclasses.fields(kind)
    }
    return names - {*FIXED, "seed"}


def _axis(name: str, value: Any) -> list[Any] | Range:
    if isinstance(value, Mapping):
        found = _section(Range, dict(value), f"grid, {name}")
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (found.low, found.high))
        if not numbers or found.low >= found.high or (found.log and found.low <= 0):
            raise ValueError(f"grid, {name}: expected numbers low < high, above 0 with log, got {value}")
        return found
    if not isinstance(value, list) or not value:
        raise TypeError(f"grid, {name}: expected a list of values, or low and high, got {value!r}")
    return list(value)


def _check_shared(
    base: Mapping[str, Any], grid: Mapping[str, Any], spaces: list[MethodSpace], entries: list[dict[str, Any]]
) -> None:
    """Every option of base and grid is known to some method, and the held-out rows are the same for all."""
    known = set().union(*(_options_of(space.method) for space in spaces))
    for section, names in (("base", base), ("grid", grid)):
        set_here = sorted(set(names) & set(FIXED))
        if set_here:
            raise ValueError(
                f"{section}: the study sets {set_here} itself, or has a place for it at the top; take it out"
            )
        unknown = [name for name in names if name not in known]
        if unknown:
            hint = near_matches(unknown, known) or f"; there are {sorted(known)}"
            raise ValueError(f"{section}: expected options of a run or of one of the methods, got {unknown}{hint}")
    varied = {name for space in spaces for name in space.axes} | {name for entry in entries for name in entry}
    rows = sorted(varied & set(ONE_FOR_ALL))
    if rows:
        raise ValueError(f"study: {rows} decide which rows are held out, which all runs share; set them in base")
