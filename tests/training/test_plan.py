"""fastpeft.plan: bytes that add up, equal to a real run's, at any number of layers; and the largest that fits."""

import copy
import gc
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, masking_utils

import fastpeft
from fastpeft import backend
from fastpeft.ops import cross_entropy, lora_mlp
from fastpeft.ops.nf4 import quantize_4bit
from fastpeft.training import estimate
from fastpeft.training.estimate import extrapolated, largest
from fastpeft.training.live_memory import KINDS, LiveMemory, Peak
from fastpeft.training.model_shapes import SHAPES, config_of
from fastpeft.training.plan import plan, plan_config
from fastpeft.training.plan_config import gpu_gib
from fastpeft.training.planned_step import PARTS, FakeModel, StepPeaks, build, run_steps

ROWS, TOKENS = 4, 96
MIB = 2**20
AGREEMENT = 0.02


def llama(layers: int = 3, **options):
    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "tie_word_embeddings": False, "dtype": "bfloat16"}
    return AutoConfig.for_model("llama", **sizes | options)


def bert(layers: int = 3):
    return AutoConfig.for_model(
        "bert", vocab_size=500, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_hidden_layers=layers
    )


METHODS = {
    "lora": ("lora", {"r": 8, "target_modules": "all-linear"}),
    "lora-dropout": ("lora", {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.1}),
    "qlora": ("qlora", {"r": 8, "target_modules": "all-linear"}),
    "int8": ("lora", {"r": 8, "target_modules": "all-linear", "quantization": "int8"}),
    "dora": ("dora", {"r": 8, "target_modules": "all-linear"}),
    "qdora": ("qlora", {"r": 8, "target_modules": "all-linear", "use_dora": True}),
}


def steps_of(name: str, config, **options) -> tuple[StepPeaks, StepPeaks]:
    """The step of a plan and that of a real run, on this CPU."""
    method, own = METHODS[name]
    planned = plan_config(config, method, {"device": "cpu", **own, **options})
    fake = FakeModel(planned, config).step(ROWS, TOKENS)
    real = run_steps(build(planned, copy.deepcopy(config)), planned, batch_size=ROWS, seq_len=TOKENS)
    return fake, real


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", METHODS)
def test_a_plan_is_what_a_real_step_takes(name, checkpointing):
    fake, real = steps_of(name, llama(), gradient_checkpointing=checkpointing)
    for part, planned, measured in zip(PARTS, fake.parts, real.parts, strict=True):
        assert planned.nbytes == pytest.approx(measured.nbytes, rel=AGREEMENT), part
        assert sum(planned.parts.values()) == planned.nbytes, part
    assert (fake.trainable, fake.total) == (real.trainable, real.total)


def test_a_classifier_in_mixed_precision_is_planned_too():
    config = bert()
    own = {"r": 4, "target_modules": ["query", "value"], "task": "classification", "bf16": True, "device": "cpu"}
    planned = plan_config(config, "lora", own)
    fake = FakeModel(planned, config).step(ROWS, TOKENS)
    real = run_steps(build(planned, copy.deepcopy(config)), planned, batch_size=ROWS, seq_len=TOKENS)
    assert fake.peak.nbytes == pytest.approx(real.peak.nbytes, rel=AGREEMENT)


