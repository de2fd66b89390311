"""Which rows of a batch belong to which adapter: the tables that the kernels of lora_rows.py read.

Made once per batch from host integers, without waiting for the device, and used by every layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

BASE = -1  # the adapter of rows that have none
_TILE_ROWS = (16, 32, 64)
_CHUNKS = 16  # of M rows, for gradients: with 16 column tiles they give every processor two programs
_CHUNK_ROWS = 64  # a chunk's rows are a multiple of this
_ALIGNED_INTS = 4  # tables start on 16 bytes: a pointer's alignment is part of what Triton compiles for


class RowPlan(NamedTuple):
    """Which rows belong to which adapter. All tensors int32 on one device; positions count along `order`."""

    order: torch.Tensor  # [M] rows by adapter, the base's last
    tile_adapter: torch.Tensor  # [T] adapter, or BASE
    tile_first: torch.Tensor  # [T] position of the first row
    tile_rows: torch.Tensor  # [T] 1 .. block_m
    chunk_first: torch.Tensor  # [C] the same for gradients: long pieces, at least one per adapter, which may be empty
    chunk_rows: torch.Tensor  # [C]
    chunks_before: torch.Tensor  # [L + 1] adapter l has chunks chunks_before[l] .. chunks_before[l + 1]
    adapted_tiles: int  # tiles that are not the base's; they come first
    block_m: int

    @property
    def adapters(self) -> int:
        return self.chunks_before.shape[0] - 1


def plan_rows(segments: Sequence[tuple[int, int, int]], adapters: int, device: torch.device | str) -> RowPlan:
    """The plan of a batch of segments (first row, number of rows, adapter 0 .. adapters - 1 or BASE).

    Raises:  ValueError where the segments do not cover rows 0 .. M once each, or name an adapter that is not there
    """
    by_adapter: list[list[tuple[int, int]]] = [[] for _ in range(adapters + 1)]  # the base's are the last
    covered = 0
    for first, rows, adapter in sorted(segments):
        if first != covered or rows < 0:
            raise ValueError(
                f"plan_rows: expected segments that cover all rows once, got {first=}, {rows=} at {covered}"
            )
        if not BASE <= adapter < adapters:
            raise ValueError(f"plan_rows: expected adapters {BASE} .. {adapters - 1}, got {adapter}")
        by_adapter[adapter].append((first, rows))
        covered += rows
    lengths = [sum(rows for _, rows in pieces) for pieces in by_adapter]
    longest = max(lengths)
    block_m = next((size for size in _TILE_ROWS if longest <= size), _TILE_ROWS[-1])
    chunk = triton.cdiv(triton.cdiv(covered, _CHUNKS), _CHUNK_ROWS) * _CHUNK_ROWS

    order, tiles, chunks, chunks_before = [], [], [], [0]
    for adapter, (pieces, length) in enumerate(zip(by_adapter, lengths, strict=True)):
        start = len(order)
        for first, rows in pieces:
            order.extend(range(first, first + rows))
        name = adapter if adapter < adapters else BASE
        tiles += [(name, start + i, min(block_m, length - i)) for i in range(0, length, block_m)]
        if adapter < adapters:
            chunks += [(start + i, min(chunk, length - i)) for i in range(0, max(length, 1), chunk)]
            chunks_before.append(len(chunks))
    adapted_tiles = sum(tile[0] != BASE for tile in tiles)
    tables = [order, *zip(*tiles, strict=True), *zip(*chunks, strict=True), chunks_before]
    return RowPlan(*_on_device(tables, device), adapted_tiles, block_m)


def _on_device(tables: Sequence[Sequence[int]], device: torch.device | str) -> list[torch.Tensor]:
    """The tables as int32 tensors, by one copy that the host does not wait for."""
    flat: list[int] = []
    starts = []
    for table in tables:
        starts.append(len(flat))
        flat.extend(table)
        flat.extend([0] * (-len(flat) % _ALIGNED_INTS))
    host = torch.tensor(flat, dtype=torch.int32)
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    packed = host.to(device, non_blocking=True)
    return [packed[start : start + len(table)] for start, table in zip(starts, tables, strict=True)]
