"""The ops that are measured, one file each."""

from benchmarks.case import Op


def ops() -> dict[str, Op]:
    """Every op by name."""
    from benchmarks.ops import attention, elementwise, lora, loss, quantize

    return {op.name: op for op in (lora.OP, attention.OP, loss.OP, *elementwise.OPS, quantize.OP)}
