"""Learning rates to start from."""

import pytest

from fastpeft.methods import METHODS
from fastpeft.training.guidance import LARGE, RATES, UNKNOWN, suggested_learning_rate


def test_what_is_known_of_lora():
    """QLoRA's paper has 2e-4 up to 13 B and 1e-4 above; below that, what this library always took."""
    assert [suggested_learning_rate("LORA", int(size)) for size in (1, 23e6, 7e9, 13e9, 65e9)] == [
        3e-4,
        3e-4,
        2e-4,
        2e-4,
        1e-4,
    ]
    assert suggested_learning_rate("lora", 10) == suggested_learning_rate("LORA", 10)


@pytest.mark.parametrize("method", [*RATES, "of another package"])
def test_rates_fall_with_the_size_and_cover_every_size(method):
    limits, rates = zip(*RATES.get(method, UNKNOWN), strict=True)
    assert list(limits) == sorted(set(limits))
    assert limits[-1] == LARGE
    assert list(rates) == sorted(rates, reverse=True)
    assert suggested_learning_rate(method, 10**13) == rates[-1]


def test_every_method_has_a_row():
    assert set(METHODS) <= set(RATES)


def test_a_prompt_learns_with_higher_rates_than_a_matrix():
    order = [suggested_learning_rate(kind, 10**8) for kind in ("LORA", "BITFIT", "IA3", "PROMPT_TUNING")]
    assert order == sorted(order)


def test_no_model_has_no_parameters():
    with pytest.raises(ValueError, match="at least 1 parameter, got 0"):
        suggested_learning_rate("LORA", 0)
