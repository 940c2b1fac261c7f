"""A plain read of memory on a CPU (read.cpp): what no product with so many bytes of weights can beat."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsegpt.kernels.cpu import library


def read(data: Tensor, *, level: str | None = None) -> int:
    """[B] int64 contiguous -> the exclusive or of its numbers; without a library torch's sum, another number.

    Raises SparseGPTError for a `level` that the machine does not have (`library.call`).
    """
    if library.machine_level() is None:
        return int(data.sum())
    total = torch.empty(1, dtype=torch.int64)
    library.call("sparse24_read", (data, total), (data.nbytes,), data.numel(), level)
    return int(total)
