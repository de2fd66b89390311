"""The LoRA linear by the fused kernels: what a GPU runs.

Equations and what is kept: lora.py. The large products y and dx are taken by the algorithm that algorithms.py chooses
(lora_gemm.py); S, dS + dB and dA are one pass each over one large tensor, with sums in float32 and no atomics.
"""

from fastpeft import backend
from fastpeft.ops.dropout import LEVELS
from fastpeft.ops.lora_gemm import choose_dx, choose_y, product_dx, product_y


def forward(x, w, a, b, bias, scale, seed, threshold):
    """(y [M, N], s [M, padded R]) of rows x [M, K]."""
    from fastpeft.kernels.lora import lora_down

    precision = backend.matmul_precision(x.device)
    s = lora_down(x, a, scale=scale, seed=seed, threshold=threshold, precision=precision)
    algorithm = choose_y(x, w, a.shape[0], dropout=threshold > 0)
    return product_y(x, w, s, a, b, bias, scale=scale, precision=precision, algorithm=algorithm), s


def backward(dy, x, s, w, a, b, scale, seed, threshold, needs):
    """(dx, da, db), each None where `needs` = (x, a, b) does not ask; x may be None without da, s without db."""
    from fastpeft.kernels import lora as kernels

    precision = backend.matmul_precision(dy.device)
    need_x, need_a, need_b = needs
    dx = da = db = ds = None
    if need_b:
        ds, db = kernels.lora_grad_s_b(dy, b, s, scale=scale, threshold=threshold, precision=precision)
    elif need_x or need_a:  # ds alone: the kernel of S, with dy for x and b^T for a
        c = scale / (1.0 - threshold / LEVELS)
        ds = kernels.lora_down(dy, b.t(), scale=c, seed=0, threshold=0, precision=precision)
    dropout = {"seed": seed, "threshold": threshold, "precision": precision}
    if need_x:
        algorithm = choose_dx(dy, w, a.shape[0], dropout=threshold > 0)
        dx = product_dx(dy, w, ds, a, b, scale=scale, algorithm=algorithm, **dropout)
    if need_a:
        da = kernels.lora_grad_a(x, ds, a, **dropout)
    return dx, da, db
