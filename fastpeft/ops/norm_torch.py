"""RMSNorm and LayerNorm by library calls: what a CPU runs, and any device on request. Equations: norm.py.

LayerNorm is PyTorch's own kernel, told to keep its statistics in float32, which it does not on a CPU in half precision.
RMSNorm has no kernel on a CPU: F.rms_norm is composed there, as transformers' modules are, and both keep float32 copies of x.
Here the rows are taken in chunks that stay in the core's cache: every intermediate is float32 and none is as long as x.

Forward and backward, microseconds of CPU time, one thread of an AMD EPYC (Zen 4), torch 2.13, interleaved medians of 15. The
first number is with a frozen weight, the second with one that trains:

    [M, K]                      LlamaRMSNorm   F.rms_norm     rms_norm     F.layer_norm  layer_norm
    [1024, 576]   bfloat16       4193   4422    3780   5624    1853   1936     797    918     738   1381
    [1024, 576]   float32        4483   6063    4340   5319    1445   1639     642    773     817    881
    [1024, 2048]  bfloat16      19511  22627   20868  23278    6197   6617    1989   3150    1949   4432
    [1024, 2048]  float32       23768  25351   19096  19566    5854   4909    2630   2922    2916   3188
    [2048, 384]   bfloat16       3602   6459    3862   7155    2291   2618     834   1231     893   1744
    [2048, 384]   float32        5381   4191    4752   4097    1847   1839     661    871     774   1012

PyTorch's gradient of LayerNorm's weight and bias adds half precision up in half precision on a CPU: five times eager's error over
64 rows. Adding in float32 is what layer_norm takes longer for there.
"""

import torch
import torch.nn.functional as F

_CHUNK = 2**17  # elements: 2^16 and 2^18 take up to a third more in bfloat16, the whole of x twice as long
_SMALL = 2**16  # elements: up to here the calls themselves are what takes time


def is_small(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """True where `small_rms_norm` is the faster way to y in `dtype`, when no gradient is asked for."""
    return x.device.type == "cpu" and x.numel() <= _SMALL and x.dtype == dtype


def small_rms_norm(x, w, eps, offset):
    """y [..., K] by PyTorch's composed rms_norm: 10 microseconds for one row of 576 in float32, `forward` takes 40.

    There are sixty norms in a token of a small model.
    """
    if offset or (w is not None and w.dtype != x.dtype):
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], _scale(w, offset, wide), eps).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], w, eps)


def forward(rows, residual, w, bias, eps, offset, centred, dtype):
    """(y in `dtype`, h or None, mean or None, rstd) of rows [M, K]; mean and rstd [M, 1] in float32 or wider."""
    h = None if residual is None else rows + residual
    rows = rows if h is None else h
    if centred:
        operands = _operands(rows, w, bias)
        y, mean, rstd = torch.native_layer_norm(operands[0], rows.shape[1:], *operands[1:], eps)
        return y.to(dtype), h, mean, rstd
    m, k = rows.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    y = torch.empty(m, k, dtype=dtype, device=rows.device)
    rstd = torch.empty(m, 1, dtype=wide, device=rows.device)
    scale = _scale(w, offset, wide)
    for part in _chunks(rows):
        x, r, target = rows[part], rstd[part], y[part]
        torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide, out=r)
        r.square_().div_(k).add_(eps).rsqrt_()
        if x.dtype == wide:
            out = torch.mul(x, r, out=target if dtype == wide else None)
        else:
            out = x.to(wide).mul_(r)
        if scale is not None:
            out.mul_(scale)
        if out is not target:
            target.copy_(out)
    return y, h, None, rstd


def backward(dy, dh, h, w, mean, rstd, offset, bias_dtype, needs):
    """(dx, dw, dbias), each None where `needs` = (x, w, bias) does not ask; dy in y's dtype, all [M, K]."""
    if mean is not None:
        return _layer_norm_backward(dy, dh, h, w, mean, rstd, bias_dtype, needs)
    need_x, need_w, _ = needs
    k, wide = h.shape[1], rstd.dtype
    scale = _scale(w, offset, wide)
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device) if need_x else None
    dw = torch.zeros(k, dtype=wide, device=h.device) if need_w else None
    for part in _chunks(h):
        x, g, r = h[part].to(wide), dy[part].to(wide), rstd[part]
        product = g * x
        if need_w:
            dw.addmv_(product.t(), r[:, 0])
        if not need_x:
            continue
        along = product.sum(dim=1) if scale is None else torch.mv(product, scale, out=product.new_empty(len(x)))
        # rstd * (g scale - hat * mean(g scale * hat)) with hat = x * rstd
        d = torch.mul(g, r, out=dx[part] if dx.dtype == wide else product)
        if scale is not None:
            d.mul_(scale)
        d.addcmul_(x, r.pow(3).mul_(along[:, None]).div_(k), value=-1)
        if dh is not None:
            d.add_(dh[part])
        if dx.dtype != wide:
            dx[part] = d
    return dx, None if dw is None else dw.to(w.dtype), None


def _layer_norm_backward(dy, dh, h, w, mean, rstd, bias_dtype, needs):
    need_x, need_w, need_bias = needs
    wide = rstd.dtype
    bias = None if bias_dtype is None else torch.empty(h.shape[1:], dtype=bias_dtype, device=h.device)  # not read
    x, scale, bias = _operands(h, w, bias)
    own_sums = x.dtype != wide and x.device.type == "cpu"  # PyTorch adds the rows up in half precision there
    mask = [need_x, need_w and not own_sums, need_bias and not own_sums]
    dx, dw, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(x.dtype), x, h.shape[1:], mean, rstd, scale, bias, mask
    )
    if own_sums and (need_w or need_bias):
        dw, dbias = (torch.zeros(h.shape[1:], dtype=wide) if need else None for need in (need_w, need_bias))
        for part in _chunks(h):
            g = dy[part].to(wide)
            if need_bias:
                dbias += g.sum(dim=0)
            if need_w:
                dw.addmv_(g.mul_(h[part].to(wide).sub_(mean[part])).t(), rstd[part][:, 0])
    if dx is not None:
        dx = dx.to(h.dtype) if dh is None else (dx + dh).to(h.dtype)
    return dx, None if dw is None else dw.to(w.dtype), None if dbias is None else dbias.to(bias_dtype)


def _operands(x, w, bias):
    """x, weight and bias in dtypes that PyTorch's kernel takes and of which it keeps statistics in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        alike = all(tensor is None or tensor.dtype == x.dtype for tensor in (w, bias))
        return (x, w, bias) if alike else [None if tensor is None else tensor.to(wide) for tensor in (x, w, bias)]
    if w is None and x.dtype != wide:
        w = torch.ones(x.shape[1:], dtype=wide)
    return x, None if w is None else w.to(wide), None if bias is None else bias.to(wide)


def _scale(w, offset, wide):
    if w is None:
        return None
    return w.to(wide) + offset if offset else w.to(wide)


def _chunks(rows):
    m, k = rows.shape
    step = max(1, _CHUNK // k) if rows.device.type == "cpu" else max(1, m)
    return [slice(first, first + step) for first in range(0, m, step)]
