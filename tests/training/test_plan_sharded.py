"""A plan for one of several processes: its parts add up, and follow the number of processes. test_distributed.py measures one."""

import math

import pytest

from fastpeft.training import estimate
from fastpeft.training.live_memory import ADAPTERS, BASE, GRADIENTS, OPTIMIZER, STATISTICS
from fastpeft.training.plan import plan, plan_config
from fastpeft.training.plan_sharded import AT_ONCE, GATHERED, MESSAGES, Groups
from fastpeft.training.planned_step import FakeModel
from tests.training.test_plan import llama

LORA = {"r": 8, "target_modules": "all-linear", "seq_len": 64}


@pytest.mark.parametrize(("method", "shard_adapters"), [("lora", False), ("qlora", True)])
def test_what_each_of_n_processes_holds(method, shard_adapters):
    options = LORA | {"gradient_checkpointing": True}
    groups = Groups.of(FakeModel(plan_config(llama(5), method, options), llama(5)).model)
    one = plan(llama(5), method, **options)
    assert groups.base_layers == 5 * groups.base_layer
    before = math.inf
    for count in (2, 64):
        found = plan(llama(5), method, processes=count, distributed="fsdp", shard_adapters=shard_adapters, **options)
        assert sum(found.parts.values()) == found.peak_bytes < before
        before = found.peak_bytes
        shard = (groups.base_layers + groups.base_rest) * (1 - 1 / count)
        assert found.parts[BASE] == pytest.approx(one.parts[BASE] - shard, abs=1)
        trained = groups.trained_layer * shard_adapters
        assert found.parts[GATHERED] == groups.base_rest + AT_ONCE * (groups.base_layer + trained)
        share = count if shard_adapters else 1
        for kind in (ADAPTERS, OPTIMIZER):
            assert found.parts[kind] == pytest.approx(one.parts[kind] / share, abs=1)
        assert found.parts.get(STATISTICS) == one.parts.get(STATISTICS)
        assert (found.parts.get(MESSAGES, 0) > 0) == shard_adapters  # the peak is in the backward pass


def test_a_few_layers_tell_the_rest_of_a_shard():
    """Also where the bytes cannot be shared out evenly."""
    options = LORA | {"processes": 3, "distributed": "fsdp", "shard_adapters": True}
    few, every = (plan(llama(7), "lora", every_layer=every, **options) for every in (False, True))
    assert few.layers_run == estimate.POINTS
    assert few.parts == every.parts


def test_ddp_adds_the_messages_alone():
    one = plan(llama(3), "lora", **LORA)
    two = plan(llama(3), "lora", processes=2, **LORA)
    assert two.parts == one.parts | {MESSAGES: one.parts[ADAPTERS]}
    assert "on each of 2 GPUs (ddp)" in two.table()
    assert two.to_dict()["processes"] == 2


def test_gradients_outweigh_a_short_row():
    """Where the peak is the optimizer's, nothing is gathered; gradients that are whole are sent as one message."""
    options = {"r": 64, "target_modules": "all-linear", "seq_len": 2, "processes": 4, "distributed": "fsdp"}
    found = plan(llama(3, vocab_size=8), "qlora", **options)
    assert found.where[0] == "optimizer"
    assert found.parts[MESSAGES] == found.parts[GRADIENTS]
    assert GATHERED not in found.parts


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"processes": 0}, "processes: expected at least 1"),
        ({"distributed": "zero"}, "distributed: expected one of"),
        ({"shard_adapters": True}, "shard_adapters: expected False without fsdp"),
        ({"processes": 2, "compare_peft": True}, "compare_peft: expected processes 1"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        plan(llama(2), "lora", seq_len=8, **options)
