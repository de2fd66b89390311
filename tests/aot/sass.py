"""NVIDIA machine code of a compiled kernel: registers, spills, occupancy, and what one turn of its main loop costs.

Read from the disassembly (nvdisasm, cuobjdump: both come with Triton), so exact for this compiler. The cycles are a
static bound per pipe and loop turn, without latencies, caches and DRAM: good for ordering versions of one kernel and for
seeing which pipe limits it, not for a rate.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.aot.metrics import Dot, Metrics, instructions_of, loop_fma_of, main_loop, share_of_wide

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KIB = 1024
REGISTERS_PER_SM = 65536
RESERVED_SHARED = 1 * KIB  # per block, by the driver
TENSOR_MEMORY_COLUMNS = 512  # per SM, sm_100
WARP = 32
SUBCORES = 4  # warp schedulers per SM
WIDE_ROWS = 64  # rows of one warpgroup's product


@dataclass(frozen=True)
class Processor:
    """One SM (CUDA C++ Programming Guide, tables of compute capabilities)."""

    shared: int  # bytes for all blocks
    shared_per_block: int
    threads: int
    blocks: int
    half_fma: int  # dense float16 multiply-adds per clock, tensor cores
    fp32_cycles: float  # cycles of one warp's float32 instruction on its sub-core


PROCESSORS = {
    "sm_80": Processor(164 * KIB, 163 * KIB, 2048, 32, 1024, 2),
    "sm_86": Processor(100 * KIB, 99 * KIB, 1536, 16, 512, 1),
    "sm_89": Processor(100 * KIB, 99 * KIB, 1536, 24, 512, 1),
    "sm_90": Processor(228 * KIB, 227 * KIB, 2048, 32, 2048, 1),
    "sm_100": Processor(228 * KIB, 227 * KIB, 2048, 32, 4096, 1),
    "sm_120": Processor(100 * KIB, 99 * KIB, 1536, 24, 512, 1),
}

# Cycles of one warp's instruction on its pipe (arithmetic throughput table of the same guide).
SPECIAL_CYCLES, INTEGER_CYCLES, SHUFFLE_CYCLES, SHARED_BYTES_PER_CYCLE = 8, 2, 4, 32
SPECIAL = {"MUFU", "F2F", "I2F", "F2I", "POPC"}
FLOAT = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "IMAD", "FFMA2", "FADD2", "FMUL2"}
INTEGER = {
    *("IADD3", "IADD", "LOP3", "LOP", "SHF", "ISETP", "SEL", "PRMT", "LEA", "VIADD", "IMNMX", "VIMNMX", "BMSK", "SGXT"),
    *("FSEL", "FSETP", "FMNMX", "F2FP", "HSETP2", "HMNMX2", "PLOP3", "VIADDMNMX", "IABS"),
}
# On global memory. Not ATOMS, which counts tensor-memory columns on sm_100, nor REDUX, a reduction within a warp.
ATOMICS = {"RED", "REDG", "ATOM", "ATOMG", "UTMAREDG", "UBLKRED"}
TENSOR_FMA = {"884": 256, "1684": 512, "1688": 1024, "16816": 2048, "16832": 4096, "16864": 8192}


@dataclass(frozen=True)
class Instruction:
    """op "HMMA.16816.F32.BF16"; target: index of the instruction that a branch goes to, else None."""

    op: str
    target: int | None

    @property
    def name(self) -> str:
        return self.op.split(".", 1)[0]


def measure(kernel, arch: str, num_warps: int, dots: list[Dot], tile_fma: int | None) -> Metrics:
    """Metrics of a kernel compiled for an NVIDIA target; dots: its source's products; tile_fma: see `loop_fma_of`."""
    processor = PROCESSORS[arch]
    code, resources = disassemble(kernel.asm["cubin"])
    threads_line = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", kernel.asm["ptx"])
    threads = int(threads_line[1]) if threads_line else num_warps * WARP
    warps = threads // WARP
    fits = {
        "registers": _warps_by_registers(resources["REG"]) // warps,
        "shared": processor.shared // (kernel.metadata.shared + RESERVED_SHARED),
        "threads": processor.threads // threads,
        "blocks": processor.blocks,
    }
    if tensor_memory := getattr(kernel.metadata, "tmem_size", 0) or 0:
        fits["tensor memory"] = TENSOR_MEMORY_COLUMNS // tensor_memory
    limiter = min(fits, key=fits.get)

    source_fma = loop_fma_of(dots, tile_fma)
    loop, loops = main_loop(code, lambda body: _fma_per_warp(body) * warps, _load_bytes, source_fma)
    hidden_shapes = any(x.op.startswith("UTC") for x in loop)  # tcgen05: the shape is in a descriptor
    loop_fma = source_fma if hidden_shapes else _fma_per_warp(loop) * warps
    return Metrics(
        arch=arch,
        registers=resources["REG"],
        stack=resources["STACK"],
        spills=_spills(code),
        loop_spills=_spills(loop),
        shared=kernel.metadata.shared,
        shared_limit=processor.shared_per_block,
        blocks_per_sm=fits[limiter],
        limiter=limiter,
        instructions=len(code),
        loops=loops,
        loop_instructions=len(loop),
        loop_fma=round(loop_fma),
        source_fma=source_fma,
        tensor_ops=instructions_of(code, _tensor_kind),
        expected_tensor_ops=_expected_tensor_ops(arch, dots),
        vec128=share_of_wide(_load_width(x) for x in loop),
        atomics=sorted({x.op for x in code if x.name in ATOMICS}),
        threads=threads,
        cycles=_cycles(loop, processor, warps, loop_fma),
    )


