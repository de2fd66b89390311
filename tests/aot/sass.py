"""NVIDIA machine code of a compiled kernel: registers, spills, occupancy, and what one turn of its main loop costs.

Read from the disassembly (nvdisasm, cuobjdump: both come with Triton), so exact for this compiler. nvdisasm takes a quarter
of a second to start, as long as compiling a small kernel, so it reads the code of many kernels as one raw image. The cycles are a
static bound per pipe and loop turn, without latencies, caches and DRAM: good for ordering versions of one kernel and for
seeing which pipe limits it, not for a rate.
"""

import bisect
import contextlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

from tests.aot.metrics import Dot, Metrics, costly, instructions_of, loop_fma_of, main_loop, share_of_wide

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
    dram: float  # bytes per clock for one SM: bandwidth over SMs and boost clock


PROCESSORS = {
    "sm_80": Processor(164 * KIB, 163 * KIB, 2048, 32, 1024, 2, 13.4),  # A100 80 GB: 2039 GB/s, 108 SMs, 1.41 GHz
    "sm_86": Processor(100 * KIB, 99 * KIB, 1536, 16, 512, 1, 6.6),  # RTX 3090: 936, 82, 1.70
    "sm_89": Processor(100 * KIB, 99 * KIB, 1536, 24, 512, 1, 3.1),  # RTX 4090: 1008, 128, 2.52
    "sm_90": Processor(228 * KIB, 227 * KIB, 2048, 32, 2048, 1, 12.8),  # H100 SXM: 3350, 132, 1.98
    "sm_100": Processor(228 * KIB, 227 * KIB, 2048, 32, 4096, 1, 27.5),  # B200: 8000, 148, 1.97
    "sm_120": Processor(100 * KIB, 99 * KIB, 1536, 24, 512, 1, 4.4),  # RTX 5090: 1792, 170, 2.41
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


def measure(kernel, listing, arch: str, num_warps: int, dots: list[Dot], tile_fma: int | None) -> Metrics:
    """Metrics of a kernel compiled for an NVIDIA target.

    listing: of `disassemble`; dots: its source's products; tile_fma: see `loop_fma_of`.
    """
    processor = PROCESSORS[arch]
    code, resources = listing
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
    costed = costly(loop, code, loop_fma, _load_bytes)
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
        vec128=share_of_wide(_load_width(x) for x in costed),
        atomics=sorted({x.op for x in code if x.name in ATOMICS}),
        threads=threads,
        cycles=_cycles(costed, processor, warps, loop_fma),
        moved=_moved_bytes(costed) * threads,
        dram=processor.dram,
        mix=dict(Counter(x.name for x in loop).most_common()),
    )


def disassemble(kernels: Sequence) -> list[tuple[list[Instruction], dict[str, int]]]:
    """Of each kernel, all of one target: its instructions in order, and cuobjdump's resource usage (REG, STACK, ...)."""
    images = [_machine_code(kernel.asm["cubin"]) for kernel in kernels]
    listings: list[list[tuple[int, str, str]]] = [[] for _ in kernels]  # address, op, operands
    starts = [sum(map(len, images[:index])) for index in range(len(images))]
    for address, op, operands in _rows(b"".join(images), kernels[0].asm["ptx"]) if kernels else ():
        index = bisect.bisect_right(starts, address) - 1
        listings[index].append((address, op, operands))
    return [(_linked(rows), _resources(kernel.asm["cubin"])) for rows, kernel in zip(listings, kernels, strict=True)]


def _rows(image: bytes, ptx: str) -> Iterable[tuple[int, str, str]]:
    """(address, op, operands) of the instructions of raw machine code."""
    architecture = re.search(r"^\.target sm_(\w+)", ptx, re.MULTILINE)[1]  # with its "a"
    with _written(image) as path:
        text = _run("nvdisasm", "-b", f"SM{architecture}", path)
    for line in text.splitlines():
        if row := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            yield int(row[1], 16), row[2], row[3].strip()


def _linked(rows: list[tuple[int, str, str]]) -> list[Instruction]:
    """Instructions with the indices that their branches go to."""
    index = {address: i for i, (address, _, _) in enumerate(rows)}
    code = []
    for _, op, operands in rows:
        to = re.search(r"0x([0-9a-f]+)$", operands) if op.startswith("BRA") else None
        code.append(Instruction(op, index.get(int(to[1], 16)) if to else None))
    return code


def _resources(cubin: bytes) -> dict[str, int]:
    with _written(cubin) as path:
        usage = _run("cuobjdump", "-res-usage", path)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}


def _machine_code(cubin: bytes) -> bytes:
    """The contents of an ELF file's code sections (ELF-64, little endian)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    strings = heads[names][4]  # of a head: name, type, flags, address, offset, size
    code = [head for head in heads if cubin.startswith(b".text.", strings + head[0])]
    return b"".join(cubin[head[4] : head[4] + head[5]] for head in code)


@contextlib.contextmanager
def _written(data: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.name


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


def _moved_bytes(body: Iterable[Instruction]) -> int:
    """Bytes per thread that are loaded and stored."""
    return sum(_width(x.op) for x in body if x.name in ("LDG", "LDGSTS", "STG"))


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
