"""The rows of one process: those of one large batch, dealt out, in the same order as in a single process.

    batch of B * count rows -> B for each process;  the last, shorter batch -> equal numbers, filled up with blank rows

A blank row has no label with a loss, so it counts nowhere. accelerate's own sharding repeats rows from the beginning instead,
which changes the last step of an epoch.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from fastpeft.training.tokenise import IGNORED


class RankRows(Sampler[int]):
    """Row numbers of process `rank` of `count` out of `order`, a sampler of all rows; len(order) stands for a blank row."""

    def __init__(self, order: Sampler[int], batch_size: int, rank: int, count: int):
        self.order, self.batch_size, self.rank, self.count = order, batch_size, rank, count

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)

    def __len__(self) -> int:
        together = self.batch_size * self.count
        whole, rest = divmod(len(self.order), together)
        return whole * self.batch_size + -(-rest // self.count)

    def __iter__(self) -> Iterator[int]:
        rows, size, together = list(self.order), self.batch_size, self.batch_size * self.count
        tail = len(rows) % together
        rest = rows[len(rows) - tail :]
        for start in range(0, len(rows) - tail, together):
            yield from rows[start + self.rank * size : start + (self.rank + 1) * size]
        each = -(-tail // self.count)
        rest += [len(rows)] * (each * self.count - tail)
        yield from rest[self.rank * each : (self.rank + 1) * each]


class WithBlankRow:
    """A data set and, as row number len(rows), one whose labels have no loss; or the first row again, if not `blank`."""

    def __init__(self, rows: Any, blank: bool = True):
        self.rows, self.blank = rows, blank

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        row = dict(self.rows[0])
        if self.blank and "labels" in row:
            labels = row["labels"]
            row["labels"] = [IGNORED] * len(labels) if isinstance(labels, list) else IGNORED
        return row
