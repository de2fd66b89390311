"""The rows of a process: together those of one process, in its order."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler

from fastpeft.training.processes import Processes
from fastpeft.training.rank_rows import RankRows, WithBlankRow
from fastpeft.training.trainer import GroupedByLength
from tests.tolerance import assert_bits_equal


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 7, 40, 41, 43, 48])
def test_processes_share_the_rows_of_one(rows, count):
    """Together, batch by batch, the rows of one process with a batch as large as all; equally many, blanks only at the end."""
    order, size = GroupedByLength([row % 7 for row in range(rows)], 4 * count, seed=1), 4
    shares = [list(RankRows(order, size, rank, count)) for rank in range(count)]
    assert {len(share) for share in shares} == {len(RankRows(order, size, 0, count))}
    whole = list(order)
    for number, start in enumerate(range(0, rows, size * count)):
        together = [row for share in shares for row in share[number * size : (number + 1) * size]]
        blanks = together.count(rows)
        assert [row for row in together if row != rows] == whole[start : start + size * count]
        assert blanks < count
        assert not blanks or start + size * count > rows


def test_a_process_follows_the_epoch_of_the_order():
    order = GroupedByLength(list(range(20)), 4, seed=1)
    rows = RankRows(order, 2, 1, 2)
    first = list(rows)
    rows.set_epoch(1)
    assert list(rows) != first


def test_a_blank_row_has_no_loss():
    tokens = WithBlankRow([{"input_ids": [5, 6], "labels": [5, 6]}])
    assert len(tokens) == 1
    assert tokens[1] == {"input_ids": [5, 6], "labels": [-100, -100]}
    assert WithBlankRow([{"labels": 2}])[1] == {"labels": -100}
    assert WithBlankRow([{"labels": 2}], blank=False)[1] == {"labels": 2}


def test_one_process_needs_no_group():
    rows = Dataset.from_dict({"x": [3.0, 4.0]})
    alone = Processes.of_environment()
    assert alone == Processes(0, 1, 0)
    assert list(RankRows(SequentialSampler(rows), 2, 0, 1)) == [0, 1]
    values = alone.over_rows(lambda given: torch.tensor(given["x"][:]).numpy()[:, None], rows)
    assert_bits_equal("rows", torch.from_numpy(values), torch.tensor([[3.0], [4.0]]))
