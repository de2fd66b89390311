"""AMD machine code of a compiled kernel (CDNA 3, RDNA 3): the same metrics as sass.py, read from the assembly text."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.aot.metrics import Dot, Metrics, costly, instructions_of, loop_fma_of, main_loop, share_of_wide

KIB = 1024
TRANSCENDENTAL_COST = 4  # vector instructions that one of these takes as long as
LDS_BYTES_PER_CYCLE = 128  # per compute unit
TRANSCENDENTAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")
GLOBAL_LOADS = ("global_load", "buffer_load", "flat_load")
GLOBAL_STORES = ("global_store", "buffer_store", "flat_store")
MATRIX = ("v_mfma_", "v_wmma_")
ATOMICS = ("global_atomic", "buffer_atomic", "flat_atomic")
# Multiply-adds per clock and SIMD over those of float16 (CDNA 3 white paper, table 1).
RELATIVE_RATE = {"f32": 1 / 8, "xf32": 1 / 2}


@dataclass(frozen=True)
class ComputeUnit:
    wave: int  # lanes
    simds: int
    waves: int  # per SIMD
    registers: int  # per lane and SIMD, VGPR and AGPR together
    granule: int
    lds: int  # bytes
    half_fma: int  # float16 multiply-adds per clock
    vector_cycles: int  # of one wave's vector instruction
    dram: float  # bytes per clock for one unit: bandwidth over units and clock


COMPUTE_UNITS = {
    "gfx942": ComputeUnit(64, 4, 8, 512, 8, 64 * KIB, 1024, 4, 8.3),  # MI300X: 5300 GB/s, 304 units, 2.1 GHz
    "gfx1100": ComputeUnit(32, 2, 16, 1536, 24, 64 * KIB, 256, 1, 4.0),  # RX 7900 XTX: 960, 96, 2.5
}


@dataclass(frozen=True)
class Instruction:
    """op "v_mfma_f32_32x32x8_bf16_1k"; target: index of the instruction that a branch goes to, else None."""

    op: str
    target: int | None


def measure(kernel, code, arch: str, num_warps: int, dots: list[Dot], tile_fma: int | None) -> Metrics:
    """Metrics of a kernel compiled for an AMD target.

    code: of `disassemble`; dots: its source's products; tile_fma: see `loop_fma_of`.
    """
    unit, text = COMPUTE_UNITS[arch], kernel.asm["amdgcn"]
    registers, shared = _directive(text, "vgpr_count"), kernel.metadata.shared
    allocated = max(unit.granule, -(-registers // unit.granule) * unit.granule)
    waves_by_registers = min(unit.waves, unit.registers // allocated)
    fits = {
        "registers": waves_by_registers * unit.simds // num_warps,
        "shared": unit.lds // shared if shared else unit.waves,
    }
    limiter = min(fits, key=fits.get)
    source_fma = loop_fma_of(dots, tile_fma)
    loop, loops = main_loop(code, lambda body: _fma_per_wave(body) * num_warps, _load_bytes, source_fma)
    loop_fma = _fma_per_wave(loop) * num_warps
    costed = costly(loop, code, loop_fma, _load_bytes)
    return Metrics(
        arch=arch,
        registers=registers,
        stack=_directive(text, "private_segment_fixed_size"),
        spills=_directive(text, "vgpr_spill_count") + _directive(text, "sgpr_spill_count"),
        loop_spills=sum(x.op.startswith("scratch_") for x in loop),
        shared=shared,
        shared_limit=unit.lds,
        blocks_per_sm=fits[limiter],
        limiter=limiter,
        instructions=len(code),
        loops=loops,
        loop_instructions=len(loop),
        loop_fma=loop_fma,
        source_fma=source_fma,
        tensor_ops=instructions_of(code, lambda x: x.op[2:6] if x.op.startswith(MATRIX) else None),
        expected_tensor_ops=_expected_tensor_ops(arch, dots),
        vec128=share_of_wide(_width(x.op) for x in costed if x.op.startswith(GLOBAL_LOADS)),
        atomics=sorted({x.op for x in code if x.op.startswith(ATOMICS)}),
        threads=num_warps * unit.wave,
        cycles=_cycles(costed, unit, num_warps),
        moved=_moved_bytes(costed) * num_warps * unit.wave,
        dram=unit.dram,
        mix=dict(Counter(x.op for x in loop).most_common()),
    )


def disassemble(kernels: Sequence) -> list[list[Instruction]]:
    """Of each kernel its instructions in order."""
    return [_instructions(kernel.asm["amdgcn"]) for kernel in kernels]


def _instructions(text: str) -> list[Instruction]:
    labels, rows = {}, []
    for line in text.split(".amdhsa_kernel")[0].splitlines():
        line = line.split(";")[0].rstrip()
        if label := re.match(r"(\.?[\w$.]+):", line):
            labels[label[1]] = len(rows)
        elif row := re.match(r"\s+([a-z]\w+)\s*(.*)", line):
            rows.append((row[1], row[2]))
    is_branch = re.compile(r"s_c?branch")
    return [Instruction(op, labels.get(rest.strip()) if is_branch.match(op) else None) for op, rest in rows]


def _directive(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found[1]) if found else 0


def _matrix_shape(op: str) -> tuple[int, str] | None:
    """(multiply-adds of one wave, operand type) of a matrix instruction."""
    shape = re.match(r"v_(?:mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)(?:_\d+b)?_(\w+?)(?:_1k)?$", op)
    return (int(shape[1]) * int(shape[2]) * int(shape[3]), shape[4]) if shape else None


def _expected_tensor_ops(arch: str, dots: list[Dot]) -> dict[str, bool]:
    """{instruction: must it be there}: CDNA has matrix instructions for every type, RDNA 3 for halves only."""
    if arch.startswith("gfx11"):
        return {"wmma": True} if any(dot.precision == "half" for dot in dots) else {}
    return {"mfma": True} if dots else {}


def _fma_per_wave(body: Iterable[Instruction]) -> int:
    return sum(shape[0] for x in body if (shape := _matrix_shape(x.op)))


def _width(op: str) -> int:
    """Bytes per lane of a memory instruction."""
    for mark, width in (
        ("x4", 16),
        ("b128", 16),
        ("x3", 12),
        ("x2", 8),
        ("b64", 8),
        ("short", 2),
        ("u16", 2),
        ("b16", 2),
    ):
        if mark in op:
            return width * (2 if op.startswith(("ds_read2", "ds_write2")) else 1)
    return 1 if "byte" in op or "u8" in op or "b8" in op else 4


def _load_bytes(body: Iterable[Instruction]) -> int:
    return sum(_width(x.op) for x in body if x.op.startswith(GLOBAL_LOADS))


def _moved_bytes(body: Iterable[Instruction]) -> int:
    """Bytes per lane that are loaded and stored."""
    return sum(_width(x.op) for x in body if x.op.startswith((*GLOBAL_LOADS, *GLOBAL_STORES)))


def _cycles(loop: list[Instruction], unit: ComputeUnit, num_warps: int) -> dict[str, float]:
    """Cycles of one loop turn of one block, per pipe of a SIMD."""
    counts: Counter[str] = Counter()
    tensor = 0.0
    for x in loop:
        if shape := _matrix_shape(x.op):
            tensor += shape[0] / (unit.half_fma / unit.simds * RELATIVE_RATE.get(shape[1], 1))
        elif x.op.startswith(TRANSCENDENTAL):
            counts["vector"] += TRANSCENDENTAL_COST * unit.vector_cycles
        elif x.op.startswith("v_"):
            counts["vector"] += unit.vector_cycles
        elif x.op.startswith("ds_"):
            counts["shared"] += _width(x.op) * unit.wave / (LDS_BYTES_PER_CYCLE / unit.simds)
    waves_per_simd = num_warps / unit.simds
    per_wave = {"tensor": tensor, "issue": len(loop), "vector": counts["vector"], "shared": counts["shared"]}
    return {pipe: value * waves_per_simd for pipe, value in per_wave.items()}
