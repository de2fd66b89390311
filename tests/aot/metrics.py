"""What is measured of one compiled kernel, and what its source says about matrix products: shared by all targets."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

HALF_TYPES = ("f16", "bf16")


@dataclass(frozen=True)
class Dot:
    """One `tl.dot` of a kernel's source: [rows, depth] x [depth, columns]; precision "half", "tf32", "ieee" or a type.

    loop: the number of the innermost loop around it, None outside loops.
    """

    rows: int
    columns: int
    depth: int
    precision: str
    loop: int | None

    @property
    def fma(self) -> int:
        return self.rows * self.columns * self.depth


@dataclass
class Metrics:
    """Static facts of one kernel at one target. `loop` means the main loop: see `main_loop`."""

    arch: str
    registers: int  # per thread
    stack: int  # bytes per thread of local memory
    spills: int  # instructions, whole kernel
    loop_spills: int
    shared: int  # bytes per block
    shared_limit: int
    blocks_per_sm: int  # 0: it cannot be launched
    limiter: str
    instructions: int
    loops: int  # innermost loops
    loop_instructions: int
    loop_fma: int  # multiply-adds of tensor instructions, all warps, per loop turn
    source_fma: int  # multiply-adds of one turn of the source's main loop
    tensor_ops: dict[str, int]  # instruction -> count, whole kernel
    expected_tensor_ops: dict[str, bool]  # instruction -> must it occur; others must not
    vec128: float | None  # share of the loop's global bytes in loads of 16 bytes per thread or TMA; None: no such load
    atomics: list[str]  # on global memory
    threads: int  # per block
    cycles: dict[str, float] = field(default_factory=dict)  # per pipe and loop turn
    moved: int = 0  # bytes that the threads of a block load and store in one loop turn
    dram: float = 1.0  # bytes per clock for one processor
    stages: int = 1  # of the loop's pipeline
    mix: dict[str, int] = field(default_factory=dict)  # instruction -> count, in the main loop, most frequent first
    elements: int | None = None  # of the streamed tensor that one loop turn of one block consumes
    stage_bytes: int | None = None  # of that tensor in one stage

    @property
    def pipe_share(self) -> float | None:
        """p = tensor cycles / cycles of the busiest pipe: 1 where the tensor cores limit; None without tensor work."""
        if not self.loop_fma:
            return None
        return self.cycles["tensor"] / max(self.cycles.values())

    @property
    def redundancy(self) -> float | None:
        """Multiply-adds executed over those in the source: above 1 warps repeat each other's work."""
        if not self.loop_fma or not self.source_fma:
            return None
        return self.loop_fma / self.source_fma

    @property
    def bound(self) -> str:
        """What limits the main loop: "tensor", "memory", or "issue", with the pipe in brackets where one is busier than that.

        Memory counts where nothing is read twice, in loops without products. A product's operands come from L2 again and again,
        how often depends on the grid: there it is the busiest pipe.
        """
        busiest = max(self.cycles, key=self.cycles.get)
        if not self.loop_fma and self.moved / self.dram >= self.cycles[busiest]:
            return "memory"
        return busiest if busiest in ("tensor", "issue") else f"issue ({busiest})"

    @property
    def instructions_per_element(self) -> float | None:
        """Instructions of all lanes in one loop turn, over the elements of the streamed tensor that it consumes."""
        return self.loop_instructions * self.threads / self.elements if self.elements else None

    @property
    def bytes_in_flight(self) -> int | None:
        """Bytes of the streamed tensor that one processor has asked for while it works on others."""
        return (self.stages - 1) * self.stage_bytes * self.blocks_per_sm if self.stage_bytes else None


def dots_of(ttir: str) -> list[Dot]:
    """The matrix products in a kernel's Triton IR, and the loops that they stand in."""
    dots, loops, count = [], [], 0  # loops: (indentation, number) of those that are open, outermost first
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and line.strip() and indent <= loops[-1][0]:
            loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append((indent, count))
            count += 1
        shape = re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>", line)
        if shape:
            declared = re.search(r"inputPrecision = (\w+)", line)
            precision = {"f32": declared[1] if declared else "ieee"}.get(shape[3], shape[3])
            precision = "half" if precision in HALF_TYPES else precision
            loop = loops[-1][1] if loops else None
            dots.append(Dot(int(shape[1]), int(shape[4]), int(shape[2]), precision, loop))
    return dots


def loop_fma_of(dots: Sequence[Dot], tile_fma: int | None) -> int:
    """Multiply-adds of one turn of the source's main loop: the one of `tile_fma` if there is one, else the largest."""
    loops = Counter()
    for dot in dots:
        if dot.loop is not None:
            loops[dot.loop] += dot.fma
    return tile_fma if tile_fma in loops.values() else max(loops.values(), default=0)


def main_loop(
    code: Sequence, fma: Callable[[Sequence], float], load_bytes: Callable[[Sequence], int], source_fma: int
) -> tuple[list, int]:
    """The main loop's instructions, and the number of innermost loops; without a loop, the whole code.

    Instructions have `target`: the index that a branch goes to, else None. Of the innermost loops it is the one with
    `source_fma` multiply-adds; if none has these, the one with the most; without tensor work, the one that loads the
    most bytes. Of equals it is the shortest: a kernel that masks only its last tiles has a longer copy of the same loop,
    which runs rarely.
    """
    spans = [(x.target, i) for i, x in enumerate(code) if x.target is not None and x.target < i]
    innermost = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    bodies = [list(code[first : last + 1]) for first, last in innermost]
    if not bodies:
        return list(code), 0

    def rank(body: list) -> tuple[float, ...]:
        work = fma(body)
        return work > 0 and work == source_fma, work, 0 if work else load_bytes(body), -len(body)

    return max(bodies, key=rank), len(bodies)


def costly(loop: list, code: Sequence, fma: float, load_bytes: Callable[[Sequence], int]) -> Sequence:
    """The main loop, or the whole code where that loop neither multiplies nor loads: AMD's compiler branches around stores."""
    return loop if fma or load_bytes(loop) else code


def instructions_of(code: Sequence, kind: Callable[..., str | None]) -> dict[str, int]:
    """Instructions counted by kind; those of kind None are left out."""
    counts = Counter(kind(x) for x in code)
    counts.pop(None, None)
    return dict(sorted(counts.items()))


def share_of_wide(widths: Iterable[int]) -> float | None:
    """Of the bytes that loads of these widths move, the share in loads of 16; None without a load."""
    moved = [width for width in widths if width]
    return sum(width for width in moved if width == 16) / sum(moved) if moved else None
