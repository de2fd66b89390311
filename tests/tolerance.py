"""Every tolerance of the test suite, and the comparisons that use them. No other file writes one.

A kernel is held to the eager code that it replaces: both are compared with a float64 oracle, and the kernel's error may
be at most `factor` times the eager code's. So no tolerance is tuned to a dtype, a shape, or a sum's length.
"""

import math

import torch

EPS32 = torch.finfo(torch.float32).eps

WORSE_FACTOR = 2.0
"""A kernel's root mean square error over the eager code's, at most."""

NO_LESS_ACCURATE = 1.0
"""For `assert_no_worse` where code claims at least the accuracy of what it replaces."""

WORSE_PEAK_FACTOR = 8.0
"""A kernel's largest error over the eager code's largest, at most: one wrong element must not drown in a mean."""

LOGITS_EQUAL_TO_PEFT = 1e-6
"""float32 logits of a model against the same model under Hugging Face peft, for `assert_close`."""

MERGED_EQUALS_UNMERGED = 1e-5
"""float32 outputs with the adapter merged into the weights against beside them, for `assert_close`."""

OTHER_ORDER_OF_SUMS = 1e-6
"""The same float32 sums taken in another order (another kernel, recomputed activations), for `assert_close`."""

CANCELLED_GRADIENT = 4e-6
"""Rounding that a float32 gradient of attention may keep where its terms, of order one, cancel (a softmax over one key)."""

GRADIENTS_THROUGH_A_MODEL = 1e-5
"""float32 gradients through a whole model, sums taken in another order (another library, recomputed), for `assert_close`."""

BF16_TRAINING = 2e-2
"""Losses and trained float32 parameters after a few steps of a bfloat16 model whose roundings differ, for `assert_close`."""

EQUAL_TO_THREE_DIGITS = 5e-4
"""Losses of two float32 trainings whose sums are taken in another order, step by step, for `assert_close`."""

ADAM_ON_ROUNDED_GRADIENTS = 1e-4
"""Trained float32 parameters after a dozen steps of Adam, sums taken in another order: it scales gradients near zero up."""

DECOMPOSED_AND_PUT_TOGETHER = 2e-5
"""A float32 matrix against the product of its factors (SVD, QR), for `assert_close`."""

GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-6}
"""Arguments of `torch.autograd.gradcheck` for float64."""

KEEP_RATE_SIGMAS = 5.0
"""Standard deviations that a dropout mask's mean may lie from its probability."""

MEAN_OF_DRAWS_SIGMAS = 6.0
"""Standard deviations that the mean of many dropout draws may lie from the value without dropout, for any of ~50 outputs."""

VARIANCE_OF_DRAWS = 0.25
"""Relative distance of a variance over 6600 dropout draws from the closed form, for any of ~50 outputs."""

SPREAD_OF_INIT = 0.02
"""Relative distance of an initial value's standard deviation from its closed form, over some 10^4 elements."""

METRICS_REPEATED = 1e-5
"""Relative distance of a metric from the same metric computed in other batches."""

PLANNED = 0.04
"""Relative distance of what one of two processes holds from its plan, beside a layer that it may hold or not."""

RESAMPLED_BOUND = 0.05
"""Distance of an interval's bound from the same bound by other draws, 20,000 each, as part of the interval's width."""

RESAMPLED_P = 0.02
"""Distance of a permutation test's p-value from the same by other draws, 20,000 each."""

CHANCE = 0.001
"""A count that is less likely than this, were the claim true, speaks against the claim."""

STATIC_SHARE_SLACK = 0.01
"""How far a static share (vector width, pipe share) may fall below its recorded value: rounding in the record."""


def rms(tensor: torch.Tensor) -> float:
    """Root mean square of a tensor's elements, in float64; 0 for an empty tensor."""
    if tensor.numel() == 0:
        return 0.0
    return tensor.double().square().mean().sqrt().item()


