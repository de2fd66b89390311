"""Watches every memory access of kernels in Triton's CPU interpreter: bytes moved, accesses out of bounds, races.

    with Probe() as probe:
        launcher(...)
    assert probe.bytes_asked(0) == {("x_ptr", "load"): ..., ("y_ptr", "store"): ...}

Bytes are counted per tensor argument and direction ("load", "store", "atomic"):

    asked    bytes of all active lanes: what the instructions ask for
    sector   32-byte sectors of each access of each program: what coalescing leaves between the SM and its L1
    program  distinct sectors of each program: L2 to SM, if a program fetches a sector once
    unique   distinct sectors of the launch: DRAM, with an ideal L2 (compulsory traffic)

In bounds means: an element of the view that was passed, so that the gaps of a strided tensor are out of bounds too.
A race is one address touched by two programs of one launch, by at least one of them with a plain store.
Cache policies, TMA and the order of programs are not modelled; addresses are compared as they are accessed, so two
programs that touch one word with different widths are compared by their first byte only.
"""

import inspect
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

SECTOR_SHIFT = 5  # 32 bytes
SECTOR_BYTES = 1 << SECTOR_SHIFT
KINDS = ("load", "store", "atomic")
HOOKED_ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that belongs to none of its tensor arguments."""


class RaceError(AssertionError):
    """Two programs of one launch touched one element, one of them with a plain store."""


@dataclass(frozen=True)
class TensorArgument:
    """Where a tensor argument's elements lie; offsets and strides in bytes."""

    name: str
    start: int
    itemsize: int
    dims: tuple[tuple[int, int], ...]  # (stride, size), largest stride first, without dims of one element

    @classmethod
    def of(cls, name: str, tensor) -> "TensorArgument":
        itemsize = tensor.element_size()
        dims = [(s * itemsize, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1 and s > 0]
        return cls(name, tensor.data_ptr(), itemsize, tuple(sorted(dims, reverse=True)))

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + sum(stride * (size - 1) for stride, size in self.dims) + self.itemsize

    def owns(self, addresses: np.ndarray) -> np.ndarray:
        """For each byte address: does it lie within an element of the view?"""
        inside = (addresses >= self.start) & (addresses < self.end)
        if not inside.any():
            return inside
        rest = np.where(inside, addresses - self.start, 0)
        for stride, size in self.dims:
            index = np.minimum(rest // stride, size - 1)
            rest = rest - index * stride
        return inside & (rest < self.itemsize)


@dataclass(frozen=True)
class Race:
    """An address that races, as the first example of `count` such addresses of one tensor."""

    tensor: str
    element: int  # byte offset from the tensor's start over its item size
    programs: tuple[int, ...]
    lines: tuple[int, ...]
    count: int


@dataclass
class Launch:
    """One kernel launch: its arguments, and what its programs touched."""

    kernel: str
    file: str
    tensors: list[TensorArgument]
    asked: Counter = field(default_factory=Counter)
    sectors: Counter = field(default_factory=Counter)
    touched: dict = field(default_factory=lambda: defaultdict(list))  # key -> [(program, addresses, line)]

    def record(self, key: tuple[str, str], program: int, addresses: np.ndarray, size: int, line: int) -> None:
        """Count one access of one program to one tensor: `size` bytes at each address."""
        self.asked[key] += addresses.size * size
        self.sectors[key] += np.unique(addresses >> SECTOR_SHIFT).size
        self.touched[key].append((program, np.unique(addresses), line))

    def program_bytes(self, key: tuple[str, str]) -> int:
        """Bytes of distinct sectors, counted once per program."""
        per_program = defaultdict(list)
        for program, addresses, _ in self.touched[key]:
            per_program[program].append(addresses >> SECTOR_SHIFT)
        return SECTOR_BYTES * sum(np.unique(np.concatenate(parts)).size for parts in per_program.values())

    def unique_bytes(self, key: tuple[str, str]) -> int:
        """Bytes of distinct sectors over the whole launch."""
        sectors = [addresses >> SECTOR_SHIFT for _, addresses, _ in self.touched[key]]
        return SECTOR_BYTES * np.unique(np.concatenate(sectors)).size

    def report(self) -> str:
        """A table of bytes per tensor and direction, with the share of used bytes per sector and the reuse."""
        head = f"{'tensor':>16} {'kind':>6} {'asked':>12} {'sector':>12} {'program':>12} {'unique':>12}"
        rows = [f"{self.kernel}: bytes", f"{head} {'coalesced':>9} {'reuse':>6}"]
        for key in sorted(self.asked):
            asked, sector, unique = self.asked[key], self.sectors[key] * SECTOR_BYTES, self.unique_bytes(key)
            rows.append(
                f"{key[0]:>16} {key[1]:>6} {asked:12d} {sector:12d} {self.program_bytes(key):12d} {unique:12d} "
                f"{asked / sector:9.2f} {asked / unique:6.1f}"
            )
        return "\n".join(rows)

    def races(self) -> list[Race]:
        """Every tensor's races, over all names under which its memory was passed."""
        stored = [entry for (_, kind), entries in self.touched.items() if kind == "store" for entry in entries]
        if not stored:
            return []
        written = np.unique(np.concatenate([addresses for _, addresses, _ in stored]))
        addresses, programs, lines = [], [], []
        for entries in self.touched.values():
            for program, touched, line in entries:
                shared = touched[np.isin(touched, written, assume_unique=True)]
                addresses.append(shared)
                programs.append(np.full(shared.size, program, np.int64))
                lines.append(np.full(shared.size, line, np.int64))
        address, program, line = (np.concatenate(parts) for parts in (addresses, programs, lines))
        order = np.lexsort((program, address))
        address, program, line = address[order], program[order], line[order]
        first = np.flatnonzero(np.r_[True, address[1:] != address[:-1]])
        last = np.r_[first[1:], address.size]
        racing = np.flatnonzero(program[first] != program[last - 1])
        by_tensor = defaultdict(list)
        for group in racing:
            by_tensor[self._owner(int(address[first[group]]))].append(group)
        found = []
        for tensor, groups in by_tensor.items():
            span = slice(first[groups[0]], last[groups[0]])
            element = (int(address[span][0]) - tensor.start) // tensor.itemsize
            who = tuple(int(p) for p in np.unique(program[span]))
            where = tuple(int(n) for n in np.unique(line[span]))
            found.append(Race(tensor.name, element, who, where, len(groups)))
        return found

    def _owner(self, address: int) -> TensorArgument:
        return next(tensor for tensor in self.tensors if tensor.owns(np.array([address]))[0])


class Probe:
    """Context that watches all kernel launches of this process.

    strict: raise OutOfBoundsError at the access and RaceError at the end of the launch; else collect them in `faults`
    and `Launch.races()`. An access out of bounds is never carried out.
    """

    def __init__(self, strict: bool = True):
        self.strict = strict
        self.launches: list[Launch] = []
        self.faults: list[str] = []
        self._replaced: list[tuple[type, str, object]] = []

    def bytes_asked(self, index: int = -1) -> dict[tuple[str, str], int]:
        """{(argument, "load" | "store" | "atomic"): bytes of active lanes} of launch `index`."""
        return dict(self.launches[index].asked)

    def launches_of(self, kernel: str) -> list[Launch]:
        """The launches of the kernel of this name, in order."""
        return [launch for launch in self.launches if launch.kernel == kernel]

    def __enter__(self) -> "Probe":
        from triton.runtime import interpreter

        for name in HOOKED_ACCESSES:
            self._replace(interpreter.InterpreterBuilder, name, self._watched_access(interpreter, name))
        self._replace(interpreter.GridExecutor, "_init_args_hst", self._watched_arguments(interpreter))
        self._replace(interpreter.GridExecutor, "__call__", self._watched_launch(interpreter))
        return self

    def __exit__(self, *error) -> None:
        while self._replaced:
            owner, name, original = self._replaced.pop()
            setattr(owner, name, original)

    def _replace(self, owner: type, name: str, hook) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, hook)

    def _watched_access(self, interpreter, name: str):
        original = getattr(interpreter.InterpreterBuilder, name)
        kind = next(kind for kind in KINDS if kind in name)
        # Positions of (pointers, mask), counted from the first argument after the builder; a compare-and-swap has no mask.
        pointers_at = 1 if name == "create_atomic_rmw" else 0
        mask_at = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}.get(name)

        def hook(builder, *args, **kwargs):
            pointers = args[pointers_at]
            active = np.ones(pointers.data.shape, np.bool_) if mask_at is None else np.asarray(args[mask_at].data)
            allowed = self._check(builder, kind, pointers, active)
            if mask_at is not None and allowed is not active:
                mask = interpreter.TensorHandle(allowed, interpreter.tl.int1)
                args = (*args[:mask_at], mask, *args[mask_at + 1 :])
            return original(builder, *args, **kwargs)

        return hook

    def _watched_arguments(self, interpreter):
        original = interpreter.GridExecutor._init_args_hst

        def hook(executor, args, kwargs):
            args, kwargs = original(executor, args, kwargs)
            tensors = []
            for name, value in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
                value = getattr(value, "base", value)  # a tensor descriptor's tensor
                if hasattr(value, "data_ptr") and value.numel():
                    tensors.append(TensorArgument.of(name, value))
            self.launches.append(Launch(executor.fn.__name__, inspect.getsourcefile(executor.fn), tensors))
            return args, kwargs

        return hook

    def _watched_launch(self, interpreter):
        original = interpreter.GridExecutor.__call__

        def hook(executor, *args, **kwargs):
            try:
                original(executor, *args, **kwargs)
            except interpreter.InterpreterError as error:
                cause = error.__cause__
                while isinstance(cause, interpreter.InterpreterError):
                    cause = cause.__cause__
                if isinstance(cause, OutOfBoundsError):
                    raise cause from None
                raise
            if self.strict and (races := self.launches[-1].races()):
                raise RaceError(f"{self.launches[-1].kernel}: {races}")

        return hook

    def _check(self, builder, kind: str, pointers, mask: np.ndarray) -> np.ndarray:
        """Record an access; returns the mask of lanes that may proceed (`mask` itself where all may)."""
        launch = self.launches[-1]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, mask.shape)
        active = np.broadcast_to(mask, shape)
        addresses = np.broadcast_to(pointers.data, shape)[active].astype(np.int64)
        if not addresses.size:
            return mask
        program, line = _program(builder), _line_in(launch.file)
        unowned = np.ones(addresses.shape, np.bool_)
        for tensor in launch.tensors:
            owned = unowned & tensor.owns(addresses) & tensor.owns(addresses + size - 1)
            if owned.any():
                launch.record((tensor.name, kind), program, addresses[owned], size, line)
                unowned &= ~owned
            if not unowned.any():
                return mask
        message = (
            f"{launch.kernel}:{line}, program {builder.grid_idx}: {kind} of {int(unowned.sum())} lane(s) "
            f"out of bounds, first {_describe(int(addresses[unowned][0]), launch.tensors)}"
        )
        self.faults.append(message)
        if self.strict:
            raise OutOfBoundsError(message)
        allowed = active.copy()
        allowed[active] = ~unowned
        return allowed


def _program(builder) -> int:
    """The running program's place in the grid, as one number."""
    (x, y, z), (size_x, size_y, _) = builder.grid_idx, builder.grid_dim
    return (z * size_y + y) * size_x + x


def _line_in(file: str) -> int:
    """The line of `file` that runs now, innermost; -1 if none of its functions is on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == file:
            return frame.f_lineno
        frame = frame.f_back
    return -1


def _describe(address: int, tensors: list[TensorArgument]) -> str:
    """Where an address lies, told from the nearest tensor."""
    if not tensors:
        return f"address {address:#x}; the kernel has no tensor argument"
    nearest = min(tensors, key=lambda tensor: max(tensor.start - address, address - (tensor.end - 1), 0))
    name, itemsize = nearest.name, nearest.itemsize
    if address >= nearest.end:
        return f"{(address - nearest.end) // itemsize + 1} element(s) past the end of {name}"
    if address < nearest.start:
        return f"{-(-(nearest.start - address) // itemsize)} element(s) before the start of {name}"
    return f"{(address - nearest.start) // itemsize} element(s) into {name}, in a gap between its rows"
