"""quantize: a model whose linear weights take 4 or 8 bits. The name loads where transformers is missing; calling it needs it."""

import os
from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

QUANT_TYPES = ("nf4", "fp4", "int8")
QuantType = Literal["nf4", "fp4", "int8"]


def quantize(
    model: nn.Module | str | os.PathLike,
    quant_type: QuantType = "nf4",
    *,
    compute_dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: Iterable[str] | None = None,
    device: torch.device | str | None = None,
    dtype: str = "auto",
) -> nn.Module:
    """Store the weights of a model's linear modules in 4 bits ("nf4", "fp4") or 8 bits ("int8"), frozen.

    model          a transformers folder or hub name: made without data, then read tensor by tensor, each linear weight
                   quantised as it arrives, so that at most one of them is there in full; or a model, whose linear modules are
                   replaced one by one, in place
    compute_dtype  of a 4-bit module's products; its result has the input's dtype. blocksize (32 .. 4096, a power of two) and
                   double_quant (8-bit scales) are of 4-bit weights too; int8 has a scale per row
    skip_modules   names (or regular expressions) of modules to leave alone, as transformers reads them; None: the output
                   embedding, the last module, poolers and classification heads. Weights shared by two modules are never quantised
    device         where the model goes; None: the CPU for a folder, where it is for a model
    dtype          of what is not quantised, for a folder: "auto" (as saved), "float32", "bfloat16", "float16"

    A folder that holds a quantised model already, or such a model, comes back as it is if its settings are these.
    Raises:  ValueError for an option out of range, a model without linear modules or quantised in another way, and weights
             that are missing, left over or of another shape; OSError for a folder that cannot be read
    """
    from fastpeft.integrations import quantized_model  # needs transformers and bitsandbytes

    config = quantized_model.bits_and_bytes_config(
        quant_type, compute_dtype=compute_dtype, double_quant=double_quant, skip_modules=skip_modules
    )
    quantized_model.check_blocksize(blocksize)
    if isinstance(model, nn.Module):
        return quantized_model.quantize_module(model, config, blocksize, device)
    return quantized_model.load_quantized(model, config, blocksize=blocksize, device=device, dtype=dtype)