def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and cuobjdump's resource usage (REG, STACK, SHARED, LOCAL)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _run("nvdisasm", "-c", "-ndf", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    labels, rows = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = len(rows)
        elif row := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            rows.append((row[1], re.search(r"`\((\.L_\w+)\)", row[2])))
    code = [Instruction(op, labels.get(label[1]) if label and op.startswith("BRA") else None) for op, label in rows]
    return code, {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _warps_by_registers(registers: int) -> int:
    """Warps whose registers fit into an SM: allocated by 8 per thread, and for 4 warps at a time."""
    per_warp = -(-registers // 8) * 8 * WARP
    return REGISTERS_PER_SM // per_warp // SUBCORES * SUBCORES


def _spills(code: Iterable[Instruction]) -> int:
    return sum(x.name in ("STL", "LDL") for x in code)


def _tensor_kind(x: Instruction) -> str | None:
    return x.name if "MMA" in x.name else None


def _fma_per_warp(body: Iterable[Instruction]) -> float:
    """Multiply-adds on tensor cores by one warp; a warpgroup's instruction counts for a quarter."""
    total = 0.0
    for x in body:
        if shape := re.match(r"[HBIQ]GMMA\.(?:SP\.)?(\d+)x(\d+)x(\d+)", x.op):
            total += int(shape[1]) * int(shape[2]) * int(shape[3]) / 4
        elif shape := re.match(r"[HIQ]MMA\.(\d+)", x.op):
            total += TENSOR_FMA[shape[1]]
        elif x.op.startswith("UTC") and "MMA" in x.op:
            total += 1
    return total


def _expected_tensor_ops(arch: str, dots: list[Dot]) -> dict[str, bool]:
    """{instruction: must it be there}; an instruction that is not named must not be there."""
    wide = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(arch)
    expected: dict[str, bool] = {}
    for dot in dots:
        if dot.precision == "half":
            expected[wide if wide and dot.rows >= WIDE_ROWS else "HMMA"] = True
        elif dot.precision == "tf32":  # wgmma takes tf32 only where both operands lie along K
            for name in filter(None, ("HMMA", wide)):
                expected.setdefault(name, False)
    return expected


def _width(op: str) -> int:
    """Bytes per thread of a memory instruction."""
    parts = op.split(".")
    if parts[0] == "LDSM":
        return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in parts if part in widths), 4)


def _load_width(x: Instruction) -> int:
    """Bytes per thread that an instruction loads from global memory; a TMA load counts as the widest."""
    return 16 if x.name == "UTMALDG" else _width(x.op) if x.name in ("LDG", "LDGSTS") else 0


def _load_bytes(body: Iterable[Instruction]) -> int:
    return sum(_load_width(x) for x in body)


def _cycles(loop: list[Instruction], processor: Processor, warps: int, fma: float) -> dict[str, float]:
    """Cycles of one loop turn of one block, per pipe of a sub-core."""
    names = Counter(x.name for x in loop)
    tf32 = any("TF32" in x.op for x in loop)
    tensor_rate = processor.half_fma / (2 if tf32 else 1)
    shared = sum(_width(x.op) * WARP for x in loop if x.name in ("LDS", "STS", "LDSM", "STSM"))
    per_warp = {
        "issue": len(loop),
        "shared": shared / SHARED_BYTES_PER_CYCLE,
        "float": processor.fp32_cycles * sum(names[name] for name in FLOAT),
        "integer": INTEGER_CYCLES * sum(names[name] for name in INTEGER),
        "special": SPECIAL_CYCLES * sum(names[name] for name in SPECIAL),
        "shuffle": SHUFFLE_CYCLES * names["SHFL"],
    }
    cycles = {pipe: value * warps / SUBCORES for pipe, value in per_warp.items()}
    return {"tensor": fma / tensor_rate, **cycles}
