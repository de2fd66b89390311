"""One batch, several adapters: every item of the batch goes through the adapter that it names, in one pass over x.

    y_i = x_i w^T + bias + scale_l (x_i a_l^T) b_l^T,    l = row_adapters[i]
    dS_i = scale_l dy_i b_l,   dx_i = dy_i w + dS_i a_l,   da_l = sum over i of l: dS_i^T x_i,   db_l likewise dy_i^T S_i

Kept for backward: x and S. Which rows are whose is known on the host, so nothing waits for the device.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastpeft import backend
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.tracing import traced, transformed, written_out
from fastpeft.ops.weights import FrozenWeight, dense
from fastpeft.reference import lora_rows as reference

BASE = -1
"""The row_adapters entry of an item without an adapter."""


class RowAdapter(NamedTuple):
    """a [R, K], b [N, R] and the scale between them; ranks may differ."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def lora_linear_rows(
    x: torch.Tensor,
    w: FrozenWeight,
    adapters: Sequence[RowAdapter],
    row_adapters: Sequence[int],
    bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """y_i = x_i w^T + bias + scale_l (x_i a_l^T) b_l^T with l = row_adapters[i], or no low-rank part where that is BASE.

    Shapes:  x [B, ..., K], row_adapters of length B, w [N, K], a_l [R_l, K], b_l [N, R_l], bias [N] or None -> y [B, ..., N]
    Dtypes:  x and a dense w alike; adapters in any floating dtype, rounded to x's for the products
    Grads:   x, every a and b, bias; never w. First order only. An adapter without items gets zeros
    Raises:  ValueError where shapes, dtypes or devices disagree, or row_adapters names an adapter that is not there
    Source:  Chen et al. 2023, Punica, arXiv:2310.18547 (the grouped product)
    """
    chosen = backend.resolve(impl, x.device, x.dtype)
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    _check(x, w, adapters, row_adapters, bias, autocast)
    if autocast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return _run(chosen, x, w, adapters, row_adapters, bias)
    return _run(chosen, x, w, adapters, row_adapters, bias)


def _run(impl, x, w, adapters, row_adapters, bias):
    if impl == "reference":
        wide = functools.reduce(torch.promote_types, [adapter.a.dtype for adapter in adapters], x.dtype)
        w = w if isinstance(w, torch.Tensor) else w.dequantize(x.dtype, impl="reference")
        cast = [(a.to(wide), b.to(wide), scale) for a, b, scale in adapters]
        bias = None if bias is None else bias.to(wide)
        return reference.lora_linear_rows(x.to(wide), w.to(wide), cast, row_adapters, bias).to(x.dtype)
    if x.numel() == 0 or traced(x) or transformed():
        return _composed(x, w, adapters, row_adapters, bias)
    pairs = [tensor for adapter in adapters for tensor in adapter[:2]]
    scales = tuple(adapter.scale for adapter in adapters)
    return _LoRARows.apply(x, w, bias, impl, tuple(row_adapters), scales, *pairs)


def _composed(x, w, adapters, row_adapters, bias):
    """The same by plain calls: for whoever traces, or transforms."""
    w = w.to(x.dtype) if isinstance(w, torch.Tensor) else written_out(w, x.dtype)
    y = F.linear(x, w, None if bias is None else bias.to(x.dtype))
    for number, (a, b, scale) in enumerate(adapters):
        items = [i for i, adapter in enumerate(row_adapters) if adapter == number]
        if items:
            index = torch.tensor(items, device=x.device)
            part = F.linear(F.linear(x[index], a.to(x.dtype)), b.to(x.dtype)) * scale
            y = y.index_add(0, index, part)
    return y


