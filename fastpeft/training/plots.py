"""The report's charts as inline SVG: no plotting library, no script, colours from the page's CSS variables.

Every function returns markup whose text is escaped. Colours are the classes `before`, `after` and `second`, and
`series v0` to `series v7` of many (see report_style), so a chart follows the reader's light or dark theme.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 18, 14, 44
_MAX_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One curve. `colour` is a CSS class; `faint` draws it thin behind the others; `marked` puts dots on its points."""

    name: str
    points: Sequence[Point]
    colour: str = "after"
    faint: bool = False
    marked: bool = False


def smooth(points: Sequence[Point], window: int = 7) -> list[Point]:
    """Centred moving mean over up to `window` ordinates; near the ends the window shrinks and stays centred."""
    result = []
    for i, (x, _) in enumerate(points):
        reach = min(window // 2, i, len(points) - 1 - i)
        near = points[i - reach : i + reach + 1]
        result.append((x, sum(y for _, y in near) / len(near)))
    return result


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_format: Callable[[float], str] | None = None,
    height: int = 270,
    zero: bool = False,
) -> str:
    """Curves over a common abscissa that starts at 0, with a legend where there is more than one; "" without points.

    zero starts the ordinate at 0 too; otherwise it spans the data, to round values.
    """
    drawn = [Series(s.name, _finite(s.points), s.colour, s.faint, s.marked) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    x_range = (min(0.0, *xs), max(1.0, *xs))
    y_ticks = _ticks(0.0 if zero else min(ys), max(ys), 5 if height > 220 else 3)
    frame = _Frame(x_range, (y_ticks[0], y_ticks[-1]), height)
    body = [frame.grid(_inner_ticks(*x_range, 6), y_ticks, y_format or _number, x_label)]
    body += [_curve(frame, s) for s in sorted(drawn, key=lambda s: not s.faint)]
    return _figure(title, body, height, [s for s in drawn if not s.faint] if len(drawn) > 1 else [])


def roc_chart(curves: Sequence[tuple[str, str, dict]], *, title: str) -> str:
    """Receiver operating characteristics: (name, CSS class, {"fpr", "tpr", "auc"}) each, over the chance diagonal."""
    height = 350
    frame = _Frame((0.0, 1.0), (0.0, 1.0), height)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    body = [frame.grid(ticks, ticks, lambda v: f"{v:g}", "false positive rate", y_label="true positive rate")]
    body.append(f'<path class="chance" d="{frame.path([(0.0, 0.0), (1.0, 1.0)])}"/>')
    series = []
    for name, colour, roc in curves:
        points = _finite(zip(roc["fpr"], roc["tpr"]))
        if colour == "after" and points:
            body.append(f'<path class="area" d="{frame.path([(0.0, 0.0), *points, (1.0, 0.0)])}Z"/>')
        series.append(Series(f"{name}, AUC {roc['auc']:.3f}", points, colour))
    body += [_curve(frame, s) for s in series]
    return _figure(title, body, height, series)


def unit_chart(series: Sequence[Series], *, title: str, x_label: str, y_label: str, diagonal: bool = False) -> str:
    """Curves whose abscissa and ordinate are shares, 0..1, over a dotted diagonal if it says something; "" without points."""
    drawn = [Series(s.name, _finite(s.points), s.colour, s.faint, s.marked) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    height = 350
    frame = _Frame((0.0, 1.0), (0.0, 1.0), height)
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    body = [frame.grid(ticks, ticks, lambda v: f"{v:g}", x_label, y_label=y_label)]
    body += [f'<path class="chance" d="{frame.path([(0.0, 0.0), (1.0, 1.0)])}"/>'] if diagonal else []
    body += [_curve(frame, s) for s in drawn]
    return _figure(title, body, height, drawn)


@dataclass(frozen=True)
class Bar:
    """One bar, from 0 to a value of at least 0, with what stands at its end."""

    name: str
    value: float
    shown: str
    colour: str = "after"


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars under their names; "" without one that is finite."""
    bars = [bar for bar in bars if math.isfinite(bar.value)]
    if not bars:
        return ""
    longest = max(bar.value for bar in bars) or 1.0
    pitch, end = 46, 110
    body = []
    for i, bar in enumerate(bars):
        y, width = i * pitch, max(2.0, bar.value / longest * (_WIDTH - end))
        body.append(f'<text class="label" x="0" y="{y + 14}">{escape(bar.name)}</text>')
        body.append(f'<rect class="bar {bar.colour}" x="0" y="{y + 21}" width="{width:.1f}" height="12" rx="3"/>')
        body.append(f'<text x="{width + 8:.1f}" y="{y + 31}">{escape(bar.shown)}</text>')
    return _figure(title, body, len(bars) * pitch, [])


@dataclass(frozen=True)
class Measured:
    """A point with the interval of its ordinate."""

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: str = "after"


def scatter_chart(points: Sequence[Measured], *, title: str, x_label: str, x_format: Callable[[float], str]) -> str:
    """Points with intervals over a logarithmic abscissa, with 2 and 5 between few powers of ten; "" without a finite one."""
    points = [p for p in points if p.x > 0 and all(map(math.isfinite, (p.x, p.y)))]
    if not points:
        return ""
    height = 350
    logs = [math.log10(p.x) for p in points]
    x_range = (math.floor(min(logs) - 0.05), math.ceil(max(logs) + 0.05))
    ends = [v for p in points for v in (p.low, p.y, p.high) if math.isfinite(v)]
    y_ticks = _ticks(min(ends), max(ends), 5)
    frame = _Frame(x_range, (y_ticks[0], y_ticks[-1]), height)
    powers = range(x_range[0], x_range[1] + 1)
    between = (1, 2, 5) if len(powers) <= 3 else (1,)
    x_ticks = [power + math.log10(digit) for power in powers for digit in between]
    x_ticks = [tick for tick in x_ticks if tick <= x_range[1]]
    body = [frame.grid(x_ticks, y_ticks, _number, x_label, x_format=lambda v: x_format(10.0**v))]
    for p, log in zip(points, logs):
        x = frame.x(log)
        if math.isfinite(p.low) and math.isfinite(p.high):
            body.append(f'<path class="curve {p.colour}" d="M{x:.1f} {frame.y(p.low):.1f}V{frame.y(p.high):.1f}"/>')
        body.append(f'<g class="dots {p.colour}"><circle cx="{x:.1f}" cy="{frame.y(p.y):.1f}" r="5.5"/></g>')
    return _figure(title, body, height, [Series(p.name, [], p.colour) for p in points])


def confusion_matrix(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A table of counts and shares of each true class, shaded by the share; rows true, columns predicted."""
    head = "".join(f'<th scope="col">{escape(str(label))}</th>' for label in labels)
    rows = []
    for i, (label, row) in enumerate(zip(labels, counts)):
        total = sum(row) or 1
        cells = "".join(
            f'<td class="{"hit" if i == j else "miss"}" style="--share:{count / total:.3f}">'
            f"<b>{count:,}</b><span>{count / total:.1%}</span></td>"
            for j, count in enumerate(row)
        )
        rows.append(f'<tr><th scope="row">{escape(str(label))}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="confusion"><thead>'
        f'<tr><td></td><th class="axis" colspan="{len(labels)}">predicted</th></tr>'
        f'<tr><th class="axis">true</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


class _Frame:
    """The plotting rectangle: data coordinates to SVG user units."""

    def __init__(self, x_range: Point, y_range: Point, height: int) -> None:
        self.x_range, self.y_range, self.height = x_range, y_range, height

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def grid(
        self,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        y_format: Callable[[float], str],
        x_label: str,
        y_label: str = "",
        x_format: Callable[[float], str] = "{:g}".format,
    ) -> str:
        """Horizontal rules, tick labels on both axes and the axes' names."""
        bottom, right = self.height - _BOTTOM, _WIDTH - _RIGHT
        parts = []
        for tick in y_ticks:
            y, kind = self.y(tick), "axis" if tick == y_ticks[0] else "rule"
            parts.append(f'<path class="{kind}" d="M{_LEFT} {y:.1f}H{right}"/>')
            parts.append(f'<text x="{_LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{escape(y_format(tick))}</text>')
        for tick in x_ticks:
            parts.append(
                f'<text x="{self.x(tick):.1f}" y="{bottom + 19}" text-anchor="middle">{escape(x_format(tick))}</text>'
            )
        middle = (_LEFT + right) / 2
        parts.append(f'<text class="name" x="{middle}" y="{bottom + 37}" text-anchor="middle">{escape(x_label)}</text>')
        if y_label:
            up = (_TOP + bottom) / 2
            turned = f'transform="translate(13 {up}) rotate(-90)"'
            parts.append(f'<text class="name" {turned} text-anchor="middle">{escape(y_label)}</text>')
        return "".join(parts)


def _curve(frame: _Frame, series: Series) -> str:
    points = _thin(series.points)
    strength = " faint" if series.faint else ""
    parts = [f'<path class="curve {series.colour}{strength}" d="{frame.path(points)}"/>'] if len(points) > 1 else []
    if series.marked or len(points) == 1:
        dots = (f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="4"/>' for x, y in points)
        parts.append(f'<g class="dots {series.colour}">{"".join(dots)}</g>')
    return "".join(parts)


def _figure(title: str, body: Sequence[str], height: int, legend: Sequence[Series]) -> str:
    keys = "".join(f'<span class="key {s.colour}">{escape(s.name)}</span>' for s in legend)
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if y is not None and math.isfinite(x) and math.isfinite(y)]


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about _MAX_POINTS points: means of equal runs, with the first and the last point kept."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    run = math.ceil(len(points) / _MAX_POINTS)
    chunks = [points[i : i + run] for i in range(0, len(points), run)]
    means = [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]
    return [points[0], *means[1:-1], points[-1]]


def _step(low: float, high: float, count: int) -> float:
    """The step 1, 2, 2.5 or 5 times a power of ten that gives about `count` intervals."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(step - raw))


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round values that enclose low..high."""
    if high <= low:
        low, high = low - abs(low) * 0.1, high + (abs(high) * 0.1 or 1.0)
    step = _step(low, high, count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _inner_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside low..high."""
    return [tick for tick in _ticks(low, high, count) if low <= tick <= high]


def _number(value: float) -> str:
    if 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:g}"
