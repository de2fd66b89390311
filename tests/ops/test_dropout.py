"""The seeded dropout mask of the `torch` implementation, and its statistics."""

import pytest
import torch

from fastpeft.ops import dropout
from fastpeft.ops.dropout import LEVELS, draw_seed, drop, keep_mask, threshold_of
from fastpeft.ops.lora import lora_linear
from tests.tolerance import assert_bits_equal, assert_keep_rate

ROWS = torch.empty(512, 301)  # 154112 elements, not a multiple of four


def keep(seed: int, threshold: int, like: torch.Tensor = ROWS) -> torch.Tensor:
    """keep_mask as booleans."""
    return keep_mask(seed=seed, like=like, threshold=threshold).bool()


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0.0, 0), (0.5, 32768), (1 / 65536, 1), (0.1, 6554), (0.9999999, 65535), (1e-9, 0)],
    ids=["none", "half", "one_level", "tenth", "nearly_all", "too_small"],
)
def test_threshold_is_the_nearest_level(p, threshold):
    assert threshold_of(p) == threshold
    assert threshold_of(p) < LEVELS  # p < 1: something is always kept, the scale stays finite


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(p):
    threshold = threshold_of(p)
    assert_keep_rate(f"p={p}", keep(11, threshold), threshold / LEVELS)


@pytest.mark.parametrize("lane", range(4))
def test_each_of_the_four_lanes_of_a_draw_keeps_at_the_same_rate(lane):
    """Four elements share one 64-bit draw; its top lane is signed, and a draw over half the range would bias it."""
    mask = keep(3, LEVELS // 2).view(-1)
    assert_keep_rate(f"lane {lane}", mask[lane::4], 0.5)


def test_lanes_and_neighbours_are_independent():
    mask = keep(5, LEVELS // 2).view(-1)
    for distance in (1, 2, 3, 4, ROWS.shape[1]):
        assert_keep_rate(f"agreement at distance {distance}", mask[distance:] == mask[:-distance], 0.5)


def test_function_of_the_seed_and_shape():
    first = keep(2**63 - 1, 20000)
    assert_bits_equal("same seed", keep(2**63 - 1, 20000), first)
    assert first.shape == ROWS.shape
    assert not torch.equal(keep(2**63 - 2, 20000), first)
    other = torch.empty(301, 512, dtype=torch.bfloat16).t()
    assert_bits_equal("dtype and strides do not matter", keep(2**63 - 1, 20000, like=other), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mask_is_ones_and_zeros_of_the_input_s_dtype(dtype):
    mask = keep_mask(seed=1, like=torch.empty(7, 9, dtype=dtype), threshold=30000)
    assert mask.dtype == dtype
    assert set(mask.view(-1).tolist()) == {0.0, 1.0}


def test_a_higher_threshold_drops_more_of_the_same_draw():
    low, high = (keep(1, threshold) for threshold in (10000, 30000))
    assert bool((high <= low).all())


def test_no_global_state_is_used():
    before = torch.get_rng_state()
    keep(4, 100)
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_seed_follows_torch_manual_seed():
    torch.manual_seed(7)
    seeds = [draw_seed() for _ in range(4)]
    torch.manual_seed(7)
    assert [draw_seed() for _ in range(4)] == seeds
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_drop_keeps_or_zeroes_without_scaling():
    x = torch.randn(33, 65)
    kept = keep(9, 20000, like=x)
    assert_bits_equal("kept", drop(x, 9, 20000)[kept], x[kept])
    assert bool((drop(x, 9, 20000)[~kept] == 0).all())
    assert drop(x, 9, 0) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 7 * 33, 2**21])
def test_parts_of_a_mask_are_the_mask_drawn_or_held(monkeypatch, chunk, dtype):
    monkeypatch.setattr(dropout, "_CHUNK", chunk)
    x = torch.randn(33, 7).to(dtype)
    kept = keep(5, threshold_of(0.3), like=x)
    expected = torch.where(kept, x, 0)
    x[~kept] = float("inf")  # a dropped element is 0, whatever it was
    mask, draws = dropout.Keep((33, 7), dtype, x.device, 5, threshold_of(0.3)), count_draws(monkeypatch)
    for drawn in (True, False, False):
        before = len(draws)
        parts = [(span, dropout.masked(x[span], part, out=part).clone()) for span, part in mask.parts()]
        assert [span.stop - span.start for span, _ in parts] == {1: [4] * 8 + [1], 7 * 33: [32, 1], 2**21: [33]}[chunk]
        assert_bits_equal("masked", torch.cat([part for _, part in parts]), expected)
        assert (len(draws) - before == len(parts)) is drawn


def test_a_mask_that_was_not_drawn_to_its_end_is_drawn_anew(monkeypatch):
    monkeypatch.setattr(dropout, "_CHUNK", 1)
    mask = dropout.Keep((33, 7), torch.float32, torch.device("cpu"), 5, threshold_of(0.3))
    next(mask.parts())
    parts = [part.clone() for _, part in mask.parts()]
    assert torch.equal(torch.cat(parts) != 0, keep(5, threshold_of(0.3), like=torch.empty(33, 7)))


def count_draws(monkeypatch) -> list[int]:
    """How many numbers were drawn at each time from now on."""
    counts, bits = [], dropout.Draws.bits

    def counted(draws, count):
        counts.append(count)
        return bits(draws, count)

    monkeypatch.setattr(dropout.Draws, "bits", counted)
    return counts


def test_a_backward_pass_draws_no_mask_again(monkeypatch):
    draws = count_draws(monkeypatch)
    x, w = torch.randn(33, 16, requires_grad=True), torch.randn(8, 16)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    y = lora_linear(x, w, a, b, dropout_p=0.3, seed=1, impl="torch")
    assert len(draws) == 1
    y.sum().backward()
    assert len(draws) == 1
