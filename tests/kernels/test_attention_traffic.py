"""Bytes that the attention kernels ask for, against closed forms: one side once, the other side where a tile sees it.

A tile's rows past the end ask for the last row again: bytes asked are those of whole tiles, bytes fetched those that exist.
"""

import pytest
import torch

from fastpeft.kernels.attention_bwd import attention_bwd
from fastpeft.kernels.attention_call import AttentionCall, valid_keys
from fastpeft.kernels.attention_fwd import attention_fwd
from fastpeft.kernels.attention_tiling import choose_attention
from fastpeft.kernels.tiling import INTERPRETER

BATCH, HEADS, KV_HEADS, D, SIZE = 1, 2, 1, 16, 4
STATISTIC = 4  # bytes of lse and delta

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="accesses are counted in the interpreter")


def tile_of(kernel: str, call: AttentionCall):
    return choose_attention(kernel, INTERPRETER, D=D, dtype=torch.float32, call=call)


def seen(
    tiled: int, other: int, block: int, other_block: int, before: int | None, after: int | None
) -> tuple[int, int]:
    """Rows of the other side that all tiles of one side visit: in whole tiles, and those that exist."""
    whole = existing = 0
    for first in range(0, tiled, block):
        last = min(first + block, tiled) - 1
        low = 0 if before is None else min(max(first + other - tiled - before, 0), other)
        high = other if after is None else min(max(last + other - tiled + after + 1, 0), other)
        begin, end = low // other_block * other_block, -(-high // other_block) * other_block
        whole += max(end - begin, 0)
        existing += max(min(end, other) - begin, 0)
    return whole, existing