class _LoRARows(torch.autograd.Function):
    """Keeps x and S; a quantised w as it came."""

    @staticmethod
    def forward(ctx, x, w, bias, impl, row_adapters, scales, *pairs):
        rows = x.reshape(-1, x.shape[-1])
        items = rows.shape[0] // x.shape[0]
        passes = _PASSES[impl](row_adapters, items, scales, pairs, rows)
        y = F.linear(rows, dense(w, rows.dtype), None if bias is None else bias.to(rows.dtype))
        s = passes.down(rows)
        passes.add_up_(y, s)
        dense_w = w if isinstance(w, torch.Tensor) else None
        wanted = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if wanted else None, s if wanted else None, dense_w, *pairs)
        ctx.quantized = None if dense_w is not None else w
        ctx.settings = impl, row_adapters, items, scales
        ctx.x_shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @first_order_only("lora_linear_rows")
    def backward(ctx, grad):
        x, s, dense_w, *pairs = ctx.saved_tensors
        impl, row_adapters, items, scales = ctx.settings
        need_x, _, need_bias, *_ = ctx.needs_input_grad
        need_pairs = ctx.needs_input_grad[6:]
        dy = grad.reshape(-1, grad.shape[-1])
        passes = _PASSES[impl](row_adapters, items, scales, pairs, dy)
        ds = passes.grad_s(dy) if need_x or any(need_pairs[::2]) else None
        dx = None
        if need_x:
            dx = dy @ dense(ctx.quantized if dense_w is None else dense_w, dy.dtype)
            passes.add_back_(dx, ds)
            dx = dx.view(ctx.x_shape)
        das = passes.grad_a(x.reshape(-1, x.shape[-1]), ds) if any(need_pairs[::2]) else [None] * len(scales)
        dbs = passes.grad_b(dy, s) if any(need_pairs[1::2]) else [None] * len(scales)
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(ctx.bias_dtype) if need_bias else None
        grads = [grad for pair in zip(das, dbs, strict=True) for grad in pair]
        return (
            dx,
            None,
            dbias,
            None,
            None,
            None,
            *(g if need else None for g, need in zip(grads, need_pairs, strict=True)),
        )


class _TorchPasses:
    """Runs of items with one adapter, a slice of the rows each; S is [M, widest rank]."""

    def __init__(self, row_adapters, items, scales, pairs, rows):
        self.runs = _runs(row_adapters, items)
        self.scales, self.dtype = scales, rows.dtype
        self.a, self.b = pairs[::2], pairs[1::2]
        self.width = max((a.shape[0] for a in self.a), default=0)

    def _into(self, rows, factors):
        s = rows.new_zeros(rows.shape[0], self.width)
        for part, adapter in self.runs:
            factor = factors[adapter].to(self.dtype)
            torch.mm(rows[part], factor, out=s[part, : factor.shape[1]])
            s[part].mul_(self.scales[adapter])
        return s

    def _add_(self, y, s, factors):
        for part, adapter in self.runs:
            factor = factors[adapter].to(self.dtype)
            y[part].addmm_(s[part, : factor.shape[0]], factor)

    def down(self, rows):
        return self._into(rows, [a.t() for a in self.a])

    def grad_s(self, dy):
        return self._into(dy, self.b)

    def add_up_(self, y, s):
        self._add_(y, s, [b.t() for b in self.b])

    def add_back_(self, dx, ds):
        self._add_(dx, ds, self.a)

    def grad_a(self, rows, ds):
        return [da.to(a.dtype) for da, a in zip(self._sums(ds, rows, self.a), self.a, strict=True)]

    def grad_b(self, dy, s):
        sums = self._sums(s, dy, [b.t() for b in self.b])
        return [db.t().to(b.dtype) for db, b in zip(sums, self.b, strict=True)]

    def _sums(self, s, rows, like):
        """The sum of s^T rows over each adapter's runs, as wide as float32 where there are several."""
        wide = torch.promote_types(self.dtype, torch.float32)
        sums = [torch.zeros(factor.shape, dtype=wide, device=rows.device) for factor in like]
        for part, adapter in self.runs:
            sums[adapter] += s[part, : like[adapter].shape[0]].t() @ rows[part]
        return sums


