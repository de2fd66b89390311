"""The kernels of DoRA, of projections that share x, and of batches with several adapters, for ahead-of-time compilation.

As in aot_cases.py a recording of the launchers on meta tensors: 8192 and 16 rows of 4096 x 4096; groups are q, k, v of a
model with grouped heads.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from fastpeft.kernels import dora, lora_group, lora_rows
from fastpeft.kernels.aot_cases import BF16, FP32, LIKE_ANOTHER, AotCase, case_of, target_for
from fastpeft.kernels.launch import Launch, record_launches
from fastpeft.kernels.tiling import Target, padded_rank

_N = _K = 4096
_GROUP_N = (4096, 1024, 1024)
_LARGE, _SKINNY = 8192, 16
_THRESHOLD = 6554  # p = 0.1
# dtype of x and w, dtype of a and b, rank of the members, rows, members with dropout
_GROUPS = [
    (BF16, BF16, 16, _LARGE, 0),
    (BF16, BF16, 16, _LARGE, 3),
    (BF16, BF16, 16, _SKINNY, 0),
    (BF16, BF16, 64, _LARGE, 0),
    (BF16, FP32, 128, _LARGE, 1),
    (BF16, FP32, 128, _LARGE, 0),
    (FP32, FP32, 16, _LARGE, 0),
]
# dtype of x, dtype of a and b, rank, rows per segment, segments
_ROWS = [
    (BF16, BF16, 16, 2048, 4),
    (BF16, BF16, 16, 1, 64),
    (BF16, FP32, 64, 2048, 4),
    (BF16, BF16, 128, 1, 64),
    (FP32, FP32, 16, 2048, 4),
]
_ADAPTERS = 4
_DORA = [(BF16, BF16, 16), (BF16, FP32, 128), (FP32, FP32, 16)]
# What falls short of the gates, and why that costs nothing:
_LIMITS = {
    "_rows_up_add_kernel": {"vec128": 0.65},  # rows are looked up in `order`, 4 bytes per lane beside 16 of y
    "_rows_grad_kernel": {"vec128": 0.7},
    "_group_grad_a_kernel": {"vec128": 0.7},  # a lane loads 8 bytes of each ds beside a narrow tile of x
    "_dora_norm_kernel": {"vec128": 0.7, "redundancy": 32.0},  # reads N R elements; its loops over ranks are unrolled
}


def aot_cases(arch: str) -> list[AotCase]:
    """The kernels of dora.py, lora_group.py, lora_group_grad.py and lora_rows.py for `arch`, each compilation once."""
    target = target_for(arch)
    cases: dict[tuple, AotCase] = {}
    for name, launch in (*_dora_launches(target), *_group_launches(target), *_rows_launches(target)):
        case = case_of(name, launch)
        case = dataclasses.replace(case, limits=case.limits | _LIMITS.get(case.kernel.__name__, {}))
        compiled = (case.kernel, str((case.signature, case.constexprs, case.divisible)))
        cases.setdefault((*compiled, case.num_warps, case.num_stages), case)
    return list(cases.values())


def _shipped(rows: list[tuple], target: Target) -> list[tuple]:
    """The rows that are compiled for `target`; each starts with x's dtype, the adapter's dtype and the rank."""
    if target.arch not in LIKE_ANOTHER:
        return rows
    return [row for row in rows if row[0] == BF16 and row[2] != 64]


def _record(target: Target, suffix: str, launcher: Callable, *args, **options) -> Iterator[tuple[str, Launch]]:
    with record_launches(target) as launches:
        launcher(*args, **options)
    for index, launch in enumerate(launches):
        kernel = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
        yield f"{launcher.__name__}-{suffix}" + (f"-{kernel}-{index}" if index else ""), launch


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _label(dtype: torch.dtype, adapter_dtype: torch.dtype, r: int) -> str:
    name = {BF16: "bf16", FP32: "fp32"}
    return name[dtype] + ("" if dtype == adapter_dtype else f"-{name[adapter_dtype]}-adapter") + f"-r{r}"


def _dora_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    dropout = {"seed": 1, "threshold": _THRESHOLD}
    for dtype, adapter_dtype, r in _shipped(_DORA, target):
        suffix = _label(dtype, adapter_dtype, r)
        x, w, dy = _empty(_LARGE, _K, dtype=dtype), _empty(_N, _K, dtype=dtype), _empty(_LARGE, _N, dtype=dtype)
        a, b = _empty(r, _K, dtype=adapter_dtype), _empty(_N, r, dtype=adapter_dtype)
        t, gram, row = _empty(_N, padded_rank(r), dtype=FP32), _empty(r, r, dtype=FP32), _empty(_N, dtype=FP32)
        magnitude = _empty(_N, dtype=adapter_dtype)
        yield from _record(target, suffix, dora.dora_products, w, a, precision="ieee")
        yield from _record(target, suffix, dora.dora_norm, t, b, gram, row, magnitude, scale=2.0, eps=1e-6)
        yield from _record(target, suffix, dora.row_squares, w)
        yield from _record(target, suffix, dora.dora_backward, dy, dy, row, row)
        yield from _record(target, suffix, dora.drop_rows, x, **dropout)
        yield from _record(target, suffix, dora.split_dropped, x, **dropout)
        yield from _record(target, suffix, dora.combine_dropped, x, x, **dropout)


def _group_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for dtype, adapter_dtype, r, m, dropped in _shipped(_GROUPS, target):
        size = "skinny" if m == _SKINNY else "large"
        suffix = f"{_label(dtype, adapter_dtype, r)}-{size}" + (f"-dropout{dropped}" if dropped else "")
        thresholds = [_THRESHOLD if i < dropped else 0 for i in range(len(_GROUP_N))]
        x, ds, a = (
            _empty(m, _K, dtype=dtype),
            _empty(m, padded_rank(r), dtype=dtype),
            _empty(r, _K, dtype=adapter_dtype),
        )
        down = [(a, 2.0, 1, threshold) for threshold in thresholds]
        grad_a = [(a, 1, threshold) for threshold in thresholds]
        grad_x = [
            (_empty(m, n, dtype=dtype), _empty(n, _K, dtype=dtype), ds, a, 1, threshold)
            for n, threshold in zip(_GROUP_N, thresholds, strict=True)
        ]
        yield from _record(target, suffix, lora_group.group_down, x, down, precision="ieee")
        yield from _record(target, suffix, lora_group.group_grad_a, x, [ds] * len(grad_a), grad_a, precision="ieee")
        yield from _record(target, suffix, lora_group.group_grad_x, grad_x, precision="ieee")
        total = _empty(m, _K, dtype=FP32)
        yield from _record(target, f"{suffix}-add", lora_group.group_grad_x, grad_x[:1], precision="ieee", add=total)


def _rows_launches(target: Target) -> Iterator[tuple[str, Launch]]:
    for dtype, adapter_dtype, r, rows, segments in _shipped(_ROWS, target):
        plan = lora_rows.plan_rows([(i * rows, rows, i % _ADAPTERS) for i in range(segments)], _ADAPTERS, "meta")
        suffix = f"{_label(dtype, adapter_dtype, r)}-tiles{plan.block_m}"
        padded, m = padded_rank(r), rows * segments
        x, y, s = (_empty(m, columns, dtype=dtype) for columns in (_K, _N, padded))
        a, b = _empty(_ADAPTERS, padded, _K, dtype=adapter_dtype), _empty(_ADAPTERS, _N, padded, dtype=adapter_dtype)
        scales = _empty(_ADAPTERS, dtype=FP32)
        options = {"precision": "ieee"}
        yield from _record(target, suffix, lora_rows.rows_down, x, a, scales, plan, **options)
        yield from _record(target, suffix, lora_rows.rows_up_add_, y, s, b, plan, **options)
        yield from _record(target, f"{suffix}-dx", lora_rows.rows_up_add_, x, s, a.transpose(1, 2), plan, **options)
        yield from _record(target, suffix, lora_rows.rows_grad_s, y, b, scales, plan, **options)
        yield from _record(target, suffix, lora_rows.rows_grad_a, x, s, plan, **options)
        yield from _record(target, suffix, lora_rows.rows_grad_b, y, s, plan, **options)
