"""From a study's spaces to variants: all of the grid, a part of it by chance, or one after the other as optuna suggests."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastpeft.training.studies.spec import MethodSpace, Range, StudySpec

_SHORT = {"learning_rate": "lr", "target_modules": "on", "lora_alpha": "alpha", "num_train_epochs": "epochs"}


@dataclass(frozen=True)
class Variant:
    """What is compared: a method with its options, without the seed."""

    label: str
    method: str
    options: dict[str, Any]

    def key(self) -> str:
        """The content, whatever the label."""
        return json.dumps([self.method, self.options], sort_keys=True, default=str)


def variants(spec: StudySpec) -> list[Variant]:
    """The variants of a grid or a random search, in order; those that come out the same are one.

    Raises:  ValueError where two have one label
    """
    picked = _all(spec) if spec.search.kind == "grid" else _drawn(spec)
    found = _distinct(_variant(spec, space, values) for space, values in picked)
    return found[: spec.search.trials] if spec.search.kind == "random" else found


def corners(spec: StudySpec) -> list[Variant]:
    """A variant for every value there is, one option at a time: what can be checked of a search that has not begun."""
    found = []
    for space in spec.methods:
        first = {name: axis.low if isinstance(axis, Range) else axis[0] for name, axis in space.axes.items()}
        found.append(_variant(spec, space, first))
        for name, axis in space.axes.items():
            for value in (axis.low, axis.high) if isinstance(axis, Range) else axis:
                found.append(_variant(spec, space, first | {name: value}))
    return list({variant.key(): variant for variant in found}.values())


def suggested(spec: StudySpec, score: Callable[[Variant], float], higher_is_better: bool) -> list[Variant]:
    """The variants that optuna's TPE asked for, each after the scores of those before it.

    The sampler starts from the search's seed, so a study that is started again asks for the same variants, whose runs are there.
    Raises:  ValueError where optuna is missing
    """
    optuna = require_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize" if higher_is_better else "minimize",
        sampler=optuna.samplers.TPESampler(seed=spec.search.seed),
    )
    names = [f"{index} {space.name}" for index, space in enumerate(spec.methods)]
    asked: list[Variant] = []
    for _ in range(spec.search.trials):
        trial = study.ask()
        chosen = names.index(trial.suggest_categorical("method", names))
        space = spec.methods[chosen]
        values = {name: _suggest(trial, f"{names[chosen]} {name}", axis) for name, axis in space.axes.items()}
        variant = _variant(spec, space, values)
        found = score(variant)
        asked.append(variant)
        if math.isfinite(found):
            study.tell(trial, found)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return _distinct(asked)


def require_optuna() -> Any:
    """The package, or a ValueError that says how to get it."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("search: optuna is not installed; pip install 'fastpeft[study]'") from error
    return optuna


def _suggest(trial: Any, name: str, axis: list[Any] | Range) -> Any:
    if isinstance(axis, Range):
        kind = trial.suggest_int if axis.whole else trial.suggest_float
        return kind(name, axis.low, axis.high, log=axis.log)
    texts = [json.dumps(value) for value in axis]  # optuna's categories are plain values, ours may be lists
    return json.loads(trial.suggest_categorical(name, texts))


def _all(spec: StudySpec) -> Iterator[tuple[MethodSpace, dict[str, Any]]]:
    for space in spec.methods:
        for values in itertools.product(*space.axes.values()):
            yield space, dict(zip(space.axes, values))


def _drawn(spec: StudySpec) -> Iterator[tuple[MethodSpace, dict[str, Any]]]:
    """Draws, a method first; all of the grid in a drawn order where there are only lists."""
    draw = random.Random(spec.search.seed)
    if not any(isinstance(axis, Range) for space in spec.methods for axis in space.axes.values()):
        everything = list(_all(spec))
        draw.shuffle(everything)
        yield from everything
        return
    for _ in range(20 * spec.search.trials):  # some come twice
        space = draw.choice(spec.methods)
        yield space, {name: _draw(draw, axis) for name, axis in space.axes.items()}


def _draw(draw: random.Random, axis: list[Any] | Range) -> Any:
    if not isinstance(axis, Range):
        return draw.choice(axis)
    low, high = (math.log(axis.low), math.log(axis.high)) if axis.log else (axis.low, axis.high)
    value = draw.uniform(low, high)
    value = math.exp(value) if axis.log else value
    return min(max(round(value), axis.low), axis.high) if axis.whole else float(f"{value:.3g}")


def _variant(spec: StudySpec, space: MethodSpace, values: Mapping[str, Any]) -> Variant:
    """With a label of the entry's name and the options that vary within the entries of that name."""
    alike = [other for other in spec.methods if other.name == space.name]
    options = {**space.fixed, **values}
    shown = [name for name, axis in space.axes.items() if isinstance(axis, Range) or len(axis) > 1]
    names = dict.fromkeys(name for other in alike for name in (*other.fixed, *other.axes))
    everywhere = [other.fixed | dict.fromkeys(other.axes) for other in alike]
    shown += [n for n in names if n not in shown and len({json.dumps(e.get(n), default=str) for e in everywhere}) > 1]
    parts = [f"{_SHORT.get(name, name)} {_text(options[name])}" for name in shown if name in options]
    return Variant(" · ".join([space.name, *parts]), space.method, options)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _distinct(found: Iterator[Variant] | list[Variant]) -> list[Variant]:
    distinct: dict[str, Variant] = {}
    for variant in found:
        distinct.setdefault(variant.key(), variant)
    labels: dict[str, Variant] = {}
    for variant in distinct.values():
        if variant.label in labels:
            raise ValueError(f"methods: two entries are both called {variant.label!r}; give one a name")
        labels[variant.label] = variant
    return list(distinct.values())
