"""The GLU kernels: bytes against the closed form, given outputs. Values and gradients: tests/ops/test_glu.py."""

import pytest
import torch

from fastpeft.kernels import glu as kernels
from fastpeft.kernels.launch import target_of
from tests.ops.glu_cases import draw
from tests.tolerance import assert_bits_equal

BYTES = 2  # of bfloat16


@pytest.mark.parametrize("packed", [False, True], ids=["two", "packed"])
@pytest.mark.parametrize("with_h", [False, True], ids=["", "with_h"])
@pytest.mark.parametrize(("m", "n"), [(33, 97), (8, 512), (3, 513)])
def test_every_tensor_is_read_or_written_once(m, n, with_h, packed, probe, device):
    if device.type != "cpu":
        pytest.skip("accesses are counted in the interpreter")
    gate, up, dh = (tensor.detach() for tensor in draw((m, n), torch.bfloat16, device))
    if packed:
        both = torch.cat([gate, up], -1)
        gate, up = both[:, :n], both[:, n:]
    kernels.glu(gate, up, "silu")
    kernels.glu_grad(dh, gate, up, "silu", with_h=with_h)
    forward, backward = probe.launches
    once = m * n * BYTES
    assert forward.asked == {("gate_ptr", "load"): once, ("up_ptr", "load"): once, ("h_ptr", "store"): once}
    assert backward.asked == {
        ("dh_ptr", "load"): once,
        ("gate_ptr", "load"): once,
        ("up_ptr", "load"): once,
        ("dgate_ptr", "store"): once,
        ("dup_ptr", "store"): once,
    } | ({("h_ptr", "store"): once} if with_h else {})


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_outputs_in_the_memory_of_inputs_that_are_the_callers_own(activation, device):
    gate, up, dh = (tensor.detach() for tensor in draw("odd", torch.bfloat16, device))
    h = kernels.glu(gate, up, activation)
    dgate, dup, again = kernels.glu_grad(dh, gate, up, activation, with_h=True)
    assert_bits_equal("h again", again, h)
    own = dh.clone()
    given, other, _ = kernels.glu_grad(own, gate, up, activation, out_gate=own, out_up=h)
    assert given is own
    assert other is h
    assert_bits_equal("dgate over dh", given, dgate)
    assert_bits_equal("dup over h", other, dup)
    own = up.clone()
    assert_bits_equal("h over up", kernels.glu(gate, own, activation, out=own), again)


def test_columns_with_a_stride_are_copied_first(device):
    gate, up, dh = (tensor.detach() for tensor in draw("odd", torch.float32, device, "transposed"))
    rows = [tensor.contiguous() for tensor in (gate, up, dh)]
    assert_bits_equal("h", kernels.glu(gate, up, "gelu"), kernels.glu(*rows[:2], "gelu"))
    for one, other in zip(kernels.glu_grad(dh, gate, up, "gelu"), kernels.glu_grad(rows[2], *rows[:2], "gelu")):
        assert one is other or torch.equal(one, other)


def test_a_tile_is_whole_rows_or_a_part_of_one():
    target = target_of(torch.device("cpu"))._replace(arch="sm_90")
    assert (kernels.tile_of(100, target).block_m, kernels.tile_of(100, target).block_n) == (16, 128)
    assert (kernels.tile_of(14336, target).block_m, kernels.tile_of(14336, target).block_n) == (1, 2048)
