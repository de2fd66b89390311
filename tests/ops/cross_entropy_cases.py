"""What the tests of the linear cross-entropy draw: shapes, terms, and the value with its gradients in any dtype."""

import torch

from fastpeft.reference.cross_entropy import linear_cross_entropy as formula

# M, K, V
SHAPES = {
    "aligned": (32, 16, 128),
    "odd": (33, 17, 97),
    "one-row": (1, 5, 33),
    "two-blocks": (5, 9, 259),
    "small": (9, 3, 11),
    "one-column": (3, 4, 1),
}
PLAIN: dict[str, float] = {}
TERMS = {
    "plain": PLAIN,
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.2, "softcap": 5.0, "logit_scale": 0.7, "z_loss": 1e-2},
}
NAMES = ("loss", "dx", "dw", "dbias")


def draw(shape, dtype, device="cpu", *, ignored: float = 0.5):
    """x, w, bias with a gradient, and labels of which a share is ignored."""
    m, k, v = SHAPES[shape]
    x, w, bias = torch.randn(m, k), torch.randn(v, k), torch.randn(v)
    labels = torch.randint(0, v, (m,))
    labels[: int(ignored * m)] = -100
    labels = labels[torch.randperm(m)]
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in (x, w, bias)]
    return *tensors, labels.to(device)


def reduced(losses, labels, reduction):
    if reduction == "none":
        return losses
    count = (labels != -100).sum().clamp(min=1) if reduction == "mean" else 1
    return losses.sum() / count


def in_dtype(dtype, x, w, bias, labels, dy, *, reduction="mean", **terms):
    """loss, dx, dw, dbias by the formula in `dtype`."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, w, bias)]
    loss = reduced(formula(leaves[0], leaves[1], labels, leaves[2], **terms), labels, reduction)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dy.to(dtype))]


def as_transformers(
    x, w, bias, labels, dy, *, reduction="mean", softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0
):
    """loss, dx, dw, dbias by F.cross_entropy on logits of the working dtype cast to float32, and plain code beside it."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, w, bias)]
    logits = logit_scale * torch.nn.functional.linear(*leaves)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.nn.functional.cross_entropy(
        logits.to(wide), labels, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        losses = losses + z_loss * torch.where(labels == -100, 0, logits.to(wide).logsumexp(-1).square())
    loss = reduced(losses, labels, reduction)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dy)]
