"""Peak memory at any batch size and length: of the model's layers a few are run, as far as the law that this rests on holds.

Layers are alike, so what lives at one point of a step is affine in their number, and the peak of a part of a step is the largest
of several such lines. It is measured with 2, 3 and 4 layers. A part whose bytes of every kind lie on a line there, with the same
operator at its peak, goes on along that line; a part that does not, but cannot reach the others by its steepest rise, is left
out. Otherwise all layers are run.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from fastpeft.training.live_memory import Peak
from fastpeft.training.plan_config import PlanConfig
from fastpeft.training.plan_sharded import shared_out, whole
from fastpeft.training.planned_step import FakeModel, StepPeaks

POINTS = (2, 3, 4)
FEW_LAYERS = 6  # up to here all are run


@dataclass(frozen=True)
class Estimate:
    """The peak of a step. layers_run: how many layers were run to find it, of `layers`; step: one that was run"""

    peak: Peak
    layers_run: tuple[int, ...]
    layers: int | None
    step: StepPeaks


class Estimator:
    """Peaks of a model's training step; every (batch size, length) is computed once."""

    def __init__(self, options: PlanConfig, config: PreTrainedConfig):
        self.options, self.config = options, config
        self.layers: int | None = getattr(config, "num_hidden_layers", None)
        self.runs = 0
        self._by_layers = not options.every_layer and _layers_are_alike(options, config)
        self._models: dict[int | None, FakeModel] = {}
        self.at = functools.cache(self._at)

    def _at(self, batch_size: int, seq_len: int) -> Estimate:
        if self._by_layers:
            steps = [self._step(count, batch_size, seq_len) for count in POINTS]
            peak = extrapolated(steps, POINTS, self.layers)
            if peak is not None:
                return Estimate(peak, POINTS, self.layers, self._whole(steps))
        step = self._step(None, batch_size, seq_len)
        return Estimate(whole(step.peak), () if self.layers is None else (self.layers,), self.layers, step)

    def _step(self, layers: int | None, batch_size: int, seq_len: int) -> StepPeaks:
        if layers not in self._models:
            self._models[layers] = FakeModel(self.options, self.config, layers)
        self.runs += 1
        fake = self._models[layers]
        return shared_out(fake.step(batch_size, seq_len), fake.model, self.options)

    def _whole(self, steps: Sequence[StepPeaks]) -> StepPeaks:
        """The last of the steps, with the numbers of parameters of the whole model."""
        rest = self.layers - POINTS[-1]
        trainable, total = (
            getattr(steps[-1], name) + rest * (getattr(steps[-1], name) - getattr(steps[-2], name))
            for name in ("trainable", "total")
        )
        return replace(steps[-1], trainable=trainable, total=total)


def _layers_are_alike(options: PlanConfig, config: PreTrainedConfig) -> bool:
    count = getattr(config, "num_hidden_layers", None)
    if count is None or count <= FEW_LAYERS or config.is_encoder_decoder or config.get_text_config() is not config:
        return False
    chosen = ("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
    picked = any(getattr(options.peft, name, None) for name in chosen)
    return not picked and len(set(getattr(config, "layer_types", None) or ["same"])) == 1


def extrapolated(steps: Sequence[StepPeaks], points: Sequence[int], layers: int) -> Peak | None:
    """The peak with `layers` layers, from three steps with equally many more layers each; None where it is no line."""
    first, second, third = points
    if second - first != third - second:
        raise ValueError(f"extrapolated: expected equally spaced points, got {points}")
    ahead = (layers - third) / (third - second)
    lines, bounds = [], []
    for parts in zip(*(step.parts for step in steps), strict=True):
        line = _line(parts, ahead)
        if line is None:
            sizes = [part.nbytes for part in parts]
            bounds.append(sizes[2] + ahead * max(sizes[1] - sizes[0], sizes[2] - sizes[1], 0))
        else:
            lines.append(line)
    best = max(lines, key=lambda peak: peak.nbytes, default=None)
    return best if best is not None and best.nbytes >= max(bounds, default=0) else None


def _line(parts: Sequence[Peak], ahead: float) -> Peak | None:
    """The third of three peaks, `ahead` steps further; None where some kind of bytes does not lie on a line."""
    kinds = list(dict.fromkeys(kind for part in parts for kind in part.parts))
    ahead_parts = {}
    for kind in kinds:
        low, middle, high = (part.parts.get(kind, 0) for part in parts)
        if high - middle != middle - low:
            return None
        ahead_parts[kind] = round(high + ahead * (high - middle))
    if len({part.where for part in parts}) > 1 or min(ahead_parts.values()) < 0:
        return None
    return Peak(sum(ahead_parts.values()), ahead_parts, parts[-1].where)


# -- the largest that fits --------------------------------------------------------------------------------------------


def largest(fits: Callable[[int], int], start: int, limit: int) -> int:
    """The largest n of start..limit with fits(n) <= 0, where fits grows with n, almost along a line; 0 if start is too much.

    Each evaluation is placed where the line through the last two crosses zero, first outwards, then between the ends: there
    every third one halves what is left.
    """
    low, at_low = start, fits(start)
    if at_low > 0:
        return 0
    if start >= limit:
        return start
    high, step = min(start + 1, limit), 1
    while True:
        at_high = fits(high)
        if at_high > 0:
            break
        if high == limit:
            return limit
        slope = (at_high - at_low) / (high - low)
        step *= 2
        low, at_low = high, at_high
        high = min(limit, high + max(step, int(-at_high / slope) + 1 if slope > 0 else limit))
    turn = 0
    while high - low > 1:
        turn += 1
        between = (low + high) // 2 if turn % 3 == 0 else low + int((high - low) * -at_low / (at_high - at_low))
        middle = min(max(between, low + 1), high - 1)
        at_middle = fits(middle)
        if at_middle > 0:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return low
