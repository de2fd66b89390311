"""The Philox mask: equal to a numpy reference, the same in every kernel and tiling, right in its probability."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastpeft.kernels import lora
from fastpeft.kernels.dropout import keep_tile
from tests.tolerance import assert_bits_equal, assert_keep_rate

SEEDS = [1, 0x1234_5678_9ABC_DEF, 2**63 - 1]
ROUNDS = 7


def philox_4x32(seed: int, counter: list[np.ndarray]) -> list[np.ndarray]:
    """Philox-4x32 with 7 rounds as Salmon et al. state it: key (low, high word of seed), counter of four words."""
    words = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(ROUNDS):
        product_0 = np.uint64(0xD2511F53) * words[0]
        product_1 = np.uint64(0xCD9E8D57) * words[2]
        words = [
            (product_1 >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]),
            product_1 & low,
            (product_0 >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]),
            product_0 & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


def reference_keep(seed: int, rows: np.ndarray, columns: np.ndarray, threshold: int) -> torch.Tensor:
    """[rows, columns] booleans: 16 bits of one call for each of 8 neighbouring columns, low half of a word first."""
    words = np.stack(philox_4x32(seed, [rows[:, None], columns[None, :] // 8, 0, 0]))
    in_group = np.broadcast_to(columns % 8, words.shape[1:])
    word = np.take_along_axis(words, in_group[None] // 2, axis=0)[0]
    bits = (word >> (16 * (in_group % 2)).astype(np.uint64)) & np.uint64(0xFFFF)
    return torch.from_numpy(bits >= threshold)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("m", "k"), [(33, 97), (1, 1), (40, 64)])
def test_keep_equals_the_numpy_reference(seed, m, k, device):
    for threshold in (1, 6554, 32768, 65535):
        got = lora.lora_keep(seed, m, k, threshold, device)
        expected = reference_keep(seed, np.arange(m), np.arange(k), threshold)
        assert_bits_equal(f"keep {m} x {k}, seed {seed}, threshold {threshold}", got, expected)


@triton.jit
def _keep_at_kernel(out_ptr, first_row, first_column, seed: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    keep = keep_tile(seed, first_row + tl.arange(0, ROWS), first_column, 32768, ROWS, COLUMNS)
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + offs, keep.to(tl.int8))


@pytest.mark.parametrize(("first_row", "first_column"), [(2_000_000_000, 1 << 20), (3, (1 << 31) - 64)])
def test_keep_does_not_overflow_in_huge_matrices(first_row, first_column, device):
    """row * K passes 2^32 long before memory ends: rows and columns are separate counter words."""
    rows, columns = 8, 32
    got = torch.empty(rows, columns, dtype=torch.int8, device=device)
    _keep_at_kernel[(1,)](got, first_row, first_column, SEEDS[1], ROWS=rows, COLUMNS=columns)
    expected = reference_keep(SEEDS[1], first_row + np.arange(rows), first_column + np.arange(columns), 32768)
    assert_bits_equal(f"keep at ({first_row}, {first_column})", got.view(torch.bool), expected)


def test_all_seed_bits_count(device):
    masks = [lora.lora_keep(seed, 8, 64, 32768, device) for seed in (1, 1 + 2**32, 1 + 2**62)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert_keep_rate(f"agreement of masks {first} and {second}", masks[first] == masks[second], 0.5)


@pytest.mark.parametrize("threshold", [655, 6554, 32768, 64880])
def test_keep_rate_is_binomial(threshold, device):
    keep = lora.lora_keep(99, 256, 512, threshold, device)
    assert_keep_rate(f"threshold {threshold}", keep, threshold / 65536)


@pytest.mark.parametrize(("m", "k"), [(33, 97), (5, 40)])
def test_every_kernel_draws_the_same_mask(m, k, device):
    """Inputs that make each kernel return its own mask: the tile sizes and the position of a tile do not enter."""
    seed, threshold = SEEDS[1], 16384
    keep = lora.lora_keep(seed, m, k, threshold, device)
    dropout = {"seed": seed, "threshold": threshold, "precision": "ieee"}
    expected = keep.float()
    one = torch.ones(m, k, device=device)

    identity = torch.eye(k, device=device)
    s = lora.lora_down(one, identity, scale=1 - threshold / 65536, **dropout)
    assert_bits_equal("mask of lora_down", s[:, :k], expected)

    ds = torch.zeros(m, 16, device=device)
    ds[:, 0] = 1.0
    dx = lora.lora_grad_x(torch.zeros(m, 3, device=device), torch.zeros(3, k, device=device), ds, one[:1], **dropout)
    assert_bits_equal("mask of lora_grad_x", dx, expected)

    padded = torch.zeros(m, lora.padded_rank(m), device=device)
    padded[:, :m] = torch.eye(m, device=device)
    da = lora.lora_grad_a(one, padded, one, **dropout)
    assert_bits_equal("mask of lora_grad_a", da, expected)
