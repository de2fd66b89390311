"""Counts, shares, sizes, durations and option values as people read them."""

from collections.abc import Mapping, Sequence
from typing import Any


def count_text(number: int) -> str:
    """1,234,567"""
    return f"{number:,}"


def short_count_text(number: int) -> str:
    """1.2 M"""
    return _with_prefix(number, "", ("k", "M", "B"))


def share_text(part: int, whole: int) -> str:
    """1.29 %"""
    return f"{100 * part / max(whole, 1):.2f} %"


def bytes_text(number: float) -> str:
    """1.2 MB, of 10^6 bytes"""
    return _with_prefix(number, "B", ("kB", "MB", "GB"))


def duration_text(seconds: float) -> str:
    """41.5 s, 4 min 44 s, 2 h 3 min"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def value_text(value: Any) -> str:
    """An option: yes or no, a number, or the items of a list or mapping separated by commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count_text(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(value_text(item) for item in value)
    return str(value)


def _with_prefix(number: float, unit: str, prefixed: Sequence[str]) -> str:
    for power, name in reversed(list(enumerate(prefixed, start=1))):
        if number >= 1000**power:
            return f"{number / 1000**power:.1f} {name}"
    return f"{number:.0f} {unit}".strip()
