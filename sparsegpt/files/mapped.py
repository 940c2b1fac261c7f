"""Tensors whose bytes are pages of a file: the system reads them when they are used and may forget them at any time.

A checkpoint loaded so costs no private memory, however large it is.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.unchanged import mapped_file
from sparsegpt.strips import strips

# Smaller tensors are not worth a file of their own.
SMALL = 1 << 20


def is_mapped(tensor: Tensor) -> bool:
    """Whether the tensor's memory is mapped from a file. Where the system does not tell (no /proc), False."""
    return mapped_file(tensor.data_ptr()) is not None


def mapped_empty(shape: torch.Size | list[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """An uninitialised tensor in a file of its own in `folder`; the file has no name any more and dies with the tensor.

    Its pages count as the file's, not as private memory. Raises SparseGPTError when the disk cannot hold it.
    """
    numel = max(1, torch.Size(shape).numel())
    try:
        # Without a name from the beginning where the system can do that: even a killed process leaves nothing.
        with tempfile.TemporaryFile(prefix=".sparsegpt-", dir=folder) as file:
            # Reserved now: a sparse file would find the disk full in the middle of a store, which kills the process.
            os.posix_fallocate(file.fileno(), 0, numel * dtype.itemsize)
            tensor = torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=numel, dtype=dtype)
    except OSError as error:
        raise SparseGPTError(
            f"no room for {numel * dtype.itemsize / 2**30:.2f} GiB of scratch in {folder} ({error.strerror}): free "
            "space, or give another folder",
            settings=("scratch",),
        ) from error
    return tensor[: torch.Size(shape).numel()].view(shape)


def to_mapped(tensor: Tensor, folder: Path) -> Tensor:
    """The same values in a file of their own."""
    return mapped_empty(tensor.shape, tensor.dtype, folder).copy_(tensor)


@contextmanager
def mapped_parameters(folder: Path) -> Iterator[None]:
    """While a model is loaded here, every large parameter that comes into private memory moves to a file in `folder`.

    Parameters read as they are stay pages of the checkpoint. Those that the loader converts (another dtype, experts
    merged into one tensor, pickled files) are moved one at a time, as each becomes part of its module.
    """
    tied: dict[int, nn.Parameter] = {}

    def move(module: nn.Module, name: str, parameter: Any) -> Any:
        if not isinstance(parameter, nn.Parameter) or parameter.device.type != "cpu" or parameter.nbytes < SMALL:
            return None
        if id(parameter) not in tied and not is_mapped(parameter):
            parameter.data = to_mapped(parameter.data, folder)
            tied[id(parameter)] = parameter  # kept, so that the id stays its own
        return None

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


def chunks(tensor: Tensor, elements: int = 1 << 22) -> Iterator[Tensor]:
    """A contiguous tensor in flat pieces, so that looking at all of it needs no copy of all of it."""
    flat = tensor.reshape(-1)
    for piece in strips(flat.numel(), elements):
        yield flat[piece]
