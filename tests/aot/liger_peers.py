"""Liger-Kernel's Triton kernels beside ours at Llama-3-8B's shapes, compiled in one run by one compiler.

    python -m benchmarks static --arch sm_90 gfx942 --peers --liger benchmarks/results/static_peers.md

Its own launchers choose signature, constants, block and warps: they run on meta tensors with kernels that only write down how
they are called, and are told the target that they would find. Stages are Triton's default, since they name none. Nothing runs.

8192 rows: hidden size 4096, MLP 14336, 32 query and 8 key heads of 128 columns over 2 x 4096 tokens, 128256 words, bfloat16.
Liger writes gradients over its inputs and rotates in place; ours write fresh tensors.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from benchmarks.tables import markdown
from fastpeft.kernels import cross_entropy, glu, norm, rope
from fastpeft.kernels.aot_cases import BF16, FP32, AotCase, case_of, target_for
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import TileConfig
from tests.aot.metrics import Metrics

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results/static_peers.md"
PEER = "Liger-Kernel"
PACKAGE = "liger_kernel"
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What `infer_device_arch` of Liger answers there.
FAMILY = {"sm_80": "ampere_ada", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "cdna3"}
BATCH, TOKENS, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, WORDS = 2, 4096, 4096, 14336, 32, 8, 128, 128256
ROWS = BATCH * TOKENS
CHUNK = 256  # rows of logits at a time: what Liger's fused loss takes at this shape
DEFAULT_WARPS, DEFAULT_STAGES = 4, {"sm": 3, "gf": 2}  # of Triton's backends, where a launcher names none
PREFIX = "liger-"
SCHEDULERS = 4  # of an SM, and of a compute unit


def version() -> str:
    """Liger's version, or why it cannot be compiled: "not installed", or the error of its import."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "not installed"
    try:
        importlib.import_module(f"{PACKAGE}.ops.utils")
    except (ImportError, RuntimeError, AttributeError) as error:
        return f"does not import: {error}"
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return "0, of no package"


def is_there() -> bool:
    return version()[:1].isdigit()


def aot_cases(arch: str) -> list[AotCase]:
    """Ours and Liger's of every op, under one name with PREFIX before Liger's; nothing where it is not installed."""
    if not is_there():
        return []
    cases = [
        dataclasses.replace(case_of(name, launch), elements=_elements(launch)) for name, launch in launches_of(arch)
    ]
    for name, launch in _ligers(arch):
        cases.append(dataclasses.replace(case_of(PREFIX + name, launch), elements=_ligers_elements(name, launch)))
    return [dataclasses.replace(case, stage_bytes=None) for case in cases]