class _Unwatched(LiveMemory):
    """A log that sees nothing, for a step that somebody else watches."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", ["lora", "qlora", "dora"])
def test_the_allocator_says_the_same(name, checkpointing):
    """PyTorch's own record of allocations, which also sees what operators allocate inside themselves."""
    method, own = METHODS[name]
    planned = plan_config(llama(), method, {"device": "cpu", "gradient_checkpointing": checkpointing, **own})
    peak = FakeModel(planned, llama()).step(ROWS, TOKENS).peak
    static = sum(peak.parts.get(kind, 0) for kind in ("base weights", "quantisation statistics", "adapter weights"))
    model = build(planned, llama())
    run_steps(model, planned, batch_size=ROWS, seq_len=TOKENS)  # caches are filled
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_steps(model, planned, batch_size=ROWS, seq_len=TOKENS, memory=_Unwatched())
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert peak.nbytes - static == pytest.approx(max(itertools.accumulate(changes)), rel=AGREEMENT)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_parts_that_are_alike_are_rehearsed_once(name, checkpointing, monkeypatch):
    """Many rows are taken in parts, by the loss and by the MLPs. Three of them tell what all take."""
    method, own = METHODS[name]
    monkeypatch.setattr(lora_mlp, "CHUNK_BYTES", 1)
    own = own | {"batch_size": 15, "seq_len": 100, "gradient_checkpointing": checkpointing}  # 5.9 parts
    few = plan(llama(), method, **own)
    seen = []
    for module in (lora_mlp, cross_entropy):
        every = lambda m, rows: [seen.append(m) or slice(i, min(m, i + rows)) for i in range(0, m, rows)]  # noqa: E731
        monkeypatch.setattr(module, "spans", every)
    assert plan(llama(), method, **own) == few
    assert len(seen) > 40


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(
    ("method", "options", "tokens"),
    [
        ("lora", {"r": 8, "target_modules": "all-linear"}, 96),
        (
            "qlora",
            {"r": 64, "target_modules": "all-linear"},
            8,
        ),  # gradients outweigh activations: the peak is elsewhere
    ],
    ids=["lora", "qlora-short"],
)
def test_a_few_layers_tell_the_rest(method, options, tokens, checkpointing):
    common = {"batch_size": 2, "seq_len": tokens, "gradient_checkpointing": checkpointing, **options}
    few = plan(llama(7), method, **common)
    all_layers = plan(llama(7), method, every_layer=True, **common)
    assert (few.layers_run, all_layers.layers_run) == (estimate.POINTS, (7,))
    assert few == all_layers.__class__(**{**vars(all_layers), "layers_run": few.layers_run, "options": few.options,
                                          "accelerated": few.accelerated})  # fmt: skip


def test_layers_that_differ_are_all_run():
    config = llama(7)
    assert plan(config, "lora", r=4, seq_len=16, layers_to_transform=[0, 5]).layers_run == (7,)
    assert plan(llama(5), "lora", r=4, seq_len=16).layers_run == (5,)


def _steps(*sizes: tuple[int, ...], kind: str = "base weights") -> list[StepPeaks]:
    return [StepPeaks(tuple(Peak(size, {kind: size}, ("forward", "op")) for size in of), 0, 0, "") for of in sizes]


def test_a_line_is_followed_and_nothing_else():
    assert extrapolated(_steps((10,), (12,), (14,)), (2, 3, 4), 10).nbytes == 26
    assert extrapolated(_steps((10,), (12,), (15,)), (2, 3, 4), 10) is None
    # a steeper line that starts lower
    assert extrapolated(_steps((10, 1), (12, 5), (14, 9)), (2, 3, 4), 10).nbytes == 33
    # no line, but it stays below; and one that might not
    assert extrapolated(_steps((100, 1), (120, 5), (140, 5)), (2, 3, 4), 10).nbytes == 260
    assert extrapolated(_steps((10, 1), (12, 5), (14, 6)), (2, 3, 4), 10) is None


# -- what is planned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_8b_llama(quantization):
    found = plan(
        "llama-3-8b", r=16, target_modules="all-linear", quantization=quantization, gradient_checkpointing=True
    )
    assert sum(found.parts.values()) == found.peak_bytes
    assert set(found.parts) <= set(KINDS)
    assert found.total - found.trainable == 8_030_261_248
    assert found.trainable == 41_943_040
    assert found.parts["adapter weights"] == 4 * found.trainable
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    if quantization == "none":
        assert found.parts["base weights"] == pytest.approx(2 * 8_030_261_248, rel=1e-5)
    else:
        rest = 2 * (8_030_261_248 - linears)
        assert found.parts["base weights"] == pytest.approx(rest + linears / 2, rel=1e-5)
        assert found.parts["quantisation statistics"] == pytest.approx(linears / 64 * (1 + 4 / 256), rel=1e-2)


def test_peft_takes_no_less():
    """Adapters in float32 over bfloat16: PEFT casts what they read, and keeps it."""
    own = {"r": 8, "target_modules": "all-linear", "batch_size": 4, "seq_len": 96}
    found = plan(llama(7), compare_peft=True, **own)
    assert sum(found.peft.parts.values()) == found.peft.peak_bytes
    assert (found.peft.trainable, found.peft.total) == (found.trainable, found.total)
    assert found.peft.parts["saved activations"] > 1.2 * found.parts["saved activations"]
    assert "PEFT, MiB" in found.table()


