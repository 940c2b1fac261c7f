"""Work on a large matrix strip by strip, so that what each step needs beside it stays small.

Dimension key: R and C rows and columns.
"""

from torch import Tensor

# Rows turned at once.
TURNED = 64


def strips(size: int, step: int) -> list[slice]:
    """range(size) in slices of `step`."""
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def transposed(matrix: Tensor) -> Tensor:
    """matrix [R, C] turned, in new contiguous memory [C, R].

    torch turns a whole matrix with one thread and misses the cache often; with strips of rows it does neither.
    """
    turned_CR = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    for rows in strips(len(matrix), TURNED if matrix.device.type == "cpu" else max(1, len(matrix))):
        turned_CR[:, rows] = matrix[rows].T
    return turned_CR
