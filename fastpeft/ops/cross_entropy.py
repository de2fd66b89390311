"""A linear head and the cross-entropy of its logits, without the logits.

    u = logit_scale (x w^T + bias),   z = softcap tanh(u / softcap), or u without a softcap
    loss_m = lse - (1 - e) z_label - e / V sum_v z_v + z_loss lse^2,   0 where label == ignore_index
    dx = dz w,   dw = dz^T x,   dbias = sum dz

A chunk of rows of logits is held at a time. Gradients are formed in the forward pass, for a loss whose own gradient is 1, and
kept instead of x, w and the logits: dx in x's dtype, and dw and dbias where they train. Backward multiplies them by dy.

Beside transformers' ForCausalLMLoss over the head's logits, on a CPU (one thread of an AMD Zen 4, which other work shared;
M = 1024, K = 576, V = 49152, w frozen, forward and backward, medians of 3, interleaved):

                                     CPU seconds                peak                 kept for backward
    bfloat16                         1.10 -> 0.69  (1.6x)       576 -> 27 MiB        192 -> 1.1 MiB
    bfloat16, half the labels        1.09 -> 0.34  (3.2x)       576 -> 27 MiB        192 -> 1.1 MiB
    float32                          1.75 -> 1.49  (1.2x)       576 -> 50 MiB        192 -> 2.3 MiB
    float32, half the labels         2.01 -> 0.80  (2.5x)       576 -> 51 MiB        192 -> 2.3 MiB
"""

import torch

from fastpeft import backend
from fastpeft.ops import cross_entropy_torch, cross_entropy_triton
from fastpeft.ops.cross_entropy_torch import Terms, wide
from fastpeft.ops.first_order import first_order_only
from fastpeft.ops.rehearsal import spans
from fastpeft.ops.tracing import has_values, transformed
from fastpeft.reference import cross_entropy as reference

PASSES = {"torch": cross_entropy_torch, "triton": cross_entropy_triton}
REDUCTIONS = ("mean", "sum", "none")


def in_chunks(x, w, bias, labels, terms: Terms, impl: str, needs, factor, weights):
    """(losses [M], dx, dw, dbias) of x [M, K]; the gradients are of sum(factor weights losses), None where not needed."""
    valueless = not has_values(x)
    passes = cross_entropy_torch if valueless and not backend.rehearsing() else PASSES[impl]
    (m, _), v, to = x.shape, w.shape[0], wide(x.dtype)
    need_x, need_w, need_bias = needs
    index = None
    if impl == "torch" and backend.type_of(x.device) == "cpu":
        index = _kept_rows(labels, v, terms.ignore_index) if not valueless else _nearly_all(m, x)
    count = m if index is None else len(index)
    losses = torch.zeros(m, dtype=to, device=x.device)
    dx = None
    if need_x:
        dx = (torch.empty if index is None else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.zeros(w.shape, dtype=to, device=x.device) if need_w else None
    dbias = torch.zeros(v, dtype=to, device=x.device) if need_bias else None
    rows = min(count, passes.chunk_rows(v, x))
    buffer = passes.scratch(rows, v, x)
    for part in spans(count, rows):
        take = part if index is None else index[part]
        xs = x[take]
        logits = passes.project(xs, w, bias, buffer[: xs.shape[0]])
        of_rows = None if weights is None else weights[take]
        part_losses, dz = passes.row_losses(logits, labels[take], bias, terms, factor, of_rows, any(needs), x.dtype)
        losses[take] = part_losses
        if need_x and index is None:
            torch.mm(dz, w, out=dx[part])
        elif need_x:
            dx.index_copy_(0, take, torch.mm(dz, w))
        if need_w and x.dtype == to:
            dw.addmm_(dz.t(), xs)
        elif need_w:
            dw += torch.mm(dz.t(), xs)
        if need_bias:
            dbias += dz.sum(0, dtype=to)
        del logits, dz  # before the next chunk's are made
    return losses, dx, None if dw is None else dw.to(w.dtype), None if dbias is None else dbias.to(bias.dtype)


def _kept_rows(labels: torch.Tensor, v: int, ignore_index: int) -> torch.Tensor | None:
    """The rows whose label counts, None for all; on the CPU, where looking is free. Labels out of range are refused."""
    kept = labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= v))
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"linear_cross_entropy: expected labels in 0..{v - 1} or ignore_index={ignore_index}, "
            f"got {int(labels[where])} at position {where} of {len(labels)}"
        )
    return None if kept.all() else kept.nonzero()[:, 0]