def _empty(*shape, dtype=BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches_of(arch: str) -> Iterator[tuple[str, Launch]]:
    """(name, launch) of every op."""
    x, w, rstd = _empty(ROWS, HIDDEN), _empty(HIDDEN), _empty(ROWS, dtype=FP32)
    gate, q, k = _empty(ROWS, MLP), _empty(BATCH, TOKENS, HEADS, HEAD_DIM), _empty(BATCH, TOKENS, KV_HEADS, HEAD_DIM)
    table, logits = _empty(TOKENS, HEAD_DIM // 2, dtype=FP32), _empty(CHUNK, WORDS)
    backward = {"offset": 0.0, "bias_dtype": BF16}
    terms = {"softcap": None, "logit_scale": 1.0, "label_smoothing": 0.0, "z_loss": 0.0}
    rotation = {"positions": None, "offset": 0, "interleaved": False, "inverse": False}
    calls = {
        "rms_norm": lambda: norm.norm_forward(x, None, w, None, centred=False, dtype=BF16, eps=1e-6, offset=0.0),
        "rms_norm-grad": lambda: norm.norm_backward(x, None, x, w, None, rstd, needs=(True, False, False), **backward),
        "rms_norm-grad-trains": lambda: norm.norm_backward(
            x, None, x, w, None, rstd, needs=(True, True, False), **backward
        ),
        "swiglu": lambda: glu.glu(gate, gate, "silu"),
        "swiglu-grad": lambda: glu.glu_grad(gate, gate, gate, "silu"),
        "geglu": lambda: glu.glu(gate, gate, "gelu_tanh"),
        "geglu-grad": lambda: glu.glu_grad(gate, gate, gate, "gelu_tanh"),
        "rope": lambda: rope.rotate(q, k, table, table, **rotation),
        "cross_entropy": lambda: cross_entropy.cross_entropy(
            logits,
            _empty(CHUNK, dtype=torch.int64),
            out=logits,
            ignore_index=-100,
            factor=_empty((), dtype=FP32),
            **terms,
        ),
    }
    for name, call in calls.items():
        with record_launches(target_for(arch)) as launches:
            call()
        yield name, launches[0]


def _ligers(arch: str) -> Iterator[tuple[str, Launch]]:
    """The same of Liger's launchers."""
    ops = {name: importlib.import_module(f"{PACKAGE}.ops.{name}") for name in ("rms_norm", "swiglu", "geglu", "rope")}
    fused = importlib.import_module(f"{PACKAGE}.ops.fused_linear_cross_entropy")
    x, w, rstd, gate = _empty(ROWS, HIDDEN), _empty(HIDDEN), _empty(ROWS, dtype=FP32), _empty(ROWS, MLP)
    q, k = _empty(BATCH, HEADS, TOKENS, HEAD_DIM), _empty(BATCH, KV_HEADS, TOKENS, HEAD_DIM)
    table = _empty(1, TOKENS, HEAD_DIM)  # transformers' tables, in the model's dtype
    settings = importlib.import_module(f"{PACKAGE}.ops.utils")

    def norm_grad(trains: bool):
        with _told(arch, [settings]):
            block, warps = settings.calculate_settings(HIDDEN)
        mode, in_place, row_mode = ops["rms_norm"]._str_to_casting_mode["llama"], True, None
        return ops["rms_norm"].rms_norm_backward(
            x, x, w, rstd, 0.0, mode, block, warps, in_place, row_mode, needs_dw=trains
        )

    labels = torch.zeros(ROWS, dtype=torch.int64)  # a real tensor: the launcher counts them
    hidden, head = _empty(ROWS, HIDDEN).requires_grad_(), _empty(WORDS, HIDDEN)
    calls = {
        "rms_norm": (ops["rms_norm"], lambda: ops["rms_norm"].rms_norm_forward(x, w, 1e-6, 0.0, "llama", None)),
        "rms_norm-grad": (ops["rms_norm"], lambda: norm_grad(False)),
        "rms_norm-grad-trains": (ops["rms_norm"], lambda: norm_grad(True)),
        "swiglu": (ops["swiglu"], lambda: ops["swiglu"].swiglu_forward(gate, gate)),
        "swiglu-grad": (ops["swiglu"], lambda: ops["swiglu"].swiglu_backward(gate, gate, gate)),
        "geglu": (ops["geglu"], lambda: ops["geglu"].geglu_forward(gate, gate)),
        "geglu-grad": (ops["geglu"], lambda: ops["geglu"].geglu_backward(gate, gate, gate)),
        "rope": (ops["rope"], lambda: ops["rope"].rope_forward(q, k, table, table)),
        "cross_entropy": (fused, lambda: fused.fused_linear_cross_entropy_forward(hidden, head, labels)),
    }
    for name, (module, call) in calls.items():
        with _told(arch, [settings, module]), _written_down(arch, module) as launches:
            call()
        yield name, launches[0]


def _elements(launch: Launch) -> int:
    """Elements of the output that one turn of the main loop of our kernel makes, or a program without a loop."""
    tile = launch.constexprs
    if "BLOCK_V" in tile:
        return tile["BLOCK_V"]
    if "HALF" in tile:
        return tile["BLOCK_M"] * HEAD_DIM  # one head at a time
    return tile["BLOCK_M"] * tile.get("BLOCK_N", HIDDEN)


def _ligers_elements(name: str, launch: Launch) -> int:
    """The same of Liger's: a row at a time, or a block of it."""
    if name == "rope":
        return (HEADS + KV_HEADS) * HEAD_DIM
    row = {"rms_norm": HIDDEN, "cross_entropy": WORDS}.get(name.partition("-")[0], MLP)
    return min(row, launch.constexprs["BLOCK_SIZE"])


@contextlib.contextmanager
def _told(arch: str, modules: list[ModuleType]) -> Iterator[None]:
    """Liger's questions for the device answered with `arch`."""
    answers = {"is_hip": arch.startswith("gfx"), "infer_device_arch": FAMILY[arch]}
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, answer in answers.items():
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, lambda answer=answer: answer))
        yield


