"""bfloat16 for Triton's CPU interpreter (TRITON_INTERPRET=1), and stricter semantics where a GPU is stricter.

The interpreter (tried: Triton 3.8.0 and 3.9.0) keeps bfloat16 as numpy uint16. Sums, products, comparisons and `tl.dot` of
bfloat16 are then integer arithmetic, with no error raised, and float32 -> bfloat16 truncates where hardware rounds to
nearest even. Keeping bfloat16 as `ml_dtypes.bfloat16`, a true numpy dtype, mends all of it in one place: the kernels run
as they ship, without an upcast that only tests would see.

Two more differences to a GPU are removed:

- lanes of a load that are masked off without `other=` read NaN (integers: 0x5a in every byte) instead of 0, since
  on a GPU their value is undefined;
- `tl.dot` of float32 with `input_precision="tf32"` (the default) rounds its operands to tf32, 10 bits of mantissa.

`install()` patches the interpreter of this process; conftest.py calls it once, before a kernel runs.
Not modelled: rounding of float32 -> float8, libdevice, inline assembly.
"""

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
BITS16 = np.dtype(np.uint16)
POISON_BYTE = 0x5A
TF32_DROPPED_BITS = 13  # float32 has 23 bits of mantissa, tf32 has 10


def install() -> None:
    """Patch `triton.runtime.interpreter`; a second call does nothing."""
    from triton.runtime import interpreter

    if getattr(interpreter, "bfloat16_is_patched", False):
        return
    interpreter.bfloat16_is_patched = True
    numpy_dtype = _patch_storage(interpreter)
    _patch_memory(interpreter, numpy_dtype)
    _patch_casts(interpreter, numpy_dtype)
    _patch_dot(interpreter)
    _patch_atomics(interpreter)


def poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of values that no kernel may use: NaN, or 0x5a in every byte of an integer, or True."""
    if dtype == BFLOAT16 or dtype.kind == "f":
        return np.full(shape, np.nan, np.float32).astype(dtype)
    if dtype == np.bool_:
        return np.ones(shape, np.bool_)
    return np.full((*shape, dtype.itemsize), POISON_BYTE, np.uint8).view(dtype).reshape(shape)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits of mantissa, to nearest with ties away from zero (cvt.rna.tf32.f32)."""
    half = np.uint32(1 << (TF32_DROPPED_BITS - 1))
    keep = np.uint32(0xFFFFFFFF << TF32_DROPPED_BITS & 0xFFFFFFFF)
    bits = np.ascontiguousarray(values).view(np.uint32)
    return np.where(np.isfinite(values), ((bits + half) & keep).view(np.float32), values)


def _as_bits(values: np.ndarray) -> np.ndarray:
    """The uint16 image of bfloat16 values, which is what the interpreter's compiled part moves; others unchanged."""
    values = np.ascontiguousarray(values)
    return values.view(BITS16) if values.dtype == BFLOAT16 else values


def _patch_storage(interpreter):
    import triton.language as tl

    original = interpreter._get_np_dtype

    def numpy_dtype(dtype) -> np.dtype:
        scalar = dtype.scalar if isinstance(dtype, tl.block_type) else dtype
        return BFLOAT16 if scalar == tl.bfloat16 else original(dtype)

    interpreter._get_np_dtype = numpy_dtype
    return numpy_dtype


def _patch_memory(interpreter, numpy_dtype) -> None:
    builder, handle, memory = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._interpreter

    # What follows `other` differs between Triton 3.8 and 3.9 (cache modifiers), and the interpreter ignores it.
    def create_masked_load(self, pointers, mask, other, *_, **__):
        element = pointers.get_element_ty()
        dtype = numpy_dtype(element)
        fallback = poison(pointers.data.shape, dtype) if other is None else other.data
        moved = BITS16 if dtype == BFLOAT16 else dtype
        loaded = memory.load(pointers.data, np.asarray(mask.data), _as_bits(fallback), moved)
        return handle(loaded.view(dtype), element)

    def create_masked_store(self, pointers, value, mask, *_, **__):
        return memory.store(pointers.data, _as_bits(value.data), np.asarray(mask.data))

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store


def _patch_casts(interpreter, numpy_dtype) -> None:
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_floats = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
    original_cast, original_float_cast = builder.cast_impl, builder.create_fp_to_fp

    def is_plain(dtype) -> bool:
        return dtype.scalar in plain_floats or dtype.scalar.is_int()

    def convert(source, target):
        """numpy's conversion: to nearest even, overflow to infinity, NaN kept, float to integer truncates."""
        with np.errstate(all="ignore"):
            return handle(source.data.astype(numpy_dtype(target)), target.scalar)

    def cast_impl(self, source, target):
        if is_plain(source.dtype) and is_plain(target):
            return convert(source, target)
        return original_cast(self, source, target)

    def create_fp_to_fp(self, source, target, rounding_mode):
        towards_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        if is_plain(source.dtype) and is_plain(target) and not towards_zero:
            return convert(source, target)
        return original_float_cast(self, source, target, rounding_mode)

    def get_bf16(self, value):
        return handle(np.array([value], np.float32).astype(BFLOAT16), tl.bfloat16)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16


def _patch_dot(interpreter) -> None:
    import triton.language as tl
    from triton._C.libtriton import ir

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def operand(tensor, to_tf32: bool):
        """What the tensor core multiplies: halves widened exactly, float32 as it is or rounded to tf32."""
        if tensor.dtype.scalar in (tl.float16, tl.bfloat16):
            return handle(tensor.data.astype(np.float32), tl.float32)
        if to_tf32 and tensor.dtype.scalar == tl.float32:
            return handle(round_to_tf32(tensor.data), tl.float32)
        return tensor

    def create_dot(self, a, b, acc, input_precision, *rest):
        to_tf32 = input_precision == ir.INPUT_PRECISION.TF32
        return original(self, operand(a, to_tf32), operand(b, to_tf32), acc, input_precision, *rest)

    builder.create_dot = create_dot


def _patch_atomics(interpreter) -> None:
    from triton._C.libtriton import ir

    builder, handle, memory = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._interpreter
    original = builder.create_atomic_rmw

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        if value.data.dtype != BFLOAT16:
            return original(self, operation, pointers, value, mask, *rest)
        if operation not in (ir.ATOMIC_OP.FADD, ir.ATOMIC_OP.XCHG):
            raise NotImplementedError(f"atomic on bfloat16: expected add or exchange, got {operation}")
        shape = pointers.data.shape
        addresses, values, active = (
            np.broadcast_to(np.asarray(tensor.data), shape).reshape(-1) for tensor in (pointers, value, mask)
        )
        before = np.zeros(addresses.shape, BFLOAT16)
        lane_on = np.ones(1, np.bool_)
        for lane in np.flatnonzero(active):  # one after the other: equal addresses within a block accumulate
            address = addresses[lane : lane + 1].copy()
            old = memory.load(address, lane_on, np.zeros(1, BITS16), BITS16).view(BFLOAT16)
            before[lane] = old[0]
            new = values[lane : lane + 1]
            if operation == ir.ATOMIC_OP.FADD:
                new = old + new
            memory.store(address, _as_bits(new), lane_on)
        return handle(before.reshape(shape), value.dtype.scalar)

    builder.create_atomic_rmw = create_atomic_rmw
