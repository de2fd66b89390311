"""The rotary kernel: bytes against the closed form, and its gradient by the same launch. Values: tests/ops/test_rope.py."""

import pytest
import torch
import triton

from fastpeft.kernels import rope as kernels
from fastpeft.kernels.launch import target_of
from tests.ops.rope_cases import table
from tests.tolerance import assert_bits_equal

BYTES, ANGLE = 2, 4  # of bfloat16; of a float32 table
OPTIONS = {"positions": None, "offset": 0, "interleaved": False, "inverse": False}


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize(("b", "s", "h", "h_kv", "d", "half"), [(3, 37, 5, 2, 33, 5), (2, 64, 4, 4, 64, 32)])
def test_queries_and_keys_are_read_once_in_one_launch(b, s, h, h_kv, d, half, interleaved, probe, device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    q, k = torch.randn(b, s, h, d).bfloat16(), torch.randn(b, s, h_kv, d).bfloat16()
    cos, sin = table(half)
    kernels.rotate(q, k, cos, sin, **OPTIONS | {"interleaved": interleaved})
    (once,) = probe.launches
    target = target_of(q.device)
    config = kernels._tile(triton.next_power_of_2(half), target)
    heads = kernels._heads_per_program(b * s, h + h_kv, config.block_m, target)
    groups = triton.cdiv(h + h_kv, heads)
    assert once.asked == {
        ("q_ptr", "load"): q.numel() * BYTES,
        ("k_ptr", "load"): k.numel() * BYTES,
        ("q_out_ptr", "store"): q.numel() * BYTES,
        ("k_out_ptr", "store"): k.numel() * BYTES,
        ("cos_ptr", "load"): groups * b * s * half * ANGLE,
        ("sin_ptr", "load"): groups * b * s * half * ANGLE,
    }


def test_inverse_turns_back(device):
    """The gradient is the kernel with -sin: what it does equals the kernel on a negated table, bit for bit."""
    q = torch.randn(2, 9, 3, 20).to(device)
    cos, sin = (part.to(device) for part in table(6))
    inverse, _ = kernels.rotate(q, None, cos, sin, **OPTIONS | {"inverse": True})
    assert_bits_equal("inverse", inverse, kernels.rotate(q, None, cos, -sin, **OPTIONS)[0])
    assert_bits_equal("what is not rotated", inverse[..., 12:], q[..., 12:])


def test_columns_with_a_stride_are_copied_first(device):
    q = torch.randn(2, 16, 3, 9).to(device).transpose(1, 3)
    cos, sin = (part.to(device) for part in table(4))
    got, _ = kernels.rotate(q, None, cos, sin, **OPTIONS)
    assert_bits_equal("q'", got, kernels.rotate(q.contiguous(), None, cos, sin, **OPTIONS)[0])


def test_programs_for_every_processor():
    """Long batches take all heads in one program; one token spreads its heads."""
    target = target_of(torch.device("cpu"))._replace(processors=132)
    assert kernels._heads_per_program(8192, 40, 16, target) == 64
    assert kernels._heads_per_program(1, 40, 16, target) == 1
