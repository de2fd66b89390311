"""RMSNorm and LayerNorm by the fused kernels. Equations: norm.py; the passes have the signatures of norm_torch.py's."""


def forward(rows, residual, w, bias, eps, offset, centred, dtype):
    """(y in `dtype`, h or None, mean or None, rstd) of rows [M, K]; mean and rstd [M] in float32."""
    from fastpeft.kernels.norm import norm_forward

    return norm_forward(rows, residual, w, bias, eps=eps, offset=offset, centred=centred, dtype=dtype)


def backward(dy, dh, h, w, mean, rstd, offset, bias_dtype, needs):
    """(dx, dw, dbias), each None where `needs` = (x, w, bias) does not ask."""
    from fastpeft.kernels.norm import norm_backward

    return norm_backward(dy, dh, h, w, mean, rstd, offset=offset, bias_dtype=bias_dtype, needs=tuple(needs))
