"""One chunk of the linear cross-entropy on a GPU: cuBLAS' or hipBLAS' products around one kernel over the rows of the logits.

A chunk has 256 rows: a product of so many rows with w is bound by the tensor cores of an H200 (206 operations a byte) and nearly
so on an H100 (295), and more rows only take more memory. On CUDA logits of half precision are kept in float32, unrounded; their
gradients, of half the bytes, go where the logits of rows before were.
"""

import torch

from fastpeft import backend
from fastpeft.ops.cross_entropy_torch import Terms

ROWS = 256
_CHUNK_BYTES = 512 * 2**20
MIN_ROWS = 64


def _keeps_float32(like: torch.Tensor) -> bool:
    """cuBLAS returns float32 of half-precision factors; PyTorch does not offer it for ROCm."""
    return (
        backend.type_of(like.device) == "cuda"
        and torch.version.hip is None
        and like.dtype in (torch.float16, torch.bfloat16)
    )


def scratch(rows: int, v: int, like: torch.Tensor) -> torch.Tensor:
    """The chunk's logits [rows, V], to be written by `project`; rows start at multiples of 16 bytes."""
    from fastpeft.kernels.cross_entropy import padded

    dtype = torch.float32 if _keeps_float32(like) else like.dtype
    return torch.empty(rows, padded(v), dtype=dtype, device=like.device)[:, :v]


def chunk_rows(v: int, like: torch.Tensor) -> int:
    """How many rows of V logits are held at once."""
    return min(ROWS, max(MIN_ROWS, _CHUNK_BYTES // (4 * max(1, v))))


def project(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    """out = x w^T: the kernel adds the bias."""
    if out.dtype != x.dtype:
        return torch.mm(x, w.t(), out_dtype=out.dtype, out=out)
    return torch.mm(x, w.t(), out=out)


def row_losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    terms: Terms,
    factor: torch.Tensor | None,
    weights: torch.Tensor | None,
    want: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(losses [m] float32, dlogits [m, V] in `dtype`), those in the buffer of the logits."""
    from fastpeft.kernels.cross_entropy import cross_entropy

    def of(part, out):
        of_rows = None if weights is None else weights[part]
        return cross_entropy(
            logits[part], labels[part], out=out, bias=bias, factor=factor, weights=of_rows, **terms._asdict()
        )

    if not want or logits.dtype == dtype:
        out = logits if want else None
        return of(slice(None), out), out
    return _narrowed(of, logits, dtype)


def _narrowed(of, logits: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, dlogits in `dtype`, which is half as wide as the logits). of(rows, out): their losses, with dlogits into `out`.

    Row i of dlogits takes the place of row i // 2 of the logits. Rows first..2 first lie where rows first / 2..first were, so
    each launch writes over what launches before it have read, and over nothing that it reads itself. The first rows have a
    place of their own, for a while: a quarter, since a launch of a few rows would leave most of the GPU idle.
    """
    (m, v), row = logits.shape, logits.stride(0)
    out = logits.view(dtype).as_strided((m, v), (row, 1))
    first = -(-m // 4)
    apart = torch.empty(first, row, dtype=dtype, device=logits.device)[:, :v]
    losses = [of(slice(0, first), apart)]
    done = first
    while done < m:
        part = slice(done, min(m, 2 * done))
        losses.append(of(part, out[part]))
        done = part.stop
    out[:first] = apart
    return torch.cat(losses), out