def test_a_gpu_plan_counts_the_kernels_allocations():
    own = {"r": 8, "target_modules": "all-linear", "batch_size": 4, "seq_len": 512}  # too long for a CPU to keep p
    gpu, cpu = (plan(llama(), device=device, **own) for device in ("cuda", "cpu"))
    assert gpu.parts["base weights"] == cpu.parts["base weights"]
    rows, ranks = 4 * 512, 3 * 7
    padding = 2 * rows * (16 - 8) * ranks  # S has 16 columns at least, for the tensor cores; see kernels/tiling.py
    more = gpu.parts["saved activations"] - cpu.parts["saved activations"]
    assert more == pytest.approx(padding, rel=0.5)


def test_the_largest_that_fits_fits():
    own = {"r": 8, "target_modules": "all-linear", "seq_len": 96, "allowance_gib": 0.0}
    config = llama(2, max_position_embeddings=4096)
    found = plan(config, gpu=str(32 / 1024), **own).largest
    room = 32 * MIB
    assert 1 < found.batch_size < 4096
    assert found.batch_bytes <= room < plan(config, batch_size=found.batch_size + 1, **own).peak_bytes
    assert plan(config, batch_size=found.batch_size, **own).peak_bytes == found.batch_bytes
    assert found.seq_len % 64 == 0
    assert not found.tokens_limited
    assert found.seq_bytes <= room < plan(config, **own | {"seq_len": found.seq_len + 64}).peak_bytes


def test_a_gpu_that_is_too_small_holds_nothing():
    found = plan(llama(), r=4, seq_len=16, gpu="0.5")  # the allowance alone is more
    assert (found.largest.batch_size, found.largest.seq_len) == (0, 0)
    assert "none, one row needs more" in found.table()
    assert all(fit.fits for fit in found.fits)


@pytest.mark.parametrize("limit", [1, 2, 7, 100, 4096])
@pytest.mark.parametrize(
    "over", [lambda n: 3 * n - 100, lambda n: n * n // 50 - 60, lambda n: -1, lambda n: (n // 8) * 8 - 24]
)
def test_largest_is_the_last_that_fits(over, limit):
    calls = []

    def fits(n):
        calls.append(n)
        return over(n)

    expected = max((n for n in range(1, limit + 1) if over(n) <= 0), default=0)
    assert largest(fits, 1, limit) == expected
    assert max(calls) <= limit
    assert len(calls) <= 30  # 3 or 4 where it is a line


def test_nothing_is_left_behind():
    before = masking_utils.find_packed_sequence_indices
    plan(llama(), "qlora", r=4, seq_len=16, target_modules="all-linear", device="cpu")
    assert masking_utils.find_packed_sequence_indices is before
    assert not backend.rehearsing()
    w = torch.randn(32, 64)
    weight = quantize_4bit(w, double_quant=True)
    linear = fastpeft.lora_linear(torch.randn(2, 64), weight, torch.randn(4, 64), torch.randn(32, 4))
    assert type(linear) is torch.Tensor
    assert torch.isfinite(linear).all()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("lama-3-8b", {}, "llama-3-8b"),
        ("llama-3-8b", {"method": "lorra"}, "lora"),
        ("llama-3-8b", {"gpu": "rtx-4091"}, "rtx-4090"),
        ("llama-3-8b", {"gpu": "-3"}, "got '-3'"),
        ("llama-3-8b", {"seq_len": 9000}, "8192 positions"),
        ("llama-3-8b", {"seq_len": 0}, "at least 1"),
        ("llama-3-8b", {"optim": "adamw"}, "adamw_torch"),
        ("llama-3-8b", {"quantization": "nf4", "compare_peft": True}, "compare_peft"),
        ("llama-3-8b", {"rang": 3}, "rang"),
        (
            "llama-3-8b",
            {"method": "prefix", "num_virtual_tokens": 8, "gradient_checkpointing": True},
            "False with PREFIX",
        ),
    ],
)
def test_wrong_input_is_refused(model, options, said):
    with pytest.raises(ValueError, match=said):
        plan(model, **options)


def test_names_of_models_and_gpus():
    for name in SHAPES:
        assert config_of(name).model_type == SHAPES[name]["model_type"]
    assert gpu_gib("H100") == gpu_gib("nvidia a100") == gpu_gib("80 GB") == gpu_gib(80) == 80
    assert gpu_gib("24gib") == 24
