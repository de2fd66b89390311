"""The log of live storages: exact on a sequence of tensors that can be followed by hand."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastpeft.training.live_memory import RECOMPUTED, SAVED, WORKSPACE, LiveMemory

KIB = 1024


def _sequence(memory: LiveMemory) -> None:
    held = torch.empty(4 * KIB, dtype=torch.uint8)
    memory.mark([held], "held")
    with memory:
        memory.phase = "forward"
        a = torch.empty(2 * KIB, dtype=torch.uint8)
        b = a + 1  # held, a, b: 8 KiB
        view = b[:KIB].view(2, -1)
        del a
        c = torch.cat([view, view])  # held, b, c: 8 KiB
        c.add_(1)
        d = torch.empty(KIB + 1, dtype=torch.uint8)  # 9 KiB and 1 byte: the peak
        memory.mark([b], "kept")
        del view, b, c, d
        memory.phase = "backward"
        torch.empty(3 * KIB, dtype=torch.uint8)


def test_the_peak_is_what_lives_at_once():
    memory = LiveMemory(round_to=1)
    _sequence(memory)
    peak = memory.peak()
    assert peak.nbytes == 9 * KIB + 1
    assert peak.parts == {"held": 4 * KIB, "kept": 2 * KIB, WORKSPACE: 3 * KIB + 1}
    assert peak.where == ("forward", "aten.empty.memory_format")


def test_fake_tensors_count_as_real_ones():
    real, fake = LiveMemory(), LiveMemory()
    _sequence(real)
    with FakeTensorMode():
        _sequence(fake)
    assert real.peak() == fake.peak()


def test_allocations_are_rounded_up():
    memory = LiveMemory()
    _sequence(memory)
    assert memory.peak().nbytes == 9 * KIB + 512


def test_a_part_of_the_events_has_its_own_peak():
    memory = LiveMemory(round_to=1)
    with memory:
        first = torch.empty(5 * KIB, dtype=torch.uint8)
        mark = memory.now
        del first
        second = torch.empty(2 * KIB, dtype=torch.uint8)
    assert memory.peak().nbytes == 5 * KIB
    assert memory.peak(after=mark + 1).nbytes == len(second)
    assert memory.peak(until=mark - 1).nbytes == 0


def test_what_outlives_the_forward_pass_is_saved():
    memory = LiveMemory(round_to=1)
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(16, 8)
    memory.mark([w], "weights")
    memory.mark([x], "batch")
    with memory:
        memory.phase = "forward"
        loss = (x @ w).exp().sum()
        memory.keep_for_backward()
        memory.phase = "backward"
        loss.backward()
        memory.mark([w.grad], "gradients")
    parts = memory.peak().parts
    assert parts[SAVED] == 16 * 8 * 4 + loss.nbytes  # the result of exp
    assert memory.lives[-1].kind is None or memory.lives[-1].kind == "gradients"
    assert sum(life.nbytes for life in memory.lives if life.kind == "gradients") == w.nbytes


def test_what_checkpointing_computes_again_is_told_apart():
    memory = LiveMemory(round_to=1)
    w, x = torch.randn(64, 64, requires_grad=True), torch.randn(32, 64)
    memory.mark([w, x], "held")
    with memory:
        memory.phase = "forward"
        loss = checkpoint(lambda x: (x @ w).exp().sin(), x, use_reentrant=False).sum()
        memory.keep_for_backward()
        memory.phase = "backward"
        loss.backward()
    again = [life for life in memory.lives if life.recomputed]
    assert {life.shape for life in again} == {(32, 64)}
    assert all(life.phase == "backward" for life in again)
    assert memory.peak().parts[RECOMPUTED] >= x.nbytes  # the result of exp, which is the argument of sin