def whole_tiles(rows: int, block: int) -> int:
    return -(-rows // block) * block


CASES = [
    pytest.param(70, 70, None, None, id="bidirectional"),
    pytest.param(128, 128, None, 0, id="causal-even"),
    pytest.param(70, 101, None, 0, id="causal-longer-keys"),
    pytest.param(101, 70, None, 0, id="causal-rows-without-keys"),
    pytest.param(128, 128, 20, 0, id="window"),
]


@pytest.mark.parametrize(("sq", "sk", "left", "right"), CASES)
def test_every_tile_that_is_read_is_seen(sq, sk, left, right, probe):
    call = AttentionCall(D**-0.5, left=left, right=right)
    q, do = torch.randn(BATCH, sq, HEADS, D), torch.randn(BATCH, sq, HEADS, D)
    k, v = torch.randn(BATCH, sk, KV_HEADS, D), torch.randn(BATCH, sk, KV_HEADS, D)
    o, lse = attention_fwd(q, k, v, call, precision="ieee")
    nothing = {"bias_shape": None, "with_distances": False, "with_sinks": False}
    attention_bwd(do, q, k, v, o, lse, call, with_keys=True, precision="ieee", **nothing)
    row = HEADS * D * SIZE  # bytes of one token of all query heads
    tile = tile_of("fwd", call)
    whole, existing = seen(sq, sk, tile.block_m, tile.block_n, left, right)
    own = whole_tiles(sq, tile.block_m)
    assert probe.bytes_asked(0) == {
        ("q_ptr", "load"): own * row,
        ("k_ptr", "load"): whole * row,
        ("v_ptr", "load"): whole * row,
        ("o_ptr", "store"): sq * row,
        ("lse_ptr", "store"): lse.numel() * STATISTIC,
    }
    assert fetched(probe.launches[0], "q", "k", "v") == [sq * row, existing * row, existing * row]
    tile = tile_of("dq", call)
    whole, existing = seen(sq, sk, tile.block_m, tile.block_n, left, right)
    own = whole_tiles(sq, tile.block_m)
    assert probe.bytes_asked(1) == {
        **{(f"{name}_ptr", "load"): own * row for name in ("q", "o", "do")},
        ("k_ptr", "load"): whole * row,
        ("v_ptr", "load"): whole * row,
        ("lse_ptr", "load"): lse.numel() * STATISTIC,
        ("delta_ptr", "store"): lse.numel() * STATISTIC,
        ("dq_ptr", "store"): sq * row,
    }
    assert fetched(probe.launches[1], "q", "o", "do", "k", "v") == [sq * row] * 3 + [existing * row] * 2
    tile = tile_of("dkdv", call)
    whole, existing = seen(sk, sq, tile.block_n, tile.block_m, right, left)
    own = KV_HEADS * D * SIZE
    assert probe.bytes_asked(2) == {
        **{(f"{name}_ptr", "load"): whole_tiles(sk, tile.block_n) * own for name in ("k", "v")},
        **{(f"{name}_ptr", "load"): whole * row for name in ("q", "do")},
        **{(f"{name}_ptr", "load"): whole * HEADS * STATISTIC for name in ("lse", "delta")},
        **{(f"{name}_ptr", "store"): sk * own for name in ("dk", "dv")},
    }
    assert fetched(probe.launches[2], "k", "v", "q", "do") == [sk * own] * 2 + [existing * row] * 2


def fetched(launch, *names: str) -> list[int]:
    """Bytes that exist, of each tensor that the programs of `launch` load, once per program."""
    return [launch.program_bytes((f"{name}_ptr", "load")) for name in names]


def test_causal_reads_about_half(probe):
    q, k, v = (torch.randn(1, 256, 1, D) for _ in range(3))
    for right in (None, 0):
        attention_fwd(q, k, v, AttentionCall(D**-0.5, right=right), precision="ieee")
    full, causal = (probe.bytes_asked(index)["k_ptr", "load"] for index in (0, 1))
    assert full == 8 * 256 * D * SIZE
    assert causal == full * 9 // 16  # 8 tiles a side: 36 of 64


def test_nothing_of_the_scores_size_is_written(probe):
    """No intermediate grows with Sq Sk: all stores together are o, lse, delta and the gradients."""
    sq = sk = 96
    q, k = torch.randn(1, sq, 2, D), torch.randn(1, sk, 2, D)
    call = AttentionCall(D**-0.5, distances=torch.randn(2, 9), sinks=torch.randn(2))
    o, lse = attention_fwd(q, k, k, call, precision="ieee")
    asked = {"bias_shape": None, "with_distances": True, "with_sinks": True}
    attention_bwd(q, q, k, k, o, lse, call, with_keys=True, precision="ieee", **asked)
    written = sum(moved for launch in probe.launches for (_, kind), moved in launch.asked.items() if kind == "store")
    linear = 4 * q.numel() * SIZE + 2 * lse.numel() * STATISTIC
    histograms = 2 * (sq // 32) * 32 * SIZE + 2 * 9 * SIZE  # of each head and query tile, and their sum
    assert written == linear + histograms


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("right", [None, 0])
def test_tiles_of_padding_are_not_read(side, right, probe):
    """128 keys in tiles of 32, of which the first 40, the last 70 or both are padding; of a second batch all are."""
    mask = torch.ones(2, 128, dtype=torch.bool)
    mask[0, :40] = side == "right"
    mask[0, -70:] &= side == "left"
    mask[1] = False
    first, last = (1 if side != "right" else 0), (2 if side != "left" else 4)
    q, k, v, do = (torch.randn(2, 128, 1, D) for _ in range(4))
    call = AttentionCall(D**-0.5, right=right, padding=mask.view(torch.int8), valid=valid_keys(mask))
    o, lse = attention_fwd(q, k, v, call, precision="ieee")
    nothing = {"bias_shape": None, "with_distances": False, "with_sinks": False}
    attention_bwd(do, q, k, v, o, lse, call, with_keys=True, precision="ieee", **nothing)
    tiles = sum(max(0, min(last, 4 if right is None else tile + 1) - first) for tile in range(4))
    tile_bytes = 32 * D * SIZE
    for index in (0, 1):  # forward, dq
        asked = probe.bytes_asked(index)
        assert asked["k_ptr", "load"] == asked["v_ptr", "load"] == tiles * tile_bytes
    asked = probe.bytes_asked(2)
    assert asked["q_ptr", "load"] == asked["do_ptr", "load"] == tiles * tile_bytes


def test_valid_keys_are_between_the_first_and_the_last():
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    assert valid_keys(mask).tolist() == [[0, 3], [1, 2], [0, 0], [0, 3], [2, 3]]


def test_rope_on_load_writes_no_rotated_copy(probe):
    """The launches store what they store without it. q and k come with their partners and as many angles, dq and dk too."""
    q, k, v, do = (torch.randn(1, 70, 2, D) for _ in range(4))
    angles = torch.rand(1, 70, D // 2)
    asked = []
    for tables in ({}, {"cos": angles.cos(), "sin": angles.sin()}):
        call = AttentionCall(D**-0.5, right=0, **tables)
        o, lse = attention_fwd(q, k, v, call, precision="ieee")
        nothing = {"bias_shape": None, "with_distances": False, "with_sinks": False}
        attention_bwd(do, q, k, v, o, lse, call, with_keys=True, precision="ieee", **nothing)
        asked.append([probe.bytes_asked(index) for index in range(len(probe.launches) - 3, len(probe.launches))])
    for plain, turned, gradient in zip(*asked, (None, "q_ptr", "k_ptr"), strict=True):
        tables = {name: turned.pop((f"{name}_ptr", "load")) for name in ("cos", "sin")}
        loaded = plain["q_ptr", "load"] + plain["k_ptr", "load"]
        back = plain[gradient, "load"] // 2 if gradient else 0  # half as many angles as columns of dq, dk
        assert tables == {"cos": loaded + back, "sin": loaded + back}
        for name in ("q", "k"):
            turned[f"{name}_ptr", "load"] //= 2
        assert turned == plain