def assert_no_worse(
    name: str,
    got: torch.Tensor,
    exact: torch.Tensor,
    eager: torch.Tensor,
    factor: float = WORSE_FACTOR,
) -> None:
    """rms(got - exact) <= factor * rms(eager - exact) + 2 eps(float32) * rms(exact), and the same for the largest error.

    Shapes:  got, exact, eager alike, any
    Dtypes:  exact float64 (the oracle); got as eager (the working dtype)
    Raises:  AssertionError with both errors, the limit and the worst element, where got is worse, not finite, or of
             another shape or dtype; ValueError where the oracle or the eager code itself is not usable
    """
    if exact.dtype != torch.float64:
        raise ValueError(f"{name}: expected a float64 oracle, got {exact.dtype}")
    for role, tensor in (("exact", exact), ("eager", eager)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: {role} is not finite; draw smaller inputs")
    assert eager.shape == exact.shape, f"{name}: eager has shape {tuple(eager.shape)}, exact {tuple(exact.shape)}"
    assert got.shape == exact.shape, f"{name}: expected shape {tuple(exact.shape)}, got {tuple(got.shape)}"
    assert got.dtype == eager.dtype, f"{name}: expected {eager.dtype} as the eager code returns, got {got.dtype}"
    bad = ~torch.isfinite(got)
    assert not bad.any(), f"{name}: {int(bad.sum())} of {got.numel()} elements not finite, first at {_first(bad)}"
    if got.numel() == 0:
        return

    exact = exact.to(got.device)
    error, eager_error = (got.double() - exact).abs(), (eager.to(got.device).double() - exact).abs()
    floor = 2 * EPS32
    for measure, of, limit_factor in (
        ("rms", rms, factor),
        ("largest", lambda tensor: tensor.abs().max().item(), factor / WORSE_FACTOR * WORSE_PEAK_FACTOR),
    ):
        limit = limit_factor * of(eager_error) + floor * of(exact)
        if of(error) > limit:
            worst = _first(error == error.max())
            raise AssertionError(
                f"{name}: {measure} error {of(error):.3e} > {limit:.3e} = {limit_factor:g} x eager's "
                f"{of(eager_error):.3e} + {floor:.1e} x {of(exact):.3e}; worst at {worst}: "
                f"got {got[worst].item():.6g}, exact {exact[worst].item():.6g}, eager {eager[worst].item():.6g}"
            )


def assert_close(name: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """max |got - expected| <= limit * max(1, max |expected|), shapes alike, all finite.

    `limit` is one of this module's constants.
    """
    assert got.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert torch.isfinite(got).all(), f"{name}: not finite at {_first(~torch.isfinite(got))}"
    if got.numel() == 0:
        return
    error = (got.double() - expected.double()).abs()
    allowed = limit * max(1.0, expected.double().abs().max().item())
    worst = _first(error == error.max())
    assert error.max().item() <= allowed, (
        f"{name}: largest difference {error.max().item():.3e} > {allowed:.3e} at {worst}: "
        f"got {got[worst].item():.8g}, expected {expected[worst].item():.8g}"
    )


def is_close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    """What `assert_close` asserts, as an answer."""
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    return error <= limit * max(1.0, expected.double().abs().max().item() if got.numel() else 0.0)


def assert_bits_equal(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """got and expected have one shape, one dtype and the same bits; NaN equals NaN of the same bits, +0 is not -0."""
    assert got.shape == expected.shape, f"{name}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}"
    assert got.dtype == expected.dtype, f"{name}: expected {expected.dtype}, got {got.dtype}"
    got, expected = got.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if got.numel() == 0:
        return
    size = got.element_size()
    bytes_differ = got.reshape(-1).view(torch.uint8) != expected.reshape(-1).view(torch.uint8)
    differ = bytes_differ.view(-1, size).any(dim=1).view(got.shape)
    where = _first(differ) if differ.any() else ()
    assert not differ.any(), (
        f"{name}: {int(differ.sum())} of {got.numel()} elements differ, first at {where}: "
        f"got {got[where].item()!r}, expected {expected[where].item()!r}"
    )


def assert_keep_rate(name: str, keep: torch.Tensor, dropout_p: float) -> None:
    """The mean of a boolean dropout mask is 1 - dropout_p, within KEEP_RATE_SIGMAS of the binomial deviation."""
    assert keep.dtype == torch.bool, f"{name}: expected torch.bool, got {keep.dtype}"
    rate = keep.double().mean().item()
    sigma = math.sqrt(dropout_p * (1 - dropout_p) / keep.numel())
    allowed = KEEP_RATE_SIGMAS * sigma
    assert abs(rate - (1 - dropout_p)) <= allowed, (
        f"{name}: expected a rate of {1 - dropout_p:.4f} +- {allowed:.4f}, got {rate:.4f} over {keep.numel()}"
    )


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    """Index of the first True element."""
    return tuple(int(i) for i in mask.nonzero()[0])