class _TritonPasses:
    """One launch per pass: the kernels of lora_rows.py on stacked, padded adapters."""

    def __init__(self, row_adapters, items, scales, pairs, rows):
        from fastpeft.kernels.tiling import padded_rank

        self.a, self.b = pairs[::2], pairs[1::2]
        self.precision = backend.matmul_precision(rows.device)
        self.plan = _plan(row_adapters, items, len(scales), rows.device)
        self.scales = _scales_on(scales, rows.device)
        r = padded_rank(max(a.shape[0] for a in self.a))
        n, k = self.b[0].shape[0], self.a[0].shape[1]
        self.stacked_a, self.stacked_b = rows.new_zeros(len(scales), r, k), rows.new_zeros(len(scales), n, r)
        for number, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            self.stacked_a[number, : a.shape[0]] = a
            self.stacked_b[number, :, : b.shape[1]] = b

    def down(self, rows):
        from fastpeft.kernels.lora_rows import rows_down

        return rows_down(rows, self.stacked_a, self.scales, self.plan, precision=self.precision)

    def grad_s(self, dy):
        from fastpeft.kernels.lora_rows import rows_grad_s

        return rows_grad_s(dy, self.stacked_b, self.scales, self.plan, precision=self.precision)

    def add_up_(self, y, s):
        from fastpeft.kernels.lora_rows import rows_up_add_

        rows_up_add_(y, s, self.stacked_b, self.plan, precision=self.precision)

    def add_back_(self, dx, ds):
        from fastpeft.kernels.lora_rows import rows_up_add_

        rows_up_add_(dx, ds, self.stacked_a.transpose(1, 2), self.plan, precision=self.precision)

    def grad_a(self, rows, ds):
        from fastpeft.kernels.lora_rows import rows_grad_a

        da = rows_grad_a(rows, ds, self.plan, dtype=torch.float32, precision=self.precision)
        return [part[: a.shape[0]].to(a.dtype) for part, a in zip(da, self.a, strict=True)]

    def grad_b(self, dy, s):
        from fastpeft.kernels.lora_rows import rows_grad_b

        db = rows_grad_b(dy, s, self.plan, dtype=torch.float32, precision=self.precision)
        return [part[:, : b.shape[1]].to(b.dtype) for part, b in zip(db, self.b, strict=True)]


_PASSES = {"torch": _TorchPasses, "triton": _TritonPasses}


@functools.lru_cache(maxsize=64)
def _runs(row_adapters: tuple[int, ...], items: int) -> list[tuple[slice, int]]:
    """(rows, adapter) for every run of neighbouring items with one adapter; items is the rows of one of them."""
    runs, first = [], 0
    for last in range(1, len(row_adapters) + 1):
        if last == len(row_adapters) or row_adapters[last] != row_adapters[first]:
            if row_adapters[first] != BASE:
                runs.append((slice(first * items, last * items), row_adapters[first]))
            first = last
    return runs


@functools.lru_cache(maxsize=64)
def _plan(row_adapters: tuple[int, ...], items: int, adapters: int, device: torch.device):
    """The kernels' tables, made once per batch and not once per layer."""
    from fastpeft.kernels.lora_rows_plan import plan_rows

    segments = [(number * items, items, adapter) for number, adapter in enumerate(row_adapters)]
    return plan_rows(segments, adapters, device)


@functools.lru_cache(maxsize=256)
def _scales_on(scales: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(scales, dtype=torch.float32, device=device)


def _check(x, w, adapters, row_adapters, bias, autocast):
    n, k = w.shape
    where = "lora_linear_rows"
    if x.dim() < 2 or x.shape[-1] != k or (bias is not None and tuple(bias.shape) != (n,)):
        got = "" if bias is None else f", bias {tuple(bias.shape)}"
        raise ValueError(f"{where}: expected x [B, ..., K={k}] and bias [N={n}], got x {tuple(x.shape)}{got}")
    if not adapters:
        raise ValueError(f"{where}: expected at least one adapter, got none; call F.linear, or lora_linear")
    for number, (a, b, _) in enumerate(adapters):
        r = a.shape[0] if a.dim() == 2 else None
        if tuple(a.shape) != (r, k) or tuple(b.shape) != (n, r) or not r:
            raise ValueError(
                f"{where}: expected a [R, K={k}] and b [N={n}, R] of adapter {number}, got {tuple(a.shape)} and {tuple(b.shape)}"
            )
    if len(row_adapters) != x.shape[0] or not all(BASE <= row < len(adapters) for row in row_adapters):
        raise ValueError(
            f"{where}: expected one number from {BASE} to {len(adapters) - 1} for each of {x.shape[0]} items, "
            f"got {list(row_adapters)}"
        )
    tensors = [t for a, b, _ in adapters for t in (a, b)] + ([] if bias is None else [bias])
    if any(t.device != x.device for t in (w, *tensors)):
        raise ValueError(
            f"{where}: expected everything on {x.device}, got {sorted({str(t.device) for t in (w, *tensors)})}"
        )
    same = not isinstance(w, torch.Tensor) or w.dtype == x.dtype or autocast
    if not same or not all(t.dtype.is_floating_point for t in (x, *tensors)):
        raise ValueError(
            f"{where}: expected x and w of one floating dtype and floating adapters, got x {x.dtype}, w {w.dtype}, "
            f"{sorted({str(t.dtype) for t in tensors})}; cast x to {w.dtype}, or run under torch.autocast"
        )
    if isinstance(w, torch.Tensor) and w.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where}: expected a frozen w, got w.requires_grad=True; its gradient is never computed here")