def _nearly_all(m: int, like: torch.Tensor) -> torch.Tensor | None:
    """The rows in a rehearsal: some label is ignored, as after the last token of each row of a batch. None where it is none."""
    return torch.arange(m, device=like.device) if backend.rehearsing() else None


def loss_and_gradients(x, w, bias, labels, num_items, terms: Terms, reduction: str, impl: str, needs):
    """(loss, dx, dw, dbias, rest): the gradients times `rest` are those of the loss; they are None where not needed."""
    to = wide(x.dtype)
    one = torch.ones((), dtype=to, device=x.device)
    if reduction == "none":
        again = needs[1] or needs[2]  # dw is a sum over rows with their dy: it can only be formed in backward
        losses, dx, *_ = in_chunks(x, w, bias, labels, terms, impl, (needs[0] and not again, False, False), None, None)
        return losses, dx, None, None, one
    if reduction == "sum":
        divisor = one
    elif num_items is None:
        divisor = (labels != terms.ignore_index).sum().clamp(min=1).to(to)
    else:
        divisor = num_items.reshape(()).to(device=x.device, dtype=to)
        divisor = torch.where(divisor == 0, one, divisor)
    rest = one / divisor
    # float16 would lose small probabilities to the division before the product: it comes after
    factor, rest = (None, rest) if x.dtype == torch.float16 else (rest, one)
    losses, *grads = in_chunks(x, w, bias, labels, terms, impl, needs, factor, None)
    return losses.sum() / divisor, *grads, rest


def scaled(grad: torch.Tensor | None, by: torch.Tensor) -> torch.Tensor | None:
    """A new tensor grad * by, rounded once; `by` is wide, and a 0-dim factor must not be rounded to grad's dtype first."""
    if grad is None:
        return None
    return torch.mul(grad, by.reshape(-1, *[1] * (grad.dim() - 1)), out=torch.empty_like(grad))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, labels, num_items, terms, reduction, impl):
        needs = ctx.needs_input_grad[:3]
        loss, *grads, rest = loss_and_gradients(x, w, bias, labels, num_items, terms, reduction, impl, needs)
        ctx.again = reduction == "none" and any(needs[1:])
        kept = (x, w, bias, labels) if ctx.again else (*grads, rest)
        ctx.save_for_backward(*kept)
        ctx.settings = terms, impl
        return loss

    @staticmethod
    @first_order_only("linear_cross_entropy")
    def backward(ctx, dy):
        if ctx.again:
            x, w, bias, labels = ctx.saved_tensors
            needs = ctx.needs_input_grad[:3]
            _, *grads = in_chunks(x, w, bias, labels, *ctx.settings, needs, None, dy)
        else:
            *grads, rest = ctx.saved_tensors
            grads = [scaled(grad, dy * rest) for grad in grads]
        return *grads, *[None] * 5