@contextlib.contextmanager
def _written_down(arch: str, module: ModuleType) -> Iterator[list[Launch]]:
    """The kernels of `module` only note how they are launched."""
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name, kernel in vars(module).copy().items():
            if isinstance(kernel, JITFunction):
                stack.enter_context(mock.patch.object(module, name, _Noted(kernel, arch, launches)))
        yield launches


@dataclasses.dataclass
class _Noted:
    """Stands for a kernel: `noted[grid](...)` appends a Launch."""

    kernel: Callable
    arch: str
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **named: self._note(grid, args, named)

    def _note(self, grid: tuple[int, ...], args: tuple, named: dict) -> None:
        config = TileConfig(1, 1, 1, 1, named.pop("num_warps", DEFAULT_WARPS), DEFAULT_STAGES[self.arch[:2]])
        bound = inspect.signature(self.kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        given = bound.arguments
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        # One program per processor in its norm's backward: a meta tensor has none to count.
        if "rows_per_program" in given:
            given["rows_per_program"] = -(-ROWS // target_for(self.arch).processors)
        values = tuple(None if p.is_constexpr else given[p.name] for p in self.kernel.params)
        self.launches.append(Launch(self.kernel, grid, values, constants, config))


HEAD = (
    "target",
    "op",
    "kernel",
    "warps",
    "registers",
    "spills",
    "blocks/SM",
    "instructions",
    "16-byte loads",
    "lane-instructions / element",
    "bound",
)


def document(reports: dict[str, dict]) -> str:
    """benchmarks/results/static_peers.md, of a report by target."""
    triton = next(iter(reports.values()))["triton"]
    rows = []
    for arch, report in reports.items():
        for name in report["cases"]:
            if not name.startswith(PREFIX) and PREFIX + name in report["cases"]:
                rows += [_row(arch, name, "fastpeft", report), _row(arch, name, PEER, report, PREFIX)]
    return f"""# {PEER} {version()} and fastpeft, as Triton {triton} compiles them

Made by `python -m benchmarks static --arch {" ".join(reports)} --peers --liger FILE`; do not edit. Compiled, not run: these are
counts of code, not times.

Shapes of Llama-3-8B in bfloat16: {ROWS} rows of {HIDDEN}, an MLP of {MLP}, {HEADS} and {KV_HEADS} heads of
{HEAD_DIM} columns over {BATCH} x {TOKENS} tokens, {CHUNK} rows of {WORDS} logits. Block and warps are what each one's
launcher chooses. {PEER} writes gradients over its inputs, rotates in place and multiplies partly in bfloat16; ours write
fresh tensors and compute in float32.

instructions: of the whole kernel. Lane-instructions / element: of one turn of the main loop over the elements that it makes,
or of the whole kernel where the source has no loop; empty where the compiler cut that loop into others.

{markdown(HEAD, rows)}
"""


def _row(arch: str, name: str, kernel: str, report: dict, prefix: str = "") -> list[str]:
    metrics = Metrics(**report["cases"][prefix + name]["metrics"])
    warps = metrics.threads // (64 if arch == "gfx942" else 32)
    loops = name.startswith(("rms_norm-grad", "cross_entropy")) or (name == "rope" and not prefix)
    counted = metrics.loop_instructions if loops else metrics.instructions
    # What bytes and cycles were counted of is that loop, and it moves all of its elements.
    is_costed = round(metrics.cycles["issue"] * SCHEDULERS / warps) == counted
    is_whole_turn = is_costed and metrics.moved >= metrics.elements * BF16.itemsize
    return [
        arch,
        name,
        kernel,
        str(warps),
        str(metrics.registers),
        str(metrics.spills),
        str(metrics.blocks_per_sm),
        str(metrics.instructions),
        "" if metrics.vec128 is None else f"{metrics.vec128:.2f}",
        f"{counted * metrics.threads / metrics.elements:.1f}" if is_whole_turn else "",
        metrics.bound,
    ]
