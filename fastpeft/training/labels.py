"""Class labels: the names, and the index of every row's label."""

from collections.abc import Sequence
from typing import Any


def label_names(values: Sequence[Any], given: Sequence[str] = ()) -> list[str]:
    """The class names in index order: `given`, or found in `values` (the labels of the training rows).

    Whole numbers (also as text, as CSV has them) are class indices 0..C-1; anything else is a name, sorted.
    Raises:  ValueError for fewer than two classes, a repeated name, or numbers that are not 0..C-1
    """
    if given:
        if len(given) < 2 or len(set(given)) < len(given):
            raise ValueError(f"labels: expected at least two different names, got {list(given)}")
        return list(given)
    seen = {_as_index(value) for value in values if not is_missing(value)}
    if all(isinstance(label, int) for label in seen):
        names = [str(label) for label in range(len(seen))]
        outside = sorted(label for label in seen if not 0 <= label < len(seen))
        if outside:
            raise ValueError(
                f"labels: expected the whole numbers 0..{len(seen) - 1} for {len(seen)} different labels, got {outside}, "
                "outside the range; if these are names, list them all with the labels option"
            )
    else:
        names = sorted(str(label) for label in seen)
    if len(names) < 2:
        raise ValueError(f"labels: expected at least two different labels in the training rows, got {names}")
    return names


def label_index(value: Any, names: Sequence[str], where: str) -> int:
    """The class index of one label: its name among `names`, else a whole number 0..C-1.

    Raises:  ValueError naming the row (`where`) and the labels there are
    """
    label = _as_index(value)
    for name in (str(value).strip(), str(label)):
        if name in names:
            return names.index(name)
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    raise ValueError(f"{where}: label {value!r} is outside the range; expected one of {list(names)}")


def is_missing(value: Any) -> bool:
    """True for a label that is not there: None, blank text, or NaN."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _as_index(value: Any) -> int | str:
    """Whole numbers as int, also when they come as bool, as float or as text; anything else as stripped text."""
    if isinstance(value, (bool, int)):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    text = str(value).strip()
    return int(text) if text.lstrip("-").isdecimal() else text