def linear_cross_entropy(
    x: torch.Tensor,
    w: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_items: int | torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """loss = lse - (1 - e) z_label - e / V sum_v z_v + z_loss lse^2, with z = softcap tanh(logit_scale (x w^T + bias) / softcap).

    Shapes:  x [..., K], w [V, K], bias [V] or None, labels [...] -> [] or, with reduction="none", [...]
    Mean:    over the labels that count; with num_items, sum / num_items (transformers' num_items_in_batch, which counts the
             tokens of all batches of one update). No label that counts: 0, with gradients of zero
    Dtypes:  x, w, bias alike: float32, float16, bfloat16 (`torch` and `reference` also float64); under autocast they are cast.
             Statistics, sums and the loss in float32
    Grads:   x, w, bias, formed in the forward pass (with reduction="none", those of w and bias in backward); first order only,
             but for `reference`
    Memory:  a chunk of logits, at most 256 rows; for backward dx, and dw and dbias where they train; nothing without a gradient
    Raises:  ValueError where shapes, dtypes, devices or options disagree, and on the CPU for a label that is out of range
             (elsewhere its loss is NaN: looking would wait for the device); NotImplementedError for a quantised w
    Source:  fastpeft/reference/cross_entropy.py
    """
    terms = Terms(ignore_index, label_smoothing, softcap, logit_scale, z_loss)
    x, w, bias = _in_one_dtype(x, w, bias)
    _check(x, w, bias, labels, terms, reduction, num_items)
    chosen = backend.resolve(impl, x.device, x.dtype)
    shape, to = labels.shape, wide(x.dtype)
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1).to(torch.int64)
    if num_items is not None and not isinstance(num_items, torch.Tensor):
        num_items = torch.full((), float(num_items), dtype=to, device=x.device)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, w, bias)]
    if chosen == "reference" or (transformed() and chosen == "torch"):
        return _by_reference(x, w, bias, labels, num_items, terms, reduction, shape)
    if torch.compiler.is_compiling():
        from fastpeft.ops.cross_entropy_custom import linear_cross_entropy as traceable

        loss = traceable(x, w, bias, labels, num_items, *terms, reduction, chosen, needs)[0]
    elif any(needs):
        loss = _LinearCrossEntropy.apply(x, w, bias, labels, num_items, terms, reduction, chosen)
    else:
        loss = loss_and_gradients(x, w, bias, labels, num_items, terms, reduction, chosen, needs)[0]
    return loss.view(shape) if reduction == "none" else loss


def _in_one_dtype(x, w, bias):
    """What F.linear multiplies: under autocast everything in its dtype."""
    if not isinstance(w, torch.Tensor):
        raise NotImplementedError(
            f"linear_cross_entropy: expected a dense w [V, K], got {type(w).__name__}; dequantise the head, "
            "or take its logits by lora_linear or frozen_linear and their F.cross_entropy"
        )
    if x.is_meta or not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, w, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)


def _by_reference(x, w, bias, labels, num_items, terms: Terms, reduction: str, shape) -> torch.Tensor:
    to = wide(x.dtype)
    x, w, bias = (None if tensor is None else tensor.to(to) for tensor in (x, w, bias))
    losses = reference.linear_cross_entropy(x, w, labels, bias, **terms._asdict())
    if reduction == "none":
        return losses.view(shape)
    if reduction == "sum":
        return losses.sum()
    divisor = (labels != terms.ignore_index).sum() if num_items is None else num_items
    return losses.sum() / torch.where(divisor == 0, 1, divisor).to(to)


def _check(x, w, bias, labels, terms: Terms, reduction, num_items):
    where = "linear_cross_entropy"
    if x.dim() < 1 or w.dim() != 2 or x.shape[-1] != w.shape[1] or not w.numel():
        raise ValueError(f"{where}: expected x [..., K] and w [V, K], got {tuple(x.shape)} and {tuple(w.shape)}")
    if labels.shape != x.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{where}: expected integer labels {tuple(x.shape[:-1])} as x {tuple(x.shape)} has rows, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"{where}: expected bias [V={w.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("w", w), ("bias", bias)):
        if tensor is not None and (tensor.dtype != x.dtype or not x.is_floating_point()):
            raise ValueError(f"{where}: expected {name} in x's floating dtype {x.dtype}, got {tensor.dtype}")
    for name, tensor in (("w", w), ("bias", bias), ("labels", labels)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{where}: expected {name} on {x.device} as x, got {tensor.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{where}: expected reduction in {REDUCTIONS}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{where}: expected num_items with reduction='mean' alone, got it with {reduction!r}")
    if isinstance(num_items, torch.Tensor) and num_items.numel() != 1:
        raise ValueError(f"{where}: expected num_items as one number, got a tensor {tuple(num_items.shape)}")
    if not 0 <= terms.label_smoothing < 1:
        raise ValueError(f"{where}: expected label_smoothing in [0, 1), got {terms.label_smoothing}")
    if terms.softcap is not None and not terms.softcap > 0:
        raise ValueError(f"{where}: expected softcap more than 0 or None, got {terms.softcap}")
